"""Where BSVRB v2 stays around the solution, by samples and blocks a step, and how well z averages its noise.

python recipes/bilevel_speedup/plateaus.py OUTPUT.json     (goes on where a run that was cut off has left OUTPUT.json)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

import torch
from run import SEEDS, M, Quadratics
from torch import Tensor

from pyquiet.bilevel import BSVRB
from pyquiet.files import replacing

ALPHA, L, STEPS = 0.05, 4.0, 4000
DROPPED = 3  # the first third of a run
# "samples" and "blocks": of a step, with beta 0.05 and eta 0.02. "averaging": by beta.
SAMPLES, BLOCKS, BETAS = (1, 8, 64), (2, 4, 8, 16, 32), (0.2, 0.05, 0.01)


class Watched(BSVRB):
    """Keeps a step's own estimate of the hypergradient, beside z, which averages them."""

    single: Tensor

    def _look(self, *given: Any) -> Any:
        found = super()._look(*given)
        self.single = found[0][0]
        return found


def settled(problem: Quadratics, blocks: int, samples: int, *, beta: float, eta: float, seed: int) -> Watched:
    """A run that begins at the solution, all trackers at what they track."""
    tau = 0.3 / ((M / blocks - ALPHA) * L)
    y = torch.linalg.solve(problem.A, (problem.C @ problem.solution + problem.b)[..., None])[..., 0]
    v = torch.linalg.solve(problem.A, (y - problem.t)[..., None])[..., 0]
    return Watched(
        problem, problem.solution.clone(), y=y, v=v, variant="v2", alpha=ALPHA, beta=beta, tau=tau, tau_v=tau, eta=eta,
        blocks_per_step=blocks, samples_per_block=samples, seed=seed,
    )  # fmt: skip


def measured(problem: Quadratics, blocks: int, samples: int, *, beta: float, eta: float, seed: int) -> dict[str, float]:
    """Mean squares behind the first third: of the hypergradient, and of the errors of z and of a single estimate."""
    method = settled(problem, blocks, samples, beta=beta, eta=eta, seed=seed)
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(STEPS):
        before = cast(Tensor, method.x)
        method.step()
        if step >= STEPS // DROPPED:
            here, there = (problem.curvature @ (x - problem.solution) for x in (cast(Tensor, method.x), before))
            sums += torch.stack([x.square().sum() for x in (here, method._z - there, method.single - there)])
    return dict(zip(("plateau", "z", "single"), (sums / (STEPS - STEPS // DROPPED)).tolist(), strict=True))


def cases() -> list[dict[str, Any]]:
    by_samples = [{"case": "samples", "blocks": M, "samples": samples} for samples in SAMPLES]
    by_blocks = [{"case": "blocks", "blocks": blocks, "samples": 64} for blocks in BLOCKS]
    plateaus = [case | {"beta": 0.05, "eta": 0.02} for case in by_samples + by_blocks]
    averaging = [{"case": "averaging", "blocks": 16, "samples": 8, "beta": beta, "eta": 0.005} for beta in BETAS]
    return plateaus + averaging


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and what each case is about: how much lower than the last one, or z's share of noise."""
    lines = [
        "| case | blocks | samples | beta | plateau | times lower | z / single | of beta / (2 - beta) |",
        8 * "|---" + "|",
    ]
    last: dict[str, float] = {}
    for row in rows:
        plateau, z, single = (sum(run[name] for run in row["runs"]) / len(row["runs"]) for name in row["runs"][0])
        lower = f"{last[row['case']] / plateau:.2f}" if row["case"] in last else ""
        last[row["case"]] = plateau
        share = z / single
        whole = share / (row["beta"] / (2 - row["beta"]))
        lines.append(
            f"| {row['case']} | {row['blocks']} | {row['samples']} | {row['beta']} | {plateau:.3g} | {lower} | "
            f"{share:.4f} | {whole:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem = Quadratics()
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    for case in cases()[len(rows) :]:
        options = {name: value for name, value in case.items() if name != "case"}
        rows.append(case | {"runs": [measured(problem, **options, seed=seed) for seed in SEEDS]})
        with replacing(args.output) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
