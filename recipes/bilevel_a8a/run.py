"""Optimises what each training row of a8a counts for 100 logistic regressions: BSVRB and its baselines, by epochs.

python recipes/bilevel_a8a/run.py a8a_training.txt a8a_testing.txt OUTPUT.json [FIGURE.svg] [--rsvrb]

It goes on where a run that was cut off has left OUTPUT.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pyquiet.bilevel import BSVRB, RSVRB, BlockSOBA, StocBiO
from pyquiet.bilevel.demonstration import read_rows
from pyquiet.bilevel.logistic import WeightedLogistic
from pyquiet.bilevel.method import BlockMethod
from pyquiet.files import replacing

M, TEMPERATURES, L2 = 100, (1.0, 11.0), 1e-5
BLOCKS, SAMPLES = 10, 32  # of a step
ETAS = (0.03, 0.3)  # of x, in units of its n rows
EPOCHS, SEEDS, LOOKS = 20, (0, 1), 20
EXACT = slice(None, None, 10)  # the blocks whose lower problem is solved exactly in the end


METHODS: dict[str, tuple[Callable[..., BlockMethod], dict[str, float]]] = {
    "BSVRB v2": (lambda **given: BSVRB(variant="v2", radius=100.0, **given), {"alpha": 0.3}),
    "block SOBA": (BlockSOBA, {"tau": 0.5, "tau_v": 0.5}),
    "stocBiO": (StocBiO, {"tau": 0.5}),
    "BSVRB v1": (lambda **given: BSVRB(variant="v1", **given), {"alpha": 0.3}),
}
EVERY = METHODS | {"RSVRB": (RSVRB, {"alpha": 0.3, "tau": 0.5})}
SLOW = ("BSVRB v1", "RSVRB")  # a step takes many times as long: one run each, of RSVRB only where it is asked for


class Task:
    """a8a, a fifth of its training rows for validation, and its test rows."""

    def __init__(self, training: Path, testing: Path) -> None:
        (X, y), (T, t) = read_rows(str(training)), read_rows(str(testing))
        width = max(X.shape[1], T.shape[1])
        X, T = (torch.nn.functional.pad(rows[:, :-1], (0, width - rows.shape[1])) for rows in (X, T))  # no constant
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
        train, valid = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
        temperatures = torch.linspace(*TEMPERATURES, M)
        self.n = len(train)
        self.problem = WeightedLogistic(X[train], y[train], X[valid], y[valid], temperatures=temperatures, l2=L2)
        self.test = WeightedLogistic(X[train], y[train], T, t, temperatures=temperatures, l2=L2)

        self.start = self.trained(torch.zeros(self.n), torch.arange(M))

    def losses(self, method: BlockMethod) -> tuple[float, float]:
        """The mean validation and test losses of the regressions as they are."""
        return self._losses(method.flush(), torch.arange(M))

    def exact(self, x: Tensor) -> tuple[float, float]:
        """The same of some regressions that are trained to the end on the weighed rows."""
        idx = torch.arange(M)[EXACT]
        return self._losses(self.trained(x, idx, self.start[idx]), idx)

    def _losses(self, Y: Tensor, idx: Tensor) -> tuple[float, float]:
        valid, test = (float(some.upper(None, Y, idx, None).mean()) for some in (self.problem, self.test))
        return valid, test

    def trained(self, x: Tensor, idx: Tensor, start: Tensor | None = None) -> Tensor:
        """The solutions of the lower problems of blocks, by Newton's method in float64."""
        X, scale = self.problem.signed.double(), self.problem.temperatures[idx, None].double()
        w, eye = x.double().sigmoid(), torch.eye(X.shape[1], dtype=torch.float64)
        Y = torch.zeros(len(idx), X.shape[1]).double() if start is None else start.double()
        for _ in range(30):
            p = (-(Y @ X.T) / scale).sigmoid()
            gradient = L2 * Y - (w * p / scale) @ X / self.n
            if float(gradient.norm(dim=1).max()) < 1e-8:
                return Y.float()
            curvature = w * p * (1 - p) / scale.square() / self.n
            H = torch.stack([X.T @ (row[:, None] * X) for row in curvature]) + L2 * eye
            Y = Y - torch.linalg.solve(H, gradient)
        raise RuntimeError("Newton's method did not end")


