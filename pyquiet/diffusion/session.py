"""Texts being filled, step by step: what is decided of each, what it cost, and how well its candidates were weighed.

Letters: B texts, T columns, b texts that take part in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyquiet.diffusion.hooks import Context, Order, Remask, Tokens, check_chosen, check_opened, check_sigma
from pyquiet.diffusion.inputs import Options, Texts
from pyquiet.diffusion.modeling import Denoiser
from pyquiet.diffusion.plan import Plan, reveal_uniforms
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.steps import Chooser, Chosen, Laws, State

OnStep = Callable[[int, float, Tensor], Any]


@dataclass(frozen=True)
class Trace:
    """What each step did to each text that it opened something in: one entry a step and text, in the order of steps.

    Attributes:
        rows, steps: int64 [entries], the text's number in the batch and the number of the step.
        times: float64, at which the step begins.
        opened, candidates: int64, positions that opened, and completions they were picked from (1: drawn as they are).
        ess, log_normalizer: float64, of the candidates' weights: their effective number, in [1, candidates], and the
            logarithm of their mean, an estimate of log Z; 1 and 0 where nothing was picked.
    """

    rows: Tensor
    steps: Tensor
    times: Tensor
    opened: Tensor
    candidates: Tensor
    ess: Tensor
    log_normalizer: Tensor

    @property
    def corrected(self) -> Tensor:
        """The entries of steps in which candidates were weighed, bool [entries]."""
        return self.candidates > 1

    def of(self, rows: Tensor) -> Trace:
        """The same, its texts being those of the numbers `rows`."""
        return replace(self, rows=rows[self.rows])


class Session:
    """Texts being filled by a denoiser. The counters are int64 [B] on the CPU."""

    def __init__(
        self,
        denoiser: Denoiser,
        texts: Texts,
        options: Options,
        schedule: Schedule,
        *,
        tokens: Tokens | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.denoiser, self.texts, self.options, self.schedule = denoiser, texts, options, schedule
        self.tokens, self.masked = texts.tokens.clone(), texts.fill.clone()
        self.tokens_hook, self.on_step, self._choose = tokens, on_step, Chooser(options, texts)
        self.log_probs = torch.zeros(self.tokens.shape, device=self.tokens.device)
        self.reveal_step = torch.full(self.masked.shape, -1)
        zeros = torch.zeros(len(self.masked), dtype=torch.int64)
        self.denoiser_calls, self.energy_passes, self.depth = zeros.clone(), zeros.clone(), zeros.clone()
        self.steps_run = 0
        self.entries: list[Trace] = []
        self._kept: Tensor | None = None  # hidden states of the whole batch, where they are reused
        self._stale = torch.ones(len(self.masked), dtype=torch.bool)

    # -- ways through

    def follow(self, plan: Plan, *, reuse: bool = False, first: int = 0) -> None:
        """All steps of a plan. With `reuse` a text that has not changed since the last call is not computed again."""
        for turn in plan.turns(first):
            if reuse:
                self._refresh(turn.rows)
            laws = self._laws(turn.rows, self._recall if reuse else self._call)
            if plan.everywhere and not reuse:  # the call belongs to the step, whether or not it opens anything
                laws.hidden()
            keep = turn.opened.any(1)
            if keep.any():
                self._open(self._state(turn.step, turn.time, turn.rows, turn.opened, laws).select(keep))
            self._end(turn.step, turn.time)

    def ordered(self, order: Order) -> None:
        """Until nothing is masked, what a hook opens."""
        step = 0
        while len(rows := self.masked.any(1).nonzero().flatten()):
            alpha = 1 - self.masked[rows].sum(1) / self.texts.fill[rows].sum(1).double()
            time, laws = self.schedule.time(alpha), self._laws(rows, self._call)
            state = self._state(step, time, rows, self.masked[rows], laws)
            context = self._context(state, alpha, alpha)
            self._open(state.opening(check_opened(order(context), state)))
            self._end(step, time)
            step += 1

    def remasked(self, remask: Remask, order: Order | None, steps: int) -> None:
        """K steps in which texts may be masked again, by a hook; another may say what opens. The last opens all."""
        grid = self.schedule.grid(steps)
        alphas = getattr(remask, "alphas", lambda schedule, grid: schedule.alpha(grid))(self.schedule, grid)
        rows = self.texts.fill.any(1).nonzero().flatten()
        for step in range(steps if len(rows) else 0):
            time, alpha, next_alpha = (x.expand(len(rows)) for x in (grid[step], alphas[step], alphas[step + 1]))
            state = self._state(step, time, rows, self.masked[rows], self._laws(rows, self._call))
            context = self._context(state, alpha, next_alpha)
            closed = torch.zeros_like(state.masked)
            opened = state.masked
            if step < steps - 1:
                fill = self.texts.fill
                most = ((1 - next_alpha) / alpha if order is None else torch.ones_like(alpha)).clamp(max=1)
                sigma = check_sigma(remask(context), state, fill[rows], most)
                u = torch.ones(sigma.shape, dtype=torch.float64)
                u[fill[rows]] = reveal_uniforms(self.texts, fill, self.options.seed, step)
                closed = ~state.masked & (u < sigma)
                if order is None:
                    chance = (next_alpha[:, None] - (1 - sigma) * alpha[:, None]) / (1 - alpha[:, None])
                    opened = state.masked & (u < chance)
                elif state.masked.any():
                    opened = check_opened(order(context), state, some=False)
            keep = opened.any(1)
            if keep.any():
                self._open(state.opening(opened).select(keep))
            self._close(rows, closed)
            self._end(step, time)

    # -- parts of a step

    def _laws(self, rows: Tensor, call: Callable[[Tensor], Tensor]) -> Laws:
        return Laws(self.denoiser, call, rows)

    def _call(self, rows: Tensor) -> Tensor:
        """The network's hidden states of some texts as they are; counted."""
        self.denoiser_calls[rows] += 1
        self.depth[rows] += 1
        on_device, real = rows.to(self.tokens.device), self.texts.real[rows]
        attention = None if bool(real.all()) else real.long().to(self.tokens.device)
        return self.denoiser.hidden(self.tokens[on_device], attention)

    def _refresh(self, rows: Tensor) -> None:
        """Compute those that have changed since they were computed."""
        stale = rows[self._stale[rows]]
        if len(stale):
            hidden = self._call(stale)
            if self._kept is None:
                self._kept = hidden.new_empty(len(self.masked), *hidden.shape[1:])
            self._kept[stale.to(hidden.device)] = hidden
            self._stale[stale] = False

    def _recall(self, rows: Tensor) -> Tensor:
        assert self._kept is not None, "refreshed before"
        return self._kept[rows.to(self._kept.device)]

    def _state(self, step: int, time: Tensor, rows: Tensor, opened: Tensor, laws: Laws) -> State:
        return State(step, time, rows, self.tokens[rows.to(self.tokens.device)], self.masked[rows], opened, laws)

    def _context(self, state: State, alpha: Tensor, next_alpha: Tensor) -> Context:
        device, rows = self.tokens.device, state.rows
        told = {"time": state.time, "alpha": alpha, "next_alpha": next_alpha, "rows": rows, "masked": state.masked}
        told |= {"fill": self.texts.fill[rows], "places": self.texts.places[rows]}
        return Context(
            step=state.step,
            tokens=state.tokens.clone(),
            log_probs=self.log_probs[rows.to(device)],
            _laws=state.laws,
            _candidates=lambda k: self._choose.candidates(state, k),
            **{name: x.clone().to(device) for name, x in told.items()},
        )

    def _open(self, state: State) -> None:
        """Choose and write the tokens of what opens: something in every text of the state."""
        chosen = self._choose(state) if self.tokens_hook is None else self._by_hook(self.tokens_hook, state)
        device = self.tokens.device
        rows, opened = state.rows.to(device), state.opened.to(device)
        self.tokens[rows] = torch.where(opened, chosen.tokens, state.tokens)
        self.log_probs[rows] = torch.where(opened, chosen.log_probs.float(), self.log_probs[rows])
        self.masked[state.rows] = state.masked & ~state.opened
        self.reveal_step[state.rows] = self.reveal_step[state.rows].masked_fill(state.opened, state.step)
        self._stale[state.rows] = True
        self.energy_passes[state.rows] += chosen.candidates.where(chosen.rounds > 0, 0)
        self.depth[state.rows] += chosen.rounds
        steps = torch.full_like(state.rows, state.step)
        self.entries.append(
            Trace(
                state.rows,
                steps,
                state.time,
                state.opened.sum(1),
                chosen.candidates,
                chosen.ess,
                chosen.log_normalizer,
            )
        )

    def _by_hook(self, hook: Tokens, state: State) -> Chosen:
        alpha = self.schedule.alpha(state.time)
        context = self._context(state, alpha, alpha)
        tokens = hook(context, state.opened.to(state.tokens.device))
        tokens = check_chosen(tokens, state, self.denoiser.vocab_size, self.denoiser.mask_id)
        log_probs = torch.zeros(tokens.shape, device=tokens.device)
        for part, logits in state.laws.chunks(state.opened):
            where = state.opened.to(tokens.device)
            chosen = logits.log_softmax(-1).gather(-1, tokens[where][part, None])[:, 0]
            row, column = (x[part] for x in where.nonzero(as_tuple=True))
            log_probs[row, column] = chosen.float()
        ones = torch.ones_like(state.rows)
        return Chosen(tokens, log_probs, ones, ones - 1, ones.double(), ones.double() - 1)

    def _close(self, rows: Tensor, closed: Tensor) -> None:
        """Mask positions bool [b, T] again."""
        if not closed.any():
            return
        self.masked[rows] |= closed
        rows, closed = rows.to(self.tokens.device), closed.to(self.tokens.device)
        self.tokens[rows] = self.tokens[rows].masked_fill(closed, self.denoiser.mask_id)
        self.log_probs[rows] = self.log_probs[rows].masked_fill(closed, 0)

    def _end(self, step: int, time: Tensor) -> None:
        self.steps_run += 1
        if self.on_step is not None:
            self.on_step(step, float(time.max()), self.tokens.clone())

    def trace(self) -> Trace:
        """The entries of all steps in one."""
        if not self.entries:
            ints, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
            return Trace(ints, ints, floats, ints, ints, floats, floats)
        return Trace(*(torch.cat(parts) for parts in zip(*(vars(e).values() for e in self.entries), strict=True)))
