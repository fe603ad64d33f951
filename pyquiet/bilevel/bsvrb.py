"""BSVRB: blockwise variance-reduced multi-block bilevel optimisation (arXiv 2305.18730), v1 and v2.

Each block keeps s_i, an estimate of grad_y g_i that is corrected, when the block is sampled, by the difference of its
gradients at this and the last iterate on the same samples, times gamma: that makes up for the steps in which the block
was not looked at. y_i falls by tau s_i in every step. v1 keeps such an estimate of H_i and inverts it; v2 keeps v_i,
which moves towards H_i^{-1} grad_y f_i by matrix-vector products alone. z tracks the hypergradient in the same way
(STORM) and moves x.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyquiet.bilevel.method import BlockMethod, Rate, at_least, check_rate, check_share, rate
from pyquiet.bilevel.problem import Derivatives, Problem
from pyquiet.checks import check_positive, check_word

VARIANTS = ("auto", "v1", "v2")
_INVERTIBLE, _MOST_NUMBERS = 64, 2**28  # dim_y, and numbers of all H_i, up to which "auto" inverts
_POWER_STEPS, _REFRESH = 5, 100  # of the estimate of the curvature
_SAFE = 0.7  # gamma tau L where tau is chosen


class _Rows(NamedTuple):
    """What a step knows of its blocks before it moves them."""

    now: dict[str, Tensor]
    before: dict[str, Tensor]
    new: Tensor | None  # blocks that were never looked at, bool [I]; None where there is none
    outside: float  # the share of v_i that were outside of the ball


class _Factors(NamedTuple):
    """What the probabilities of a step's blocks make of them: weights and gammas [I], and the largest gammas."""

    weights: Tensor
    gamma: Tensor
    gamma_bar: Tensor
    most: float
    most_bar: float


