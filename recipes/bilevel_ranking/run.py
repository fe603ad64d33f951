"""Learns to rank generated documents by a small network: top-K NDCG by BSVRB, beside losses that know no K.

python recipes/bilevel_ranking/run.py OUTPUT.json     (goes on where a run that was cut off has left OUTPUT.json)
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyquiet.bilevel import BSVRB, BlockSOBA, solve_lower
from pyquiet.bilevel.ranking import TopKNDCG
from pyquiet.files import replacing

QUERIES, DOCUMENTS, FEATURES, HIDDEN = 150, 60, 8, 16
K, SMOOTHING = 5, 0.5
BLOCKS, STEPS, LOOKS = 15, 600, 6  # queries a step, all of their documents
ETAS, SEEDS = (0.003, 0.01, 0.03), (0, 1, 2)  # of Adam


def generated(seed: int) -> tuple[Tensor, Tensor]:
    """Documents [m, n, d], and their relevance: 2 of a query's best tenth and 1 of the next, by a hidden network and
    noise; each query asks for something of its own."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(QUERIES, DOCUMENTS, FEATURES, generator=g)
    hidden = torch.Generator().manual_seed(99)  # the same for all queries
    A, b = torch.randn(FEATURES, 12, generator=hidden), torch.randn(12, generator=hidden)
    worth = (2 * X @ A / FEATURES**0.5).tanh() @ b + 0.5 * torch.randn(X.shape[:2], generator=g)
    rank = worth.argsort(1, descending=True).argsort(1)
    return X, ((rank < DOCUMENTS // 10).float() + (rank < DOCUMENTS // 5).float())


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


class AllNDCG(TopKNDCG):
    """The smoothed NDCG of all documents: no threshold, and so nothing to solve below."""

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Tensor) -> Tensor:
        return super().upper(x, Y - 1e6, idx, batch)


def listwise(problem: TopKNDCG, x: Any, idx: Tensor) -> Tensor:
    """ListNet's cross entropy of the scores' softmax against that of relevance."""
    wanted = problem.relevance[idx].softmax(1)
    return -(wanted * problem.scores(x, problem.features[idx]).log_softmax(1)).sum(1)


def smoothed(problem: TopKNDCG, x: Any, idx: Tensor) -> Tensor:
    every = torch.arange(DOCUMENTS).expand(len(idx), DOCUMENTS)
    return problem.upper(x, torch.zeros(len(idx), 1), idx, every)


def single_level(kind: type[TopKNDCG], loss: Callable[[TopKNDCG, Any, Tensor], Tensor]) -> Callable[..., Any]:
    """Adam on a loss of a few queries a step."""

    def steps(data: tuple[Tensor, Tensor], eta: float, seed: int) -> tuple[TopKNDCG, Any, Callable[[], None]]:
        scorer = network(seed)
        problem = kind(*data, K=K, smoothing=SMOOTHING, scorer=scorer)
        adam, g = torch.optim.Adam(scorer.parameters(), lr=eta), torch.Generator().manual_seed(seed)

        def step() -> None:
            adam.zero_grad()
            idx = torch.randperm(QUERIES, generator=g)[:BLOCKS]
            loss(problem, dict(scorer.named_parameters()), idx).mean().backward()
            adam.step()

        return problem, lambda: dict(scorer.named_parameters()), step

    return steps


def bilevel(make: Callable[..., Any]) -> Callable[..., Any]:
    """Adam on a method's estimate of the hypergradient, from thresholds that fit the first scores."""

    def steps(data: tuple[Tensor, Tensor], eta: float, seed: int) -> tuple[TopKNDCG, Any, Callable[[], Any]]:
        scorer = network(seed)
        problem = TopKNDCG(*data, K=K, smoothing=SMOOTHING, scorer=scorer)
        method = make(
            problem=problem, x=scorer, y=solve_lower(problem, scorer, torch.zeros(QUERIES, 1)), eta=eta, seed=seed,
            optimizer=torch.optim.Adam, blocks_per_step=BLOCKS, samples_per_block=DOCUMENTS,
        )  # fmt: skip
        return problem, lambda: method.x, method.step

    return steps


METHODS: dict[str, Callable[..., Any]] = {
    "BSVRB v1, top K": bilevel(lambda **given: BSVRB(variant="v1", floor=0.1, **given)),
    "block SOBA, top K": bilevel(lambda **given: BlockSOBA(tau=0.5, tau_v=0.5, **given)),
    "smoothed NDCG of all": single_level(AllNDCG, smoothed),
    "ListNet": single_level(TopKNDCG, listwise),
}


def run(name: str, eta: float, seed: int) -> dict[str, Any]:
    """The best NDCG at K on the validation queries among a run's looks, and that on the test queries there."""
    problem, x, step = METHODS[name](generated(0), eta, seed)
    others = [TopKNDCG(*generated(which), K=K, scorer=problem.scorer) for which in (1, 2)]
    looks, seconds = [], 0.0
    for _look in range(LOOKS):
        began = time.process_time()
        for _ in range(STEPS // LOOKS):
            step()
        seconds += time.process_time() - began
        looks.append([problem.ndcg(x()), *(other.ndcg(x()) for other in others)])
    best = max(looks, key=lambda found: found[1])
    found = {"method": name, "eta": eta, "seed": seed, "looks": looks, "ms": seconds / STEPS * 1e3}
    return found | dict(zip(("train", "validation", "test"), best, strict=True))


def table(runs: list[dict[str, Any]]) -> str:
    """Each method at the eta of the best validation: means over the seeds, and the lowest and the highest."""
    lines = [f"| method | eta | validation NDCG@{K} | test NDCG@{K} | ms a step |", "|---|---|---|---|---|"]
    for name in METHODS:
        by_eta = [[one for one in runs if (one["method"], one["eta"]) == (name, eta)] for eta in ETAS]
        complete = [some for some in by_eta if len(some) == len(SEEDS)]
        if complete:
            best = max(complete, key=lambda some: sum(one["validation"] for one in some))
            shown = []
            for key in ("validation", "test"):
                values = [one[key] for one in best]
                shown.append(f"{sum(values) / len(values):.3f} ({min(values):.3f} .. {max(values):.3f})")
            lines.append(f"| {name} | {best[0]['eta']} | {' | '.join(shown)} | {min(one['ms'] for one in best):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    done = {(one["method"], one["eta"], one["seed"]) for one in runs}
    for case in itertools.product(METHODS, ETAS, SEEDS):
        if case not in done:
            runs.append(run(*case))
            with replacing(args.output) as partial:
                partial.write_text(json.dumps(runs, indent=1) + "\n")
            print({key: value for key, value in runs[-1].items() if key != "looks"}, flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
