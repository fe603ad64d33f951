"""Keys and values of single texts: put together to a batch's cache, taken out of it, and kept between requests."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

KV = list[tuple[Tensor, Tensor]]  # keys and values [G, S, D] of each layer


def batched(rows: Sequence[KV]) -> DynamicCache:
    """A cache of several texts, padded on the left. Every layer keeps all it is given: windows are the mask's."""
    cache = DynamicCache()
    longest = max((row[0][0].shape[1] for row in rows if row), default=0)
    layers = max(map(len, rows), default=0)
    for layer in range(layers if longest else 0):
        like = next(row[layer] for row in rows if row)
        parts = [row[layer] if row else (like[0][:, :0], like[1][:, :0]) for row in rows]
        keys, values = (
            torch.stack([pad(x, (0, 0, longest - x.shape[1], 0)) for x in side]) for side in zip(*parts, strict=True)
        )
        cache.update(keys, values, layer)
    return cache


def taken(cache: DynamicCache, row: int, columns: slice) -> KV:
    """Views of one text's keys and values."""
    return [(layer.keys[row, :, columns], layer.values[row, :, columns]) for layer in cache.layers]


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
        self._lock = Lock()  # chains are forgotten from another thread

    def find(self, chain: str, ids: Sequence[int], most: int) -> KV:
        """Keys and values of the longest known beginning of `ids`, at most of `most` tokens; empty for none."""
        with self._lock:
            kept = self._kept.get(chain)
            if kept is None:
                return []
            self._kept.move_to_end(chain)
        same = 0
        for known, wanted in zip(kept.ids, ids[:most], strict=False):
            if known != wanted:
                break
            same += 1
        return [(k[:, :same], v[:, :same]) for k, v in kept.kv] if same else []

    def keep(self, chain: str, ids: Sequence[int], kv: KV) -> None:
        """Keeps a copy for the chain instead of what it had, if it fits at all."""
        size = sum(x.numel() * x.element_size() for pair in kv for x in pair)
        self.forget(chain)
        if size > self.limit:
            return
        copy = [(k.clone(), v.clone()) for k, v in kv]
        with self._lock:
            self._kept[chain] = _Kept(tuple(ids), copy, size)
            self.size += size
            while self.size > self.limit:
                self.size -= self._kept.popitem(last=False)[1].size

    def forget(self, chain: str) -> None:
        """Drops what is kept for a chain."""
        with self._lock:
            kept = self._kept.pop(chain, None)
            self.size -= kept.size if kept else 0
