"""How well a model knows the answers of held-out stories, by kind and depth, at once or with the steps written.

A causal model reads what stands before an answer; one that fills gaps, a story whose answers are all missing.

python recipes/story_world/answers.py MODEL_FOLDER [--stories N]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from texts import Encoded, Use, encode_story
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLNetLMHeadModel,
)
from world import KINDS, Part, Wishes, draw_story

import pyquiet
from pyquiet.diffusion import by_confidence

Fill = Callable[[Tensor, Tensor], Tensor]


def held_out_stories(tokenizer: PreTrainedTokenizerBase, kind: str, count: int, wishes: Wishes) -> list[Encoded]:
    """Stories that no training draws from the same random numbers."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    rng = np.random.default_rng((0, Use.EVALUATION, list(KINDS).index(kind)))
    return [encode_story(draw_story(rng, wishes, kind), encode) for _ in range(count)]


@torch.inference_mode()
def answer_scores(model: PreTrainedModel, stories: list[Encoded]) -> dict[int, tuple[float, float, int]]:
    """By depth: mean NLL in nats of the answer's first token, how often it is the likeliest, and how many there are."""
    found: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for story in stories:
        ids = torch.tensor([story.ids])
        log_probs = model(ids).logits[0, :-1].float().log_softmax(-1)
        for at, (part, depth) in enumerate(zip(story.parts, story.depths, strict=True)):
            if part is Part.ANSWER:
                law, token = log_probs[at - 1], story.ids[at]
                found[depth].append((-law[token].item(), int(law.argmax()) == token))
    return {
        depth: (sum(n for n, _ in some) / len(some), sum(r for _, r in some) / len(some), len(some))
        for depth, some in sorted(found.items())
    }


def filler(folder: Path) -> Fill | None:
    """What fills the missing tokens of texts [1, N], bool [1, N], with the likeliest; None for a causal model."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "xlnet":
        model = XLNetLMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        return lambda ids, missing: pyquiet.infill(model, ids, mask=missing, temperature=0).tokens
    if config.architectures[0].endswith("ForMaskedLM"):
        denoiser = pyquiet.MaskedDenoiser(AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval())
        surest = by_confidence(1)
        return lambda ids, missing: (
            pyquiet.diffuse(denoiser, input_ids=ids, mask=missing, order=surest, top_k=1, seed=0).tokens
        )
    return None


@torch.inference_mode()
def filled_answers(fill: Fill, stories: list[Encoded]) -> dict[int, tuple[float, int]]:
    """By depth: how often an answer's first token is right, all of a story being missing, and how many there are."""
    found: dict[int, list[bool]] = defaultdict(list)
    for story in stories:
        ids = torch.tensor([story.ids])
        missing = torch.tensor([[part is Part.ANSWER for part in story.parts]])
        right = (fill(ids, missing) == ids)[missing]
        depths = torch.tensor([story.depths])[missing]
        for depth, one in zip(depths.tolist(), right.tolist(), strict=True):
            found[depth].append(one)
    return {depth: (sum(some) / len(some), len(some)) for depth, some in sorted(found.items())}


def both_forms(tokenizer: PreTrainedTokenizerBase, kind: str, count: int) -> list[list[Encoded]]:
    """Stories whose conclusions are given at once, and others whose steps are written."""
    return [held_out_stories(tokenizer, kind, count, Wishes(0.25, written)) for written in (0, 1)]


def print_known(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    print("| story | steps | at once: NLL (nats) | right | written out: NLL | right |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        at_once, written = (answer_scores(model, stories) for stories in both_forms(tokenizer, kind, count))
        for depth, (nll, right, _) in at_once.items():
            other_nll, other_right, _ = written[depth]
            print(f"| {kind} | {depth} | {nll:.3f} | {right:.1%} | {other_nll:.3f} | {other_right:.1%} |")


def print_filled(fill: Fill, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    print("| story | steps | at once: right | of | written out: right | of |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        at_once, written = (filled_answers(fill, stories) for stories in both_forms(tokenizer, kind, count))
        for depth, (right, some) in at_once.items():
            other_right, others = written[depth]
            print(f"| {kind} | {depth} | {right:.1%} | {some} | {other_right:.1%} | {others} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--stories", type=int, default=200, help="of each kind and form")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    fill = filler(args.model)
    if fill is None:
        print_known(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(), tokenizer, args.stories
        )
    else:
        print_filled(fill, tokenizer, args.stories)


if __name__ == "__main__":
    main()
