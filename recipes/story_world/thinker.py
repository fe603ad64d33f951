"""Go on training a causal model on stories, with thoughts or without, on the very same rows.

    python recipes/story_world/thinker.py BASE_FOLDER WORK_FOLDER --seed S [--plain] [--books FOLDER]

In these rows every conclusion is given at once; `--books` adds crops of books, so that prose is not forgotten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from texts import BOS, Use, encode_story
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from world import Wishes, draw_story

from pyquiet import QuietStarForCausalLM, QuietStarObjective

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_causal"))
from corpus import read_books
from text_codec import TokenStream, encode_sections

THOUGHT_TOKENS, THOUGHTS = 4, 2  # m, N
ROWS, BOOK_ROWS, LENGTH = 8, 2, 112  # of a step, how many of them are crops of books, tokens
AT_ONCE = Wishes(shallow=0.25, written=0.0)
RATES = {"base": 2e-4, "head": 1e-3, "meta": 3e-5}
WARM_UP = 20


class Rows:
    """int64 [ROWS, LENGTH] for a step: a story each, padded by the beginning of another, and crops of books."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, books: TokenStream | None) -> None:
        self.tokenizer, self.seed, self.books = tokenizer, seed, books

    def __call__(self, step: int) -> Tensor:
        rng = np.random.default_rng((self.seed, Use.THINKING, step))
        crops = BOOK_ROWS if self.books else 0
        return torch.tensor([self.story(rng) for _ in range(ROWS - crops)] + [self.crop(rng) for _ in range(crops)])

    def story(self, rng: np.random.Generator) -> list[int]:
        ids: list[int] = []
        while len(ids) < LENGTH:
            ids += encode_story(draw_story(rng, AT_ONCE), self.encode).ids
        return ids[:LENGTH]

    def crop(self, rng: np.random.Generator) -> list[int]:
        assert self.books is not None
        start = self.books.paragraph_before(int(rng.integers(len(self.books.ids) - LENGTH)))
        return [BOS, *self.books.ids[start : start + LENGTH - 1].tolist()]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def think_first(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> QuietStarForCausalLM:
    """A thinking model around `base`; START and END begin as the dashes that steps are written between."""
    torch.manual_seed(seed)  # of the mixing head
    (dashes,) = tokenizer("--", add_special_tokens=False).input_ids
    return QuietStarForCausalLM.from_base(
        base, thought_tokens=THOUGHT_TOKENS, thoughts_per_token=THOUGHTS, start_init=dashes
    )


def train(model: QuietStarForCausalLM, rows: Rows, steps: int, seed: int, *, thinks: bool, quiet: bool) -> None:
    """Changes `model` in place."""
    objective = QuietStarObjective(
        thoughts_per_token=THOUGHTS, lookahead=1, policy_weight=1, baseline="mean", relu=True
    )
    groups = [
        {"params": list(model.base.parameters()), "lr": RATES["base"]},
        {"params": list(model.mixing_head.parameters()), "lr": RATES["head"]},
        {"params": [model.start_embedding, model.end_embedding], "lr": RATES["meta"]},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP, (steps - step) / steps * 2)
    )
    model.train()
    for step in (bar := tqdm(range(steps), disable=quiet, mininterval=5)):
        ids = rows(step)
        with torch.autocast("cpu", torch.bfloat16):
            if thinks:
                numbers = step * ROWS + torch.arange(len(ids))
                loss = model.thinking_loss(ids, objective=objective, seed=seed, sequence_ids=numbers).loss
            else:
                loss = model.base(ids, labels=ids.masked_fill(ids == BOS, -100), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("model", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without thoughts")
    parser.add_argument("--books", type=Path, metavar="FOLDER")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    stream = None
    if args.books:
        sections = [section for book in read_books(args.books) for section in book.train]
        stream = encode_sections(tokenizer.backend_tokenizer, sections)
    model = think_first(base, tokenizer, args.seed)
    train(model, Rows(tokenizer, args.seed, stream), args.steps, args.seed, thinks=not args.plain, quiet=args.quiet)
    (model.base if args.plain else model).save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)


if __name__ == "__main__":
    main()
