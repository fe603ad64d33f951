"""What the block methods share: the shared variables, the blocks of a step, processes, states and statistics."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyquiet.bilevel.hypergradient import hypergradient
from pyquiet.bilevel.problem import Derivatives, Flat, Problem, Variables
from pyquiet.bilevel.samplers import SAMPLERS, BlockSampler
from pyquiet.bilevel.table import BlockTable
from pyquiet.checks import check_count
from pyquiet.files import replacing
from pyquiet.randomness import epoch_seed, resolve_seed

Rate = float | Callable[[int], float]


class BlockMethod(ABC):
    """A method for multi-block bilevel problems: `step()` moves `x`, and the rows of the blocks that it samples.

    Args:
        problem: what to minimise.
        x: where to start: a tensor, a dict of tensors, or a module, whose parameters are then kept up to date.
        blocks_per_step: I, of each process.
        samples_per_block: B, for the lower and, drawn independently, for the upper losses.
        eta: step size of x, a float or a function of the step's number.
        sampler: "iid", "reshuffle" or "stratified" (`BlockSampler`).
        seed: of blocks and samples; None takes one from torch's generator.
        group: processes that share the blocks, each with its own rows; x is the same on all, and one vector of x's
            size is summed over them each step. None: this process alone.
        owned: int64, the blocks of this process; None: an equal share of `group`'s.
        y: [m, dim_y], where the blocks start (zeros).

    Raises:
        TypeError, ValueError: an argument is out of range, or in half precision.
    """

    moving: Mapping[str, str] = MappingProxyType({})  # fields of rows that move between visits -> their velocities

    def __init__(
        self,
        problem: Problem,
        x: Any,
        *,
        blocks_per_step: int,
        samples_per_block: int,
        eta: Rate,
        sampler: str = "iid",
        seed: int | None = 0,
        group: Any = None,
        owned: Tensor | None = None,
        y: Tensor | None = None,
    ) -> None:
        check_count("blocks_per_step", blocks_per_step, least=1)
        self.samples_per_block = check_count("samples_per_block", samples_per_block, least=1)
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        self.problem, self.flat, self.group, self.eta = problem, Flat(x), group, eta
        self.seed, self.steps = resolve_seed(seed), 0
        self._seeded = (-1, 0)  # a step, and its seed
        self._x = self.flat.vector
        self._z = torch.zeros_like(self._x)
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        m = check_count("problem.m", problem.m, least=1)
        self.owned = torch.arange(m * rank // size, m * (rank + 1) // size) if owned is None else owned
        self.sampler = BlockSampler(len(self.owned), blocks_per_step, sampler)
        self._rank = rank
        self.table = BlockTable(
            len(self.owned), self._shapes(), self.moving, dtype=self._x.dtype, device=self._x.device
        )
        if y is not None:
            self.table.fields["y"].copy_(y[self.owned])

    @property
    def x(self) -> Variables:
        """The shared variables, in the structure in which they were given."""
        return self.flat.unflatten(self._x)

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One step; statistics of it."""

    @property
    def clock(self) -> dict[str, float]:
        """The time of each moving field: its step sizes so far, summed."""
        return {}

    def flush(self) -> Tensor:
        """Brings all rows to this step, and returns y of this process's blocks, [m of them, dim_y]."""
        self.table.flush(self.clock)
        return self.table.fields["y"]

    def hypergradient(self, *, exact: bool = True) -> Tensor:
        """The gradient of F at x on all data (`pyquiet.bilevel.hypergradient`), without processes."""
        if len(self.owned) != self.problem.m:
            raise ValueError("hypergradient needs all blocks in one process")
        return hypergradient(self.problem, self.x, self.flush().to(self._x), exact=exact)

    # -- of a step

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        fields = {name for pair in self.moving.items() for name in pair} | {"y"}
        return dict.fromkeys(sorted(fields), (self.problem.dim_y,))

    def _draw(self) -> tuple[Tensor, Tensor, Any, Any]:
        """This step's rows, the probability of each, and samples for the lower and the upper losses."""
        generator = torch.Generator().manual_seed(self._step_seed() + self._rank)
        rows, chance = self.sampler.draw(self.steps, self.seed + self._rank, generator)
        idx = self.owned[rows]
        lower = self.problem.sample(idx, self.samples_per_block, generator)
        return rows, chance, lower, self.problem.sample_upper(idx, self.samples_per_block, generator)

    def _at(self, x: Tensor, Y: Tensor, rows: Tensor) -> Derivatives:
        return Derivatives(self.problem, self.flat, x, Y, self.owned[rows])

    @contextmanager
    def _same_noise(self) -> Iterator[None]:
        """torch's generator in this step's own state: whatever the losses draw, they draw at both points."""
        devices = [self._x.device] if self._x.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(self._step_seed())  # torch.manual_seed walks all kinds of devices
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(self._step_seed())
            yield

    def _step_seed(self) -> int:
        if self._seeded[0] != self.steps:
            self._seeded = self.steps, epoch_seed(self.seed, self.steps)
        return self._seeded[1]

    def _weights(self, chance: Tensor) -> Tensor:
        """What the terms of a step's blocks count, [I], so that their sum is unbiased for the mean over all blocks."""
        return (1 / (self.problem.m * chance)).to(self._x)

    def _sum(self, part: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def _move(self, z: Tensor) -> None:
        self._z = z
        self._x = self._x - rate(self.eta, self.steps) * z
        self.flat.write_back(self._x)
        self.steps += 1

    # -- states

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next steps depend on, as tensors; the rows are those of this process."""
        own = {f"rows.{name}": field for name, field in self.table.state_dict().items()}
        shared = {"x": self._x, "z": self._z, "steps": torch.tensor(self.steps), "seed": torch.tensor(self.seed)}
        return own | shared | {"owned": self.owned} | self._state()

    def load_state_dict(self, *states: dict[str, Tensor]) -> None:
        """Goes on from the states of all processes that a run had, however the blocks were shared among them.

        Raises:
            ValueError: no state has a block of this process.
        """
        found = torch.zeros(len(self.owned), dtype=torch.bool)
        for state in states:
            place = {block: row for row, block in enumerate(state["owned"].tolist())}
            mine = [(row, place[block]) for row, block in enumerate(self.owned.tolist()) if block in place]
            if mine:
                to, rows = torch.tensor(mine).T
                self.table.load_rows(to, {name[5:]: x for name, x in state.items() if name[:5] == "rows."}, rows)
                found[to] = True
        if not found.all():
            missing = self.owned[~found].tolist()
            raise ValueError(f"states: none of {len(states)} has the blocks {missing[:5]}; give those of all processes")
        first = states[0]
        self._x, self._z = first["x"].to(self._x), first["z"].to(self._z)
        self.steps, self.seed, self._seeded = int(first["steps"]), int(first["seed"]), (-1, 0)
        self._load_state(states)
        self.flat.write_back(self._x)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes this process's state into the folder, one file a process."""
        size = 1 if self.group is None else dist.get_world_size(self.group)
        file = Path(folder) / f"blocks-{self._rank:05d}-of-{size:05d}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            save_file({name: x.contiguous().cpu() for name, x in self.state_dict().items()}, partial)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Goes on from a folder that `save` wrote, by any number of processes.

        Raises:
            FileNotFoundError: a process's file is missing.
        """
        files = sorted(Path(folder).glob("blocks-*-of-*.safetensors"))
        if not files or len(files) != int(files[0].stem[-5:]):
            raise FileNotFoundError(f"{folder} holds {len(files)} of the files blocks-*-of-*.safetensors of a run")
        self.load_state_dict(*(load_file(file) for file in files))

    def _state(self) -> dict[str, Tensor]:
        return {}

    def _load_state(self, states: tuple[dict[str, Tensor], ...]) -> None:  # noqa: B027  # most have none of their own
        pass


def rate(value: Rate, step: int) -> float:
    """A step size at the step of this number."""
    return float(value(step)) if callable(value) else value


def guard(gamma: Tensor, tau: float, smoothness: float, name: str) -> float:
    """gamma tau L, the largest of the step's blocks: from 2 on the extrapolated steps diverge.

    Raises:
        ValueError: it is 2 or more. Warns above 1.
    """
    product = float(gamma.max()) * tau * smoothness if len(gamma) else 0.0
    if product >= 2:
        raise ValueError(
            f"{name}={tau:g} is too large: gamma tau L = {product:.3g} (L = {smoothness:.3g} is the largest curvature "
            f"of a batch), and from 2 on the method diverges; take {name} <= {tau / product:.3g}, or a smaller gamma"
        )
    if product > 1:
        warnings.warn(f"gamma {name} L = {product:.3g} is above 1; the method may become unstable", stacklevel=4)
    return product
