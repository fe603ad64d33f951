"""The rounds of the samplers: each decides one token or more of every sequence, by the exact law.

A round of ASSD (arXiv 2504.20456) drafts k tokens in one call of the network and verifies them in a
second; the one-call round verifies and drafts for the next in the same call. Words: b sequences, N positions, k
drafts, V vocabulary; ranks count from 0 in the order of filling, and `known[b]` of them are decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from pyquiet.any_subset.drafting import Context, Drafter
from pyquiet.any_subset.engine import Engine
from pyquiet.any_subset.inputs import Inputs
from pyquiet.kernels import Verification, verify_draft
from pyquiet.randomness import Drawn, Purpose, Stream, draw


class Origin(IntEnum):
    """How a position came by its token."""

    GIVEN = 0
    DRAWN = 1  # from its law, without a draft
    ACCEPTED = 2  # a draft that was kept
    REPLACED = 3  # drawn in place of a draft that was refused
    BONUS = 4  # drawn behind drafts that were all kept


@dataclass(frozen=True)
class Draft:
    """Drafted tokens [b, k] of `ranks` (-1: none), the logits [b, k, V] of their law and its log-sum-exp [b, k]."""

    ranks: Tensor
    tokens: Tensor
    logits: Tensor
    lse: Tensor

    @property
    def lengths(self) -> Tensor:
        """How many drafts each sequence has, int64 [b] on the CPU."""
        return (self.ranks >= 0).sum(1)


@dataclass(frozen=True)
class Round:
    """What a round did: the sequences in it, the tokens they decided, and the drafts they tried and kept, [b] each.

    One that `opens` drafted for the round after it.
    """

    sequences: int
    decided: int
    tried: Tensor
    kept: Tensor
    opens: bool = False


# What a session keeps of each position, with one column more than there are positions.
_COLUMNS = ("_tokens", "_log_probs", "_reveal_round", "_origin", "_refused")


class Session:
    """Sequences being filled: what is decided of each, its cache, its counters.

    `options` are the processing of the law: temperature, top_k, top_p, banned.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Tensor,
        inputs: Inputs,
        *,
        seed: int,
        sequences: Tensor,
        coupling: str,
        bonus: bool,
        options: dict[str, Any],
    ) -> None:
        self.engine, self.seed, self.coupling, self.bonus, self.options = engine, seed, coupling, bonus, options
        # One column more than there are positions takes what idle columns write.
        self._tokens = torch.nn.functional.pad(tokens, (0, 1))
        self._log_probs = torch.zeros(self._tokens.shape, device=tokens.device)
        self._reveal_round = torch.full_like(self._tokens, -1)
        self._origin = torch.full_like(self._tokens, Origin.GIVEN)
        self._refused = torch.full_like(self._tokens, -1)
        self.order, self.total, self.sequences = inputs.order, inputs.total, sequences
        self.known = inputs.prompt.clone()
        self.cache = engine.start(inputs.order, inputs.prompt)
        self.rows = torch.arange(len(tokens))  # of the whole batch
        self.pending: Draft | None = None
        self.number = 0  # of the round
        self._whole = self._parts
        zeros = torch.zeros(len(tokens), dtype=torch.int64)
        self.calls = {"draft": zeros.clone(), "density": zeros.clone()}
        self.drafter_calls, self.rounds = zeros.clone(), zeros.clone()

    @property
    def tokens(self) -> Tensor:
        """int64 [b, N]; what stands at undecided positions means nothing."""
        return self._tokens[:, :-1]

    @property
    def live(self) -> Tensor:
        """bool [b]: sequences with something left to fill."""
        return self.known < self.total

    def run(self, take: Callable[[], Round]) -> Round:
        """One round; then finished sequences are dropped where that halves the batch."""
        self.rounds[self.rows] += self.live
        done = take()
        self.number += 1
        if 0 < int(self.live.sum()) <= len(self.rows) // 2:
            self._drop_finished()
        return done

    def results(self) -> dict[str, Tensor]:
        """Of the whole batch, [B, N] each: what `Infilling` calls by these names."""
        self._write_back()
        return {name.removeprefix("_"): whole[:, :-1] for name, whole in zip(_COLUMNS, self._whole, strict=True)}

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in _COLUMNS)

    # -- rounds

    def sequential(self) -> Round:
        """One token from its exact law; one call."""
        self.pending = None
        ranks = self._ranks(self.known, 1)
        drawn = self._draw(self.engine.head(self._marginals("density", ranks)), ranks, Purpose.ANSWER)
        return self._decide(drawn.tokens, drawn.log_probs, self.live.long(), None)

    def assd(self, k: int) -> Round:
        """k >= 2 drafts, the first of them exact; two calls, at least two tokens (one of each at the end)."""
        self.pending = None
        ranks = self._ranks(self.known, k)
        hidden = self._marginals("draft", ranks)
        draft, drawn = self._draft(self.engine.head(hidden), ranks)
        longer = draft.lengths > 1
        if not longer.any():
            return self._decide(drawn.tokens[:, :1], drawn.log_probs[:, :1], self.live.long(), None)
        targets = self._ranks(self.known + 1, k if self.bonus else k - 1).masked_fill(~longer[:, None], -1)
        density = self._densities(longer, draft, targets)
        verdict = self._verify(torch.cat([hidden[:, :1], density], 1), draft, first_is_exact=True)
        return self._judge(verdict, draft)

    def drafted(self, k: int, drafter: Drafter) -> Round:
        """k drafts of a drafter that is not the network; one call, at least one token."""
        self.pending = None
        draft = self._ask(drafter, self._ranks(self.known, k))
        targets = self._ranks(self.known, k + 1 if self.bonus else k)
        return self._judge(self._verify(self._densities(self.live, draft, targets), draft), draft)

    def one_call(self, k: int) -> Round:
        """The k drafts pending are verified, and in the same call the next k are drafted for every outcome.

        The first round has no drafts yet: it decides one token and drafts the next ones.
        """
        if self.pending is None or self.pending.ranks.shape[1] != k:
            return self._open(k)
        draft, first = self.pending, self.known
        targets = self._ranks(first, k + 1)
        # Where a drafts are kept, a+1 tokens are decided; the drafts after them see the kept ones.
        sees = first[:, None] + torch.arange(k + 1).repeat_interleave(k)
        groups = sees + torch.arange(1, k + 1).repeat(k + 1)
        groups = groups.masked_fill(groups >= self.total[:, None], -1)
        until = torch.minimum(first + k, torch.maximum(self.total - 1, first))
        ranks, sees = torch.cat([targets, groups], 1), torch.cat([targets, sees], 1)
        self._count("density", self.live)
        hidden = self.engine.forward(self.cache, self._filled(draft), until, ranks, sees)
        verdict = self._verify(hidden[:, : k + 1], draft)
        done = self._judge(verdict, draft)
        following = hidden[:, k + 1 :].unflatten(1, (k + 1, k))
        chosen = following[torch.arange(len(following)), verdict.accepted]
        self.pending, _ = self._draft(self.engine.head(chosen), self._ranks(self.known, k))
        return done

    def _open(self, k: int) -> Round:
        ranks = self._ranks(self.known, k + 1)
        draft, drawn = self._draft(self.engine.head(self._marginals("draft", ranks)), ranks)
        done = self._decide(drawn.tokens[:, :1], drawn.log_probs[:, :1], self.live.long(), None)
        self.pending = replace(
            draft, **{name: getattr(draft, name)[:, 1:] for name in ("ranks", "tokens", "logits", "lse")}
        )
        return replace(done, opens=True)

    # -- parts of a round

    def _ranks(self, first: Tensor, width: int) -> Tensor:
        """Ranks first .. first + width - 1, [b, width]; -1 beyond the end of the text."""
        ranks = first[:, None] + torch.arange(width)
        return ranks.masked_fill(ranks >= self.total[:, None], -1)

    def _places(self, ranks: Tensor) -> Tensor:
        """Positions of ranks, on the device; the spare column for -1."""
        places = self.order.gather(1, ranks.clamp(min=0)).masked_fill(ranks < 0, self.order.shape[1])
        return places.to(self._tokens.device)

    def _count(self, kind: str, called: Tensor) -> None:
        self.calls[kind][self.rows] += called

    def _marginals(self, kind: str, ranks: Tensor) -> Tensor:
        """Hidden rows of ranks that see what is decided; one call, counted as of that kind."""
        self._count(kind, self.live)
        return self.engine.draft(self.cache, self.tokens, self.known, ranks)

    def _densities(self, called: Tensor, draft: Draft, targets: Tensor) -> Tensor:
        """Hidden rows of the targets given all ranks before them, drafts among these; one call."""
        self._count("density", called)
        return self.engine.density(self.cache, self._filled(draft), targets)

    def _stream(self, purpose: Purpose | None, sequences: Tensor, positions: Tensor) -> Stream:
        # Coupled noise belongs to the rank alone, whichever round looks at it.
        step = 0 if self.coupling == "gumbel" else self.number
        return Stream(self.seed, purpose, sequences, positions, step)

    def _draw(self, logits: Tensor, ranks: Tensor, purpose: Purpose) -> Drawn:
        """One token for each of `ranks` [b, w] from logits [b, w, V]; fields [b, w]."""
        width = ranks.shape[1]
        stream = self._stream(purpose, self.sequences.repeat_interleave(width), ranks.clamp(min=0).flatten())
        drawn = draw(logits.flatten(0, 1), stream=stream, coupling=self.coupling, **self.options)
        return Drawn(*(x.view(-1, width) for x in (drawn.tokens, drawn.log_probs, drawn.lse)))

    def _draft(self, logits: Tensor, ranks: Tensor) -> tuple[Draft, Drawn]:
        drawn = self._draw(logits, ranks, Purpose.DRAFT)
        return Draft(ranks, drawn.tokens, logits, drawn.lse), drawn

    def _ask(self, drafter: Drafter, ranks: Tensor) -> Draft:
        """The drafts of a drafter; those that it does not draw itself are drawn from its logits."""
        parts: list[Draft] = []
        width, dtype = ranks.shape[1], self.engine.dtype

        def draw_next(logits: Tensor) -> Tensor:
            parts.append(self._drafted_by(logits[:, None].to(dtype), ranks[:, len(parts) : len(parts) + 1]))
            return parts[-1].tokens[:, 0]

        known = torch.zeros(self.tokens.shape, dtype=torch.bool)
        known.scatter_(1, self.order, torch.arange(self.order.shape[1]) < self.known[:, None])
        places = self._places(ranks)
        places = places.masked_fill(places == self.order.shape[1], -1)
        logits = drafter(Context(self.tokens.clone(), known.to(places.device), places, draw_next))
        self.drafter_calls[self.rows] += self.live
        if not (logits is None or isinstance(logits, Tensor)) or len(parts) != (width if logits is None else 0):
            raise ValueError(
                f"method: the drafter drew {len(parts)} drafts and returned {type(logits).__name__}; it must return "
                f"logits, or draw all {width} with context.draw and return None"
            )
        if logits is None:
            tokens, laws, lse = (
                torch.cat([getattr(p, name) for p in parts], 1) for name in ("tokens", "logits", "lse")
            )
            return Draft(ranks, tokens, laws, lse)
        return self._drafted_by(logits.to(dtype).contiguous(), ranks)

    def _drafted_by(self, logits: Tensor, ranks: Tensor) -> Draft:
        """Drafts from a drafter's logits; what is wrong with them is the drafter's fault."""
        shape = (*ranks.shape, self.engine.vocab_size)
        if logits.shape != shape:
            raise ValueError(
                f"method: the drafter gave logits of shape {list(logits.shape)}; here they must be {list(shape)}"
            )
        if (idle := ranks < 0).any():  # what is said of drafts that there are not is not looked at
            logits = logits.masked_fill(idle.to(logits.device)[..., None], 0)
        try:
            return self._draft(logits, ranks)[0]
        except ValueError as error:
            raise ValueError(f"method: nothing can be drawn from the drafter's logits: {error}") from error

    def _filled(self, draft: Draft) -> Tensor:
        """The tokens with the drafts in their places."""
        return self._tokens.scatter(1, self._places(draft.ranks), draft.tokens)[:, :-1]

    def _verify(self, hidden: Tensor, draft: Draft, first_is_exact: bool = False) -> Verification:
        gumbel = self.coupling == "gumbel"
        return verify_draft(
            self.engine.head(hidden),
            None if gumbel else draft.logits,
            draft.tokens,
            stream=self._stream(None, self.sequences, self.known),
            draft_lse=None if gumbel else draft.lse,
            lengths=draft.lengths.to(draft.tokens.device),
            first_is_exact=first_is_exact,
            coupling=self.coupling,
            **self.options,
        )

    def _judge(self, verdict: Verification, draft: Draft) -> Round:
        """Keep what a verification decided, and of the cache what was computed of tokens that stay."""
        accepted = verdict.accepted.cpu()
        count = torch.minimum(verdict.count.cpu(), self.total - self.known)
        self.cache.commit(self.known + accepted)
        return self._decide(verdict.tokens, verdict.log_probs, count, (draft, accepted))

    def _decide(self, tokens: Tensor, log_probs: Tensor, count: Tensor, verified: tuple[Draft, Tensor] | None) -> Round:
        """Write the first `count` [b] of the tokens [b, w] in their places, which kept some of a verified draft."""
        number = torch.arange(tokens.shape[1])
        ranks = self._ranks(self.known, tokens.shape[1])
        places = self._places(ranks.masked_fill(number >= count[:, None], -1))
        self._tokens.scatter_(1, places, tokens)
        self._log_probs.scatter_(1, places, log_probs.float())
        self._reveal_round.scatter_(1, places, self.number)
        origin, drafts = torch.full_like(ranks, Origin.DRAWN), None
        if verified is not None:
            draft, kept = verified
            drafts = draft.lengths, kept
            behind = torch.where(number < draft.lengths[:, None], Origin.REPLACED, Origin.BONUS)
            origin = torch.where(number < kept[:, None], Origin.ACCEPTED, behind)
            refused = number[: draft.tokens.shape[1]] == kept[:, None]
            refused = refused & (draft.ranks >= 0)
            self._refused.scatter_(
                1, places[:, : refused.shape[1]], draft.tokens.masked_fill(~refused.to(places.device), -1)
            )
        self._origin.scatter_(1, places, origin.to(places.device))
        live = self.live
        self.known = self.known + count
        tried, kept_drafts = drafts or (torch.zeros_like(count), torch.zeros_like(count))
        return Round(int(live.sum()), int(count.sum()), tried[live], kept_drafts[live])

    # -- the batch

    def _write_back(self) -> None:
        for whole, part in zip(self._whole, self._parts, strict=True):
            if part is not whole:
                whole[self.rows.to(whole.device)] = part

    def _drop_finished(self) -> None:
        self._write_back()
        keep = self.live.nonzero().flatten()
        on_device = keep.to(self._tokens.device)
        for name in _COLUMNS:
            setattr(self, name, getattr(self, name)[on_device])
        self.order, self.total, self.known = self.order[keep], self.total[keep], self.known[keep]
        self.sequences, self.rows = self.sequences[keep], self.rows[keep]
        self.cache.select(keep)
        if self.pending is not None:
            p = self.pending
            self.pending = Draft(p.ranks[keep], p.tokens[on_device], p.logits[on_device], p.lse[on_device])
