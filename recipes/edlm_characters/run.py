"""Masked diffusion with and without an energy, on 27 symbols: what one core learns of books in minutes.

    python recipes/edlm_characters/run.py BOOKS_FOLDER WORK_FOLDER [--check] [--plot FIGURE]

A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from letters import BOS, MASK, T, read, tokenizer, windows
from models import STEPS, denoiser, energy, left_to_right
from transformers import set_seed

import pyquiet
from pyquiet.evaluation import NGramModel
from pyquiet.evaluation.diffusion import DiffusionTable, diffusion_table
from pyquiet.evaluation.estimates import Estimate
from pyquiet.evaluation.judging import histogram_entropy
from pyquiet.plotting.diffusion import plot_diffusion

GRID = (2, 4, 8, 16, 32, 64)  # steps that texts are written in
CANDIDATES = 8
COUNT, BATCH, TIMED = 256, 64, 32  # texts of each method, of a call, and by the clock
ORDER = 5  # of the n-grams
NAMES = {"none": "MDLM", "AR": "EDLM-AR", "NCE": "EDLM-NCE"}
BIT = math.log(2)  # in nats


def networks(text: str, work: Path, steps: dict[str, int]) -> dict[str, Any]:
    """The left-to-right model, the denoiser and its energy, trained on the text or as they were saved."""
    texts = windows(text)
    mdlm = denoiser(work / "denoiser", texts, steps["denoiser"])
    nce = energy(work / "energy", mdlm, texts, steps["energy"])
    return {"denoiser": mdlm, "energy": nce, "ar": left_to_right(work / "ar", texts, steps["ar"])}


def table(found: dict[str, Any], held_out: str, work: Path, grid: tuple[int, ...], count: int) -> DiffusionTable:
    """What the denoiser writes alone, with the AR energy and with the trained one, in each number of steps.

    Behind them stands the denoiser alone in infinitely many steps. Each is kept as it is done; seconds are those of a
    few texts by all of them in turn, so that a busy machine is as busy for all.
    """
    energies = {"none": None, "AR": pyquiet.AREnergy(found["ar"], mask_id=MASK), "NCE": found["energy"]}

    def written(name: str, names: Iterable[str], steps: tuple[int, ...], count: int, **options: Any) -> DiffusionTable:
        file = work / f"{name}.pt"
        if not file.exists():
            spelling = tokenizer()
            out = diffusion_table(
                found["denoiser"], spelling, [held_out], (found["ar"], spelling), steps=steps, num_samples=count,
                length=T, energies={energy: energies[energy] for energy in names}, level="character", order=ORDER,
                batch_size=BATCH, candidates=CANDIDATES, **options,
            )  # fmt: skip
            torch.save(out, file)
        return torch.load(file, weights_only=False)  # type: ignore[no-any-return]

    parts = [written(f"{name}-{steps}", [name], (steps,), count) for name in energies for steps in grid]
    timed = written("seconds", energies, grid, min(count, TIMED)).rows[1:]
    rows = [
        replace(part.rows[1], values=part.rows[1].values | {"seconds": row.values["seconds"]})
        for part, row in zip(parts, timed, strict=True)
    ]
    limit = written("limit", ["none"], (T,), count, samplers=["first_hitting"])
    return replace(limit, rows=[limit.rows[0], *rows, limit.rows[1]])


def from_the_left(model: Any, held_out: str, count: int) -> str:
    """What the left-to-right model writes by itself, which the AR energy aims at, as a row of `summary`."""
    set_seed(0)
    spelling, start = tokenizer(), torch.full((count, 1), BOS)
    texts = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=T, max_new_tokens=T,
        suppress_tokens=[MASK, BOS], pad_token_id=MASK,
    )[:, 1:]  # fmt: skip
    nll = Estimate.of(NGramModel([held_out], ORDER).nll(spelling.batch_decode(texts)) / BIT)
    entropy = Estimate.of(histogram_entropy(texts) / BIT)
    return f"| left to right | - | {nll.mean:.3f} +- {nll.error:.3f} | {entropy.mean:.3f} | | {T} | | | |"


def summary(found: DiffusionTable) -> str:
    """The table in Markdown: NLL and entropy in bits a symbol, costs and milliseconds of a text."""
    head = "| method | steps | n-gram NLL | entropy | TV of pairs | denoiser calls | all passes | ESS | ms |"
    lines = [head, "|---" * 9 + "|"]
    for row in found.rows:
        e = row.estimates()
        nll = f"{e['ngram_nll'].mean / BIT:.3f} +- {e['ngram_nll'].error / BIT:.3f}"
        name = NAMES[row.energy] + ", one by one" * (row.sampler == "first_hitting") if row.steps else "held-out text"
        line = f"| {name} | {row.steps or '-'} | {nll} "
        line += f"| {e['entropy_bits'].mean:.3f} | {e['variation_2'].mean:.3f} |"
        if row.steps:
            ess = "" if row.energy == "none" else f"{e['ess'].mean:.2f}"
            line += (
                f" {e['denoiser_calls'].mean:.1f} | {e['passes'].mean:.0f} | {ess} | {1e3 * e['seconds'].mean:.1f} |"
            )
        else:
            line += " | | | |"
        lines.append(line)
    return "\n".join(lines)


def check(found: DiffusionTable) -> None:
    """What an energy must do; AssertionError if it does not."""
    text = found.rows[0].estimates()
    alone = {row.steps: row.estimates() for row in found.methods()["schedule_first"]}
    for row in found.rows[1:]:
        here, mdlm = row.estimates(), alone[row.steps]
        name = f"{row.method}, {row.steps} steps"
        if row.energy != "none":
            assert here["denoiser_calls"] == mdlm["denoiser_calls"], f"{name}: calls differ"
            worse = here["ngram_nll"].mean - mdlm["ngram_nll"].mean
            assert worse < 0, f"{name}: n-gram NLL {worse:.3f} above that without an energy"
        apart = abs(here["entropy_bits"].mean - text["entropy_bits"].mean)
        assert apart <= 0.1, f"{name}: entropy is {apart:.3f} bits from that of the text"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("books", type=Path, help="folder of plain-text books")
    parser.add_argument("work", type=Path, help="folder for networks and tables")
    parser.add_argument("--only-train", action="store_true", help="train what is missing and stop")
    parser.add_argument("--plot", type=Path, help="write the figure here: .svg, .png or .pdf")
    parser.add_argument("--check", action="store_true", help="fail unless both energies do what they should")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text, held_out = read(args.books)
    found = networks(text, args.work, STEPS)
    if args.only_train:
        return
    results = table(found, held_out, args.work, GRID, COUNT)
    print(summary(results), from_the_left(found["ar"], held_out, COUNT), sep="\n")
    if args.plot:
        plot_diffusion(results, args.plot, quality="ngram_nll", title="27 symbols, T = 64, 8 candidates")
    if args.check:
        check(results)


if __name__ == "__main__":
    main()