class BSVRB(BlockMethod):
    """Minimises F(x) = 1/m sum_i f_i(x, argmin_y g_i(x, y)) by looking at a few blocks and samples a step.

    >>> optimizer = BSVRB(problem, x, blocks_per_step=10, samples_per_block=32)  # doctest: +SKIP
    >>> for _ in range(1000):
    ...     statistics = optimizer.step()  # doctest: +SKIP

    Args:
        problem, x, blocks_per_step, samples_per_block, eta, **kwargs: as `BlockMethod`.
        variant: "v1" (dim_y^2 numbers a block, an inverse), "v2" (vectors alone), "auto": v1 up to dim_y 64, if all
            H_i are 2^28 numbers at most.
        alpha: of s, in (0, 1]; the share of the new gradient. alpha_bar (None: the same): of H or u.
        beta: of z, in (0, 1].
        gamma: factor of the differences: "drift", m/I - alpha, has no bias where iterates drift; "msvr",
            (m - I) / (I (1 - alpha)) + 1 - alpha, needs alpha <= 1/2; or a number. gamma_bar: of H or u.
        tau, tau_v: step sizes of y and v; None: 0.7 / (gamma L), and 1 / L at most, L the largest curvature of a batch
            so far: measured every 100 steps, and noticed in between where a step's own products show a larger one.
        radius: v_i is kept in a ball of this radius (None: no ball). floor: least eigenvalue of v1's H_i.
        v, H: [m, dim_y] and [m, dim_y, dim_y], where they start; None: v at 0, H_i at its first sample.

    `step()` returns z_norm, s_norm, gamma_tau_L (by the L so far), and the shares v_clip_frac or H_clip_frac.

    Raises:
        ValueError: an argument is out of range, gamma tau L reaches 2 in a step (above 1 there is a warning), or tau
            is to be chosen by a curvature of 0. RuntimeError: a step's estimate of the hypergradient or of the blocks'
            gradients is not finite. No such step changes x or a row.
    """

    def __init__(
        self,
        problem: Problem,
        x: Any,
        *,
        blocks_per_step: int,
        samples_per_block: int,
        variant: str = "auto",
        alpha: float = 0.3,
        alpha_bar: float | None = None,
        beta: float = 0.2,
        gamma: str | float = "drift",
        gamma_bar: str | float | None = None,
        tau: Rate | None = None,
        tau_v: Rate | None = None,
        eta: Rate = 0.01,
        radius: float | None = None,
        floor: float = 1e-2,
        v: Tensor | None = None,
        H: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        check_word("variant", variant, VARIANTS)
        small = problem.dim_y <= _INVERTIBLE and problem.m * problem.dim_y**2 <= _MOST_NUMBERS
        self.inverts = variant == "v1" or (variant == "auto" and small)
        self.moving = {"y": "s"} if self.inverts else {"y": "s", "v": "u"}
        self.alpha, self.beta = check_share("alpha", alpha), check_share("beta", beta)
        self.alpha_bar = check_share("alpha_bar", alpha if alpha_bar is None else alpha_bar)
        self.gamma = _check_gamma("gamma", gamma, alpha)
        self.gamma_bar = _check_gamma("gamma_bar", gamma if gamma_bar is None else gamma_bar, self.alpha_bar)
        self.tau, self.tau_v = (
            None if value is None else check_rate(name, value) for name, value in (("tau", tau), ("tau_v", tau_v))
        )
        self.radius = None if radius is None else check_positive("radius", radius)
        self.floor = check_positive("floor", floor)
        super().__init__(
            problem, x, blocks_per_step=blocks_per_step, samples_per_block=samples_per_block, eta=eta, **kwargs
        )
        self._x_before = self._x
        self._now = dict.fromkeys(self.moving, 0.0)
        self._last = dict.fromkeys(self.moving, 0.0)
        self._smoothness, self._stability = 0.0, 0.0
        self._undo: tuple[Tensor, Tensor] | None = None  # the rows of the last step and their H before it
        self._start_rows("v", v)
        self._start_rows("H", H)
        self._factors_of: tuple[Tensor, _Factors] | None = None  # the probabilities of the last step, and its factors

    @property
    def clock(self) -> dict[str, float]:
        return self._now

    def step(self) -> dict[str, float]:
        """One step; statistics of it."""
        rows, chance, lower, upper = self._draw()
        factors, blocks = self._factors(chance), self._rows(rows)
        new, old, taus = self._look(rows, blocks, lower, upper, factors)
        z = new[0]
        if self.steps:  # one sum over processes, of what this step adds
            z = torch.add(z, old[0], alpha=self.beta - 1)
        z = torch.add(self._sum(z), self._z, alpha=1 - self.beta)
        moved, clipped = self._track(blocks, new, old, factors)
        sizes = float(z.norm()), float(moved["s"].norm())
        if not math.isfinite(sum(sizes)):
            raise RuntimeError(
                f"step {self.steps}: the estimate of the hypergradient or of grad_y g is not finite; look for losses "
                "that are not, a lower problem that is not convex (give radius), or step sizes that are too large"
            )
        self._commit(rows, blocks, moved, taus, z)
        share = "H_clip_frac" if self.inverts else "v_clip_frac"
        return {"z_norm": sizes[0], "s_norm": sizes[1], "gamma_tau_L": self._stability, share: clipped}

    # -- of a step

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d = self.problem.dim_y
        return super()._shapes() | ({"H": (d, d)} if self.inverts else {})

    def _factors(self, chance: Tensor) -> _Factors:
        if self._factors_of is None or self._factors_of[0] is not chance:
            gamma = _gamma(self.gamma, self.alpha, chance).to(self._x)
            bar = _gamma(self.gamma_bar, self.alpha_bar, chance).to(self._x)
            most, most_bar = (float(factor.max()) if len(factor) else 0.0 for factor in (gamma, bar))
            self._factors_of = chance, _Factors(self._weights(chance), gamma, bar, most, most_bar)
        return self._factors_of[1]

    def _rows(self, rows: Tensor) -> _Rows:
        """The rows at this iterate and at the last one; v in its ball, H_i as it was before the last step."""
        now = self.table.gather(rows, self._now)
        before = dict(now)
        for name, velocity in self.moving.items():
            before[name] = torch.add(now[name], now[velocity], alpha=self._last[name])
        outside = 0.0
        if self.inverts:
            before["H"] = self._undone(rows, now["H"])
        else:
            now["v"], outside = self._in_ball(now["v"])
            before["v"], _ = self._in_ball(before["v"])
        visited = self.table.visited[rows]
        return _Rows(now, before, None if bool(visited.all()) else ~visited.to(self._x.device), outside)

    def _look(
        self, rows: Tensor, blocks: _Rows, lower: Any, upper: Any, factors: _Factors
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, float]]:
        """What this point and the last one give (`_estimate`), on the same samples, and the step sizes."""
        points = [(self._x, blocks.now), (self._x_before, blocks.before)][: 2 if self.steps else 1]
        if self.problem.points:
            now, before = points[0][1], points[-1][1]
            row = {name: torch.stack([now[name], before[name]]) for name in ("y", "H" if self.inverts else "v")}
            points = [(torch.stack([self._x, self._x_before]), row)]
        found: list[tuple[Tensor, ...]] = []
        for x, row in points:
            with self._same_noise():
                at = self._at(x, row["y"], rows)
                gradient = at.gradient(lower)
                if not found:
                    taus = self._rates(at, gradient, factors)
                found.append(self._estimate(at, gradient, upper, row, factors.weights, look=not found))
        if self.problem.points:
            found = list(zip(*found[0], strict=True))
        return found[0], found[-1], taus

    def _undone(self, rows: Tensor, H: Tensor) -> Tensor:
        if self._undo is None:
            return H
        last, before = self._undo
        same = (rows[:, None] == last).nonzero()
        H = H.clone()
        H[same[:, 0]] = before[same[:, 1]]
        return H

    def _estimate(
        self,
        at: Derivatives,
        gradient: Tensor,
        upper: Any,
        row: dict[str, Tensor],
        weights: Tensor,
        *,
        look: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """At a point: the hypergradient's estimate, grad_y g_i, and the sample of H_i, or of H_i v_i - grad_y f_i.

        With `look`, curvatures are noticed that are larger than those so far.
        """
        gn = gradient.detach()
        if not self.inverts:
            direction, gy, hv = at.direction(gradient, upper, row["v"], weights)
            if look:
                self._notice(row["v"], hv)
            return direction, gn, hv - gy
        gx, gy = at.upper(upper, weights)
        H = at.hessian(gradient)
        if look:
            self._notice(gn, (H @ gn[..., None])[..., 0])
        # A tracker without this step's samples, or their product would be biased; a new block has none.
        tracker = row["H"]
        if (fresh := _untracked(tracker)) is not None:
            tracker = torch.where(fresh[..., None, None], at_least(H, self.floor)[0], tracker)
        jv, _ = at.pull(gradient, torch.linalg.solve(tracker, gy), weights)
        return gx - jv, gn, H

    def _track(
        self, blocks: _Rows, new: tuple[Tensor, ...], old: tuple[Tensor, ...], factors: _Factors
    ) -> tuple[dict[str, Tensor], float]:
        """The new rows of the sampled blocks, and the share of v_i or H_i that were projected."""
        row = blocks.now
        s = _corrected(row["s"], new[1], old[1], self.alpha, factors.gamma, blocks.new)
        if self.inverts:
            fresh = _untracked(row["H"])
            H = _corrected(row["H"], new[2], old[2], self.alpha_bar, factors.gamma_bar, fresh)
            H, clipped = at_least(H, self.floor)
            return {"y": row["y"], "s": s, "H": H}, clipped
        u = _corrected(row["u"], new[2], old[2], self.alpha_bar, factors.gamma_bar, blocks.new)
        return {"y": row["y"], "v": row["v"], "s": s, "u": u}, blocks.outside

    def _commit(self, rows: Tensor, blocks: _Rows, moved: dict[str, Tensor], taus: dict[str, float], z: Tensor) -> None:
        self.table.scatter(rows, self._now, moved)
        if self.inverts:
            H = blocks.now["H"]
            fresh = _untracked(H)
            self._undo = (rows, H if fresh is None else torch.where(fresh[..., None, None], moved["H"], H))
        self._now = {name: self._now[name] + taus[name] for name in self._now}
        self._last = taus
        self._x_before = self._x
        self._move(z)

    def _rates(self, at: Derivatives, gradient: Tensor, factors: _Factors) -> dict[str, float]:
        """The step sizes of this step, held against the curvature so far, which is measured once in a while."""
        if self.steps % _REFRESH == 0 and gradient.numel():
            self._smoothness = max(self._smoothness, _largest_curvature(at, gradient))
        taus, stability = {}, 0.0
        for name, field, gamma in (("tau", "y", factors.most), ("tau_v", "v", factors.most_bar)):
            if field in self.moving:
                given = getattr(self, name)
                taus[field] = self._chosen(name, gamma) if given is None else rate(given, self.steps)
                stability = max(stability, guard(gamma, taus[field], self._smoothness, name))
        if stability > 1 >= self._stability:
            warnings.warn(f"gamma tau L = {stability:.3g} is above 1; the method may become unstable", stacklevel=3)
        self._stability = stability
        return taus

    def _chosen(self, name: str, gamma: float) -> float:
        """The step size where none is given; without blocks there is nothing to move."""
        if not len(self.owned):
            return 0.0
        if not self._smoothness:
            raise ValueError(f"{name} is chosen by the curvature of lower in y, which is 0; give {name}")
        return _SAFE / (max(gamma, _SAFE) * self._smoothness)

    def _notice(self, v: Tensor, hv: Tensor) -> None:
        """Keeps the largest curvature that products H_i v_i have shown."""
        if v.numel():
            shown = (hv.square().sum(-1) / v.square().sum(-1).clamp_min(1e-30)).nan_to_num_(0, 0, 0)
            self._smoothness = max(self._smoothness, float(shown.max()) ** 0.5)

    def _in_ball(self, v: Tensor) -> tuple[Tensor, float]:
        """The nearest v_i in the ball, and the share that had to move."""
        if self.radius is None:
            return v, 0.0
        size: Tensor = v.norm(dim=1, keepdim=True)
        outside = int((size > self.radius).sum()) / max(1, len(v))
        return v * (self.radius / size.clamp_min(1e-30)).clamp_max(1), outside

    # -- states

    def _state(self) -> dict[str, Tensor]:
        times = [self._now[name] for name in self.moving] + [self._last[name] for name in self.moving]
        times += [self._smoothness, self._stability]
        state = {"x_before": self._x_before, "times": torch.tensor(times, dtype=torch.float64)}
        if self._undo is not None:
            state |= {"undo.blocks": self.owned[self._undo[0]], "undo.H": self._undo[1]}
        return state

    def _clock_of(self, state: dict[str, Tensor]) -> dict[str, float]:
        return dict(zip(self.moving, state["times"].tolist(), strict=False))

    def _load_state(self, own: dict[str, Tensor], states: tuple[dict[str, Tensor], ...]) -> None:
        self._x_before, times, count = own["x_before"].to(self._x), own["times"].tolist(), len(self.moving)
        self._now = self._clock_of(own)
        self._last = dict(zip(self.moving, times[count : 2 * count], strict=True))
        self._smoothness, self._stability = times[2 * count :]
        row = {block: number for number, block in enumerate(self.owned.tolist())}
        undone = [
            (row[block], H)
            for state in states
            if "undo.blocks" in state
            for block, H in zip(state["undo.blocks"].tolist(), state["undo.H"], strict=True)
            if block in row
        ]
        self._undo = None
        if undone:
            self._undo = torch.tensor([r for r, _ in undone]), torch.stack([H for _, H in undone]).to(self._x)


def _corrected(tracked: Tensor, new: Tensor, old: Tensor, alpha: float, gamma: Tensor, fresh: Tensor | None) -> Tensor:
    """A block's estimate after a look at it; at the first look, where `fresh` says so, what was seen."""
    shape = (-1, *[1] * (tracked.ndim - 1))
    found = tracked.lerp(new, alpha).addcmul_(gamma.view(shape), new - old)
    return found if fresh is None else torch.where(fresh.view(shape), new, found)


def _untracked(H: Tensor) -> Tensor | None:
    """Blocks whose H_i [..., d, d] was not looked at or given yet, bool [...]: a tracker's diagonal is above 0."""
    fresh = H[..., 0, 0] == 0
    return fresh if bool(fresh.any()) else None


def _check_gamma(name: str, gamma: str | float, alpha: float) -> str | float:
    if isinstance(gamma, str) and gamma not in ("drift", "msvr"):
        raise ValueError(f"{name} must be 'drift', 'msvr' or a number, got {gamma!r}")
    if not isinstance(gamma, str):
        check_rate(name, gamma)
    if gamma == "msvr" and alpha > 0.5:
        raise ValueError(f"{name}='msvr' needs an alpha of at most 0.5, beyond which it explodes; got {alpha}")
    return gamma


def _gamma(gamma: str | float, alpha: float, chance: Tensor) -> Tensor:
    """gamma of each block, from its probability to be among a step's; 1 - alpha where that is 1."""
    if gamma == "drift":
        return 1 / chance - alpha
    if gamma == "msvr":
        return (1 / chance - 1) / (1 - alpha) + (1 - alpha)
    return torch.full_like(chance, float(gamma))


def guard(gamma: float, tau: float, smoothness: float, name: str) -> float:
    """gamma tau L: from 2 on the extrapolated steps diverge.

    Raises:
        ValueError: it is 2 or more.
    """
    product = gamma * tau * smoothness
    if product >= 2:
        raise ValueError(
            f"{name}={tau:g} is too large: gamma tau L = {product:.3g} (L = {smoothness:.3g} is the largest curvature "
            f"of a batch), and from 2 on the method diverges; take {name} <= {tau / product:.3g}, or a smaller gamma"
        )
    return product


def _largest_curvature(at: Derivatives, gradient: Tensor) -> float:
    """The largest eigenvalue of the blocks' H_i on this batch, from below."""
    v = torch.ones_like(gradient) + 0.1 * torch.arange(gradient.shape[-1], device=gradient.device).cos()
    size = v.norm(dim=-1, keepdim=True)
    for _ in range(_POWER_STEPS):
        v = at.pull(gradient, v / size.clamp_min(1e-30))[1]
        size = v.norm(dim=-1, keepdim=True)
    return float(size.max())
