"""Held-out losses of a causal model, of it trained on plainly, and with thoughts, by tenths and at the answers.

python recipes/story_world/compare.py CAUSAL_FOLDER PLAIN_FOLDER THINKER_FOLDER [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyquiet
from pyquiet.demo.thoughts import next_token_nll
from pyquiet.evaluation import Estimate, opening_ids, thinking_gains
from pyquiet.zoo import held_out


@dataclass(frozen=True)
class Losses:
    """Of each held-out token, [n] in nats, and what it belongs to."""

    by_model: dict[str, Tensor]
    entropy: Tensor  # of the thinker without thoughts
    story: Tensor  # bool, in a story and not in a book
    answer: Tensor  # bool, the answer of a conclusion of two steps or more


def measure(causal: Path, plain: Path, thinker: Path, thoughts: int) -> Losses:
    tokenizer = AutoTokenizer.from_pretrained(causal)
    texts = [(row["text"], True) for row in held_out("stories")] + [
        (row["text"], False) for row in held_out("passages")
    ]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in texts]
    opening = opening_ids(tokenizer)
    model = pyquiet.QuietStarForCausalLM.from_pretrained(thinker).eval()
    gains = thinking_gains(model, rows, seed=0, opening=opening, thoughts_per_token=thoughts)
    whole = [[*opening, *row] for row in rows]
    found = {
        name: next_token_nll(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), whole)
        for name, folder in (("causal", causal), ("plain", plain))
    }
    story = torch.tensor([is_story for (_, is_story), row in zip(texts, rows, strict=True) for _ in row])
    answer = torch.cat([answers(text, row, tokenizer) for (text, _), row in zip(texts, rows, strict=True)])
    by_model = {**found, "thinker, no thoughts": gains.base_nll, "thinker": gains.mixed_nll}
    return Losses(by_model, gains.entropy, story, answer & story)


def answers(text: str, row: list[int], tokenizer: object) -> Tensor:
    """bool [tokens]: the first token behind "times, came to", "twice, came to" and "now in the"."""
    marks = (" twice, came to", " times, came to", " was now in the")
    at, found = "", []
    for token in row:
        found.append(at.endswith(marks))
        at += tokenizer.decode([token])
    return torch.tensor(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name in ("causal", "plain", "thinker"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--thoughts", type=int, default=1, help="for each token")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    losses = measure(args.causal, args.plain, args.thinker, args.thoughts)
    order = losses.entropy.argsort(stable=True)
    groups = {f"tenth {i}": part for i, part in enumerate(order.tensor_split(10), 1)}
    story_order = losses.entropy.masked_fill(~losses.story, -1).argsort(stable=True)
    stories = int(losses.story.sum())
    groups |= {"all": order, "stories": losses.story.nonzero().flatten(), "books": (~losses.story).nonzero().flatten()}
    groups |= {
        "hardest tenth of stories": story_order[-(stories // 10) :],
        "answers": losses.answer.nonzero().flatten(),
    }
    table = {
        name: {
            "tokens": len(where),
            **{model: float(nll[where].mean()) for model, nll in losses.by_model.items()},
            "plain - thinker": Estimate.of((losses.by_model["plain"] - losses.by_model["thinker"])[where]).to_dict(),
        }
        for name, where in groups.items()
    }
    print(f"| tokens | n | {' | '.join(losses.by_model)} | plain - thinker |\n|{'---|' * (3 + len(losses.by_model))}")
    for name, row in table.items():
        numbers = " | ".join(f"{row[model]:.4f}" for model in losses.by_model)
        gain = row["plain - thinker"]
        print(f"| {name} | {row['tokens']} | {numbers} | {gain['mean']:+.4f} +- {gain['standard_error']:.4f} |")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
