"""Quiet-STaR the slow and obvious way: every thought is one ordinary causal sequence.

For each (b, n, i) the sequence x_0 .. x_i, START, t_1 .. t_m, END goes whole through the unmodified
`base.base_model`, anew for every token: no cache, no padding, no layout, positions 0, 1, 2, ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyquiet.randomness import Purpose, Stream, draw

from .architectures import explicit_logits

EMBEDDING_SCALE = 100


@dataclass
class Thought:
    """A thought: tokens [m], their log_probs [m], mixing weight [] and three logits [V]."""

    tokens: Tensor
    log_probs: Tensor
    weight: Tensor
    logits: Tensor
    base_logits: Tensor
    thought_logits: Tensor


@dataclass
class Text:
    """The fields of `think_at_every_token`, plus mixed and base logits, for a batch of texts."""

    tokens: Tensor  # [B, T, N, m], -1 at padding
    log_probs: Tensor  # [B, T, N, m]
    weight: Tensor  # [B, T, N]
    mixed_log_probs: Tensor  # [B, T-1, N]
    base_log_probs: Tensor  # [B, T-1]
    logits: Tensor  # [B, T, N, V], 0 at padding


@dataclass
class Answer:
    """A generated answer and the thoughts before each of its tokens."""

    tokens: list[int] = field(default_factory=list)
    thoughts: list[list[Thought]] = field(default_factory=list)  # [new][N]
    scores: list[Tensor] = field(default_factory=list)  # [new][V] log of the mean probability


@dataclass(frozen=True)
class Law:
    """How tokens are drawn from logits."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    banned: Tensor | None = None

    def draw(self, logits: Tensor, stream: Stream) -> tuple[int, Tensor]:
        drawn = draw(logits.unsqueeze(0), stream=stream, **vars(self))
        return int(drawn.tokens[0]), drawn.log_probs[0]


def final_hidden(base: nn.Module, embeds: Tensor) -> Tensor:
    """The hidden state [d] after the final norm of the last of the embedded tokens [S, d]."""
    positions = torch.arange(len(embeds))
    # A copy: CTRL scales in place what it gets.
    out = base.base_model(inputs_embeds=embeds[None].clone(), position_ids=positions[None], use_cache=False)
    return out.last_hidden_state[0, -1]


def mixing_weight(model: nn.Module, base_state: Tensor, thought_state: Tensor) -> Tensor:
    """w [] of the two final hidden states [d]."""
    dtype = next(model.mixing_head.parameters()).dtype
    pair = torch.cat([base_state, thought_state]).to(dtype)
    return model.mixing_head(pair[None, None]).reshape(())


def think(model: nn.Module, text: Tensor, m: int, index: int, noise: dict[str, Any], law: Law) -> Thought:
    """Thought number `index` after `text` [S]; noise holds the seed and the sequence id."""
    base = model.base
    embed = base.get_input_embeddings()
    path = [embed(text), EMBEDDING_SCALE * model.start_embedding[None]]
    base_state = final_hidden(base, path[0])
    tokens, log_probs = [], []
    for step in range(m):
        stream = Stream(
            noise["seed"],
            Purpose.THOUGHT,
            sequence=torch.tensor([noise["sequence"]]),
            position=len(text) - 1,
            step=step,
            index=index,
        )
        logits = explicit_logits(base, final_hidden(base, torch.cat(path)))
        token, log_prob = law.draw(logits, stream)
        tokens.append(token)
        log_probs.append(log_prob)
        path.append(embed(torch.tensor([token])))
    path.append(EMBEDDING_SCALE * model.end_embedding[None])
    thought_state = final_hidden(base, torch.cat(path))
    weight = mixing_weight(model, base_state, thought_state)
    mixed = (1 - weight) * base_state + weight * thought_state
    return Thought(
        torch.tensor(tokens, dtype=torch.int64),
        torch.stack(log_probs).double() if log_probs else torch.zeros(0, dtype=torch.float64),
        weight,
        explicit_logits(base, mixed),
        explicit_logits(base, base_state),
        explicit_logits(base, thought_state),
    )


@torch.no_grad()
def think_everywhere(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    m: int,
    thoughts: int = 1,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    law: Law | None = None,
) -> Text:
    """What `think_at_every_token` must return for input_ids [B, T], padded on either side."""
    B, T = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    sequences = torch.arange(B) if sequence_ids is None else sequence_ids
    V = model.base.get_output_embeddings().weight.shape[0]
    out = Text(
        tokens=torch.full((B, T, thoughts, m), -1),
        log_probs=torch.zeros(B, T, thoughts, m, dtype=torch.float64),
        weight=torch.zeros(B, T, thoughts, dtype=torch.float64),
        mixed_log_probs=torch.zeros(B, T - 1, thoughts, dtype=torch.float64),
        base_log_probs=torch.zeros(B, T - 1, dtype=torch.float64),
        logits=torch.zeros(B, T, thoughts, V, dtype=torch.float64),
    )
    for b in range(B):
        slots = mask[b].nonzero().flatten()
        text = input_ids[b, slots]
        noise = {"seed": seed, "sequence": int(sequences[b])}
        for i, slot in enumerate(slots.tolist()):
            for n in range(thoughts):
                thought = think(model, text[: i + 1], m, n, noise, law or Law())
                _record(out, b, slot, n, thought, int(text[i + 1]) if i + 1 < len(text) else None)
    return out


def _record(out: Text, b: int, slot: int, n: int, thought: Thought, following: int | None) -> None:
    out.tokens[b, slot, n] = thought.tokens
    out.log_probs[b, slot, n] = thought.log_probs
    out.weight[b, slot, n] = thought.weight
    out.logits[b, slot, n] = thought.logits
    if following is not None:
        out.mixed_log_probs[b, slot, n] = thought.logits.double().log_softmax(-1)[following]
        out.base_log_probs[b, slot] = thought.base_logits.double().log_softmax(-1)[following]


@torch.no_grad()
def answer(
    model: nn.Module,
    prompt: Tensor,
    new: int,
    *,
    m: int,
    thoughts: int = 1,
    seed: int = 0,
    sequence: int = 0,
    copy: int = 0,
    law: Law | None = None,
    thought_law: Law | None = None,
) -> Answer:
    """`new` tokens after `prompt` [S], thinking before each; `copy` numbers the return."""
    out, text = Answer(), prompt
    for _ in range(new):
        noise = {"seed": seed, "sequence": sequence}
        made = [think(model, text, m, copy * thoughts + n, noise, thought_law or Law()) for n in range(thoughts)]
        score = mean_log_probs(torch.stack([t.logits for t in made]))
        stream = Stream(
            seed,
            Purpose.ANSWER,
            sequence=torch.tensor([sequence]),
            position=len(text),
            index=copy,
        )
        token, _ = (law or Law()).draw(score, stream)
        out.tokens.append(token)
        out.thoughts.append(made)
        out.scores.append(score)
        text = torch.cat([text, torch.tensor([token])])
    return out


def mean_log_probs(logits: Tensor) -> Tensor:
    """log of the mean over N of softmax(logits [N, ..., V])."""
    return torch.logsumexp(logits.double().log_softmax(-1), 0) - math.log(len(logits))
