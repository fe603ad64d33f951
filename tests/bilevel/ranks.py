"""A run of several processes, as a program, and the same run by one process that plays all of them.

python -m torch.distributed.run ... -m tests.bilevel.ranks run FOLDER | resume FOLDER NEW_FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyquiet.bilevel import BSVRB

from .quadratics import Noise, Quadratics

SHARES = {1: [range(7)], 2: [range(5), range(5, 7)], 4: [range(3), range(3, 4), range(0), range(4, 7)]}

STEPS = {"run": 20, "resume": 6}


class Played(BSVRB):
    """A process whose sum over processes is made by who plays them all."""

    def __init__(self, *args: Any, number: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rank = number


def method_of(rank: int, count: int, kind: type[BSVRB] = BSVRB, **options: Any) -> Any:
    problem = Quadratics(7, 4, 3, noise=Noise(0.1, 1, 1))
    return kind(
        problem, torch.ones(4, dtype=torch.float64), blocks_per_step=2, samples_per_block=3, variant="v1", tau=0.02,
        eta=0.02, owned=torch.tensor(list(SHARES[count][rank]), dtype=torch.int64), **options,
    )  # fmt: skip


def states_of(count: int, steps: int, begin: list[dict[str, Tensor]] | None = None) -> list[dict[str, Tensor]]:
    """The states of all processes after these steps (from the states of others), by one that plays them in turn."""
    parts = [method_of(rank, count, Played, number=rank) for rank in range(count)]
    for one in parts if begin else ():
        one.load_state_dict(*begin)
    for _ in range(steps):
        directions: list[Tensor] = []
        for one in parts:  # first what each would give to the sum
            trial = method_of(one._rank, count, Played, number=one._rank)
            trial.load_state_dict(one.state_dict())
            trial._sum = lambda part: directions.append(part.clone()) or part  # noqa: B023
            trial.step()
        total = torch.stack(directions).sum(0)
        for one in parts:
            one._sum = lambda part, total=total: total
            one.step()
    return [one.state_dict() for one in parts]


def main() -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    method = method_of(rank, count, group=dist.group.WORLD)
    if sys.argv[1] == "resume":
        method.load(sys.argv[2])
    for _ in range(STEPS[sys.argv[1]]):
        method.step()
    method.save(sys.argv[-1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
