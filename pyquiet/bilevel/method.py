"""What the block methods share: the shared variables, the blocks of a step, processes, states and statistics."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
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
from pyquiet.checks import check_count, check_fraction, check_word
from pyquiet.files import replacing
from pyquiet.randomness import Purpose, Stream, resolve_seed, uniforms

Rate = float | Callable[[int], float]
_SEEDS = 256


class BlockMethod(ABC):
    """A method for multi-block bilevel problems: `step()` moves `x`, and the rows of the blocks that it samples.

    Args:
        problem: what to minimise.
        x: where to start: a tensor, a dict of tensors, or a module, whose parameters (those that require a gradient)
            are then kept up to date.
        blocks_per_step: I, of each process; all that it has, where these are fewer.
        samples_per_block: B, for the lower and, drawn independently, for the upper losses.
        eta: step size of x, a float or a function of the step's number.
        optimizer: how x moves along the hypergradient's estimate z: None is x - eta z, which theory is about; or a
            maker of one of torch's optimizers (`torch.optim.Adam`), called with the parameters and lr = eta. z takes
            the gradient's place.
        sampler: "iid", "reshuffle" or "stratified" (`BlockSampler`).
        seed: of blocks and samples; None takes one from torch's generator.
        group: processes that share the blocks, each with its own rows; x must start the same on all, and one vector of
            x's size is summed over them each step. None: this process alone.
        owned: int64, the blocks of this process, which may have none; None: an equal share of `group`'s. Each block is
            that of one process.
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
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        sampler: str = "iid",
        seed: int | None = 0,
        group: Any = None,
        owned: Tensor | None = None,
        y: Tensor | None = None,
    ) -> None:
        check_count("blocks_per_step", blocks_per_step, least=1)
        self.samples_per_block = check_count("samples_per_block", samples_per_block, least=1)
        check_word("sampler", sampler, SAMPLERS)
        self.problem, self.flat, self.group, self.eta = problem, Flat(x), group, check_rate("eta", eta)
        self.seed, self.steps = (resolve_seed(seed) + 2**63) % 2**64 - 2**63, 0  # as an int64, for states
        self._seeds: dict[int, int] = {}  # of the next steps
        self._generator = torch.Generator()  # of a step's blocks and samples
        self._x, self._eta = self.flat.vector, 0.0
        self._z = torch.zeros_like(self._x)
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        m = check_count("problem.m", problem.m, least=1)
        share = torch.arange(m * rank // size, m * (rank + 1) // size)
        self.owned = share if owned is None else _check_owned(owned, m)
        if group is not None:
            _check_shares(self.owned, m, self._x.device, group)
        self.sampler = BlockSampler(len(self.owned), blocks_per_step, sampler)
        self._weighed = (torch.empty(0), torch.empty(0))  # chances, and their weights
        self._rank = rank
        self.table = BlockTable(
            len(self.owned), self._shapes(), self.moving, dtype=self._x.dtype, device=self._x.device
        )
        self._start_rows("y", y)
        self._parameter = torch.nn.Parameter(self._x.clone())  # what `optimizer` moves
        self._optimizer = None if optimizer is None else optimizer([self._parameter], lr=rate(eta, 0))

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

    def _start_rows(self, name: str, rows: Tensor | None) -> None:
        """Fills a field of the table from rows [m, ...] of all blocks."""
        if rows is None:
            return
        if name not in self.table.fields:
            raise ValueError(f"{name} is given, but this method or variant keeps {', '.join(self.table.fields)} alone")
        field = self.table.fields[name]
        if rows.shape != (self.problem.m, *field.shape[1:]):
            raise ValueError(f"{name} must be {[self.problem.m, *field.shape[1:]]}, got {list(rows.shape)}")
        field.copy_(rows[self.owned])

    def _draw(self) -> tuple[Tensor, Tensor, Any, Any]:
        """This step's rows, the probability of each, and samples for the lower and the upper losses."""
        self._eta = rate(self.eta, self.steps)  # before anything changes
        generator = self._generator.manual_seed(self._step_seed() + self._rank)
        rows, chance = self.sampler.draw(self.steps, self.seed + self._rank, generator)
        if not len(rows):
            return rows, chance, None, None
        idx = self.owned[rows]
        lower = self.problem.sample(idx, self.samples_per_block, generator)
        return rows, chance, lower, self.problem.sample_upper(idx, self.samples_per_block, generator)

    def _more(self, rows: Tensor) -> Any:
        """Further samples for the lower losses of a step's rows."""
        return self.problem.sample(self.owned[rows], self.samples_per_block, self._generator) if len(rows) else None

    def _at(self, x: Tensor, Y: Tensor, rows: Tensor) -> Derivatives:
        return Derivatives(self.problem, self.flat, x, Y, self.owned[rows])

    @contextmanager
    def _same_noise(self) -> Iterator[None]:
        """torch's generator in this step's own state: whatever the losses draw, they draw at both points."""
        devices = [self._x.device] if self._x.is_cuda else []
        # Not the numbers that chose blocks and samples: torch keeps 32 bits of a seed, so one of those is turned.
        seed = (self._step_seed() ^ 2**31) + self._rank
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed walks all kinds of devices
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def _step_seed(self) -> int:
        if self.steps not in self._seeds:  # some hundred at once: alone, one takes as long as they do
            numbers = torch.arange(self.steps, self.steps + _SEEDS)
            u = uniforms(Stream(self.seed, Purpose.EPOCH, sequence=0, position=numbers), _SEEDS)
            self._seeds = dict(zip(numbers.tolist(), (u * 2**52).long().tolist(), strict=True))
        return self._seeds[self.steps]

    def _weights(self, chance: Tensor) -> Tensor:
        """What the terms of a step's blocks count, [I], so that their sum is unbiased for the mean over all blocks."""
        if chance is not self._weighed[0]:
            self._weighed = chance, (1 / (self.problem.m * chance)).to(self._x)
        return self._weighed[1]

    def _sum(self, part: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def _move(self, z: Tensor) -> None:
        self._z = z
        if self._optimizer is None:
            self._x = torch.sub(self._x, z, alpha=self._eta)
        else:
            self._parameter.data.copy_(self._x)
            self._parameter.grad = z.clone()
            for part in self._optimizer.param_groups:
                part["lr"] = self._eta
            self._optimizer.step()
            self._x = self._parameter.detach().clone()
        self.flat.write_back(self._x)
        self.steps += 1

    # -- states

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next steps depend on, as tensors; the rows are those of this process, not copies of them."""
        own = {f"rows.{name}": field for name, field in self.table.state_dict().items()}
        shared = {"x": self._x, "z": self._z, "steps": torch.tensor(self.steps), "seed": torch.tensor(self.seed)}
        kept = {} if self._optimizer is None else self._optimizer.state[self._parameter]
        moments = {f"optimizer.{name}": torch.as_tensor(value) for name, value in kept.items() if value is not None}
        return own | shared | moments | {"owned": self.owned} | self._state()

    def load_state_dict(self, *states: dict[str, Tensor]) -> None:
        """Goes on from the states of all processes that a run had, however the blocks were shared among them.

        Where this process has the blocks of one of them, it goes on bit by bit.

        Raises:
            ValueError: no state has a block of this process, or they are of another method, variant or problem, or of
                different steps.
        """
        places = self._places(states)
        home = max(range(len(states)), key=lambda number: len(places[number]))  # whose clock and seed we take
        own = states[home]
        for state, place in zip(states, places, strict=True):
            if place:
                to, rows = torch.tensor(place).T
                clocks = self._clock_of(own), self._clock_of(state)
                ahead = {name: time - clocks[1][name] for name, time in clocks[0].items()}
                fields = {name[5:]: x for name, x in state.items() if name[:5] == "rows."}
                self.table.load_rows(to, fields, rows, ahead)
        self._x, self._z = own["x"].to(self._x), own["z"].to(self._z)
        self.steps, self.seed, self._seeds = int(own["steps"]), int(own["seed"]), {}
        if self._optimizer is not None:
            kept = {name[10:]: x.clone() for name, x in own.items() if name[:10] == "optimizer."}
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": {0: kept} if kept else {}, "param_groups": groups})
        self._load_state(own, states)
        self.flat.write_back(self._x)

    def _places(self, states: tuple[dict[str, Tensor], ...]) -> list[list[tuple[int, int]]]:
        """For each state, our rows that it has and their places in it; raises where states do not fit or lack one."""
        mine = {name: x.shape[1:] for name, x in self.state_dict().items() if name[:5] == "rows."}
        mine |= {"x": self._x.shape}
        if len(steps := {int(state["steps"]) for state in states if "steps" in state}) > 1:
            raise ValueError(
                f"states: of different steps, {sorted(steps)}, as a save that was cut off leaves them; save into a "
                "folder of its own for each step, and load the last that is complete"
            )
        missing, places = set(self.owned.tolist()), []
        for state in states:
            theirs = {name: x.shape[1:] for name, x in state.items() if name[:5] == "rows."}
            theirs |= {"x": state["x"].shape}
            if theirs != mine:
                found, wanted = ({name: list(shape) for name, shape in one.items()} for one in (theirs, mine))
                raise ValueError(f"states: of another method, variant or problem, with {found}; this one has {wanted}")
            place = {block: row for row, block in enumerate(state["owned"].tolist())}
            places.append([(row, place[block]) for row, block in enumerate(self.owned.tolist()) if block in place])
            missing -= place.keys()
        if missing:
            some = sorted(missing)[:5]
            raise ValueError(f"states: none of {len(states)} has the blocks {some}; give those of all processes")
        return places

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes this process's state into the folder, one file a process."""
        size = 1 if self.group is None else dist.get_world_size(self.group)
        file = Path(folder) / f"blocks-{self._rank:05d}-of-{size:05d}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            # Copies: rows are views of a table, and before the first step x is also the last x.
            own = {name: x.to("cpu", copy=True).contiguous() for name, x in self.state_dict().items()}
            save_file(own, partial)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Goes on from a folder that `save` wrote, by any number of processes.

        Raises:
            FileNotFoundError: a process's file is missing. ValueError: the folder holds files of several runs, or of
                different steps.
        """
        files = sorted(Path(folder).glob("blocks-*-of-*.safetensors"))
        if len(sizes := {int(file.stem[-5:]) for file in files}) > 1:
            raise ValueError(f"{folder} holds files of runs of {sorted(sizes)} processes; give each run its own folder")
        if not files or len(files) != sizes.pop():
            raise FileNotFoundError(f"{folder} holds {len(files)} of the files blocks-*-of-*.safetensors of a run")
        self.load_state_dict(*(load_file(file) for file in files))

    def _state(self) -> dict[str, Tensor]:
        return {}

    def _clock_of(self, state: dict[str, Tensor]) -> dict[str, float]:
        """`clock` as it was in a state."""
        return {}

    def _load_state(self, own: dict[str, Tensor], states: tuple[dict[str, Tensor], ...]) -> None:  # noqa: B027  # most have none
        """Takes what `_state` gave: of `own`, the state of which most of this process comes, and of rows from all."""


def at_least(H: Tensor, floor: float) -> tuple[Tensor, float]:
    """The nearest symmetric matrices with eigenvalues of at least `floor`, and the share that had to move."""
    H = (H + H.mT) / 2
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    wrong = torch.linalg.cholesky_ex(H - floor * eye).info > 0
    if wrong.any():
        values, vectors = torch.linalg.eigh(H[wrong])
        H[wrong] = vectors @ (values.clamp_min(floor)[..., None] * vectors.mT)
    return H, int(wrong.sum()) / max(1, wrong.numel())


def rate(value: Rate, step: int) -> float:
    """A step size at the step of this number.

    Raises:
        ValueError: the function gives no number of at least 0.
    """
    if not callable(value):
        return value
    found = float(value(step))
    if not 0 <= found < math.inf:
        raise ValueError(f"a step size must be a number of at least 0, got {found} at step {step}")
    return found


def check_rate(name: str, value: Rate) -> Rate:
    """The step size, if it is a function or a number of at least 0; else a TypeError or ValueError that names it."""
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a function of the step, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {value}")
    return value


def check_share(name: str, value: float) -> float:
    """What a new look counts in an average, if it is in (0, 1]; else a ValueError that names it."""
    if check_fraction(name, value) == 0:
        raise ValueError(f"{name} must be above 0, or nothing new is ever learned")
    return value


def _check_owned(owned: Tensor, m: int) -> Tensor:
    blocks = owned.tolist()
    if owned.dtype != torch.int64 or len(set(blocks)) != len(blocks) or not all(0 <= block < m for block in blocks):
        raise ValueError(f"owned must be distinct blocks, int64 in 0 .. {m - 1}, got {owned.dtype} {blocks[:10]}")
    return owned


def _check_shares(owned: Tensor, m: int, device: torch.device, group: Any) -> None:
    """Raises ValueError, in all processes, unless each block is that of exactly one of them."""
    owners = torch.zeros(m, dtype=torch.int32, device=device)
    owners[owned.to(device)] = 1
    dist.all_reduce(owners, group=group)
    wrong = (owners != 1).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(f"owned: blocks {wrong[:5]} belong to no process or to several; give each block to one")
