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
        self._edges = torch.arange(self.count + 1) * m // max(1, self.count)  # of the parts of "stratified"
        self._chances: dict[int, Tensor] = {}  # by how many blocks a step has; one tensor, so that users can keep it

    def draw(self, step: int, seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Blocks int64 [I] and the probability of each to be among a step's, float64 [I].

        `generator` is the step's own; `seed` is that of the permutations.
        """
        if not self.m:
            idx = torch.empty(0, dtype=torch.int64)
        elif self.kind == "reshuffle":
            # Evenly: a last step of few blocks would take them to be rare, and extrapolate them too far.
            steps = -(-self.m // self.count)
            epoch, part = divmod(step, steps)
            if self._epoch != (seed, epoch):
                self._epoch = seed, epoch
                self._permutation = torch.randperm(self.m, generator=_generator(seed, epoch))
            idx = self._permutation[self.m * part // steps : self.m * (part + 1) // steps]
        elif self.kind == "stratified":
            sizes = self._edges.diff()
            u = torch.rand(self.count, generator=generator, dtype=torch.float64)
            idx = self._edges[:-1] + (u * sizes).long().clamp_max(sizes - 1)
        else:
            idx = distinct(self.m, self.count, generator)
        return idx, self._chance(len(idx))

    def _chance(self, count: int) -> Tensor:
        if count not in self._chances:
            even = torch.full((count,), count / max(1, self.m), dtype=torch.float64)
            self._chances[count] = 1 / self._edges.diff().double() if self.kind == "stratified" else even
        return self._chances[count]


def distinct(m: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct integers below m, every set equally likely: Floyd's algorithm, O(count)."""
    u = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    chosen: dict[int, None] = {}
    for top, share in zip(range(m - count, m), u, strict=True):
        number = int(share * (top + 1))
        chosen[top if number in chosen else number] = None
    return torch.tensor(list(chosen), dtype=torch.int64)


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Not the generator of the step of this number: torch keeps 32 bits of a seed, so one of those is turned.
    return torch.Generator().manual_seed(epoch_seed(seed, epoch) ^ 2**30)
