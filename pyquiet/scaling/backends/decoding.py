"""Prompts read and texts written in one batch by a decoder, each text's cache its own."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pyquiet.evaluation.prompts import padded
from pyquiet.heads import cache_argument, finish_logits, head_weight
from pyquiet.randomness import Purpose, Stream, draw
from pyquiet.scaling.backends.base import RefusedError, Score, Scored, Usage
from pyquiet.scaling.backends.jobs import Job, Writing
from pyquiet.scaling.backends.kv import KV, KVStore, batched, taken

_DRAWS = 0x736361_6C696E67  # key of all draws: a request's own seed is in the counter
_TOKENS_AT_ONCE = 8192  # of prompts read in one forward, padding included
_LOGITS_AT_ONCE = 1 << 22  # elements: 16 MB in float32


@dataclass
class _Read:
    """A prompt that was read: hidden states [n, d] from the first wanted token on, and its keys and values."""

    job: Job
    hidden: Tensor
    cached: int
    kv: KV = field(default_factory=list)
    alone: DynamicCache | None = None


@dataclass
class _Lane:
    """Texts that are written together: their cache, padded on the left, and how much of it is each one's."""

    rows: list[Writing]
    cache: DynamicCache
    lengths: list[int]


class DecoderRunner:
    """The `Runner` of a plain causal LM.

    Rows join and leave between tokens. A model whose cache is not plain keys and values of every token (state spaces,
    latent attention) writes each text in a cache of its own and keeps nothing between requests.
    """

    def __init__(self, model: PreTrainedModel, writing: Callable[[Job, int], Writing], store: KVStore) -> None:
        self.model, self.store, self._writing = model, store, writing
        self._network = model.base_model
        self._cache_name = cache_argument(self._network.__class__)
        self._lanes: list[_Lane] = []
        self.shares = self._probe()

    @torch.no_grad()
    def begin(self, jobs: Sequence[Job]) -> None:
        """Reads prompts; answers scores, and draws the first token of the others."""
        found = [(job, self._found(job)) for job in jobs]
        fresh = []
        for group in _groups(found, alone=not self.shares):
            for read in self._read(group):
                if isinstance(read.job.request, Score):
                    self._score(read)
                else:
                    fresh.append((self._writing(read.job, read.cached), read))
        if not fresh:
            return
        self._take([row for row, _ in fresh], torch.cat([read.hidden[-1:] for _, read in fresh]))
        for row, read in fresh:
            if row.finish is not None:
                self._keep(row, read.kv)
        open_ = [(row, read) for row, read in fresh if row.finish is None]
        if self.shares:
            self._join([(row, read.kv) for row, read in open_])
        else:
            self._lanes += [_Lane([row], read.alone, [len(row.job.ids)]) for row, read in open_ if read.alone]

    @torch.no_grad()
    def step(self) -> None:
        """Draws a token more for each row; rows that end, and those nobody waits for any more, leave."""
        for lane in list(self._lanes):
            self._leave(lane, [row for row in lane.rows if row.job.future.cancelled()])
            if not lane.rows:
                continue
            last = torch.tensor([[row.new[-1]] for row in lane.rows])
            positions = torch.tensor(lane.lengths)[:, None]
            lane.lengths = [n + 1 for n in lane.lengths]
            hidden = self._forward(
                last, _mask(lane.lengths, int(lane.cache.get_seq_length()) + 1), positions, lane.cache
            )
            self._take(lane.rows, hidden[:, 0])
            self._leave(lane, [row for row in lane.rows if row.finish is not None])

    def running(self) -> list[Job]:
        """The jobs of all rows."""
        return [row.job for lane in self._lanes for row in lane.rows]

    def drop(self) -> None:
        """Forgets all rows."""
        self._lanes = []

    # -- reading

    def _found(self, job: Job) -> KV:
        most = job.start - 1 if isinstance(job.request, Score) else len(job.ids) - 1
        return self.store.find(job.request.chain, job.ids, most) if self.shares else []

    def _read(self, group: Sequence[tuple[Job, KV]]) -> Iterator[_Read]:
        """One forward over what is new of each prompt: [left padding | known | new | right padding]."""
        known = [kv[0][0].shape[1] if kv else 0 for _, kv in group]
        news = [job.ids[n:] for (job, _), n in zip(group, known, strict=True)]
        ids, new_mask = padded(news, "right")
        cache = batched([kv for _, kv in group]) if self.shares else DynamicCache(config=self.model.config)
        before = max(known)
        mask = torch.cat([_mask(known, before), new_mask], 1)
        positions = torch.tensor(known)[:, None] + (new_mask.cumsum(1) - 1).clamp_min(0)
        hidden = self._forward(ids, mask, positions, cache)
        for row, ((job, _), n) in enumerate(zip(group, known, strict=True)):
            end = len(job.ids) - n
            first = job.start - 1 - n if isinstance(job.request, Score) else end - 1
            read = _Read(job, hidden[row, first:end], n)
            if self.shares:
                read.kv = taken(cache, row, slice(before - n, before + end))
            else:
                read.alone = cache
            yield read

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        device = self.model.device
        out = self._network(
            input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
            use_cache=True, **{self._cache_name: cache},
        )  # fmt: skip
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], in float32 at least, of hidden states [n, d]."""
        raw = self.model.get_output_embeddings()(hidden.to(head_weight(self.model).dtype))
        return finish_logits(self.model, raw.to(torch.promote_types(raw.dtype, torch.float32)))

    def _score(self, read: _Read) -> None:
        job = read.job
        assert isinstance(job.request, Score)
        targets = torch.tensor(job.ids[job.start :], device=read.hidden.device)
        log_probs, entropies = [], []
        size = max(1, _LOGITS_AT_ONCE // len(head_weight(self.model)))
        for hidden, target in zip(read.hidden[:-1].split(size), targets.split(size), strict=True):
            law = self._logits(hidden).log_softmax(-1)
            log_probs += law.gather(-1, target[:, None])[:, 0].tolist()
            if job.request.entropy:
                entropies += torch.special.entr(law.exp()).sum(-1).tolist()
        self.store.keep(job.request.chain, job.ids, read.kv)
        if any(map(math.isnan, log_probs)):
            job.settle(RefusedError(f"the model's logits for {job.request.chain} hold NaN"))
            return
        usage = Usage(len(job.ids), read.cached, 0)
        job.settle(Scored(tuple(log_probs), usage, tuple(entropies) if job.request.entropy else None))

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
        kinds: dict[tuple[float, float], list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault((row.request.temperature, row.request.top_p), []).append(i)
        for (temperature, top_p), some in kinds.items():
            seeds = torch.tensor([rows[i].request.seed for i in some])
            stream = Stream(
                _DRAWS, Purpose.ANSWER, sequence=seeds & 0xFFFFFFFF, step=seeds >> 32,
                position=torch.tensor([len(rows[i].new) for i in some]),
            )  # fmt: skip
            drawn = draw(logits[some], stream=stream, temperature=temperature, top_p=top_p if top_p < 1 else None)
            tokens[some] = drawn.tokens.cpu()
        return [int(token) for token in tokens]

    def _keep(self, row: Writing, kv: KV) -> None:
        """Answers a row that has ended; what was read of it is kept: all but its last token."""
        if not row.job.future.cancelled():
            ids = (*row.job.ids, *row.new)
            if kv:
                self.store.keep(row.request.chain, ids[: kv[0][0].shape[1]], kv)
            if not row.job.future.done():
                row.settle()

    def _join(self, fresh: list[tuple[Writing, KV]]) -> None:
        """Puts rows beside those that run."""
        if not fresh:
            return
        old = [(row, self._kv(lane, i)) for lane in self._lanes for i, row in enumerate(lane.rows)]
        rows = old + fresh
        lengths = [kv[0][0].shape[1] for _, kv in rows]
        self._lanes = [_Lane([row for row, _ in rows], batched([kv for _, kv in rows]), lengths)]

    def _leave(self, lane: _Lane, rows: list[Writing]) -> None:
        """Takes rows out of a lane and answers those that have ended."""
        if not rows:
            return
        stay = []
        for i, row in enumerate(lane.rows):
            kv = self._kv(lane, i) if self.shares else []
            if row not in rows:
                stay.append((row, kv))
            elif row.finish is not None:
                self._keep(row, kv)
        lane.rows = []
        self._lanes = [other for other in self._lanes if other is not lane]
        self._join(stay)
        if stay:
            lane.rows = self._lanes[0].rows
            lane.cache, lane.lengths = self._lanes[0].cache, self._lanes[0].lengths
            self._lanes = [lane]

    def _kv(self, lane: _Lane, i: int) -> KV:
        width = int(lane.cache.get_seq_length())
        return taken(lane.cache, i, slice(width - lane.lengths[i], width))

    # -- what the model can do

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether texts of several lengths, read in two parts side by side, are read as they are alone.

        Raises NotImplementedError for a model that cannot go on from a cache at all.
        """
        ids = tuple(range(4))
        self.shares = False
        try:
            job = Job(Score("", None, 1), ids, 1)  # type: ignore[arg-type]  # no prompt is looked at
            (whole,) = self._read([(job, [])])
        except Exception as error:
            raise NotImplementedError(f"{type(self.model).__name__} cannot be read with a cache: {error}") from error
        self.shares = True
        try:
            (first,) = self._read([(job, [])])
            kv = [[(k[:, :n], v[:, :n]) for k, v in first.kv] for n in (1, 3)]
            jobs = [Job(job.request, ids, n + 1) for n in (1, 3)]
            parts = list(self._read(list(zip(jobs, kv, strict=True))))
        except Exception:
            return False
        scale = 0.05 * float(whole.hidden.abs().max())
        return all(
            float((part.hidden - whole.hidden[n:]).abs().max()) <= scale for part, n in zip(parts, (1, 3), strict=True)
        )


def _mask(lengths: Sequence[int], width: int) -> Tensor:
    """int64 [B, width]: 1 for the last columns, as many as each length says."""
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def _groups(found: list[tuple[Job, KV]], *, alone: bool) -> Iterator[list[tuple[Job, KV]]]:
    """Prompts that are read in one forward: like with like, so that little is padding."""

    def new(item: tuple[Job, KV]) -> int:
        return len(item[0].ids) - (item[1][0][0].shape[1] if item[1] else 0)

    group: list[tuple[Job, KV]] = []
    for item in sorted(found, key=new):
        if group and (alone or (len(group) + 1) * new(item) > _TOKENS_AT_ONCE):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
