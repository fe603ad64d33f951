"""Hooks of the sampler: which positions open in a step, with what tokens, and which are masked again.

An `order` that looks at logits makes the set of opened positions depend on the network: steps are then no longer those
of the diffusion, and an energy's correction within a step is exact for the step alone.

Letters: b texts in a step, T columns, n masked positions of all of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyquiet.checks import check_count, check_fraction, check_number, check_word
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.steps import Laws, State


@dataclass(frozen=True)
class Context:
    """What a hook is told of the texts in a step. It may change the tensors; the sampler has its own.

    Attributes:
        step: the number of the step.
        time, alpha, next_alpha: float64 [b], the time at its start, the share of the positions to fill that is clean
            then, and that at its end. Where an `order` alone decides, time and alpha follow from what is masked, and
            next_alpha is alpha.
        rows: int64 [b], the texts' numbers in the batch.
        tokens: int64 [b, T], with the mask token where they are masked.
        masked: bool [b, T], the positions that may open.
        fill: bool [b, T], all positions that had to be filled, now masked or not.
        places: int64 [b, T], positions, padding not counted.
        log_probs: float [b, T], of each filled token when it was revealed, by the denoiser's own law; else 0.
    """

    step: int
    time: Tensor
    alpha: Tensor
    next_alpha: Tensor
    rows: Tensor
    tokens: Tensor
    masked: Tensor
    fill: Tensor
    places: Tensor
    log_probs: Tensor
    _laws: Laws = field(repr=False)
    _candidates: Callable[[int], Tensor] = field(repr=False)

    @property
    def logits(self) -> Tensor:
        """The denoiser's logits of the masked positions, row by row, [n, V]; -inf for the mask token."""
        return self._laws.logits(self.masked.cpu()).clone()

    def candidates(self, k: int) -> Tensor:
        """k completions of each text, int64 [b, k, T]: everything masked drawn from the proposal."""
        return self._candidates(k)


Order = Callable[[Context], Tensor]  # -> bool [b, T], what opens: at least one masked position of each text
Tokens = Callable[[Context, Tensor], Tensor]  # and what opens, bool [b, T] -> int64 [b, T], read where it opens
Remask = Callable[[Context], Tensor]  # -> float [b, T]: the sigma of each position to fill, see `remdm`


def by_confidence(per_step: int) -> Order:
    """Opens the `per_step` positions of each text whose likeliest token is the likeliest; the leftmost of equal ones.

    Raises ValueError for fewer than one.
    """
    check_count("per_step", per_step, least=1)

    def order(context: Context) -> Tensor:
        best = _confidence(context).argsort(dim=1, descending=True, stable=True)[:, :per_step]
        opened: Tensor = torch.zeros_like(context.masked).scatter_(1, best, True)
        return opened & context.masked

    return order


def by_threshold(probability: float = 0.9) -> Order:
    """Opens all positions whose likeliest token has this probability or more, and always the likeliest one.

    Raises ValueError for a probability outside of [0, 1].
    """
    check_fraction("probability", probability)

    def order(context: Context) -> Tensor:
        confidence = _confidence(context)
        opened = confidence.exp() >= probability
        return context.masked & opened.scatter(1, confidence.argmax(1, keepdim=True), True)

    return order


