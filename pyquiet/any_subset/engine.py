"""What the samplers need of a model: rows of queries over a content cache in rank order.

Everything that a row may see is a prefix in rank order, so one integer says what it sees: the number of ranks. A
content row of the prompt sees the m ranks of the prompt; that of a later rank i sees i + 1; a query for rank i sees i
ranks for its density (all that comes before it) and n ranks for a draft (all that is decided), arXiv 2504.20456.

Words: B sequences, N positions, Q query rows, d width, V vocabulary, m prompt, n decided ranks. The integers of the
bookkeeping (orders, ranks, lengths) are on the CPU whatever the model is on, so that no step waits for a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor


class Cache:
    """What has been computed of B sequences: the content rows of each one's first `length` ranks."""

    def __init__(self, order: Tensor, prompt: Tensor) -> None:
        """order: int64 [B, N], rank to position; prompt: int64 [B]; both on the CPU."""
        self.order, self.prompt = order, prompt
        self.length = torch.zeros_like(prompt)

    def commit(self, length: Tensor) -> None:
        """Keep the content rows of ranks below `length` [B], and forget the rest, which were drafts."""
        self.length = torch.minimum(self.length, length)

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences, int64 [b]."""
        self.order, self.prompt, self.length = self.order[rows], self.prompt[rows], self.length[rows]


class Engine(ABC):
    """A model that gives the law of any position, given any set of others.

    Implement `start`, `rows` and `head`, and set `vocab_size`, `device` and, if logits are float64, `dtype`.
    """

    vocab_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32  # of logits
    training: bool = False  # dropout is at work

    @property
    def owner(self) -> Any:
        """What outlives this engine: what is learned of its costs is kept by it."""
        return self

    @abstractmethod
    def start(self, order: Tensor, prompt: Tensor) -> Any:
        """An empty `Cache` (or one of its kind) for the orders int64 [B, N] and prompt lengths int64 [B]."""

    @abstractmethod
    def rows(
        self, cache: Any, content: Tensor, content_ranks: Tensor, content_sees: Tensor, ranks: Tensor, sees: Tensor
    ) -> Tensor:
        """Hidden rows [B, Q, d] of the queries for `ranks`, which see `sees` ranks, both int64 [B, Q].

        First puts the content rows of the tokens `content` at `content_ranks`, all [B, C], into the cache; they see
        `content_sees` ranks. A rank of -1 is an idle row: it sees nothing, and what comes out of it is finite.
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in `dtype` of hidden rows [..., d]."""

    def forward(self, cache: Cache, tokens: Tensor, until: Tensor, ranks: Tensor, sees: Tensor) -> Tensor:
        """One call: content rows up to rank `until` [B], and the hidden rows [B, Q, d] of the queries.

        Of `tokens` int64 [B, N] only the positions of ranks below `until` are looked at. The prompt is computed whole:
        its rows see each other.
        """
        assert bool(((cache.length > 0) | (until >= cache.prompt)).all()), "the first call computes the whole prompt"
        fresh = cache.length[:, None] + torch.arange(max(0, int((until - cache.length).max())))
        fresh = fresh.masked_fill(fresh >= until[:, None], -1)  # [B, C]
        positions = cache.order.gather(1, fresh.clamp(min=0)).to(tokens.device)
        content_sees = torch.where(fresh < cache.prompt[:, None], cache.prompt[:, None], fresh + 1)
        # What stands at a position that is not decided need not be a token.
        content = tokens.gather(1, positions).masked_fill((fresh < 0).to(tokens.device), 0)
        hidden = self.rows(cache, content, fresh, content_sees.masked_fill(fresh < 0, 0), ranks, sees)
        cache.length = torch.maximum(cache.length, until)
        return hidden

    def prefill(self, tokens: Tensor, order: Tensor, prompt: Tensor) -> Cache:
        """A cache that holds the prompt; a call of its own."""
        cache: Cache = self.start(order, prompt)
        none = torch.empty(len(prompt), 0, dtype=torch.int64)
        self.forward(cache, tokens, prompt, none, none)
        return cache

    def draft(self, cache: Cache, tokens: Tensor, known: Tensor, ranks: Tensor) -> Tensor:
        """Hidden rows of `ranks` [B, Q], each given only the first `known` [B] ranks: their marginals."""
        return self.forward(cache, tokens, known, ranks, known[:, None].expand_as(ranks))

    def density(self, cache: Cache, tokens: Tensor, ranks: Tensor) -> Tensor:
        """Hidden rows of `ranks` [B, Q] (-1: idle), each given all ranks before it: the factors of the joint law."""
        until = torch.maximum(ranks.amax(1), cache.length) if ranks.shape[1] else cache.length
        return self.forward(cache, tokens, torch.maximum(until, cache.prompt), ranks, ranks.clamp(min=0))


Function = TypeVar("Function", bound=Callable[..., Any])


def undisturbed(function: Function) -> Function:
    """A function of an engine for any model, run without gradients and without autocast, which would change the law."""

    @wraps(function)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        engine = as_engine(model)
        with torch.no_grad(), torch.autocast(engine.device.type, enabled=False):
            return function(engine, *args, **kwargs)

    return cast(Function, run)


def as_engine(model: Any) -> Engine:
    """The engine of a model: itself if it is one, else that of transformers' XLNetLMHeadModel, unmodified.

    Raises:
        TypeError: the model is neither.
        ValueError: a configuration that the two-stream engine does not compute.
    """
    if isinstance(model, Engine):
        return model
    from pyquiet.any_subset.modeling import XLNetEngine

    return XLNetEngine(model)
