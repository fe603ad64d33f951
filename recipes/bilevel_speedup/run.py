"""Steps to a fixed norm of the hypergradient, by blocks and samples a step: BSVRB beside block SOBA.

python recipes/bilevel_speedup/run.py OUTPUT.json [FIGURE.svg]     (goes on where a run has left OUTPUT.json)
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyquiet.bilevel import BSVRB, BlockSOBA, Problem
from pyquiet.bilevel.method import BlockMethod
from pyquiet.files import replacing

M, DIM_X, DIM_Y = 32, 5, 4
GOAL = 0.03  # the norm of the hypergradient, a mean over LAST steps
LAST, MOST = 20, 10_000
ETAS = (0.02, 0.05, 0.01, 0.1, 0.005, 0.2, 0.0025)  # likely ones first: worse runs end where the best one did
# Two other settings of each: of BSVRB the shares alpha = beta of a new look (it chooses its tau), of SOBA tau = tau_v.
SETTINGS = {"BSVRB v2": (0.3, 0.1), "block SOBA": (0.2, 0.05)}
SEEDS = (0, 1, 2)
BLOCKS, SAMPLES = (2, 4, 8, 16, 32), (1, 4, 16)


class Quadratics(Problem):
    """g_i = y'A_i y / 2 - y'(C_i x + b_i), f_i = |y - t_i|^2 / 2 + |x|^2 / 20, with noise in A, b and t."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.m, self.dim_y = M, DIM_Y
        basis = torch.linalg.qr(normal(M, DIM_Y, DIM_Y)).Q
        self.A = basis @ (torch.linspace(1, 4, DIM_Y, dtype=torch.float64)[:, None] * basis.mT)
        self.C, self.b, self.t = normal(M, DIM_Y, DIM_X) / 2, normal(M, DIM_Y), normal(M, DIM_Y)
        P, q = torch.linalg.solve(self.A, self.C), torch.linalg.solve(self.A, self.b[..., None])[..., 0]
        self.curvature = (P.mT @ P).mean(0) + 0.1 * torch.eye(DIM_X, dtype=torch.float64)
        self.solution = torch.linalg.solve(self.curvature, (P.mT @ (self.t - q)[..., None]).mean(0))[:, 0]

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (len(idx), samples or 1, DIM_Y)
        E, b, t = (
            torch.randn(*shape, *more, generator=generator, dtype=torch.float64).mean(1) for more in ((DIM_Y,), (), ())
        )
        return {"A": 0.15 * (E + E.mT), "b": b, "t": t}

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: dict[str, Tensor]) -> Tensor:
        Ay = ((self.A[idx] + batch["A"]) @ Y[..., None])[..., 0]
        return (Y * (Ay / 2 - self.C[idx] @ x - self.b[idx] - batch["b"])).sum(1)

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (Y - self.t[idx] - batch["t"]).square().sum(1) / 2 + x.square().sum() / 20


PROBLEM = Quadratics()


def method_of(name: str, blocks: int, samples: int, eta: float, setting: float, seed: int) -> BlockMethod:
    x = torch.zeros(DIM_X, dtype=torch.float64)
    options: dict[str, Any] = {"blocks_per_step": blocks, "samples_per_block": samples, "eta": eta, "seed": seed}
    if name == "block SOBA":
        return BlockSOBA(PROBLEM, x, tau=setting, tau_v=setting, **options)
    return BSVRB(PROBLEM, x, variant="v2", alpha=setting, beta=setting, **options)


def steps_to_goal(method: BlockMethod, most: int) -> int | None:
    """The steps until the mean norm over the last ones is at the goal; None if that takes more than `most`."""
    norms: list[float] = []
    for step in range(most):
        method.step()
        assert isinstance(method.x, Tensor)
        norms.append(float((PROBLEM.curvature @ (method.x - PROBLEM.solution)).norm()))
        if not norms[-1] < 1e3:
            return None
        if step >= LAST and sum(norms[-LAST:]) / LAST <= GOAL:
            return step + 1
    return None


def measure(name: str, blocks: int, samples: int) -> dict[str, Any]:
    """The fewest steps over settings, a mean over the seeds; a run that cannot become the fewest is left."""
    best: dict[str, Any] = {"steps": None}
    for setting, eta in itertools.product(SETTINGS[name], ETAS):
        counts: list[int] = []
        most = MOST * len(SEEDS) if best["steps"] is None else int(best["steps"] * len(SEEDS))
        for seed in SEEDS:
            steps = steps_to_goal(method_of(name, blocks, samples, eta, setting, seed), min(MOST, most - sum(counts)))
            if steps is None:
                break
            counts.append(steps)
        else:
            best = {"steps": sum(counts) / len(SEEDS), "counts": counts, "eta": eta, "setting": setting}
    row = {"method": name, "blocks": blocks, "samples": samples} | best
    print(row, flush=True)
    return row


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_blocks, by_samples = figure.subplots(1, 2, sharey=True)
    for name in SETTINGS:
        for axes, key, other, at in ((by_blocks, "blocks", "samples", 4), (by_samples, "samples", "blocks", 8)):
            some = [row for row in rows if row["method"] == name and row[other] == at and row["steps"]]
            some.sort(key=lambda row: row[key])
            axes.loglog([row[key] for row in some], [row["steps"] for row in some], marker="o", label=name)
    by_blocks.set(xlabel="blocks a step, of 32 (4 samples each)", ylabel=f"steps to a hypergradient of {GOAL}")
    by_samples.set(xlabel="samples a block (8 blocks a step)")
    by_samples.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("figure", type=Path, nargs="?")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="gamma tau")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    done = {(row["method"], row["blocks"], row["samples"]) for row in rows}
    sizes = [(blocks, 4) for blocks in reversed(BLOCKS)] + [(8, some) for some in SAMPLES if some != 4]
    for (blocks, samples), name in itertools.product(sizes, SETTINGS):
        if (name, blocks, samples) not in done:
            rows.append(measure(name, blocks, samples))
            with replacing(args.output) as partial:
                partial.write_text(json.dumps(rows, indent=1) + "\n")
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