def run(task: Task, name: str, eta: float, seed: int) -> dict[str, Any]:
    """A run's curves of the validation and the test loss, and its end."""
    make, setting = EVERY[name]
    method = make(
        problem=task.problem, x=torch.zeros(task.n), y=task.start, blocks_per_step=BLOCKS, samples_per_block=SAMPLES,
        eta=eta * task.n, seed=seed, **setting,
    )  # fmt: skip
    steps = EPOCHS * task.n // (BLOCKS * SAMPLES)
    looks, seconds = [(0.0, *task.losses(method))], 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        method.step()
        seconds += time.process_time() - began
        if step % max(1, steps // LOOKS) == 0 or step == steps:
            looks.append((step / steps * EPOCHS, *task.losses(method)))
    found = {"method": name, "eta": eta, **setting, "seed": seed, "steps": steps, "looks": looks}
    return found | {"last": looks[-1][1:], "exact": task.exact(cast(Tensor, method.x)), "ms": seconds / steps * 1e3}


def cases(rsvrb: bool) -> list[tuple[str, float, int]]:
    """Methods, step sizes and seeds of all runs."""
    every = itertools.product((name for name in METHODS if name not in SLOW), ETAS, SEEDS)
    return [*every, *((name, ETAS[0], SEEDS[0]) for name in SLOW if rsvrb or name != "RSVRB")]


def table(runs: list[dict[str, Any]], start: tuple[float, float]) -> str:
    """Means over the seeds, and the lowest and the highest."""
    lines = [
        "| method | eta / n | validation, as they are | test | validation, trained to the end | test | ms a step |",
        "|---|---|---|---|---|---|---|",
        f"| equal rows | | | | {start[0]:.4f} | {start[1]:.4f} | |",
    ]
    for name, eta in itertools.product(EVERY, ETAS):
        some = [one for one in runs if one["method"] == name and one["eta"] == eta]
        if some:
            columns = [[one[key][which] for one in some] for key in ("last", "exact") for which in (0, 1)]
            shown = [f"{sum(c) / len(c):.4f} ({min(c):.4f} .. {max(c):.4f})" for c in columns]
            lines.append(f"| {name} | {eta} | {' | '.join(shown)} | {min(one['ms'] for one in some):.1f} |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, name in enumerate(EVERY):
        for one in runs:
            if one["method"] == name and one["eta"] == ETAS[0]:
                for panel, which in zip(axes, (1, 2), strict=True):
                    label = name if one["seed"] == SEEDS[0] else None
                    points = [(look[0], look[which]) for look in one["looks"]]
                    panel.plot(*zip(*points, strict=True), color=f"C{number}", alpha=0.8, lw=1, label=label)
    for panel, rows in zip(axes, ("validation", "test"), strict=True):
        panel.set(xlabel="epochs", ylabel=f"{rows} loss, mean of {M} regressions (nats)")
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("training", type=Path)
    parser.add_argument("testing", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("figure", type=Path, nargs="?")
    parser.add_argument(
        "--rsvrb", action="store_true", help="also one run of RSVRB: 2 GB of memory, and half an hour or so"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(args.training, args.testing)
    start = task.exact(torch.zeros(task.n))
    runs: list[dict[str, Any]] = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    done = {(one["method"], one["eta"], one["seed"]) for one in runs}
    for case in cases(args.rsvrb):
        if case not in done:
            runs.append(run(task, *case))
            with replacing(args.output) as partial:
                partial.write_text(json.dumps({"start": start, "runs": runs}) + "\n")
            print(table(runs, start), flush=True)
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
