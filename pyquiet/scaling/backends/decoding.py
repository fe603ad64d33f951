"""Texts written and scored in one batch by a decoder, each text's cache its own."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyquiet.heads import apply_head, finish_logits, head_weight, rows_at_once
from pyquiet.randomness import Purpose, Stream, draw
from pyquiet.scaling.backends.base import RefusedError, Score, Scored, Usage
from pyquiet.scaling.backends.jobs import Job, Writing
from pyquiet.scaling.backends.kv import KV, Alone, KVStore, Rows, length
from pyquiet.scaling.backends.reading import Read, Reader

_DRAWS = 0x736361_6C696E67  # key of all draws: a request's own seed is in the counter
_ROOM = 64  # tokens that a batch of texts may grow before it is moved


@dataclass
class _Lane:
    """Texts that are written together."""

    rows: list[Writing]
    texts: Rows | Alone


class DecoderRunner:
    """The `Runner` of a plain causal LM.

    Rows join and leave between tokens. A model whose cache is more than keys and values of every token (state spaces)
    writes each text in a cache of its own and keeps nothing between requests.

    Args:
        words: ids that are drawn are below this. A model may have logits for more than its tokenizer has words.
    """

    def __init__(
        self, model: PreTrainedModel, writing: Callable[[Job, int], Writing], store: KVStore, words: int
    ) -> None:
        self.model, self.store, self._writing, self._words = model, store, writing, words
        self._reader = Reader(model, store)
        self._lanes: list[_Lane] = []

    @property
    def token_bytes(self) -> int | None:
        """Bytes of a token's keys and values; None where the cache is more than that."""
        return None if self._reader.layout is None else self._reader.layout.token_bytes

    @torch.no_grad()
    def begin(self, jobs: Sequence[Job]) -> None:
        """Reads prompts; answers scores, and draws the first token of the others."""
        fresh = []
        for reads in self._reader.read(jobs):
            self._score([read for read in reads if isinstance(read.job.request, Score)])
            writes = [read for read in reads if not isinstance(read.job.request, Score)]
            fresh += [(self._writing(read.job, read.cached), read) for read in writes]
        if not fresh:
            return
        self._take([row for row, _ in fresh], torch.cat([read.hidden[-1:] for _, read in fresh]))
        for row, read in fresh:
            if row.finish is not None:
                self._keep(row, read.kv)
        self._join([(row, read) for row, read in fresh if row.finish is None])

    @torch.no_grad()
    def step(self) -> None:
        """Draws a token more for each row; rows that end, and those nobody waits for any more, leave."""
        for lane in self._lanes:
            self._leave(lane)
            if lane.rows:
                last = torch.tensor([[row.new[-1]] for row in lane.rows])
                positions = torch.tensor(lane.texts.lengths)[:, None]
                hidden = self._reader.forward(last, lane.texts.mask(1), positions, lane.texts.cache)
                lane.texts.grow()
                self._take(lane.rows, hidden[:, 0])
                self._leave(lane)
        self._lanes = [lane for lane in self._lanes if lane.rows]

    def running(self) -> list[Job]:
        """The jobs of all rows."""
        return [row.job for lane in self._lanes for row in lane.rows]

    def drop(self) -> None:
        """Forgets all rows."""
        self._lanes = []

    # -- scores

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], in float32 at least, of hidden states [n, d]."""
        raw = apply_head(self.model.get_output_embeddings(), hidden.to(head_weight(self.model).dtype))
        return finish_logits(self.model, raw.to(torch.promote_types(raw.dtype, torch.float32)))

    def _score(self, reads: Sequence[Read]) -> None:
        """Answers scores of prompts that were read together."""
        if not reads:
            return
        counts = [len(read.hidden) - 1 for read in reads]
        tokens = [token for read in reads for token in read.job.ids[read.job.start :]]
        entropy = any(isinstance(read.job.request, Score) and read.job.request.entropy for read in reads)
        log_probs, entropies = self._weigh(torch.cat([read.hidden[:-1] for read in reads]), tokens, entropy)
        for read, end in zip(reads, itertools.accumulate(counts), strict=True):
            job, part = read.job, slice(end - len(read.hidden) + 1, end)
            assert isinstance(job.request, Score)
            self.store.keep(job.request.chain, job.ids, read.kv)
            if any(map(math.isnan, log_probs[part])):
                job.settle(RefusedError(f"the model's logits for {job.request.chain} hold NaN"))
                continue
            told = tuple(entropies[part]) if job.request.entropy else None
            job.settle(Scored(tuple(log_probs[part]), Usage(len(job.ids), read.cached, 0), told))

    def _weigh(self, hidden: Tensor, tokens: list[int], entropy: bool) -> tuple[list[float], list[float]]:
        """Log-probabilities of tokens behind hidden states [n, d], and the entropies there if asked for."""
        log_probs: list[float] = []
        entropies: list[float] = []
        size = rows_at_once(len(head_weight(self.model)))
        targets = torch.tensor(tokens, device=hidden.device)[:, None]
        for some, target in zip(hidden.split(size), targets.split(size), strict=True):
            law = self._logits(some).log_softmax(-1)
            log_probs += law.gather(-1, target)[:, 0].tolist()
            if entropy:
                entropies += torch.special.entr(law.exp()).sum(-1).tolist()
        return log_probs, entropies

    # -- writing

    def _take(self, rows: Sequence[Writing], hidden: Tensor) -> None:
        """Draws the next token of each row from hidden states [R, d]."""
        logits = self._logits(hidden)
        sound = logits.amax(-1).isfinite().tolist()
        tokens = self._draw(rows, torch.where(torch.tensor(sound, device=logits.device)[:, None], logits, 0))
        for row, token, good in zip(rows, tokens, sound, strict=True):
            if good:
                row.take(token)
            else:
                row.job.settle(RefusedError(f"the model's logits for {row.request.chain} are not finite"))
                row.finish = "length"

    def _draw(self, rows: Sequence[Writing], logits: Tensor) -> list[int]:
        """A token a row; the request's 63-bit seed is the counter's sequence and step, so no two share a number."""
        tokens = torch.zeros(len(rows), dtype=torch.int64)
        kinds: dict[tuple[float, float, int | None], list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault((row.request.temperature, row.request.top_p, row.request.top_k), []).append(i)
        for (temperature, top_p, top_k), some in kinds.items():
            seeds = torch.tensor([rows[i].request.seed for i in some])
            stream = Stream(
                _DRAWS, Purpose.ANSWER, sequence=seeds & 0xFFFFFFFF, step=seeds >> 32,
                position=torch.tensor([len(rows[i].new) for i in some]),
            )  # fmt: skip
            law = logits[some, : self._words]
            cut: dict[str, Any] = {"top_k": top_k, "top_p": top_p if top_p < 1 else None}
            tokens[some] = draw(law, stream=stream, temperature=temperature, **cut).tokens.cpu()
        return [int(token) for token in tokens]

    def _keep(self, row: Writing, kv: KV) -> None:
        """Answers a row that has ended; what was read of it is kept: all but its last token."""
        if not row.job.future.cancelled():
            ids = (*row.job.ids, *row.new)
            if kv:
                self.store.keep(row.request.chain, ids[: length(kv)], kv)
            if not row.job.future.done():
                row.settle()

    def _join(self, fresh: Sequence[tuple[Writing, Read]]) -> None:
        """Puts rows beside those that run."""
        if self._reader.layout is None:
            for row, read in fresh:
                read.texts.grow(len(row.job.ids))
                self._lanes.append(_Lane([row], read.texts))
        elif fresh:
            if not self._lanes:
                self._lanes = [_Lane([], Rows(self._reader.layout, _ROOM))]
            (lane,) = self._lanes
            assert isinstance(lane.texts, Rows)
            lane.texts.add([read.kv for _, read in fresh])
            lane.rows += [row for row, _ in fresh]

    def _leave(self, lane: _Lane) -> None:
        """Takes the rows out of a lane that have ended, whom it answers, or that nobody waits for any more."""
        for i in reversed(range(len(lane.rows))):
            row = lane.rows[i]
            if row.finish is not None or row.job.future.cancelled():
                if row.finish is not None:
                    self._keep(row, lane.texts.take(i))
                lane.texts.remove(i)
                lane.rows[i] = lane.rows[-1]
                lane.rows.pop()
