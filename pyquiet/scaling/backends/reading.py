"""Prompts read side by side by a decoder, what is known of them left out."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pyquiet.heads import cache_argument
from pyquiet.scaling.backends.base import Prompt, Score
from pyquiet.scaling.backends.jobs import Job
from pyquiet.scaling.backends.kv import HEAD, KV, Alone, KVStore, Layout, Rows, common, length
from pyquiet.tokens import padded

_TOKENS_AT_ONCE = 8192  # of prompts read in one forward, padding included
_PADDING = {"cpu": 64, "cuda": 4096}  # tokens that cost about as much as another forward


@dataclass
class Read:
    """A prompt that was read: hidden states [n, d] from the first wanted token on, and its keys and values.

    Attributes:
        cached: how many tokens were known before. texts: the batch in which it was read.
    """

    job: Job
    hidden: Tensor
    cached: int
    kv: KV
    texts: Rows | Alone


class Reader:
    """Reads prompts with a model, and finds out how that can be done.

    Attributes:
        layout: where keys and values are; None for a model whose cache is more than keys and values of every token
            (state spaces): there each text has a cache of its own, and nothing is known of any.

    Raises NotImplementedError for a model that cannot go on from a cache at all.
    """

    def __init__(self, model: PreTrainedModel, store: KVStore) -> None:
        self._model, self._network, self._store = model, model.base_model, store
        self._cache_name = cache_argument(self._network.__class__)
        self.layout: Layout | None = None
        self.layout = self._probe()

    def read(self, jobs: Sequence[Job]) -> Iterator[list[Read]]:
        """Reads all prompts, those together that are of about the same length."""
        for group in self._groups(self._known(jobs)):
            yield self._read(group)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Hidden states [B, Q, d] of ids [B, Q] behind what is in the cache; the mask [B, S] is of both."""
        device = self._model.device
        out = self._network(
            input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
            use_cache=True, **{self._cache_name: cache},
        )  # fmt: skip
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _known(self, jobs: Sequence[Job]) -> list[tuple[Job, KV]]:
        """What is known of each prompt, once what several new ones begin with, a question for one, has been read."""
        if self.layout is None:
            return [(job, ()) for job in jobs]
        found = [(job, self._find(job)) for job in jobs]
        alike: dict[tuple[int, ...], list[Job]] = defaultdict(list)
        for job, kv in found:
            if not kv and _most(job) >= HEAD:
                alike[job.ids[:HEAD]].append(job)
        several = [same for same in alike.values() if len(same) > 1 and self._store.limit]
        for group in self._groups([(_head(same), ()) for same in several]):
            for read in self._read(group):
                self._store.keep(read.job.request.chain, read.job.ids, read.kv)
        return [(job, kv or self._find(job)) for job, kv in found] if several else found

    def _find(self, job: Job) -> KV:
        return self._store.find(job.request.chain, job.ids, _most(job))

    def _read(self, group: Sequence[tuple[Job, KV]]) -> list[Read]:
        """One forward over what is new of each prompt: [left padding | known | new | right padding]."""
        known = [length(kv) for _, kv in group]
        ids, new_mask = padded([job.ids[n:] for (job, _), n in zip(group, known, strict=True)], "right")
        texts: Rows | Alone
        if self.layout is None:
            texts = Alone(self._model.config)
        else:
            texts = Rows(self.layout)
            texts.add([kv for _, kv in group], ids.shape[1])
        positions = torch.tensor(known)[:, None] + (new_mask.cumsum(1) - 1).clamp_min(0)
        # What pads on the right comes after all that counts; unmasked, it still has something to look at in a window.
        hidden = self.forward(ids, texts.mask(ids.shape[1]), positions, texts.cache)
        reads = []
        for row, ((job, _), n) in enumerate(zip(group, known, strict=True)):
            end = len(job.ids) - n
            first = job.start - 1 - n if isinstance(job.request, Score) else end - 1
            reads.append(Read(job, hidden[row, first:end], n - job.paid, texts.take(row, end), texts))
        return reads

    def _groups(self, found: Sequence[tuple[Job, KV]]) -> Iterator[list[tuple[Job, KV]]]:
        """Prompts to read in one forward: like with like, so that little is padding."""
        padding = _PADDING.get(self._model.device.type, _PADDING["cuda"])
        group: list[tuple[Job, KV]] = []
        last = 0
        for new, job, kv in sorted(((len(job.ids) - length(kv), job, kv) for job, kv in found), key=lambda x: x[0]):
            if group and (
                self.layout is None or (len(group) + 1) * new > _TOKENS_AT_ONCE or len(group) * (new - last) > padding
            ):
                yield group
                group = []
            group.append((job, kv))
            last = new
        if group:
            yield group

    @torch.no_grad()
    def _probe(self) -> Layout | None:
        """Where keys and values are, if texts of several lengths read in two parts side by side are read as alone."""
        ids, request = tuple(range(4)), Score("", Prompt(()), 1)
        try:
            (whole,) = self._read([(Job(request, ids, 1), ())])
        except Exception as error:
            raise NotImplementedError(f"{type(self._model).__name__} cannot be read with a cache: {error}") from error
        try:
            cache = DynamicCache()
            self.forward(torch.tensor([ids]), torch.ones(1, 4, dtype=torch.int64), torch.arange(4)[None], cache)
            self.layout = Layout.of(cache)
            (first,) = self._read([(Job(request, ids, 1), ())])
            parts = self._read([(Job(request, ids, n + 1), tuple(kind[:, :, :n] for kind in first.kv)) for n in (1, 3)])
        except Exception:
            return None
        scale = 0.05 * float(whole.hidden.abs().max())
        same = all(
            float((part.hidden - whole.hidden[n:]).abs().max()) <= scale for part, n in zip(parts, (1, 3), strict=True)
        )
        return self.layout if same else None


def _most(job: Job) -> int:
    """How many tokens of its prompt need not be read: those before the first whose law is wanted, but for one."""
    return job.start - 1 if isinstance(job.request, Score) else len(job.ids) - 1


def _head(jobs: Sequence[Job]) -> Job:
    """A job that reads what these begin with, for the first of them."""
    n = jobs[0].paid = min(common(job.ids, jobs[0].ids[: _most(job)]) for job in jobs)
    return Job(Score(jobs[0].request.chain, Prompt(()), n), jobs[0].ids[:n], n)
