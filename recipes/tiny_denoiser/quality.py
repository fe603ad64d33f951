"""Held-out bound and NLLs of a denoiser by how much is masked, and how well an energy tells texts from its completions.

python recipes/tiny_denoiser/quality.py HELD_OUT_JSONL DENOISER_FOLDER [ENERGY_FOLDER] [--short] [--every N]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from pyquiet.bilevel.demonstration import auc
from pyquiet.datasets import packed, read_dataset
from pyquiet.diffusion import MaskedDenoiser
from pyquiet.diffusion.training import completions, nelbo, random_masks
from pyquiet.trainers import evenly_spread

LENGTH, BATCH, DRAWS, COMPLETIONS = 128, 32, 4, 4
PAD = 0
RATES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.95)
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def held_out(file: Path, tokenizer: Any, short: bool = False) -> Tensor:
    """The pieces of full length of the held-out documents, or all, int64 [W, 128]; padded on the right."""
    pieces = [piece["input_ids"] for piece in packed(read_dataset(str(file), "text"), tokenizer, LENGTH, across=False)]
    whole = [piece for piece in pieces if short or len(piece) == LENGTH]
    return pad_sequence(whole, batch_first=True, padding_value=PAD)


def batches(texts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Texts, where they have tokens, and their numbers."""
    for ids, numbers in zip(texts.split(BATCH), torch.arange(len(texts)).split(BATCH), strict=True):
        yield ids, ids != PAD, numbers


@torch.no_grad()
def bound(denoiser: MaskedDenoiser, texts: Tensor, draws: int = DRAWS) -> tuple[float, float]:
    """The NELBO in nats a token, and its standard error over the texts."""
    each = torch.zeros(len(texts), dtype=torch.float64)
    for seed in range(draws):
        for ids, real, numbers in batches(texts):
            given: dict[str, Any] = {"attention_mask": real}
            masks = random_masks(evenly_spread(numbers, seed=seed), ids, seed=seed, sequence_ids=numbers, **given)
            found = nelbo(denoiser, ids, masked=masks.masked, weight=masks.weight, **given)
            each[numbers] += found.text.double() / draws
    tokens = (texts != PAD).sum(1)
    mean = each.sum() / tokens.sum()
    error = (each - mean * tokens).std() * len(each) ** 0.5 / tokens.sum()  # of a ratio of sums
    return mean.item(), error.item()


@torch.no_grad()
def masked_nll(denoiser: MaskedDenoiser, texts: Tensor, rate: float) -> tuple[float, int]:
    """NLL a masked token where this share is masked, and how many there are."""
    total, count = 0.0, 0
    for ids, real, numbers in batches(texts):
        given: dict[str, Any] = {"attention_mask": real}
        masks = random_masks(torch.full((len(ids),), rate), ids, seed=0, sequence_ids=numbers, **given)
        out = nelbo(denoiser, ids, masked=masks.masked, weight=torch.ones(len(ids)), **given)
        total += out.text.double().sum().item()
        count += int(masks.masked.sum())
    return total / count, count


@torch.no_grad()
def energies(energy: Any, denoiser: MaskedDenoiser, texts: Tensor, time: float, count: int = COMPLETIONS) -> Tensor:
    """Of each text and its completions when it is noised to this time, float64 [W, 1 + count]."""
    found = []
    for ids, real, numbers in batches(texts):
        level = torch.full((len(ids),), time)
        options: dict[str, Any] = {"seed": 0, "sequence_ids": numbers, "attention_mask": real}
        masks = random_masks(level, ids, objective="continuous", min_time=0.0, **options)
        drawn = completions(denoiser, ids, masked=masks.masked, count=count, **options)
        candidates = torch.cat([ids[:, None], drawn], 1)
        found.append(
            energy(candidates, ids.masked_fill(masks.masked, denoiser.mask_id), masks.time, attention_mask=real)
        )
    return torch.cat(found).double()


def share_right(found: Tensor) -> float:
    """How often a completion has a higher energy than its text, of energies [W, 1 + count]; equal ones count half."""
    return ((found[:, 1:] - found[:, :1]).sign() + 1).mean().item() / 2


def area_under_curve(found: Tensor) -> float:
    """How often a text has a lower energy than a completion, of any text, of energies [W, 1 + count]."""
    is_text = torch.arange(found.shape[1]) == 0
    return auc(-found.flatten(), is_text.repeat(len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("held_out", type=Path)
    parser.add_argument("denoiser", type=Path)
    parser.add_argument("energy", type=Path, nargs="?")
    parser.add_argument("--short", action="store_true", help=f"score pieces of less than {LENGTH} tokens too")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="score every N-th piece alone")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.denoiser)
    denoiser = MaskedDenoiser(AutoModelForMaskedLM.from_pretrained(args.denoiser, dtype=torch.float32).eval())
    texts = held_out(args.held_out, tokenizer, args.short)[:: args.every]
    if args.energy is None:
        nats, error = bound(denoiser, texts)
        size = f"{(texts != PAD).sum().item()} tokens" if args.short else f"{LENGTH} tokens"
        print(f"{len(texts)} texts of {size}: NELBO {nats:.4f} +- {error:.4f} nats a token")
        print("\n| masked | tokens | NLL |\n|---|---|---|")
        for rate in RATES:
            nll, count = masked_nll(denoiser, texts, rate)
            print(f"| {rate:.0%} | {count} | {nll:.4f} |")
        return
    energy = AutoModel.from_pretrained(args.energy, dtype=torch.float32).eval()
    print(
        "| time | text below its completion | AUC | mean energy: text | completion | log Z |\n|---|---|---|---|---|---|"
    )
    for time in TIMES:
        found = energies(energy, denoiser, texts, time)
        text, others = found[:, :1], found[:, 1:]
        log_z = (-others).exp().mean().log()
        right, area = share_right(found), area_under_curve(found)
        print(f"| {time} | {right:.1%} | {area:.3f} | {text.mean():.2f} | {others.mean():.2f} | {log_z:.2f} |")


if __name__ == "__main__":
    main()
