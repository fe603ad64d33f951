"""Transformers' XLNet, unmodified, as a two-stream engine with a content cache in rank order.

Each layer has two kinds of rows on one set of weights. Content rows start from a token's embedding and give all keys
and values; query rows start from one learned vector and give neither, so that they influence nothing but their own
logits. Scores hold the signed difference of *positions*, so keys may be stored in any order (arXiv 2504.20456; arXiv
1906.08237, section 2.3). Letters: B sequences, N positions, C content rows, Q query rows, R rows, S keys, H
heads, D head size, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import XLNetLMHeadModel

from pyquiet.any_subset.engine import Cache, Engine
from pyquiet.any_subset.order import ranks_of
from pyquiet.heads import apply_head


class XLNetCache(Cache):
    """Keys and values of every layer in rank order, and the keys of all differences of positions.

    The slot N, which no row sees, takes the keys of idle rows.
    """

    def __init__(self, engine: XLNetEngine, order: Tensor, prompt: Tensor) -> None:
        super().__init__(order, prompt)
        batch, length = order.shape
        attentions = [layer.rel_attn for layer in engine.layers]
        heads, size = attentions[0].n_head, attentions[0].d_head
        self.stored = [a.q.new_zeros(batch, 2 * heads, length + 1, size) for a in attentions]  # keys, then values
        self.to_query = [a.q.detach() * a.scale for a in attentions]
        self.to_stored = [torch.cat([a.k, a.v], 1).detach() for a in attentions]
        self.biases = [_biases(a).detach() for a in attentions]
        self.differences = [engine.difference_keys(layer, length).detach().mT for layer in engine.layers]
        self.places = torch.cat([order, order.new_zeros(batch, 1)], 1)  # of the slots

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        on_device = rows.to(self.stored[0].device)
        self.places = self.places[rows]
        self.stored = [x[on_device] for x in self.stored]


class XLNetEngine(Engine):
    """The engine of a transformers.XLNetLMHeadModel, whose weights it reads and whose modules it calls.

    Raises:
        TypeError: `model` is no XLNetLMHeadModel.
        ValueError: its attention is one-directional (attn_type "uni"), bi_data is set, or its weights are of several
            dtypes.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, XLNetLMHeadModel):
            raise TypeError(
                "model must be a transformers.XLNetLMHeadModel or a pyquiet.any_subset.Engine, got "
                f"{type(model).__name__}"
            )
        config = model.config
        if config.attn_type != "bi" or config.bi_data:
            raise ValueError(
                f"model.config has attn_type={config.attn_type!r}, bi_data={config.bi_data}; filling in any order "
                "needs attn_type='bi' and bi_data=False"
            )
        dtypes = {weight.dtype for weight in model.parameters()}
        if len(dtypes) > 1:  # transformers leaves some of XLNet's in float32, whatever dtype it is asked for
            raise ValueError(
                f"model has weights in {' and '.join(sorted(map(str, dtypes)))}; convert them all, with model.to(dtype)"
            )
        self.model = model
        self.base = model.transformer
        self.layers: Any = self.base.layer
        self.vocab_size: int = config.vocab_size

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # the model may be moved
        return self.base.mask_emb.device  # type: ignore[no-any-return]

    @property
    def owner(self) -> Any:
        return self.model

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.model.training  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.promote_types(self.base.mask_emb.dtype, torch.float32)

    def start(self, order: Tensor, prompt: Tensor) -> XLNetCache:
        return XLNetCache(self, order, prompt)

    def head(self, hidden: Tensor) -> Tensor:
        return apply_head(self.model.lm_loss, hidden).to(self.dtype)

    def rows(
        self,
        cache: XLNetCache,
        content: Tensor,
        content_ranks: Tensor,
        content_sees: Tensor,
        ranks: Tensor,
        sees: Tensor,
    ) -> Tensor:
        C, (B, length) = content.shape[1], cache.order.shape
        sees = torch.cat([content_sees, sees.masked_fill(ranks < 0, 0)], 1)
        ranks = torch.cat([content_ranks, ranks], 1)
        H, S = cache.stored[0].shape[1] // 2, max(1, int(sees.max())) if sees.numel() else 1
        positions = cache.order.gather(1, ranks.clamp(min=0))
        # Of the difference keys, those that these rows meet; and among them, each row's by slot.
        first, last = (length - 1 - int(p) for p in (positions.max(), positions.min())) if ranks.numel() else (0, 0)
        columns = cache.places[:, None, :S] - positions[:, :, None] + (length - 1 - first)
        columns = columns.to(self.device)[:, None].expand(-1, H, -1, -1)
        met = [keys[..., first : last + length] for keys in cache.differences]
        slots = ranks[:, :C].masked_fill(ranks[:, :C] < 0, length).to(self.device)
        slots = slots[:, None, :, None].expand(-1, 2 * H, -1, cache.stored[0].shape[3])
        mask = self._mask(torch.arange(S) >= sees[:, None, :, None])
        empty = _empty(sees[:, None, :, None])
        rows = torch.cat([self.base.word_embedding(content), self._queries(ranks[:, C:])], 1)
        for number, layer in enumerate(self.layers):
            stored = cache.stored[number]
            if C:
                stored.scatter_(2, slots, _heads(rows[:, :C], cache.to_stored[number]))
            if layer is self.layers[-1]:  # nobody reads the content rows of the last layer
                rows, columns, mask = rows[:, C:], columns[:, :, C:], mask[:, :, C:]
                empty = None if empty is None else empty[:, :, C:]
            if not rows.shape[1]:
                break
            by_key, by_place = _heads(rows, cache.to_query[number]) + cache.biases[number]
            by_place = (by_place @ met[number]).gather(-1, columns).add_(mask)
            scores = torch.baddbmm(by_place.flatten(0, 1), by_key.flatten(0, 1), stored[:, :H, :S].flatten(0, 1).mT)
            rows = _layer(layer, rows, scores.unflatten(0, (B, H)), stored[:, H:, :S], empty)
        return rows

    def whole(self, tokens: Tensor, order: Tensor, prompt: Tensor, sees: Tensor) -> Tensor:
        """Hidden rows [B, A, N, d] of A queries at each position, in one differentiable pass without a cache.

        `sees` int64 [B, A, N] is how many ranks the queries see, by position. Keys stand in order of positions here, so
        that each row's differences are one slice of all.
        """
        N, A = tokens.shape[1], sees.shape[1]
        rank = ranks_of(order)
        content_sees = torch.maximum(rank + 1, prompt[:, None])
        all_sees = torch.cat([content_sees, sees.flatten(1)], 1)[:, None, :, None]
        mask, empty = self._mask(rank[:, None, None, :] >= all_sees), _empty(all_sees)
        rows = torch.cat([self.base.word_embedding(tokens), self._queries(all_sees[:, 0, N:, 0])], 1)
        rows = self.base.dropout(rows)
        for layer in self.layers:
            attention = layer.rel_attn
            keys, values = _heads(rows[:, :N], attention.k), _heads(rows[:, :N], attention.v)
            if layer is self.layers[-1]:
                rows, mask, empty = rows[:, N:], mask[:, :, N:], None if empty is None else empty[:, :, N:]
            by_key, by_place = _heads(rows, attention.q) * attention.scale + _biases(attention)
            by_place = by_place @ self.difference_keys(layer, N).mT
            by_place = _shift(by_place.unflatten(2, (-1, N))).flatten(2, 3)
            rows = _layer(layer, rows, by_key @ keys.mT + by_place + mask, values, empty)
        return self.base.dropout(rows).unflatten(1, (A, N))  # type: ignore[no-any-return]

    def difference_keys(self, layer: Any, length: int) -> Tensor:
        """The keys [1, H, 2N - 1, D] of the differences N - 1 .. -(N - 1) of positions."""
        difference = torch.arange(length - 1, -length, -1, device=self.device).float()
        if self.base.clamp_len > 0:
            difference = difference.clamp(-self.base.clamp_len, self.base.clamp_len)
        width = self.base.d_model
        frequency = 1 / 10000 ** (torch.arange(0, width, 2.0, device=self.device) / width)
        angle = difference[:, None] * frequency
        place = torch.cat([angle.sin(), angle.cos()], -1).to(layer.rel_attn.r.dtype)
        return _heads(self.base.dropout(place[None]), layer.rel_attn.r)

    def _queries(self, ranks: Tensor) -> Tensor:
        return self.base.mask_emb.expand(*ranks.shape, -1)  # type: ignore[no-any-return]

    def _mask(self, hidden: Tensor) -> Tensor:
        """What is added to scores: 0, or for a hidden key so little that it weighs nothing beside any other."""
        dtype = self.base.mask_emb.dtype
        # Half of the least number, to which a score may still be added.
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min / 2).to(self.device)


