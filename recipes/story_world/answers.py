"""How well a causal model knows the answers of held-out stories, by kind and depth, at once or with the steps written.

python recipes/story_world/answers.py MODEL_FOLDER [--stories N]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from texts import Encoded, Use, encode_story
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from world import KINDS, Part, Wishes, draw_story


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--stories", type=int, default=200, help="of each kind and form")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    print("| story | steps | at once: NLL (nats) | right | written out: NLL | right |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        at_once, written = (
            answer_scores(model, held_out_stories(tokenizer, kind, args.stories, Wishes(0.25, share)))
            for share in (0, 1)
        )
        for depth, (nll, right, _) in at_once.items():
            other_nll, other_right, _ = written[depth]
            print(f"| {kind} | {depth} | {nll:.3f} | {right:.1%} | {other_nll:.3f} | {other_right:.1%} |")


if __name__ == "__main__":
    main()
