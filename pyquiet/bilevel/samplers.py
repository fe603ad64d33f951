"""Which blocks a step looks at. A step's blocks depend on (seed, step) alone, so a run can go on from anywhere."""

import torch
from torch import Tensor

from pyquiet.randomness import epoch_seed

SAMPLERS = ("iid", "reshuffle", "stratified")


class BlockSampler:
    """Draws I of m blocks a step, without replacement.

    Args:
        m: blocks; I: how many of them a step takes, at most m.
        kind: "iid" draws anew each step, in O(I); "reshuffle" goes through a permutation, so that every block comes
            once in ceil(m / I) steps (the last of them may have fewer); "stratified" takes one from each of I equal
            parts.
    """

    def __init__(self, m: int, count: int, kind: str) -> None:
        self.m, self.count, self.kind = m, min(count, m), kind
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, step: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Blocks int64 [I] and the probability of each to be among a step's, float64 [I].

        `generator` is the step's own; `seed` is that of the permutations.
        """
        if not self.m:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        if self.kind == "reshuffle":
            steps = -(-self.m // self.count)
            if step // steps != self._epoch:
                self._epoch = step // steps
                self._permutation = torch.randperm(self.m, generator=_generator(seed, self._epoch))
            idx = self._permutation[step % steps * self.count :][: self.count]
        elif self.kind == "stratified":
            edges = torch.arange(self.count + 1) * self.m // self.count
            sizes = edges.diff()
            u = torch.rand(self.count, generator=generator, dtype=torch.float64)
            return edges[:-1] + (u * sizes).long().clamp_max(sizes - 1), 1 / sizes.double()
        else:
            idx = distinct(self.m, self.count, generator)
        return idx, torch.full((len(idx),), len(idx) / self.m, dtype=torch.float64)


def distinct(m: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct integers below m, every set equally likely: Floyd's algorithm, O(count)."""
    highest = torch.arange(m - count, m)
    draws = (torch.rand(count, generator=generator, dtype=torch.float64) * (highest + 1)).long()
    chosen: dict[int, None] = {}
    for top, number in zip(highest.tolist(), draws.tolist(), strict=True):
        chosen[top if number in chosen else number] = None
    return torch.tensor(list(chosen), dtype=torch.int64)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(epoch_seed(seed, number))
