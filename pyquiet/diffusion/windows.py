"""Texts longer than the denoiser sees: a window that moves on, its prompt what is filled (arXiv 2406.07524).

Letters: B texts, T columns, b texts with something to fill in a window, W positions of the window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyquiet.diffusion.energy import Energy
from pyquiet.diffusion.inputs import Texts, check_context, check_energy
from pyquiet.diffusion.modeling import Denoiser
from pyquiet.diffusion.padding import leftward
from pyquiet.diffusion.plan import schedule_first
from pyquiet.diffusion.session import Session


def windows(texts: Texts, context: int, stride: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The windows with anything left to fill: number, the texts' rows int64 [b], and their columns int64 [b, W].

    Windows begin every `stride` positions, padding not counted; the last one is the first that reaches the end.
    """
    # Padding goes last, so that windows of all texts stand in the same columns.
    columns, left = leftward(texts.real), texts.fill.clone()
    longest = int(texts.real.sum(1).max())
    for number, start in enumerate(range(0, max(longest - context + stride, 1), stride)):
        where = columns[:, start : start + context]
        rows = left.gather(1, where).any(1).nonzero().flatten()
        if len(rows):
            left[rows[:, None], where[rows]] = False
            yield number, rows, where[rows]


def check_texts(denoiser: Denoiser, energy: Energy | None, texts: Texts, context: int | None, stride: int) -> None:
    """Raises ValueError for texts that denoiser or energy do not take, in the columns that they will see at once."""
    whole = texts.tokens.shape[1]
    check_context(denoiser, min(whole, context or whole))
    if energy is None:
        return
    rows = texts.fill.any(1).nonzero().flatten()
    at_once = [(0, rows, torch.arange(whole).expand(len(rows), -1))] if len(rows) else []
    for _, rows, columns in at_once if context is None else windows(texts, context, stride):
        check_energy(energy, texts, rows, columns)


def slide(session: Session, steps: int, context: int, stride: int) -> None:
    """Fills the texts of a session window by window, K steps each, by the schedule-first sampler."""
    for number, rows, where in windows(session.texts, context, stride):
        _fill_window(session, rows, where, steps, number * steps)


def _fill_window(session: Session, rows: Tensor, where: Tensor, steps: int, first: int) -> None:
    """Fills some texts, rows int64 [b], in their columns `where` int64 [b, W]; steps are numbered from `first` on."""
    device, whole = session.tokens.device, session.texts
    at = rows[:, None].to(device), where.to(device)
    on_cpu = rows[:, None], where
    fill = session.masked[on_cpu] & whole.real[on_cpu]
    texts = Texts(session.tokens[at], fill, whole.real[on_cpu], whole.places[on_cpu], whole.sequences[rows])
    part = Session(
        session.denoiser,
        texts,
        session.options,
        session.schedule,
        tokens=session.tokens_hook,
        on_step=lambda step, time, tokens: _show(session, step, time, at, tokens),
    )
    part.follow(schedule_first(texts, session.schedule, steps, session.options.seed), first=first)
    session.tokens[at], session.log_probs[at] = part.tokens, part.log_probs
    session.masked[on_cpu] = part.masked
    session.reveal_step[on_cpu] = torch.where(fill, part.reveal_step, session.reveal_step[on_cpu])
    for name in ("denoiser_calls", "energy_passes", "depth"):
        getattr(session, name)[rows] += getattr(part, name)
    session.steps_run += part.steps_run
    session.entries += [entry.of(rows) for entry in part.entries]


def _show(session: Session, step: int, time: float, at: tuple[Tensor, Tensor], tokens: Tensor) -> None:
    if session.on_step is not None:
        session.on_step(step, time, session.tokens.clone().index_put_(at, tokens))
