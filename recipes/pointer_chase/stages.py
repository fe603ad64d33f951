"""The stages of the pointer chase: pretraining, adaptation, and what a model makes of fresh three-hop queries."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from chase import THINK, WORDS, Texts, Use, direct_texts, make_tokenizer, mixed_texts
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyquiet import QuietStarForCausalLM, QuietStarObjective

THOUGHTS = 4  # N


@dataclass(frozen=True)
class Settings:
    """What decides weights and scores, besides the seed of an adaptation."""

    pretraining_steps: int = 8000
    pretraining_rows: int = 48
    pretraining_seed: int = 0
    peak_rate: float = 2e-3
    weight_decay: float = 0.01
    adaptation_steps: int = 500
    adaptation_rows: int = 16
    base_rate: float = 3e-4
    head_rate: float = 1e-3
    meta_token_rate: float = 3e-5  # of the START and END parameters, a hundredth of their embeddings
    evaluation_rows: int = 512


@dataclass(frozen=True)
class Variant:
    """One way to go on training: with thoughts or without, and how REINFORCE counts."""

    title: str
    thinks: bool = True
    policy_weight: float = 0.0
    max_norm: float = math.inf


VARIANTS = {
    "plain": Variant("plain continued training, no thoughts", thinks=False),
    "no-reinforce": Variant("thoughts, no REINFORCE"),
    "full": Variant("full, policy weight 1", policy_weight=1),
    "weight-10": Variant("full, policy weight 10", policy_weight=10),
    "weight-1e6": Variant("full, policy weight 1e6, gradients clipped to norm 1", policy_weight=1e6, max_norm=1),
}


@dataclass(frozen=True)
class Scores:
    """NLLs in nats of three-hop answers, and the thoughts before them."""

    base: float  # without a thought
    mixed: float  # with a thought, averaged over thoughts
    averaged: float  # of the law that is the mean of `THOUGHTS` thoughts' laws
    dashes: float  # the part of `base` that is lost to "---" as the next token
    chain: float  # how often a thought is f(a) f(f(a))
    weight: float  # mean of w


def new_model() -> LlamaForCausalLM:
    """88,000 random parameters; at the usual initial spread of 0.02 the look-up was not found in 8,000 steps."""
    width = 64
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=width**-0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def pretrain(settings: Settings, *, quiet: bool = False) -> LlamaForCausalLM:
    """A model that has read queries of all forms."""
    torch.manual_seed(settings.pretraining_seed)
    model = new_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.peak_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.peak_rate, total_steps=settings.pretraining_steps
    )
    for step in tqdm(range(settings.pretraining_steps), "pretraining", disable=quiet, mininterval=1):
        texts = mixed_texts(settings.pretraining_seed, step, settings.pretraining_rows)
        model(texts.ids, labels=texts.after_pairs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def thinking(base: LlamaForCausalLM, seed: int) -> QuietStarForCausalLM:
    """A thinking model around `base`, START and END beginning as "---"."""
    torch.manual_seed(seed)  # of the mixing head
    return QuietStarForCausalLM.from_base(base, thought_tokens=2, thoughts_per_token=THOUGHTS, start_init=THINK)


def adapt(
    base: LlamaForCausalLM, variant: Variant, seed: int, settings: Settings, *, quiet: bool = False
) -> QuietStarForCausalLM:
    """`base`, changed in place and made to think, after texts whose queries are all answered at once."""
    model = thinking(base, seed)
    objective = QuietStarObjective(
        thoughts_per_token=THOUGHTS,
        lookahead=1,
        policy_weight=variant.policy_weight,
        baseline="mean",
        relu=True,
        over_steps="mean",
    )

    def loss(texts: Texts, first: int) -> Tensor:
        if not variant.thinks:
            return model.base(texts.ids, labels=texts.ids, use_cache=False).loss
        ids = first + torch.arange(len(texts.ids))
        return model.thinking_loss(texts.ids, objective=objective, seed=seed, sequence_ids=ids).loss

    groups = [
        {"params": list(model.base.parameters()), "lr": settings.base_rate},
        {"params": list(model.mixing_head.parameters()), "lr": settings.head_rate},
        {"params": [model.start_embedding, model.end_embedding], "lr": settings.meta_token_rate},
    ]
    train_on_direct_texts(model, groups, loss, seed, settings, max_norm=variant.max_norm, quiet=quiet)
    return model.eval()


def train_on_direct_texts(
    model: nn.Module,
    groups: list[dict[str, object]],
    loss: Callable[[Texts, int], Tensor],
    seed: int,
    settings: Settings,
    *,
    max_norm: float = math.inf,
    quiet: bool = False,
) -> None:
    """Adam steps on `loss(texts, number of the first text)`, at constant rates."""
    optimizer = torch.optim.Adam(groups, fused=True)
    rows = settings.adaptation_rows
    for step in tqdm(range(settings.adaptation_steps), "adaptation", disable=quiet, mininterval=1):
        loss(direct_texts(Use.ADAPTATION, seed, step, rows), step * rows).backward()
        if max_norm < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: QuietStarForCausalLM, rows: int) -> Scores:
    """Scores on texts that no training sees, the same for every model."""
    texts = direct_texts(Use.EVALUATION, 0, 0, rows)
    thoughts = model.think_at_every_token(texts.ids, seed=0, thoughts_per_token=THOUGHTS)
    mixed = thoughts.mixed_log_probs[:, texts.marks]  # [B, Q, N]
    logits = model(texts.ids, think="never").logits[:, texts.marks]
    right = (thoughts.tokens[:, texts.marks] == texts.chains[:, :, None]).all(-1)
    return Scores(
        base=-thoughts.base_log_probs[:, texts.marks].mean().item(),
        mixed=-mixed.mean().item(),
        averaged=math.log(THOUGHTS) - mixed.logsumexp(-1).mean().item(),
        dashes=-(1 - logits.softmax(-1)[..., THINK]).log().mean().item(),
        chain=right.float().mean().item(),
        weight=thoughts.weight[:, texts.marks].mean().item(),
    )


def export(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model and the tokenizer of its words as a Hugging Face folder, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    make_tokenizer().save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
