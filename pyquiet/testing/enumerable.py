"""Any-subset models so small that their law can be written out, for exact tests of samplers.

Words: B sequences, N positions, G of them to fill, V vocabulary, Q query rows, K = V^G completions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import XLNetConfig, XLNetLMHeadModel

from pyquiet.any_subset.engine import Cache, Engine, as_engine
from pyquiet.any_subset.order import order_from_mask
from pyquiet.checks import check_count
from pyquiet.randomness import Purpose, Stream, epoch_seed, process_logits, uniforms

_MOST_COMPLETIONS = 1 << 20


class TabularCache(Cache):
    """The codes int64 [B, N] of the (position, token) pairs by rank; a set of pairs has the sum of its codes."""

    def __init__(self, order: Tensor, prompt: Tensor) -> None:
        super().__init__(order, prompt)
        self.codes = torch.zeros_like(order)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.codes = self.codes[rows]


class TabularEngine(Engine):
    """A model that has, for each position and each set of visible (position, token) pairs, logits of its own.

    They are strength times standard normal numbers, hashed from the seed by Philox. So the laws of two sets have
    nothing in common, and a sampler that conditions on anything but what it should is off by much. Hidden rows are the
    logits. On the CPU; the seed of a sampler may be the same, they share no random number.

    Args:
        vocab_size: V.
        length: the longest text, N.
        strength: standard deviation of the logits; 0 is the uniform law.
        seed: of the table.
        dtype: of the logits, float32 or float64.

    Raises:
        TypeError, ValueError: vocab_size or length is no count; from the engine's methods, of a sampler's mistakes: a
            query sees ranks that the cache does not hold, or a text is longer than `length`.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        *,
        strength: float = 2.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vocab_size = check_count("vocab_size", vocab_size, least=1)
        check_count("length", length, least=1)
        self.strength, self.dtype = strength, dtype
        self.device = torch.device("cpu")
        self._seed = epoch_seed(seed, 0)  # a key of its own
        pairs = uniforms(Stream(self._seed, Purpose.CANDIDATE), length * vocab_size)
        self._codes = (pairs * 2**52).long().view(length, vocab_size)

    def start(self, order: Tensor, prompt: Tensor) -> TabularCache:
        if order.shape[1] > len(self._codes):
            raise ValueError(f"order has {order.shape[1]} positions, but the table was made for {len(self._codes)}")
        return TabularCache(order, prompt)

    def rows(
        self,
        cache: TabularCache,
        content: Tensor,
        content_ranks: Tensor,
        content_sees: Tensor,
        ranks: Tensor,
        sees: Tensor,
    ) -> Tensor:
        row, column = (content_ranks >= 0).nonzero(as_tuple=True)
        rank = content_ranks[row, column]
        cache.codes[row, rank] = self._codes[cache.order[row, rank], content[row, column]]
        held = torch.cat([cache.length[:, None], content_ranks + 1], 1).amax(1, keepdim=True)
        sees = sees.masked_fill(ranks < 0, 0)
        if (sees > held).any():
            b, q = (sees > held).nonzero()[0].tolist()
            raise ValueError(
                f"query {q} of sequence {b} sees {int(sees[b, q])} ranks, but the cache holds {int(held[b])}"
            )
        sums = torch.nn.functional.pad(cache.codes.cumsum(1), (1, 0))  # [B, N + 1]
        return self.logits(cache.order.gather(1, ranks.clamp(min=0)), sums.gather(1, sees))

    def logits(self, positions: Tensor, codes: Tensor) -> Tensor:
        """Logits [..., V] of positions [...] given sets of the codes [...]."""
        V, low = self.vocab_size, (1 << 32) - 1
        step, code = (x.flatten().repeat_interleave(V) for x in (positions, codes))
        token = torch.arange(V).repeat(positions.numel())
        cell = Stream(
            self._seed, Purpose.GUMBEL, sequence=code & low, position=code >> 32 & low, step=step, index=token
        )
        noise: Tensor = torch.special.ndtri(uniforms(cell, len(code)))
        return (self.strength * noise).to(self.dtype).view(*positions.shape, V)

    def head(self, hidden: Tensor) -> Tensor:
        """The hidden rows, which are the logits."""
        return hidden


def tiny_xlnet(vocab_size: int = 4, *, scale: float = 4.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random transformers.XLNetLMHeadModel (2 layers, width 16, 2 heads) whose tokens depend on each other.

    `scale` is the gain of the weight matrices, which in a fresh model is near 0.1. How strong the dependence is differs
    from seed to seed and text to text. Reads and writes no global random state.
    """
    config = XLNetConfig(
        vocab_size=vocab_size, d_model=16, n_layer=2, n_head=2, d_inner=32, dropout=0.0, pad_token_id=0, bos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        model = XLNetLMHeadModel(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # the vectors, layer norms and biases, stay as they are
            # Rows that all start from one large query vector would all predict the same.
            std = {"word_embedding": 0.5, "mask_emb": 0.1}.get(name.split(".")[1], scale / config.d_model**0.5)
            parameter.data.normal_(0, std, generator=generator)
    return model


@torch.no_grad()
def enumerate_law(
    model: Any,
    input_ids: Tensor,
    *,
    known: Tensor,
    order: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    batch_size: int = 4096,
) -> Tensor:
    """Log-probabilities, float64 [V, ..., V], of all completions: one axis a position to fill, in ascending order.

    The law is the product, in the model's order, of the conditionals after processing (temperature, top-k, top-p,
    banned ids, as in `pyquiet.randomness.process_logits`): what an exact sampler with these options must draw from.

    Args:
        model: anything `pyquiet.any_subset.as_engine` takes.
        input_ids: int64 [N]; only the given tokens are looked at.
        known: bool [N], True where the token is given.
        order: int64 [N], rank to position, given positions first; None is `order_from_mask(known)`.
        batch_size: completions in one call of the model.

    Raises:
        ValueError: nothing to fill, more than 2^20 completions, or shapes that do not fit.
    """
    engine = as_engine(model)
    if known.dtype != torch.bool or known.dim() != 1 or known.shape != input_ids.shape:
        raise ValueError(
            f"input_ids and known (bool) must have one shape [N], got {list(input_ids.shape)} and {known.dtype} "
            f"{list(known.shape)}"
        )
    V, G = engine.vocab_size, int((~known).sum())
    if G == 0 or V**G > _MOST_COMPLETIONS:
        raise ValueError(f"known leaves {G} positions, {V}^{G} completions; there must be 1 .. 2^20 to write them out")
    known = known.cpu()
    default, m = order_from_mask(known)[0], len(known) - G
    order = default if order is None else order.cpu()
    targets = order[m:]
    if not torch.equal(order[:m].sort().values, default[:m]) or not torch.equal(targets.sort().values, default[m:]):
        raise ValueError("order must hold each position once, the given ones first")
    completions = torch.cartesian_prod(*[torch.arange(V)] * G).view(-1, G)
    ranks = torch.arange(m, len(order))
    parts = []
    for part in completions.split(batch_size):
        b = len(part)
        tokens = input_ids.cpu().repeat(b, 1)
        tokens[:, ~known] = part
        cache = engine.start(order.expand(b, -1), torch.full((b,), m))
        hidden = engine.density(cache, tokens.to(engine.device), ranks.expand(b, -1))
        logits = engine.head(hidden).flatten(0, 1).cpu()
        law = process_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, banned=banned)
        chosen = law.double().log_softmax(-1).gather(1, tokens[:, targets].view(-1, 1))
        parts.append(chosen.view(b, G).sum(1))
    return torch.cat(parts).view([V] * G)
