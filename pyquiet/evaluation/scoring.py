"""How probable continuations are, with thoughts or without, and whether greedy decoding would write them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyquiet.checks import can_think
from pyquiet.evaluation.prompts import check_think
from pyquiet.heads import log_prob
from pyquiet.quiet_star.thinking import Think, average, chunks
from pyquiet.tokens import padded


@dataclass(frozen=True)
class Continuation:
    """Token ids and those before them, at least one of each, and the number that thoughts are drawn by."""

    before: list[int]
    tokens: list[int]
    number: int  # in [0, 2^32)

    @property
    def read(self) -> list[int]:
        """The ids that a model reads to predict `tokens`: all but the last."""
        return (self.before + self.tokens)[:-1]


def number_of(*ids: Any) -> int:
    """A number in [0, 2^32) that depends on these values alone: draws by it are the same wherever they stand."""
    return int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=4).digest(), "big")


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel,
    rows: Sequence[Continuation],
    *,
    think: Think,
    seed: int = 0,
    thoughts_per_token: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One batch of continuations under a model, on the model's device.

    With think="always" there is a thought before each token of a continuation, and none elsewhere; the laws of N
    thoughts are averaged. Thoughts depend on (seed, number, position) alone, not on the batch.

    Returns:
        log-probabilities in nats, float64 [B], and bool [B]: every token is the likeliest one at its place.

    Raises:
        ValueError: thoughts of a plain model, a text that is too long, or NaN logits.
    """
    check_think(model, think)
    texts = padded([row.read for row in rows], "right")
    spans = [range(len(row.before) - 1, len(row.before) + len(row.tokens) - 1) for row in rows]
    columns, counted = padded(spans, "right")
    targets, _ = padded([row.tokens for row in rows], "right")
    ids, mask, columns, targets = (x.to(model.device) for x in (*texts, columns, targets))
    if think == "always":
        numbers = torch.tensor([row.number for row in rows], device=model.device)
        laws = _with_thoughts(model, ids, mask, columns, (seed, thoughts_per_token, 1.0, None, None, numbers))
    else:
        laws = _plainly(model, ids, mask, columns)
    scores, likeliest = [], []
    for part, logits in laws:
        scores.append(log_prob(logits, targets[:, part]).double())
        likeliest.append(logits.argmax(-1) == targets[:, part])
    real = counted.bool().to(model.device)
    total = torch.cat(scores, 1).masked_fill(~real, 0).sum(1)
    if total.isnan().any():
        raise ValueError(f"row {int(total.isnan().nonzero()[0])}: the model's logits are NaN; load it in float32")
    return total, (torch.cat(likeliest, 1) | ~real).all(1)


Laws = Iterator[tuple[slice, Tensor]]  # of some of the columns, their logits [B, n, V]


def _with_thoughts(model: Any, ids: Tensor, mask: Tensor, columns: Tensor, options: tuple[Any, ...]) -> Laws:
    text, checked = model._prepare(ids, mask, options)
    hidden, round_ = model._think_after(columns, ids, text, checked)
    weight = model.mix(hidden, round_.end_hidden)
    for part in chunks(columns.shape[1], len(ids) * (checked.thoughts + 1) * model.logits_size):
        raw = model.raw_logits(hidden[:, part])
        yield part, average(model.mixed_logits(raw, round_.end_hidden[:, part], weight[:, part]))


def _plainly(model: PreTrainedModel, ids: Tensor, mask: Tensor, columns: Tensor) -> Laws:
    options = {"think": "never"} if can_think(model) else {}
    logits = model(ids, attention_mask=mask, **options).logits
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    yield slice(None), logits[rows, columns].to(torch.promote_types(logits.dtype, torch.float32))
