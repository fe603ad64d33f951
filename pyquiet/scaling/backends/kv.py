"""Keys and values of single texts: side by side in a batch's cache, taken out of it, and kept between requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

KV = tuple[Tensor, ...]  # [N, G, S, D] for each kind of keys and values that the layers have: nearly always one
HEAD = 16  # tokens that two chains must have in common for one to begin with what is known of the other
Place = tuple[int, int]  # of a layer's keys or values: their kind, and their number among that kind


def length(kv: KV) -> int:
    """How many tokens it is of; 0 for none at all."""
    return kv[0].shape[2] if kv else 0


@dataclass(frozen=True)
class Layout:
    """Where each layer's keys and values are found in a `KV`.

    Attributes:
        kinds: an empty tensor [0, G, 0, D] of each. counts: how many tensors are of it.
        places: of each layer's keys and values.
    """

    kinds: tuple[Tensor, ...]
    counts: tuple[int, ...]
    places: tuple[tuple[Place, Place], ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers: 2 x layers x key heads x head size x width for most."""
        kinds = zip(self.kinds, self.counts, strict=True)
        return sum(count * like.shape[1] * like.shape[3] * like.element_size() for like, count in kinds)

    @classmethod
    def of(cls, cache: DynamicCache) -> Layout:
        """That of a cache which a model has filled."""
        kinds: dict[Any, list[Tensor]] = {}
        places = []
        for layer in cache.layers:
            pair = []
            for x in (layer.keys, layer.values):
                alike = kinds.setdefault((x.shape[1], x.shape[3], x.dtype, x.device), [])
                alike.append(x)
                pair.append((list(map(id, kinds.values())).index(id(alike)), len(alike) - 1))
            places.append((pair[0], pair[1]))
        empty = tuple(alike[0][:0, :, :0] for alike in kinds.values())
        return cls(empty, tuple(map(len, kinds.values())), tuple(places))


