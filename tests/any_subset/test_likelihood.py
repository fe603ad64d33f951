"""One call against the chain of conditionals, and against the sum over all fillings."""

import itertools

import pytest
import torch

import pyquiet

from .models import random_xlnet, transformers_logits

N, V = 6, 3
KNOWN = torch.tensor([[True, False, True, False, False, False], [False] * 6, [True] * 6])


@pytest.fixture(scope="module")
def model():
    return random_xlnet(V)


def fillings(known):
    places = (~known).nonzero().flatten()
    texts = torch.zeros(V ** len(places), len(known), dtype=torch.int64)
    texts[:, places] = torch.tensor(list(itertools.product(range(V), repeat=len(places))), dtype=torch.int64)
    return texts


@pytest.mark.parametrize("row", range(3))
def test_the_joint_sums_to_one(model, row):
    texts = fillings(KNOWN[row])
    joint = pyquiet.joint_log_prob(model, texts, known=KNOWN[row].expand_as(texts))
    assert abs(joint.double().exp().sum().item() - 1) < 1e-5
    assert joint.exp().max() < 0.9 or row == 2  # it is no certainty, where there is a choice


def test_the_joint_is_the_product_of_transformers_conditionals(model):
    text = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    order, m = pyquiet.any_subset.order_from_mask(KNOWN[0])
    chain = sum(
        transformers_logits(model, text, order, m, int(order[r]), r).log_softmax(-1)[text[order[r]]]
        for r in range(m, N)
    )
    joint = pyquiet.joint_log_prob(model, text[None], known=KNOWN[:1])
    torch.testing.assert_close(joint[0], chain, rtol=0, atol=1e-5)


def test_marginals_are_transformers_and_look_at_nothing_hidden(model):
    text = torch.randint(0, V, (1, N), generator=torch.Generator().manual_seed(1))
    order, m = pyquiet.any_subset.order_from_mask(KNOWN[0])
    out = pyquiet.marginals(model, text, known=KNOWN[:1])[0]
    for position in range(N):
        if KNOWN[0, position]:
            assert out[position].exp().tolist() == torch.eye(V)[text[0, position]].tolist()
        else:
            expected = transformers_logits(model, text[0], order, m, position, m).log_softmax(-1)
            torch.testing.assert_close(out[position], expected, rtol=0, atol=1e-5)
    other = torch.where(KNOWN[:1], text, (text + 1) % V)
    assert torch.equal(pyquiet.marginals(model, other, known=KNOWN[:1])[0], out)


def test_the_first_marginal_is_the_first_factor(model):
    known = KNOWN[:1]
    text = torch.zeros(1, N, dtype=torch.int64)
    first = int((~known[0]).nonzero()[0])
    one = torch.ones(1, N, dtype=torch.bool)
    one[0, first] = False
    chances = pyquiet.marginals(model, text, known=known)[0, first].exp()
    texts = fillings(known[0])
    joint = pyquiet.joint_log_prob(model, texts, known=known.expand_as(texts)).exp()
    summed = torch.stack([joint[texts[:, first] == v].sum() for v in range(V)])
    torch.testing.assert_close(summed, chances, rtol=0, atol=1e-5)


@pytest.mark.parametrize("known", [KNOWN[:1], torch.ones(1, N, dtype=torch.bool)], ids=["some", "all known"])
def test_results_are_as_exact_as_the_model(known):
    exact, text = random_xlnet().double(), torch.zeros(1, N, dtype=torch.int64)
    for function in (pyquiet.joint_log_prob, pyquiet.marginals):
        assert function(exact, text, known=known).dtype == torch.float64


def test_bad_input_is_named(model):
    text = torch.zeros(1, N, dtype=torch.int64)
    with pytest.raises(ValueError, match="known"):
        pyquiet.joint_log_prob(model, text, known=torch.ones(1, N + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="input_ids"):
        pyquiet.marginals(model, text + V, known=torch.ones(1, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="input_ids"):
        pyquiet.joint_log_prob(model, text + V, known=KNOWN[1:2])
