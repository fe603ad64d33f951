"""Samplers of masked diffusion with an energy, written out: what they draw from after any number of steps.

Letters: T positions, M of them masked at the start, m still masked, V vocabulary with the mask token, W without it,
k candidates, n partly filled texts, C = W^m completions.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from pyquiet.diffusion.energy import as_energy
from pyquiet.diffusion.modeling import as_denoiser
from pyquiet.diffusion.schedule import Schedule
from pyquiet.randomness import process_logits

_MOST_STATES = 1 << 14
_NODE = 0.05  # of the quadrature in `resampled_law`, whose error falls like exp(-pi^2 / _NODE)


def resampled_law(log_proposal: Tensor, log_weights: Tensor, k: int) -> Tensor:
    """The law of one of k draws from a proposal, picked in proportion to its weight: probabilities float64 [n, C].

    The exact law of sampling importance resampling: a cell of proposal q and weight w has k q w E[1 / (w + S)], S the
    weights of the k - 1 others, and 1 / x is the integral of exp(-s x), which makes the expectation a (k - 1)-th power.

    Args:
        log_proposal, log_weights: [n, C]; either may hold -inf. Where all k weights are 0, the pick is uniform.
        k: 1 gives the proposal back; for more it tends to the law proportional to q w.
    """
    laws = []
    for log_q, log_w in zip(log_proposal.double(), log_weights.double(), strict=True):
        q, positive = log_q.exp(), (log_w > -math.inf) & (log_q > -math.inf)
        law = q * q[~positive].sum() ** (k - 1) * ~positive
        if positive.any():
            log_w = log_w[positive] - log_w[positive].max()
            # Outside of these bounds of log s the integrand is below exp(-38) of what it sums to.
            log_s = torch.arange(-38.0, 4.0 - float(log_w.min()), _NODE, dtype=torch.float64)
            decay = (-(log_s[:, None] + log_w).exp()).exp()  # [nodes, C]
            others = (decay @ q[positive] + q[~positive].sum()) ** (k - 1)
            law[positive] = k * q[positive] * log_w.exp() * (decay * (log_s.exp() * others)[:, None]).sum(0) * _NODE
        laws.append(law)
    return torch.stack(laws)


@torch.no_grad()
def enumerate_diffusion(
    denoiser: Any,
    energy: Any = None,
    *,
    input_ids: Tensor,
    mask: Tensor | None = None,
    steps: int | None,
    candidates: int | None = None,
    mode: str = "standard",
    window: float = 1.0,
    energy_temperature: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    correct: bool = True,
    schedule: Schedule | None = None,
) -> Tensor:
    """Log-probabilities, float64 [V, ..., V], of all texts that `pyquiet.diffuse` may return with these options.

    One axis a masked position, in ascending order, as `exactness_test` takes it. Nothing is sampled: a step takes the
    probability of every partly filled text to those that have more of it filled (arXiv 2410.21357, 2406.07524).

    Args:
        denoiser: anything `pyquiet.diffusion.as_denoiser` takes.
        energy: anything `as_energy` takes; None is plain masked diffusion.
        input_ids: int64 [T], the text.
        mask: bool [T], True where it is to be filled; None: where input_ids holds the mask token.
        steps: K; None is the limit of ever more steps, in which one position at a time is revealed. The energy's time
            is then NaN, and the window must be 1.
        candidates: k; None is the limit of ever more, the residual model itself.
        mode, window, energy_temperature, temperature, top_k, top_p, banned, correct, schedule: as of `pyquiet.diffuse`.

    Raises:
        ValueError: nothing to fill, more than 2^14 partly filled texts, shapes that do not fit, or no steps and a
            window.
    """
    denoiser, schedule = as_denoiser(denoiser), schedule or Schedule()
    V, mask_id = denoiser.vocab_size, denoiser.mask_id
    if mask is None:
        mask = input_ids == mask_id
    if input_ids.dim() != 1 or mask.shape != input_ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"input_ids and mask (bool) must have one shape [T], got {list(input_ids.shape)} and {mask.dtype} "
            f"{list(mask.shape)}"
        )
    if steps is None and window != 1:
        raise ValueError(f"window must be 1 where steps is None, got {window}")
    M = int(mask.sum())
    if M == 0 or V**M > _MOST_STATES:
        raise ValueError(f"mask leaves {M} positions, {V}^{M} texts; there must be 1 .. 2^14 to write them out")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "banned": banned}
    step = _Step(denoiser, energy, input_ids, mask, candidates, mode, energy_temperature, correct, options)
    law = torch.zeros(V**M, dtype=torch.float64)
    law[mask_id * step.place.sum()] = 1  # all masked
    if steps is None:
        for _ in range(M):
            law = step(law, None, math.nan, active=True)
        return law.log().view([V] * M)
    grid = schedule.grid(steps)
    for t, rho in zip(grid[:-1].tolist(), schedule.reveal(grid[:-1], grid[1:]).tolist(), strict=True):
        law = step(law, rho, t, active=t >= 1 - window - 1e-9)  # as the sampler
    return law.log().view([V] * M)


class _Step:
    """Takes a law [V^M] of partly filled texts one step on. `place[i]` is what position i counts in a text's number."""

    def __init__(
        self, denoiser: Any, energy: Any, input_ids: Tensor, mask: Tensor, candidates: int | None, mode: str,
        energy_temperature: float, correct: bool, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.denoiser, self.energy = denoiser, None if energy is None else as_energy(energy)
        self.candidates, self.reveal_set, self.tau = candidates, mode == "reveal_set", energy_temperature
        self.correct, self.options = correct, options
        V, M = denoiser.vocab_size, int(mask.sum())
        self.place = V ** torch.arange(M - 1, -1, -1)
        self.texts = input_ids.cpu().repeat(V**M, 1)
        self.filled = torch.cartesian_prod(*[torch.arange(V)] * M).view(-1, M)
        self.texts[:, mask] = self.filled
        self.positions = mask.nonzero()[:, 0]
        self.tokens = torch.arange(V)[torch.arange(V) != denoiser.mask_id]
        self.known: dict[Any, Any] = {}

    def __call__(self, law: Tensor, rho: float | None, time: float, *, active: bool) -> Tensor:
        """`rho` is the probability that a position is revealed; None: exactly one is, all being equally likely."""
        masked = self.filled == self.denoiser.mask_id
        after = law.where(~masked.any(1), 0.0)
        for pattern in masked.unique(dim=0):
            columns = pattern.nonzero()[:, 0].tolist()
            rows = ((masked == pattern).all(1) & (law > 0)).nonzero()[:, 0]
            if not columns or not len(rows):
                continue
            m = len(columns)
            for u in range(m + 1) if rho is not None else [1]:
                share = rho**u * (1 - rho) ** (m - u) if rho is not None else 1 / m
                for chosen in itertools.combinations(range(m), u):
                    place = self.place[[columns[i] for i in chosen]]
                    moved = ((self._words(u) - self.denoiser.mask_id) * place).sum(1)  # [W^u]
                    arriving = share * law[rows, None] * self._law_of(chosen, rows, columns, time, active)
                    after.index_add_(0, (rows[:, None] + moved).flatten(), arriving.flatten())
        return after

    def _words(self, u: int) -> Tensor:
        """All words [W^u, u] of u tokens."""
        return torch.cartesian_prod(*[self.tokens] * u).view(-1, u) if u else self.tokens.new_zeros(1, 0)

    def _law_of(self, chosen: tuple[int, ...], rows: Tensor, columns: list[int], time: float, active: bool) -> Tensor:
        """The law [n, W^u] of the words that a step writes at the chosen ones of the masked columns."""
        weigh = active and self.energy is not None
        key = tuple(rows.tolist()), time if weigh and not self.energy.time_free else weigh  # type: ignore[union-attr]
        n, m, W = len(rows), len(columns), len(self.tokens)

        def arranged(x: Tensor) -> Tensor:
            """[n, C] -> [n, W^(m - u), W^u]"""
            hidden = [i for i in range(m) if i not in chosen]
            return x.view(n, *[W] * m).permute(0, *(i + 1 for i in (*hidden, *chosen))).reshape(n, -1, W ** len(chosen))

        if key not in self.known:
            self.known[key] = self._weighed(rows, columns, time, weigh)
        log_q, log_w = self.known[key]
        if self.reveal_set and weigh:
            log_q, log_w = arranged(log_q), arranged(log_w)
            rest = log_q.logsumexp(-1, keepdim=True)
            words = (log_q - rest).where(rest > -math.inf, 0.0)
            law = rest.exp() * self._pick(words.flatten(0, 1), log_w.flatten(0, 1)).view_as(words)
        else:
            if (key, "pick") not in self.known:
                self.known[key, "pick"] = self._pick(log_q, log_w) if weigh else log_q.exp()
            law = arranged(self.known[key, "pick"])
        return law.sum(1)

    def _pick(self, log_q: Tensor, log_w: Tensor) -> Tensor:
        if self.candidates is None:
            dead = (log_w == -math.inf).all(-1, keepdim=True)  # the pick is then uniform, as of finitely many
            return (log_q + log_w.where(~dead, 0.0)).softmax(-1)
        return resampled_law(log_q, log_w, self.candidates)

    def _weighed(self, rows: Tensor, columns: list[int], time: float, weigh: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completions under the proposal, and their log-weights, [n, C]."""
        texts, positions, words = self.texts[rows], self.positions[columns], self._words(len(columns))
        hidden = self.denoiser.hidden(texts.to(self.denoiser.device))[:, positions]
        logits = self.denoiser.head(hidden.flatten(0, 1)).double().cpu()

        def of_words(logits: Tensor) -> Tensor:
            table = logits.log_softmax(-1).view(len(rows), len(columns), -1)
            return table[:, torch.arange(len(columns)), words].sum(-1)

        log_q = of_words(process_logits(logits, **self.options))
        if not weigh:
            return log_q, log_q
        drawn = log_q > -math.inf
        log_mu = of_words(process_logits(logits, banned=self.options["banned"])).where(drawn, 0.0)
        whole = texts[:, None].repeat(1, len(words), 1)
        whole[..., positions] = words
        times = torch.full((len(rows),), time, dtype=torch.float64)
        where = self.denoiser.device
        energies = self.energy(*(x.to(where) for x in (whole, texts, times, log_mu.float())))  # type: ignore[misc]
        log_w = -energies.double().cpu() / self.tau
        if self.correct:
            log_w = log_w + (log_mu - log_q)
        return log_q, log_w.where(drawn, -math.inf)
