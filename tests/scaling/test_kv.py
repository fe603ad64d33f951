"""Keys and values of texts that come and go."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pyquiet.scaling.backends.kv import HEAD, KV, KVStore, Layout, Rows, common, length


def filled(tokens: int, kinds: int = 1) -> DynamicCache:
    """A cache of two layers as a model leaves it; with two kinds, values are wider than keys."""
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4 + 3 * (kinds - 1)), layer)
    return cache


def text(layout: Layout, tokens: int) -> KV:
    shapes = zip(layout.kinds, layout.counts, strict=True)
    return tuple(torch.randn(n, like.shape[1], tokens, like.shape[3]) for like, n in shapes)


def extended(kv: KV, new: KV) -> KV:
    return tuple(torch.cat(pair, 2) for pair in zip(kv, new, strict=True))


def write(rows: Rows, layout: Layout, new: list[KV]) -> list[Any]:
    """What a model does in a forward of one token: every layer's keys, then its values; what it sees of them."""
    seen = []
    for layer, places in enumerate(layout.places):
        keys, values = (torch.stack([kv[kind][i] for kv in new]) for kind, i in places)
        seen.append(rows.cache.update(keys, values, layer))
    rows.grow()
    return seen


@pytest.mark.parametrize("kinds", [1, 2])
def test_texts_come_and_go_without_a_trace(kinds: int) -> None:
    torch.manual_seed(kinds)
    layout, dice = Layout.of(filled(3, kinds)), random.Random(kinds)
    assert (len(layout.kinds), sum(layout.counts)) == (kinds, 4)
    rows = Rows(layout, room=4)
    texts: list[KV] = []
    for _ in range(150):
        if texts and dice.random() < 0.3:
            gone = dice.randrange(len(texts))
            rows.remove(gone)
            texts[gone] = texts[-1]
            texts.pop()
        if dice.random() < 0.4 and len(texts) < 6:
            fresh = [text(layout, dice.randint(0, 12)) for _ in range(dice.randint(1, 2))]
            rows.add(fresh)
            texts += fresh
        if texts:
            new = [text(layout, 1) for _ in texts]
            mask, before = rows.mask(1), rows.lengths
            seen = write(rows, layout, new)
            texts = [extended(*pair) for pair in zip(texts, new, strict=True)]
            assert mask.sum(1).tolist() == [n + 1 for n in before] == rows.lengths
            for layer, (keys, values) in enumerate(seen):
                for shown, (kind, i) in zip((keys, values), layout.places[layer], strict=True):
                    assert shown.shape[2] == mask.shape[1] == rows.width == rows.cache.get_seq_length()
                    for row, own in enumerate(texts):
                        assert torch.equal(shown[row][:, mask[row].bool()], own[kind][i])
        for row, own in enumerate(texts):
            assert all(torch.equal(a, b) for a, b in zip(rows.take(row), own, strict=True))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_what_a_broken_text_leaves_behind_is_wiped_out(broken: int) -> None:
    layout = Layout.of(filled(3))
    rows = Rows(layout, room=8)
    texts = [text(layout, 8 + (i == broken)) for i in range(3)]
    for kind in texts[broken]:
        kind.fill_(torch.nan)
    rows.add(texts)
    rows.remove(broken)
    rows.add([text(layout, 1)])
    keys, values = write(rows, layout, [text(layout, 1) for _ in range(3)])[0]
    assert keys.shape[2] == 9
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_what_was_read_of_one_chain_serves_another_that_begins_alike() -> None:
    layout, store = Layout.of(filled(3)), KVStore(1 << 20)
    ids, kv = tuple(range(30)), text(layout, 30)
    store.keep("a", ids, kv)
    other = (*ids[:20], 99, 98)
    (found,) = store.find("b", other, 21)
    assert torch.equal(found, kv[0][:, :, :20])
    assert length(store.find("b", other, 18)) == 18
    assert store.find("b", (*ids[: HEAD - 1], 99), HEAD) == ()
    store.keep("b", other, tuple(kind[:, :, :22] for kind in kv))
    assert length(store.find("b", ids, 30)) == 20  # its own comes first
    store.forget("b")
    assert length(store.find("b", ids, 30)) == 30
    store.forget("a")
    assert store.find("b", ids, 30) == ()
    assert (store.size, store._alike) == (0, {})


def test_the_least_recently_used_goes_first() -> None:
    layout = Layout.of(filled(3))
    one = text(layout, 2)
    size = sum(kind.nbytes for kind in one)
    store = KVStore(2 * size)
    for i in (0, 1):
        store.keep(str(i), (i, i), one)
    assert length(store.find("0", (0, 0), 2)) == 2
    store.keep("2", (2, 2), one)
    assert [length(store.find(str(i), (i, i), 2)) for i in range(3)] == [2, 0, 2]
    assert store.size == 2 * size
    store.keep("2", (2,) * 9, text(layout, 9))  # fits nowhere, and what it had is no longer true
    assert store.find("2", (2,) * 9, 9) == ()


def test_ids_in_common() -> None:
    assert [common((1, 2, 3), ids) for ids in ((1, 2, 3, 4), (1, 2), (1, 9, 3), (9,), ())] == [3, 2, 1, 0, 0]
