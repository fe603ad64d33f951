"""Texts with gaps filled: the law of a filling whose length is drawn too."""

from itertools import pairwise, product

import pytest
import torch

import pyquiet
from pyquiet.any_subset import Cache, Engine
from pyquiet.any_subset.gaps import fill_gaps
from pyquiet.any_subset.order import ranks_of
from pyquiet.gaps import Gapped, read_length

from ..chi_square import chi_square
from .models import random_xlnet


class MarkovEngine(Engine):
    """A stationary Markov chain: the laws of all orders agree, and those of different lengths too."""

    device = torch.device("cpu")

    def __init__(self, transition):
        self.vocab_size = len(transition)
        self.powers = torch.stack([torch.linalg.matrix_power(transition, n) for n in range(12)])
        self.start_law = self.powers[-1][0]

    def start(self, order, prompt):
        cache = Cache(order, prompt)
        cache.tokens = torch.zeros_like(order)
        cache.select = lambda rows: (Cache.select(cache, rows), setattr(cache, "tokens", cache.tokens[rows]))
        return cache

    def rows(self, cache, content, content_ranks, content_sees, ranks, sees):
        places = cache.order.gather(1, content_ranks.clamp(min=0))
        row, column = (content_ranks >= 0).nonzero(as_tuple=True)
        cache.tokens[row, places[row, column]] = content[row, column]
        place = cache.order.gather(1, ranks.clamp(min=0))[..., None]  # [B, Q, 1]
        at = torch.arange(cache.order.shape[1])
        seen = ranks_of(cache.order)[:, None] < sees[..., None]
        left = at.masked_fill(~(seen & (at < place)), -1).amax(-1)
        right = at.masked_fill(~(seen & (at > place)), 99).amin(-1)
        place = place[..., 0]
        law = self.powers[(place - left).clamp(max=11), cache.tokens.gather(1, left.clamp(min=0))]
        law = torch.where((left >= 0)[..., None], law, self.start_law)
        to = self.powers[(right - place).clamp(0, 11)].gather(
            3,
            cache.tokens.gather(1, right.masked_fill(right == 99, 0))[..., None, None].expand(
                -1, -1, self.vocab_size, 1
            ),
        )[..., 0]
        return (law * torch.where((right < 99)[..., None], to, 1.0)).log()

    def head(self, hidden):
        return hidden


@pytest.mark.parametrize("method", ["sequential", "assd"])
def test_length_and_filling_have_their_joint_law_given_the_text(method):
    chain = torch.tensor([[0.05, 0.9, 0.05], [0.1, 0.1, 0.8], [0.7, 0.1, 0.2]], dtype=torch.float64)
    text, M = Gapped([[1, 0], [0, 2]], [range(1, 4)]), 3000
    filled, took = fill_gaps(
        MarkovEngine(chain), [text] * M, seed=3, method=method, **({"k": 3} if method == "assd" else {})
    )
    laws = {}
    for length in text.lengths[0]:
        for gap in product(range(3), repeat=length):
            path = [0, *gap, 0]
            laws[gap] = torch.stack([chain[a, b] for a, b in pairwise(path)]).prod().item()
    total = sum(laws.values())
    counts = dict.fromkeys(laws, 0)
    for one in filled:
        gap = tuple(token for token, given in zip(one.ids, one.given, strict=True) if not given)
        assert one.lengths == (len(gap),)
        counts[gap] += 1
    assert chi_square(torch.tensor(list(counts.values())), torch.tensor(list(laws.values())) / total) > 1e-4
    by_length = [sum(law for gap, law in laws.items() if len(gap) == length) / total for length in (1, 2, 3)]
    assert max(by_length) > 2 * min(by_length)  # so that a uniform length would be seen
    assert took["tokens"] == 6 * M
    # Each length's tokens in as many calls at most, and two probabilities of each.
    calls = took["target_calls"] + took["draft_calls"]
    assert calls == (6 + 2 * 3) * M if method == "sequential" else 2 * 3 * M < calls < (6 + 2 * 3) * M


