"""The rows of a problem's blocks, of which a step reads and writes only those that it samples."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyquiet.bilevel.problem import check_precise


class BlockTable:
    """Rows of m blocks; some fields move in a straight line while their block is not visited.

    A field in `moving` has a velocity field of the same shape: between visits it falls by the velocity times the time
    that has passed, as if every block were updated at every step. That is made up for when a row is read, so a step
    costs what its rows cost, whatever m is. A block's row is one piece of memory, read and written at once; `fields`
    are views of it, [m, *shape].

    Args:
        m: rows.
        shapes: of a row of each field.
        moving: field -> the field of its velocity.
        dtype: float32 or float64.
        device: where the rows are used. The table of a CUDA device is in pinned memory of the host.
    """

    def __init__(
        self,
        m: int,
        shapes: Mapping[str, tuple[int, ...]],
        moving: Mapping[str, str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.m, self.moving, self.shapes, self.device = m, dict(moving), dict(shapes), torch.device(device)
        check_precise("dtype of the table", torch.empty(0, dtype=dtype))
        pinned = self.device.type == "cuda"
        home = torch.device("cpu") if pinned else self.device
        self._sizes = [math.prod(shape) for shape in shapes.values()]
        self._rows = torch.zeros(m, sum(self._sizes), dtype=dtype, device=home, pin_memory=pinned)
        self.fields = self._apart(self._rows)
        # At which time (in units of the step size, summed over steps) a moving field's row was written.
        self._since = torch.zeros(m, len(moving), dtype=torch.float64, device=home)
        self.visited = torch.zeros(m, dtype=torch.bool, device=home)

    def gather(self, idx: Tensor, now: Mapping[str, float]) -> dict[str, Tensor]:
        """The rows of the blocks int64 [I] at the time `now` of each moving field, on the table's device."""
        idx = idx.to(self._rows.device)
        rows = self._apart(self._rows.index_select(0, idx).to(self.device, non_blocking=True))
        if self.moving:
            passed = (self._times(now) - self._since.index_select(0, idx)).to(self.device, self._rows.dtype)
            for number, (name, velocity) in enumerate(self.moving.items()):
                rows[name] = torch.addcmul(rows[name], self._like(passed[:, number], name), rows[velocity], value=-1)
        return rows

    @torch.no_grad()
    def scatter(self, idx: Tensor, now: Mapping[str, float], rows: Mapping[str, Tensor]) -> None:
        """Writes all fields of the blocks int64 [I], as they are at the time `now`.

        Raises:
            ValueError: a block comes twice.
        """
        blocks = idx.tolist()
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"idx holds a block twice: {blocks[:20]}; of two updates of a row one would be lost")
        idx = idx.to(self._rows.device)
        new = torch.cat([rows[name].flatten(1) for name in self.fields], 1)
        self._rows.index_copy_(0, idx, new.to(self._rows))
        if self.moving:
            self._since[idx] = self._times(now)
        self.visited.index_fill_(0, idx, True)

    @torch.no_grad()
    def flush(self, now: Mapping[str, float]) -> None:
        """Brings all rows to the time `now`."""
        passed = (self._times(now) - self._since).to(self._rows.dtype)
        for number, (name, velocity) in enumerate(self.moving.items()):
            self.fields[name].addcmul_(self._like(passed[:, number], name), self.fields[velocity], value=-1)
        self._since.copy_(self._times(now).expand_as(self._since))

    def state_dict(self) -> dict[str, Tensor]:
        """All rows, by the names that `load_rows` takes; tensors alone, as safetensors stores them."""
        since = {f"since.{name}": self._since[:, number] for number, name in enumerate(self.moving)}
        return self.fields | since | {"visited": self.visited}

    @torch.no_grad()
    def load_rows(
        self, to: Tensor, state: Mapping[str, Tensor], rows: Tensor, ahead: Mapping[str, float] | None = None
    ) -> None:
        """Fills the rows `to` from those of a state, of this table or of others', whose clocks ours are `ahead` of."""
        for name, mine in self.state_dict().items():
            mine[to] = state[name][rows].to(mine)
        for name, time in (ahead or {}).items():
            self._since[to, list(self.moving).index(name)] += time

    def _apart(self, rows: Tensor) -> dict[str, Tensor]:
        """The fields of rows [I, numbers of a row], as views [I, *shape]."""
        parts = rows.split(self._sizes, 1)
        return {
            name: part.view(len(rows), *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _times(self, now: Mapping[str, float]) -> Tensor:
        return torch.tensor([now[name] for name in self.moving], dtype=torch.float64, device=self._rows.device)

    def _like(self, times: Tensor, name: str) -> Tensor:
        """Times [I], to be multiplied with rows of a field."""
        return times.view(-1, *[1] * len(self.shapes[name]))
