"""The rows of a problem's blocks, of which a step reads and writes only those that it samples."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyquiet.bilevel.problem import check_precise


class BlockTable:
    """Rows of m blocks; some fields move in a straight line while their block is not visited.

    A field in `moving` has a velocity field of the same shape: between visits it falls by the velocity times the time
    that has passed, as if every block were updated at every step. That is made up for when a row is read, so a step
    costs what its rows cost, whatever m is.

    Args:
        m: rows.
        shapes: of a row of each field.
        moving: field -> the field of its velocity.
        dtype: float32 or float64.
        device: where the rows are used. The table itself is there too, or in pinned memory of the host.
        pin: keep the table in pinned host memory and copy the rows of a step to a CUDA device.
    """

    def __init__(
        self,
        m: int,
        shapes: Mapping[str, tuple[int, ...]],
        moving: Mapping[str, str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pin: bool = True,
    ) -> None:
        self.m, self.moving, self.device = m, dict(moving), torch.device(device)
        check_precise("dtype of the table", torch.empty(0, dtype=dtype))
        pinned = pin and self.device.type == "cuda"
        home = torch.device("cpu") if pinned else self.device
        self.fields = {
            name: torch.zeros(m, *shape, dtype=dtype, device=home, pin_memory=pinned) for name, shape in shapes.items()
        }
        # At which time (in units of the step size, summed over steps) a moving field's row was written.
        self.since = {name: torch.zeros(m, dtype=torch.float64, device=home) for name in moving}
        self.visited = torch.zeros(m, dtype=torch.bool, device=home)

    def gather(self, idx: Tensor, now: Mapping[str, float]) -> dict[str, Tensor]:
        """The rows of the blocks int64 [I] at the time `now` of each moving field, on the table's device.

        Raises:
            ValueError: a block comes twice.
        """
        if len(set(idx.tolist())) != len(idx):
            raise ValueError(f"idx holds a block twice: {idx.tolist()[:20]}; of two updates of a row one would be lost")
        idx = idx.to(self.visited.device)
        rows = {name: field[idx] for name, field in self.fields.items()}
        for name, velocity in self.moving.items():
            passed = (now[name] - self.since[name][idx]).to(rows[name].dtype)
            rows[name] -= passed.view(-1, *[1] * (rows[name].ndim - 1)) * rows[velocity]
        return {name: row.to(self.device, non_blocking=True) for name, row in rows.items()}

    @torch.no_grad()
    def scatter(self, idx: Tensor, now: Mapping[str, float], rows: Mapping[str, Tensor]) -> None:
        """Writes rows of the blocks as they are at the time `now`; fields that are not named stay."""
        idx = idx.to(self.visited.device)
        for name, row in rows.items():
            self.fields[name].index_copy_(0, idx, row.to(self.fields[name]))
            if name in self.moving:
                self.since[name][idx] = now[name]
        self.visited[idx] = True

    @torch.no_grad()
    def flush(self, now: Mapping[str, float]) -> None:
        """Brings all rows to the time `now`."""
        for name, velocity in self.moving.items():
            field = self.fields[name]
            passed = (now[name] - self.since[name]).to(field.dtype)
            field -= passed.view(-1, *[1] * (field.ndim - 1)) * self.fields[velocity]
            self.since[name].fill_(now[name])

    def state_dict(self) -> dict[str, Tensor]:
        """All rows, by the names that `load_rows` takes; tensors alone, as safetensors stores them."""
        state = dict(self.fields) | {f"since.{name}": since for name, since in self.since.items()}
        return state | {"visited": self.visited}

    @torch.no_grad()
    def load_rows(
        self, to: Tensor, state: Mapping[str, Tensor], rows: Tensor, ahead: Mapping[str, float] | None = None
    ) -> None:
        """Fills the rows `to` from those of a state, of this table or of others', whose clocks ours are `ahead` of."""
        for name, mine in self.state_dict().items():
            mine[to] = state[name][rows].to(mine)
        for name, time in (ahead or {}).items():
            self.since[name][to] += time