def _biases(attention: Any) -> Tensor:
    """What is added to scaled queries [B, H, R, D] that meet keys, and that meet differences, [2, 1, H, 1, D]."""
    biases: Tensor = torch.stack([attention.r_w_bias, attention.r_r_bias])[:, None, :, None] * attention.scale
    return biases


def _empty(sees: Tensor) -> Tensor | None:
    """Where a row sees nothing, if one does."""
    empty = sees == 0
    return empty if bool(empty.any()) else None


def _layer(layer: Any, rows: Tensor, scores: Tensor, values: Tensor, empty: Tensor | None) -> Tensor:
    """A layer's output for `rows` [B, R, d], by scores [B, H, R, S]; those `empty` bool [B, 1, R, 1] see nothing."""
    attention = layer.rel_attn
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    mixed = _drop(attention.dropout, weights) @ values  # [B, H, R, D]
    if empty is not None:
        mixed = mixed.masked_fill(empty.to(mixed.device), 0)
    out = (mixed.transpose(1, 2).flatten(2).flatten(0, 1) @ attention.o.flatten(1).mT).view_as(rows)
    rows, ff = attention.layer_norm(_drop(attention.dropout, out) + rows), layer.ff
    inner = _drop(ff.dropout, ff.activation_function(ff.layer_1(rows)))
    return ff.layer_norm(_drop(ff.dropout, ff.layer_2(inner)) + rows)  # type: ignore[no-any-return]


def _drop(dropout: torch.nn.Module, x: Tensor) -> Tensor:
    # A call of a module that does nothing is no small part of a cached call.
    return dropout(x) if dropout.training else x


def _heads(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [B, R, d] through a weight [d, H, D]: [B, H, R, D]."""
    heads: Tensor = rows.flatten(0, 1) @ weight.flatten(1)  # one product of matrices, not one a sequence
    return heads.view(*rows.shape[:2], *weight.shape[1:]).transpose(1, 2)


def _shift(scores: Tensor) -> Tensor:
    """Of scores [..., N, 2N - 1] by row i and difference, a view of those [..., N, N] by row i and key j: i - j."""
    N = scores.shape[-2]
    if N == 1:
        return scores
    # Row i wants the columns from N - 1 - i on: in all, from i (2N - 1) + N - 1 - i on.
    wanted = scores.flatten(-2)[..., N - 1 : N - 1 + N * (2 * N - 2)]
    return wanted.unflatten(-1, (N, 2 * N - 2))[..., :N]  # type: ignore[no-any-return]
