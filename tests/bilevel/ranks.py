"""A run of several processes, and the same run by one process that plays all of them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyquiet.bilevel import BSVRB

from .quadratics import Noise, Quadratics

SHARES = {1: [range(7)], 2: [range(5), range(5, 7)], 4: [range(3), range(3, 4), range(0), range(4, 7)]}


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


def in_ranks(count: int, store: Path, steps: int, new: Path, old: Path | None = None) -> None:
    """Steps in so many processes, from what a folder holds if one is given; their states are saved in a new folder.

    The processes are forks of one that has loaded torch: launched by themselves they would spend seconds on that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyquiet.bilevel"])
    with ProcessPoolExecutor(count, context) as pool:
        parts = [pool.submit(_step_and_save, rank, count, store, steps, new, old) for rank in range(count)]
        for part in parts:
            part.result()


def _step_and_save(rank: int, count: int, store: Path, steps: int, new: Path, old: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=120)
    )
    method = method_of(rank, count, group=dist.group.WORLD)
    if old is not None:
        method.load(old)
    for _ in range(steps):
        method.step()
    method.save(new)
    dist.destroy_process_group()
