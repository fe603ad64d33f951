"""Thinking models as drafts and targets: batches through the model's own `generate` and `think_at_every_token`."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from pyquiet.heads import embedding_table
from pyquiet.scaling.backends.base import Score, Scored, Usage
from pyquiet.scaling.backends.jobs import Job, Writing
from pyquiet.tokens import padded

_DRAWS = 0x7468_696E6B  # key of all draws: a request's own seed numbers its sequence


class ThinkingRunner:
    """The `Runner` of a `QuietStarForCausalLM`. A batch is written to its end, in ids below `words`."""

    def __init__(self, model: Any, writing: Callable[[Job, int], Writing], words: int) -> None:
        self.model, self._writing = model, writing
        self._no_words = list(range(words, embedding_table(model).shape[0]))

    def begin(self, jobs: Sequence[Job]) -> None:
        """Answers all jobs."""
        kinds: dict[tuple[float, float, int | None], list[Writing]] = {}
        for job in jobs:
            if isinstance(job.request, Score):
                self._score(job)
            else:
                row = self._writing(job, 0)
                kinds.setdefault((row.request.temperature, row.request.top_p, row.request.top_k), []).append(row)
        for (temperature, top_p, top_k), rows in kinds.items():
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k or 0}
            self._write(rows, sampling if temperature else {"do_sample": False})

    def step(self) -> None:
        """Nothing is left to do."""

    def running(self) -> list[Job]:
        """None."""
        return []

    def drop(self) -> None:
        """There is nothing to give up."""

    def _write(self, rows: list[Writing], sampling: dict[str, Any]) -> None:
        ids, mask = (x.to(self.model.device) for x in padded([row.job.ids for row in rows], "left"))
        self.model.generate(
            ids, think="always", attention_mask=mask, pad_token_id=0, eos_token_id=None, seed=_DRAWS,
            sequence_ids=torch.tensor([row.request.seed & 0xFFFFFFFF for row in rows], device=ids.device),
            max_new_tokens=max(row.request.max_tokens for row in rows), suppress_tokens=self._no_words or None,
            stopping_criteria=StoppingCriteriaList([_Watch(rows)]),
            **sampling,
        )  # fmt: skip
        for row in rows:
            if row.finish is not None:
                row.settle()

    def _score(self, job: Job) -> None:
        words = hashlib.blake2b(repr(job.ids).encode(), digest_size=4).digest()
        ids = torch.tensor([job.ids], device=self.model.device)
        thoughts = self.model.think_at_every_token(
            ids, positions=torch.arange(job.start - 1, len(job.ids) - 1, device=ids.device), seed=_DRAWS,
            sequence_ids=torch.tensor([int.from_bytes(words, "big")], device=ids.device),
        )  # fmt: skip
        mixed = thoughts.mixed_log_probs[0]  # [K, N]
        log_probs = mixed.logsumexp(-1) - math.log(mixed.shape[-1])
        job.settle(Scored(tuple(log_probs.tolist()), Usage(len(job.ids), 0, 0)))


class _Watch(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Ends each row where its own request ends, or when nobody waits for it any more."""

    def __init__(self, rows: Sequence[Writing]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish is None and not row.job.future.cancelled():
                row.take(token)
        ended = [row.finish is not None or row.job.future.cancelled() for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)