class Rows:
    """Texts side by side in one cache, all ending in the same column, so that a window is the same for all of them.

    What a model adds is written in place, and texts come and go without the others being copied.
    """

    def __init__(self, layout: Layout, room: int = 0) -> None:
        self.lengths: list[int] = []
        self._layout, self._room = layout, room  # columns that are left free when texts are moved
        self._begin = self._end = 0
        self._data = self._zeros(0, 0)
        self.cache = DynamicCache()
        self.cache.layers = [_Layer(self, *places) for places in layout.places]

    @property
    def width(self) -> int:
        """Columns that the model sees: as many as the longest text has tokens."""
        return self._end - self._begin

    def mask(self, more: int = 0) -> Tensor:
        """int64 [B, width + more]: 1 for each text's tokens and for `more` that come."""
        columns = torch.arange(self.width + more)
        return (columns >= self.width - torch.tensor(self.lengths, dtype=torch.int64)[:, None]).long()

    def add(self, texts: Sequence[KV], more: int = 1) -> None:
        """Puts texts beside those that are there, and makes room for `more` tokens of each to be read at once."""
        first, lengths = len(self.lengths), list(map(length, texts))
        self._make_room(first + len(texts), max(lengths, default=0), more)
        self.lengths += lengths
        for row, (text, n) in enumerate(zip(texts, lengths, strict=True), first):
            for i, kind in enumerate(self._data):
                kind[:, row, :, : self._end - n] = 0  # what is masked still enters a product, where NaN would stay
                if n:
                    kind[:, row, :, self._end - n : self._end] = text[i]
        self._narrow()

    def remove(self, row: int) -> None:
        """Takes a text out; the last one takes its place."""
        last = len(self.lengths) - 1
        for kind in self._data if row != last else ():
            kind[:, row, :, self._begin : self._end] = kind[:, last, :, self._begin : self._end]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._narrow()

    def take(self, row: int, new: int = 0) -> KV:
        """Views of a text, with the first `new` of the columns that a model has written and `grow` has not claimed."""
        begin = self._end - self.lengths[row]
        return tuple(kind[:, row, :, begin : self._end + new] for kind in self._data)

    def grow(self, tokens: int = 1) -> None:
        """Each text has got so many tokens that the model has read."""
        self._end += tokens
        self.lengths = [n + tokens for n in self.lengths]
        self._make_room(len(self.lengths), 0, 1)

    def written(self, place: Place, new: Tensor) -> Tensor:
        """Writes a layer's new keys or values [B, G, Q, D] behind the texts; what is there then, [B, G, S, D]."""
        kind, number = place
        shown = self._data[kind][number, : len(self.lengths), :, self._begin : self._end + new.shape[2]]
        shown[:, :, self.width :] = new
        return shown

    def _zeros(self, rows: int, columns: int) -> list[Tensor]:
        return [
            like.new_zeros(count, rows, like.shape[1], columns, like.shape[3])
            for like, count in zip(self._layout.kinds, self._layout.counts, strict=True)
        ]

    def _make_room(self, rows: int, longest: int, more: int) -> None:
        there, columns = self._data[0].shape[1], self._data[0].shape[3]
        end, fits = self._end, longest <= self._end and self._end + more <= columns
        if fits and rows <= there:
            return
        if not fits:
            end = max(self.width, longest) + (self._room // 2 if self.lengths else 0)
            columns = end + more + self._room
        data = self._zeros(max(rows, min(2 * there, rows + 8)), columns)
        for old, new in zip(self._data, data, strict=True):
            n = len(self.lengths)
            new[:, :n, :, end - self.width : end] = old[:, :n, :, self._begin : self._end]
        self._data, self._begin, self._end = data, end - self.width, end

    def _narrow(self) -> None:
        self._begin = self._end - max(self.lengths, default=0)


class Alone:
    """One text in a cache of its own, for a model whose cache is more than keys and values; like `Rows` of one."""

    def __init__(self, config: Any) -> None:
        self.cache = DynamicCache(config=config)
        self.lengths = [0]

    def mask(self, more: int = 0) -> Tensor:
        """int64 [1, length + more], all 1."""
        return torch.ones(1, self.lengths[0] + more, dtype=torch.int64)

    def take(self, row: int, new: int = 0) -> KV:
        """Nothing that could be kept."""
        return ()

    def remove(self, row: int) -> None:
        """Nothing is left to take its place."""

    def grow(self, tokens: int = 1) -> None:
        """The text has got tokens that the model has read."""
        self.lengths[0] += tokens


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer of `Rows` as a model sees it. Every layer keeps all it is given: windows are the mask's."""

    def __init__(self, rows: Rows, keys: Place, values: Place) -> None:
        super().__init__()
        self._rows, self._places = rows, (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._rows.written(self._places[0], key_states), self._rows.written(self._places[1], value_states)

    def get_seq_length(self) -> int:
        return self._rows.width


@dataclass(frozen=True, slots=True)
class _Kept:
    ids: tuple[int, ...]
    kv: KV
    size: int


class KVStore:
    """What was read last of each chain, the least recently used forgotten first beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._alike: dict[tuple[int, ...], dict[str, None]] = {}  # chains by the head of what was read
        self._lock = Lock()  # chains are forgotten from another thread

    def find(self, chain: str, ids: Sequence[int], most: int) -> KV:
        """Keys and values of the longest known beginning of `ids`, at most of `most` tokens; empty for none.

        Where the chain has read nothing yet, those of another one that begins alike will do.
        """
        with self._lock:
            name = chain if chain in self._kept else next(reversed(self._alike.get(tuple(ids[:HEAD]), {})), chain)
            kept = self._kept.get(name)
            if kept is None:
                return ()
            self._kept.move_to_end(name)
        same = common(kept.ids, ids[:most])
        return tuple(kind[:, :, :same] for kind in kept.kv) if same else ()

    def keep(self, chain: str, ids: Sequence[int], kv: KV) -> None:
        """Keeps a copy for the chain instead of what it had, if it fits at all."""
        size = sum(kind.numel() * kind.element_size() for kind in kv)
        self.forget(chain)
        if size > self.limit:
            return
        copy = tuple(kind.clone(memory_format=torch.contiguous_format) for kind in kv)
        with self._lock:
            self._kept[chain] = _Kept(tuple(ids), copy, size)
            self._alike.setdefault(tuple(ids[:HEAD]), {})[chain] = None
            self.size += size
            while self.size > self.limit:
                self._drop(next(iter(self._kept)))

    def forget(self, chain: str) -> None:
        """Drops what is kept for a chain."""
        with self._lock:
            if chain in self._kept:
                self._drop(chain)

    def _drop(self, chain: str) -> None:
        kept = self._kept.pop(chain)
        self.size -= kept.size
        head = kept.ids[:HEAD]
        del self._alike[head][chain]
        if not self._alike[head]:
            del self._alike[head]


def common(known: Sequence[int], wanted: Sequence[int]) -> int:
    """How many ids agree from the beginning on."""
    n = min(len(known), len(wanted))
    if known[:n] == wanted[:n]:
        return n
    return next(i for i, (a, b) in enumerate(zip(known, wanted, strict=False)) if a != b)