def left_to_right_blocks(size: int, inside: Order | None = None) -> Order:
    """Fills blocks of `size` positions from left to right; `inside` says what opens in a block, by default all of it.

    Raises ValueError for an empty block.
    """
    check_count("size", size, least=1)

    def order(context: Context) -> Tensor:
        block = context.places // size
        first = block.masked_fill(~context.masked, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        masked = context.masked & (block == first)
        return masked if inside is None else inside(replace(context, masked=masked))

    return order


def _confidence(context: Context) -> Tensor:
    """The log-probability of each masked position's likeliest token, [b, T]; -inf elsewhere."""
    portions = context._laws.chunks(context.masked.cpu())
    found = torch.cat([logits.amax(-1) - logits.logsumexp(-1) for _, logits in portions])
    confidence = torch.full(context.masked.shape, -torch.inf, dtype=found.dtype, device=found.device)
    confidence[context.masked] = found
    return confidence


RULES = {"cap": 0.008, "rescale": 0.015, "conf": 1.0, "loop": 0.02}  # and their eta


@dataclass(frozen=True)
class ReMDM:
    """A remasking rule of arXiv 2503.00307; see `remdm`."""

    rule: str
    eta: float
    t_on: float
    t_off: float
    alpha_on: float

    def alphas(self, schedule: Schedule, grid: Tensor) -> Tensor:
        """The share of clean tokens at the times of the grid, [K + 1]."""
        if self.rule != "loop":
            return schedule.alpha(grid)
        before = self.alpha_on * schedule.alpha(((grid - self.t_on) / (1 - self.t_on)).clamp(0, 1))
        after = self.alpha_on + (1 - self.alpha_on) * schedule.alpha((grid / self.t_off).clamp(0, 1))
        return torch.where(grid > self.t_off, before, after)

    def __call__(self, context: Context) -> Tensor:
        """sigma, float64 [b, T]."""
        most = ((1 - context.next_alpha) / context.alpha).clamp(max=1)[:, None]  # inf becomes 1 where nothing is clean
        if self.rule == "conf":
            return self._by_confidence(context, most)
        sigma = self.eta * most if self.rule == "rescale" else most.clamp(max=self.eta)
        if self.rule == "loop":
            looping = (context.time <= self.t_on) & (context.time > self.t_off)
            sigma = torch.where(looping[:, None], sigma, 0.0)
        return sigma.expand(context.masked.shape)

    def _by_confidence(self, context: Context, most: Tensor) -> Tensor:
        clean = context.fill & ~context.masked
        confidence = context.log_probs.double().exp()
        shares = (-confidence).masked_fill(~clean, -torch.inf).softmax(1)
        # What is masked takes the mean of what the clean ones have, (1 - (1 - alpha)^n) / (n alpha), so that as many
        # tokens are clean in the mean as without remasking.
        n, alpha = context.fill.sum(1, keepdim=True), context.alpha[:, None]
        mean = torch.where(alpha > 0, -torch.expm1(n * torch.log1p(-alpha)) / (n * alpha), 1.0)
        return self.eta * most * torch.where(clean, shares, mean)


def remdm(
    rule: str = "cap",
    *,
    eta: float | None = None,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
) -> ReMDM:
    """Remasking that leaves the share of clean tokens at every time as the schedule has it (arXiv 2503.00307).

    In a step from t to s a clean token is masked again with probability sigma <= min(1, (1 - alpha(s)) / alpha(t)), and
    a masked one opens with probability (alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t)).

    Args:
        rule: "cap": sigma is eta, where it may be; "rescale": eta times what it may be at most; "conf": that times a
            softmax over clean positions of minus the probability that the token had when it was revealed, so that
            tokens of little confidence go first; "loop": without remasking until time t_on, when alpha is alpha_on;
            then alpha stays there and sigma is eta until t_off; then without remasking to the end.
        eta: None is the published one of the rule: 0.008, 0.015, 1, 0.02.

    Raises:
        ValueError, TypeError: the rule is unknown, or a number out of range or none.
    """
    check_word("rule", rule, RULES)
    eta = check_fraction("eta", RULES[rule] if eta is None else eta)
    if not 0 < check_number("t_off", t_off) < check_number("t_on", t_on) < 1:
        raise ValueError(f"t_off and t_on must be 0 < t_off < t_on < 1, got {t_off} and {t_on}")
    if not 0 < check_number("alpha_on", alpha_on) < 1:
        raise ValueError(f"alpha_on must be in (0, 1), got {alpha_on}")
    return ReMDM(rule, eta, t_on, t_off, alpha_on)


def check_sigma(sigma: Tensor, state: State, fill: Tensor, most: Tensor) -> Tensor:
    """The sigmas of a remask hook, float64 on the CPU.

    Raises ValueError unless they are [b, T], and in [0, most], [b], at the positions to fill, bool [b, T].
    """
    if not isinstance(sigma, Tensor) or sigma.shape != fill.shape:
        raise ValueError(f"remask must return a tensor [b, T] = {list(fill.shape)}, got {_described(sigma)}")
    sigma, limit = sigma.double().cpu(), most[:, None]
    if (wrong := ~((sigma >= 0) & (sigma <= limit * (1 + 1e-6) + 1e-12)) & fill).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"remask gave sigma {float(sigma[row, column])} for text {int(state.rows[row])} at {column}; in step "
            f"{state.step} it must be in [0, {float(most[row])}]"
        )
    return torch.minimum(sigma, limit)


def check_opened(opened: Tensor, state: State, *, some: bool = True) -> Tensor:
    """What an order hook opens, on the CPU; ValueError unless it is bool [b, T], masked and, if `some`, not empty."""
    if not isinstance(opened, Tensor) or opened.dtype != torch.bool or opened.shape != state.masked.shape:
        raise ValueError(f"order must return bool [b, T] = {list(state.masked.shape)}, got {_described(opened)}")
    opened = opened.cpu()
    if (wrong := (opened & ~state.masked).any(1)).any():
        what = "what is not masked"
    elif some and (wrong := ~opened.any(1)).any():
        what = "nothing"
    else:
        return opened
    raise ValueError(f"order opens {what} in text {int(state.rows[wrong][0])}, step {state.step}")


def check_chosen(tokens: Tensor, state: State, vocab_size: int, mask_id: int) -> Tensor:
    """The tokens of a tokens hook; ValueError unless they are int64 [b, T], and tokens other than the mask's."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.shape != state.tokens.shape:
        raise ValueError(f"tokens must return int64 [b, T] = {list(state.tokens.shape)}, got {_described(tokens)}")
    tokens = tokens.to(state.tokens.device)
    wrong = ((tokens < 0) | (tokens >= vocab_size) | (tokens == mask_id)) & state.opened.to(tokens.device)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"tokens returned {int(tokens[row, column])} for text {int(state.rows[row])} at {column}; it must be in "
            f"0..{vocab_size - 1} and not the mask id {mask_id}"
        )
    return tokens


def _described(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
