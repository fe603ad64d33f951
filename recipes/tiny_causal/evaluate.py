"""Held-out loss of a causal LM on the books, over all and book by book.

python recipes/tiny_causal/evaluate.py MODEL_FOLDER DATA_FOLDER
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import Book, characters, read_books
from text_codec import BOS, encode_sections
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

WINDOW = 512
BATCH = 8


@dataclass(frozen=True)
class Score:
    """Sum of -log p in nats over `tokens` predicted tokens that spell `characters` characters."""

    nats: float
    tokens: int
    characters: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / self.characters


def held_out_scores(model: PreTrainedModel, tokenizer: Tokenizer, books: list[Book]) -> dict[str, Score]:
    """A score for each book by name, and their sum under "all".

    A book's held-out text is cut into windows of 512 tokens, each behind its own <bos>; every
    token and each <eos> is predicted once, <bos> never.
    """
    scores = {book.name: _score(model, tokenizer, book) for book in books}
    parts = list(scores.values())
    scores["all"] = Score(sum(p.nats for p in parts), sum(p.tokens for p in parts), sum(p.characters for p in parts))
    return scores


@torch.inference_mode()
def _score(model: PreTrainedModel, tokenizer: Tokenizer, book: Book) -> Score:
    ids = torch.from_numpy(encode_sections(tokenizer, book.held_out).ids.astype("int64"))
    text = torch.split(ids[1:], WINDOW - 1)
    windows = [torch.cat([torch.tensor([BOS]), part]) for part in text]
    nats, tokens = 0.0, 0
    for start in range(0, len(windows), BATCH):
        batch = torch.nn.utils.rnn.pad_sequence(windows[start : start + BATCH], batch_first=True, padding_value=BOS)
        targets = batch[:, 1:].masked_fill(batch[:, 1:] == BOS, -100)  # [B, T-1], padding too
        logits = model(batch, use_cache=False).logits[:, :-1]  # [B, T-1, V]
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        tokens += int((targets != -100).sum())
    return Score(nats, tokens, characters(book.held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder with model.safetensors, tokenizer.json")
    parser.add_argument("data", type=Path, help="folder of the books")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    print("| book | held-out tokens | loss | perplexity | bits per character |")
    print("|---|---|---|---|---|")
    for name, score in held_out_scores(model, tokenizer, read_books(args.data)).items():
        print(
            f"| {name} | {score.tokens} | {score.loss:.4f} | {score.perplexity:.2f} | {score.bits_per_character:.3f} |"
        )


if __name__ == "__main__":
    main()
