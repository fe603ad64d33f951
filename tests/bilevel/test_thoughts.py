"""Mixing heads for domains of a thinking model's own thoughts."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pyquiet import load
from pyquiet.bilevel.domains import Part, domain_mixing_heads, mixed_by, thought_part

ANSWERED = torch.tensor([7, 10, 13, 16])  # the columns of the marks, behind which an answer stands


MODEL, TOKENIZER = load("tiny-puzzler")


@pytest.fixture
def thinker() -> Any:
    return MODEL


def chases(count: int, seed: int, *, mark: str = "?3", hops: int = 3) -> Tensor:
    """Texts int64 [count, 18] that give a permutation and then four symbols, each with where so many hops lead."""
    g, texts = random.Random(seed), []
    for _ in range(count):
        to = dict(zip("abcdef", g.sample("abcdef", 6), strict=True))
        words = [f"{a}>{b}" for a, b in g.sample(sorted(to.items()), 6)]
        for a in g.sample("abcdef", 4):
            words += [a, mark, functools.reduce(lambda symbol, _: to[symbol], range(hops), a)]
        texts.append(" ".join(words))
    ids: Tensor = TOKENIZER(texts, return_tensors="pt")["input_ids"]
    return ids


def nlls(part: Part, heads: Tensor) -> Tensor:
    """Mean NLL of each domain under its head of `heads` [m, 2]."""
    share = (part.features * heads[part.domains]).sum(1, keepdim=True)
    mixed = torch.lerp(part.logits, part.thought_logits, share).log_softmax(-1)
    lost = -mixed.gather(1, part.labels[:, None])[:, 0]
    return torch.stack([lost[part.domains == i].mean() for i in range(len(heads))])


def test_the_head_0_1_is_the_model_as_it_is(thinker: Any) -> None:
    ids = chases(10, 0)  # more than a pass
    mask = torch.ones_like(ids)
    mask[3, 7:] = 0
    mask[4, :5] = 0  # padding on the left
    part = thought_part(thinker, ids, torch.arange(10) % 3, mask, seed=5, thoughts_per_token=2)
    found = thinker.think_at_every_token(ids, mask, seed=5, thoughts_per_token=2)
    real = (mask[:, 1:] * mask[:, :-1]).bool()
    assert len(part.labels) == 2 * int(real.sum())
    mixed = torch.lerp(part.logits, part.thought_logits, part.features @ torch.tensor([[0.0], [1.0]]))
    own = mixed.log_softmax(-1).gather(1, part.labels[:, None])[:, 0]
    torch.testing.assert_close(own, found.mixed_log_probs[real].flatten(), rtol=0, atol=1e-5)
    base = part.logits.log_softmax(-1).gather(1, part.labels[:, None])[::2, 0]
    torch.testing.assert_close(base, found.base_log_probs[real], rtol=0, atol=1e-5)
    domain = (torch.arange(10) % 3)[:, None].expand_as(real)[real]
    assert torch.equal(part.domains, domain.repeat_interleave(2))


def test_columns_are_those_that_are_asked_for(thinker: Any) -> None:
    ids = chases(3, 0)
    columns = torch.tensor([2, 6, 17])  # nothing follows the last
    part = thought_part(thinker, ids, torch.zeros(3, dtype=torch.int64), positions=columns, thoughts_per_token=1)
    whole = thought_part(thinker, ids, torch.zeros(3, dtype=torch.int64), thoughts_per_token=1)
    at = (torch.arange(3)[:, None] * 17 + columns[:2]).flatten()
    assert torch.equal(part.labels, ids[:, [3, 7]].flatten())
    torch.testing.assert_close(part.thought_logits, whole.thought_logits[at], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.features, whole.features[at], rtol=1e-4, atol=1e-5)


def test_a_domain_that_thoughts_mislead_learns_to_leave_them_out(thinker: Any) -> None:
    """What the model learned to think about; the same marks with two hops as their answers; and one hop by its mark."""

    def part(count: int, seed: int) -> Part:
        kinds = [chases(count, seed), chases(count, seed, hops=2), chases(count, seed, mark="?1", hops=1)]
        domains = torch.arange(3).repeat_interleave(count)
        return thought_part(thinker, torch.cat(kinds), domains, positions=ANSWERED, thoughts_per_token=1)

    train, held_out, fresh = part(40, 0), part(40, 1), part(60, 2)
    as_it_is = torch.tensor([0.0, 1.0])
    found = domain_mixing_heads(train, held_out, start=as_it_is, steps=200)
    before, after = nlls(fresh, as_it_is.expand(3, 2)), nlls(fresh, found.values)
    assert float(before[1]) > 5
    assert float(after[1]) < 2.5
    assert float(after[0]) < float(before[0]) + 0.02
    assert float(after[2]) < float(before[2]) + 0.02
    assert found.after < found.before - 1


def test_a_head_acts_in_the_model_itself(thinker: Any) -> None:
    ids = chases(3, 0)
    part = thought_part(thinker, ids, torch.zeros(3, dtype=torch.int64), seed=2)
    head = torch.tensor([0.3, -0.5])
    with mixed_by(thinker, head):
        found = thinker.think_at_every_token(ids, seed=2)
    torch.testing.assert_close(-found.mixed_log_probs.mean(), nlls(part, head[None])[0], rtol=1e-5, atol=1e-5)
    again = thinker.think_at_every_token(ids, seed=2)
    assert not torch.allclose(again.mixed_log_probs, found.mixed_log_probs)


def test_what_does_not_fit_is_told(thinker: Any) -> None:
    ids = chases(2, 0)
    with pytest.raises(ValueError, match=r"domains must be \[2\], one for each text, got \[3\]"):
        thought_part(thinker, ids, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positions must be \[K\]"):
        thought_part(thinker, ids, torch.zeros(2, dtype=torch.int64), positions=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"head must be \[2\]"), mixed_by(thinker, torch.zeros(3)):
        pass
    part = thought_part(thinker, ids, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"start must be \[2\], a weight for each feature, got \[3\]"):
        domain_mixing_heads(part, part, start=torch.zeros(3))


def test_logits_behind_a_softcap_are_refused(thinker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(thinker), "finish", lambda self, raw: 5 * (raw / 5).tanh())
    with pytest.raises(NotImplementedError, match="does more to mixed logits than scale them"):
        thought_part(thinker, chases(2, 0), torch.zeros(2, dtype=torch.int64))