def test_the_most_probable_lengths_at_temperature_0_are_those_of_the_joint_probabilities():
    model = random_xlnet(vocabulary=13)
    text = Gapped([[1, 2], [3, 4], [5, 6, 7]], [range(1, 3), range(2, 4)])
    (filled,), _ = fill_gaps(model, [text], temperature=0.0)
    scores = {}
    for first, second in product(*text.lengths):
        known = torch.tensor([[1, 1, *[0] * first, 1, 1, *[0] * second, 1, 1, 1]]).bool()
        ids = torch.zeros(known.shape, dtype=torch.int64)
        ids[known] = torch.arange(1, 8)
        out = pyquiet.infill(model, ids, mask=~known, temperature=0.0)
        before = torch.arange(ids.shape[1])[None] < 2
        joint = [pyquiet.joint_log_prob(model, out.tokens, known=x).item() for x in (before, known)]
        scores[first, second] = (joint[0] - joint[1], out.tokens[0].tolist())
    assert filled.lengths == max(scores, key=lambda lengths: scores[lengths][0])
    assert filled.ids == scores[filled.lengths][1]
    assert filled.ids[:2] == [1, 2]


def test_a_text_is_filled_alike_alone_and_in_company():
    model = random_xlnet(vocabulary=13)
    texts = [
        Gapped([[1], [2, 3]], [range(4, 5)]),
        Gapped([[], []], [range(1, 4)]),
        Gapped([[5, 6], [7]], [range(2, 4)]),
    ]
    together, took = fill_gaps(model, texts, seed=5, sequence_ids=[4, 0, 9], method="one_call", k=2)
    alone = [
        fill_gaps(model, [text], seed=5, sequence_ids=[i], method="one_call", k=2)
        for text, i in zip(texts, [4, 0, 9], strict=True)
    ]
    assert [one.ids for one in together] == [one.ids for (one,), _ in alone]
    assert [one.log_prob for one in together] == pytest.approx([one.log_prob for (one,), _ in alone], abs=1e-4)
    for name in ("tokens", "rounds", "draft_calls", "auxiliary_calls"):
        assert took[name] == sum(cost[name] for _, cost in alone)
    assert took["tokens"] == 4 + (1 + 2 + 3) + (2 + 3)
    known = torch.tensor([[True, False, False, False, False, True, True]])
    ids = torch.tensor([[1, 0, 0, 0, 0, 2, 3]])
    noise = torch.tensor([4])
    out = pyquiet.infill(model, ids, mask=~known, seed=5, sequence_ids=noise, method="one_call", k=2)
    assert together[0].ids == out.tokens[0].tolist()
    assert together[0].log_prob == pytest.approx(out.log_probs.sum().item(), abs=1e-4)


def test_too_much_is_refused_before_anything_is_computed(monkeypatch):
    model = random_xlnet(vocabulary=13)
    with pytest.raises(ValueError, match="100 combinations"):
        fill_gaps(model, [Gapped([[1], [2], [3]], [range(1, 11)] * 2)])
    with pytest.raises(ValueError, match="GiB of memory"):
        fill_gaps(model, [Gapped([[1], [2]], [range(10**10, 10**10 + 1)])])
    monkeypatch.setattr("pyquiet.any_subset.gaps._memory", lambda device: 4 * (3 * 2 * 100**2 + 2 * 3 * 16 * 103) - 1)
    with pytest.raises(ValueError, match="1 rows of up to 103 tokens"):
        fill_gaps(model, [Gapped([[1] * 99, [2]], [range(3, 4)])])
    fill_gaps(model, [Gapped([[1] * 98, [2]], [range(3, 4)])])
    for words in ("0", "3-2", "-1", "x", "1-"):
        with pytest.raises(ValueError, match=repr(words)):
            read_length(words)
