"""Show on a pointer chase that thoughts are learned: pretrain once, go on in several ways, print a table.

    python recipes/pointer_chase/run.py WORK_FOLDER [--seed S] [--variants plain full ...] [--check]

What is finished is kept in WORK_FOLDER and not done again. One thread; on one machine the numbers come out the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from stages import VARIANTS, Settings, adapt, evaluate, export, pretrain, thinking
from transformers import LlamaForCausalLM
from transformers.utils import logging

from pyquiet import QuietStarForCausalLM
from pyquiet.files import replacing

# The NLL of the three-hop answer, in nats, must lie in these, whatever the seed.
BOUNDS = {"plain": (0.70, math.inf), "no-reinforce": (0.35, 0.60), "full": (0.0, 0.15)}
BEFORE = "before"
T = TypeVar("T")


class Work:
    """The work folder: results.json, the pretrained model and a thinking model for each variant and seed."""

    def __init__(self, folder: Path, settings: Settings, *, quiet: bool = False) -> None:
        self.folder, self.settings, self.quiet = folder, settings, quiet
        self.file = folder / "results.json"
        self.results: dict[str, Any] = {"settings": asdict(settings), "runs": {}}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
        if self.results["settings"] != asdict(settings):
            raise ValueError(
                f"{folder} was made with {self.results['settings']}, not {asdict(settings)}; give another work folder"
            )
        folder.mkdir(parents=True, exist_ok=True)

    def pretrained(self) -> LlamaForCausalLM:
        """The pretrained model, which is trained if it is not there."""
        folder = self.folder / "pretrained"
        if BEFORE not in self.runs:
            model, seconds = timed(pretrain, self.settings, quiet=self.quiet)
            export(model, folder)
            self.record(BEFORE, thinking(model, 0), seconds, thinks=False)
        return LlamaForCausalLM.from_pretrained(folder)

    def thinker(self, name: str, seed: int) -> QuietStarForCausalLM:
        """The model of a variant, which is trained if it is not there."""
        folder = self.folder / f"{name}-{seed}"
        if f"{name}-{seed}" not in self.runs:
            base, variant = self.pretrained(), VARIANTS[name]
            model, seconds = timed(adapt, base, variant, seed, self.settings, quiet=self.quiet)
            export(model, folder)
            self.record(folder.name, model, seconds, thinks=variant.thinks)
        return QuietStarForCausalLM.from_pretrained(folder)

    @property
    def runs(self) -> dict[str, Any]:
        """Scores by "before" or "variant-seed"."""
        runs: dict[str, Any] = self.results["runs"]
        return runs

    def record(self, run: str, model: QuietStarForCausalLM, seconds: float, *, thinks: bool) -> None:
        """Evaluates a model and writes its scores down; `nll` is the one that its training was about."""
        scores = asdict(evaluate(model, self.settings.evaluation_rows))
        self.runs[run] = {"nll": scores["mixed" if thinks else "base"], **scores, "seconds": seconds}
        with replacing(self.file) as partial:
            partial.write_text(json.dumps(self.results, indent=1) + "\n")

    def of(self, name: str) -> list[dict[str, Any]]:
        """The runs of a variant, by seed."""
        if name == BEFORE:
            return [self.runs[name]] if name in self.runs else []
        seeds = sorted(int(run.rpartition("-")[2]) for run in self.runs if run.rpartition("-")[0] == name)
        return [self.runs[f"{name}-{seed}"] for seed in seeds]

    def table(self) -> str:
        """The results in Markdown, those of several seeds parted by slashes."""
        titles = {BEFORE: "before adaptation, no thoughts"} | {name: v.title for name, v in VARIANTS.items()}
        rows = ["| run | NLL (nats) | P(thought is the right chain) | CPU s |", "|---|---|---|---|"]
        for name, title in titles.items():
            if runs := self.of(name):
                cells = [
                    " / ".join(form.format(run[key]) for run in runs)
                    for key, form in (("nll", "{:.3f}"), ("chain", "{:.2f}"), ("seconds", "{:.0f}"))
                ]
                rows.append(f"| {title} | {' | '.join(cells)} |")
        return "\n".join(rows)

    def misses(self) -> list[str]:
        """What is not as it should be; a variant that was not run counts."""
        found = []
        for name, (low, high) in BOUNDS.items():
            nlls = [run["nll"] for run in self.of(name)]
            if not nlls or not all(low <= nll <= high for nll in nlls):
                found.append(f"{name}: NLL {nlls} should lie in {low} .. {high}")
        return found


def timed(function: Callable[..., T], *args: object, **kwargs: object) -> tuple[T, float]:
    """function(*args, **kwargs), and the seconds of CPU it took."""
    begin = time.process_time()
    return function(*args, **kwargs), round(time.process_time() - begin, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("work", type=Path, help="folder for models and results.json")
    parser.add_argument("--seed", type=int, default=0, help="of the adaptation; the pretraining's is 0")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(BOUNDS), metavar="VARIANT")
    parser.add_argument("--check", action="store_true", help="fail unless every NLL of the folder is as it should be")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    work = Work(args.work, Settings(), quiet=args.quiet)
    for name in args.variants:
        work.thinker(name, args.seed)
    print(work.table())
    misses = work.misses() if args.check else []
    print("\n".join(misses), file=sys.stderr, end="\n" if misses else "")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
