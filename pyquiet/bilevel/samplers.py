"""Which blocks a step looks at. A step's blocks depend on (seed, step) alone, so a run can go on from anywhere."""

import torch
from torch import Tensor

from pyquiet.randomness import epoch_seed

SAMPLERS = ("iid", "reshuffle", "stratified")


class BlockSampler:
    """Draws I of m blocks a step, without replacement.

    Args:
        m: blocks. count: I, how many of them a step takes; all of them where it is above m.
        kind: "iid" draws anew each step, in O(I); "reshuffle" goes through a permutation, so that every block comes
            once in ceil(m / I) steps, among which the blocks are spread evenly; "stratified" takes one from each of I
            equal parts.
    """

    def __init__(self, m: int, count: int, kind: str) -> None:
        self.m, self.count, self.kind = m, min(count, m), kind
        self._epoch, self._permutation = (-1, -1), torch.empty(0, dtype=torch.int64)

    def draw(self, step: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Blocks int64 [I] and the probability of each to be among a step's, float64 [I].

        `generator` is the step's own; `seed` is that of the permutations.
        """
        if not self.m:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        if self.kind == "reshuffle":
            # Evenly: a last step of few blocks would take them to be rare, and extrapolate them too far.
            steps = -(-self.m // self.count)
            epoch, part = divmod(step, steps)
            if self._epoch != (seed, epoch):
                self._epoch = seed, epoch
                self._permutation = torch.randperm(self.m, generator=_generator(seed, epoch))
            idx = self._permutation[self.m * part // steps : self.m * (part + 1) // steps]
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
