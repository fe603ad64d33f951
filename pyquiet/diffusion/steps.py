"""One step: k candidates for all that is masked, and the pick of one by its energy (arXiv 2410.21357).

Letters: b texts of the step, T columns, n masked positions of all of them, k candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyquiet.diffusion.inputs import Options, Texts
from pyquiet.diffusion.modeling import Denoiser, native_head, widened
from pyquiet.heads import rows_at_once
from pyquiet.kernels.importance_resampling import draw_candidates, resample
from pyquiet.randomness import Purpose, Stream


class Laws:
    """What the denoiser says of b texts in one state. The network is called when it is first asked."""

    def __init__(self, denoiser: Denoiser, call: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        """call: numbers of rows int64 [b] -> hidden states [b, T, d]."""
        self._denoiser, self._call, self.rows = denoiser, call, rows
        self._hidden: Tensor | None = None
        self._known: tuple[Tensor, Tensor] | None = None  # positions bool [b, T], their logits

    def hidden(self) -> Tensor:
        """Hidden states [b, T, d]."""
        if self._hidden is None:
            self._hidden = self._call(self.rows)
        return self._hidden

    def select(self, keep: Tensor) -> Laws:
        """Those of some of the texts, bool [b]."""
        if bool(keep.all()):
            return self
        some = Laws(self._denoiser, self._call, self.rows[keep])
        if self._hidden is not None:
            some._hidden = self._hidden[keep.to(self._hidden.device)]
        if self._known is not None:
            where, logits = self._known
            some._known = where[keep], logits[keep[where.nonzero()[:, 0]].to(logits.device)]
        return some

    def logits(self, where: Tensor) -> Tensor:
        """Logits [n, V] of the positions bool [b, T], row by row, kept for who asks next."""
        if not where.any():
            return torch.empty(0, self._denoiser.vocab_size, device=self._denoiser.device)
        if (known := self._of_known(where)) is None:
            known = torch.cat([logits for _, logits in self.chunks(where)])
            self._known = where.clone(), known
        return widened(known)

    def chunks(self, where: Tensor, *, native: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """The same in portions, each with the part of the n rows that it is; kept if there is but one.

        native: as kernels draw from them, which may be half precision.
        """
        finish = (lambda logits: logits) if native else widened
        n = int(where.sum())
        if (known := self._of_known(where)) is not None:
            yield slice(0, n), finish(known)
            return
        hidden = self.hidden()
        row, column = (x.to(hidden.device) for x in where.nonzero(as_tuple=True))
        size = rows_at_once(self._denoiser.vocab_size)
        head = native_head(self._denoiser, hidden.dtype) if native else self._denoiser.head
        for part in _portions(n, size):
            logits = self._checked(head(hidden[row[part], column[part]]), part.stop - part.start)
            if n <= size:
                self._known = where.clone(), logits
            yield part, finish(logits)

    def _checked(self, logits: Tensor, rows: int) -> Tensor:
        """What a head has returned; ValueError where tokens drawn from it would be none."""
        V, mask_id = self._denoiser.vocab_size, self._denoiser.mask_id
        if logits.shape != (rows, V):
            raise ValueError(f"denoiser: its head must return logits [R, V] = [{rows}, {V}], got {list(logits.shape)}")
        if bool((logits[:, mask_id] > -torch.inf).any()):
            raise ValueError(f"denoiser: its head must return -inf for the mask token {mask_id}, got a probability")
        return logits

    def _of_known(self, where: Tensor) -> Tensor | None:
        """The logits of the positions, if they are among those that are known."""
        if self._known is None or bool((where & ~self._known[0]).any()):
            return None
        among, logits = self._known
        return logits if torch.equal(among, where) else logits[where[among].to(logits.device)]


@dataclass(frozen=True)
class State:
    """b texts in a step. `masked` and `opened` are bool [b, T], on the CPU; `tokens` [b, T] hold masks."""

    step: int
    time: Tensor
    rows: Tensor
    tokens: Tensor
    masked: Tensor
    opened: Tensor
    laws: Laws

    def opening(self, opened: Tensor) -> State:
        """The same with other positions to open."""
        return replace(self, opened=opened)

    def select(self, keep: Tensor) -> State:
        """Some of the texts, bool [b]."""
        on_device = keep.to(self.tokens.device)
        return State(
            self.step,
            self.time[keep],
            self.rows[keep],
            self.tokens[on_device],
            self.masked[keep],
            self.opened[keep],
            self.laws.select(keep),
        )


@dataclass(frozen=True)
class Chosen:
    """What a step chose for b texts: tokens int64 [b, T] and their log-probabilities [b, T], and how.

    Both mean something at positions that open. `candidates` and `rounds` of the energy are int64 [b], `ess` and
    `log_normalizer` float64 [b], all on the CPU; 1, 0, 1 and 0 where nothing was corrected.
    """

    tokens: Tensor
    log_probs: Tensor
    candidates: Tensor
    rounds: Tensor
    ess: Tensor
    log_normalizer: Tensor

    def select(self, keep: Tensor) -> Chosen:
        """That of some of the texts, bool [b]."""
        return Chosen(*(x[keep.to(x.device)] for x in vars(self).values()))


@dataclass(frozen=True)
class Pool:
    """Candidates of b texts: tokens int64 [b, k, T], their log_base [b, k, T] (0 where given), log_weights [b, k]."""

    tokens: Tensor
    log_base: Tensor
    log_weights: Tensor

    def select(self, keep: Tensor) -> Pool:
        """Those of some of the texts, bool [b]."""
        keep = keep.to(self.tokens.device)
        return Pool(self.tokens[keep], self.log_base[keep], self.log_weights[keep])

    def extended(self, more: Pool) -> Pool:
        """With more candidates of the same texts."""
        return Pool(
            torch.cat([self.tokens, more.tokens], 1),
            torch.cat([self.log_base, more.log_base], 1),
            torch.cat([self.log_weights, more.log_weights], 1),
        )


class Chooser:
    """Chooses the tokens of steps by the options of a call."""

    def __init__(self, options: Options, texts: Texts) -> None:
        self.options, self.texts = options, texts
        self._whole = bool(texts.real.all())

    def __call__(self, state: State) -> Chosen:
        """The tokens of a step: where the window is open, of a candidate picked by its energy."""
        o = self.options
        corrected = (state.time >= 1 - o.window - 1e-9) & o.weighs  # times of a grid are rounded
        if bool(corrected.all()):
            return self.pick(state)
        if not bool(corrected.any()):
            return self.draw_one(state)
        return merge(corrected, self.pick(state.select(corrected)), self.draw_one(state.select(~corrected)))

    def candidates(self, state: State, k: int) -> Tensor:
        """k completions of each text, int64 [b, k, T]."""
        return self._draw(state, state.masked, k)[0]

    def draw_one(self, state: State) -> Chosen:
        """Each opened position's token from its own law, independently."""
        tokens, log_base, _ = self._draw(state, state.opened, 1)
        n = torch.ones(len(tokens), dtype=torch.int64)
        zeros = torch.zeros(len(tokens), dtype=torch.float64)
        return Chosen(tokens[:, 0], log_base[:, 0], n, n - 1, zeros + 1, zeros)

    def pick(self, state: State, pool: Pool | None = None, rounds: int = 1) -> Chosen:
        """One of k candidates for all masked positions, in proportion to its weight.

        With a target of the effective sample size, texts below it get as many candidates again.
        """
        o = self.options
        pool = pool or self._pool(state, o.candidates)
        k = pool.tokens.shape[1]
        stream = Stream(o.seed, Purpose.RESAMPLE, self.texts.sequences[state.rows], step=state.step)
        found = resample(pool.log_weights, scheme=o.scheme, stream=stream)
        index = found.indices[:, :1, None].expand(-1, 1, pool.tokens.shape[2])
        tokens, log_probs = (x.gather(1, index)[:, 0] for x in (pool.tokens, pool.log_base))
        ess, log_normalizer = found.ess.cpu().double(), found.log_normalizer.cpu().double()
        counts, rounds_each = torch.full_like(state.rows, k), torch.full_like(state.rows, rounds)
        chosen = Chosen(tokens, log_probs, counts, rounds_each, ess, log_normalizer)
        if o.ess_target is None or k >= o.max_candidates:
            return chosen
        few = (ess < o.ess_target * (1 - 1e-9)) | (log_normalizer == -torch.inf)
        if not few.any():
            return chosen
        state = state.select(few)
        pool = pool.select(few).extended(self._pool(state, min(k, o.max_candidates - k), first=k))
        return merge(few, self.pick(state, pool, rounds + 1), chosen.select(~few))

    def _pool(self, state: State, k: int, first: int = 0) -> Pool:
        """Candidates number first .. first + k - 1 with their weights."""
        o = self.options
        varied = state.opened if o.mode == "reveal_set" else state.masked
        tokens, log_base, log_ratio = self._draw(state, varied, k, first)
        if (rest := state.masked & ~varied).any():  # what stays masked is the same in all candidates
            drawn, base, _ = self._draw(state, rest, 1)
            fixed = rest.to(tokens.device)[:, None]
            tokens, log_base = torch.where(fixed, drawn, tokens), torch.where(fixed, base, log_base)
        log_mu = log_base.sum(-1, dtype=torch.float64)
        energies = self._energies(state, tokens, log_mu.to(log_base.dtype), first)
        log_weights = -energies / o.energy_temperature
        if log_ratio is not None:
            log_weights = log_weights + log_ratio
        return Pool(tokens, log_base, log_weights)

    def _draw(self, state: State, where: Tensor, k: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """k candidates: the texts [b, k, T] with tokens drawn at `where`, and these tokens' log_base [b, k, T], else 0.

        Last the sum over the text of log_base less the log-probability of the law that was drawn from, float64 [b, k];
        None where the two are one, or no correction is wanted.
        """
        o, device = self.options, state.tokens.device
        row, column = where.nonzero(as_tuple=True)
        number = state.rows[row]
        sequences, places = self.texts.sequences[number], self.texts.places[number, column]
        row, column = row.to(device), column.to(device)
        tokens = state.tokens[:, None].repeat(1, k, 1)
        log_base, ratio = None, None
        for part, logits in state.laws.chunks(where, native=True):
            stream = Stream(o.seed, Purpose.CANDIDATE, sequences[part], places[part], state.step, first)
            try:
                drawn = draw_candidates(logits, k, stream=stream, **o.proposal)
            except ValueError as error:
                raise ValueError(f"denoiser: {self._fault(logits, number[part], column[part])}") from error
            if log_base is None:
                log_base = drawn.log_base.new_zeros(tokens.shape)
                ratio = torch.zeros_like(log_base) if o.processed and o.correct else None
            at = row[part], slice(None), column[part]
            tokens[at], log_base[at] = drawn.tokens, drawn.log_base
            if ratio is not None:
                ratio[at] = drawn.log_base - drawn.log_probs
        assert log_base is not None, "chunks yields at least one portion"
        return tokens, log_base, None if ratio is None else ratio.sum(-1, dtype=torch.float64)

    def _fault(self, logits: Tensor, texts: Tensor, columns: Tensor) -> str:
        """Which of the logits [r, V] no token can be drawn from, of the texts and columns int64 [r]."""
        banned = self.options.proposal["banned"]
        top = (logits if banned is None else logits.masked_fill(banned, -torch.inf)).amax(-1)
        row = int((~top.isfinite()).nonzero()[0])
        return (
            f"text {int(texts[row])} has no law at {int(columns[row])}: the largest of its logits is {float(top[row])}"
        )

    def _energies(self, state: State, tokens: Tensor, log_mu: Tensor, first: int = 0) -> Tensor:
        """Of candidates from number `first` on, float64 [b, k]; from calls of at most `energy_microbatch` texts."""
        o, (b, k, _) = self.options, tokens.shape
        real = None if self._whole else self.texts.real[state.rows].to(tokens.device)
        time = state.time.to(tokens.device)
        most = o.energy_microbatch or b * k
        energies = torch.empty(b, k, dtype=torch.float64, device=tokens.device)
        for rows in _portions(b, max(1, most // k)):
            hidden = None if real is None else real[rows]
            for some in _portions(k, most):
                given = tokens[rows, some], state.tokens[rows], time[rows], log_mu[rows, some]
                own = [x.clone() for x in given]  # which it may write into
                found = o.energy(*own, attention_mask=hidden)  # type: ignore[misc]  # weighs: there is one
                if not isinstance(found, Tensor) or found.shape != log_mu[rows, some].shape:
                    got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                    raise ValueError(f"energy must return [b, k] = {list(log_mu[rows, some].shape)}, got {got}")
                energies[rows, some] = found
        self._check(energies, state.rows, first)
        return energies

    def _check(self, energies: Tensor, rows: Tensor, first: int) -> None:
        wrong = energies.isnan() | (energies == -torch.inf)
        if wrong.any():
            row, candidate = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"energy gave {float(energies[row, candidate])} for text {int(rows[row])}, candidate "
                f"{first + candidate}; it must be finite, or inf for what is impossible"
            )


def merge(first: Tensor, yes: Chosen, no: Chosen) -> Chosen:
    """One choice of two: of the texts bool [b] where `first`, and of the others."""
    merged = []
    for a, b in zip(vars(yes).values(), vars(no).values(), strict=True):
        out = a.new_empty(len(first), *a.shape[1:])
        here = first.to(out.device)
        out[here], out[~here] = a, b
        merged.append(out)
    return Chosen(*merged)


def _portions(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
