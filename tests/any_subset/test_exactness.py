"""Theorem 2 of arXiv 2504.20456 as a test: whatever the method, draws follow the enumerated law of all completions.

And the test itself must reject four samplers with the mistakes that are easily made. Seeds are fixed.
"""

from __future__ import annotations

import pytest
import torch

from pyquiet.any_subset import infill, joint_log_prob
from pyquiet.testing import TabularEngine, enumerate_law, exactness_test, tiny_xlnet

from .toys import ContraryEngine, capricious_drafter, conditionals, expected, sample, stubborn_drafter

V = 4
INPUT_IDS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
KNOWN = torch.tensor([True, False, True, False, False, True, True, False, True])
BANNED = torch.tensor([False, True, False, False])
NETWORKS = {"tabular": TabularEngine(V, 9, strength=1.5, seed=1), "xlnet": tiny_xlnet(V, seed=1)}
SAMPLES = {"tabular": 20_000, "xlnet": 6_000}
LAWS = {name: conditionals(model, INPUT_IDS, KNOWN) for name, model in NETWORKS.items()}
PROCESSINGS = {
    "T=0.7": {"temperature": 0.7},
    "top-k": {"top_k": 2, "temperature": 1.5},
    "top-p": {"top_p": 0.8},
    "banned": {"banned": BANNED},
}


def infiller(network, input_ids=INPUT_IDS, known=KNOWN, **options):
    """The sampler that draws a text many times in one batch."""

    def draw(samples, seed):
        ids, mask = input_ids.expand(samples, -1), ~known.expand(samples, -1)
        return infill(network, ids, mask=mask, seed=seed, **options).tokens

    return draw


def check(network, law, samples=SAMPLES["tabular"], **options):
    result = exactness_test(infiller(network, **options), law, samples=samples, input_ids=INPUT_IDS, known=KNOWN)
    assert result.p_value > 1e-4, result
    assert result.cells >= 10


METHODS = {
    "sequential": {"method": "sequential"},
    "k=2": {"method": "assd", "k": 2, "bonus": False},
    "k=3": {"method": "assd", "k": 3, "bonus": False},
    "k=4": {"method": "assd", "k": 4, "bonus": False},
    "k=2, bonus": {"method": "assd", "k": 2},
    "k=3, bonus": {"method": "assd", "k": 3},
    "one call, k=1": {"method": "one_call", "k": 1},
    "one call, k=2": {"method": "one_call", "k": 2},
    "one call, k=3": {"method": "one_call", "k": 3},
    "n-gram": {"method": "ngram", "k": 3},
    "n-gram, no bonus": {"method": "ngram", "k": 2, "bonus": False},
    "stubborn drafter": {"method": stubborn_drafter(V), "k": 3},
    "capricious drafter": {"method": capricious_drafter(V), "k": 2},
    "gumbel": {"method": "assd", "k": 3, "coupling": "gumbel"},
    "gumbel, one call": {"method": "one_call", "k": 2, "coupling": "gumbel"},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_from_the_joint_law(network, method):
    model = NETWORKS[network]
    check(model, model, SAMPLES[network], **METHODS[method])


@pytest.mark.parametrize("method", ["k=3, bonus", "one call, k=2", "n-gram", "capricious drafter", "gumbel"])
@pytest.mark.parametrize("processing", PROCESSINGS)
def test_processed_laws(processing, method):
    model, options = NETWORKS["tabular"], PROCESSINGS[processing]
    check(model, enumerate_law(model, INPUT_IDS, known=KNOWN, **options), **METHODS[method], **options)


@pytest.mark.parametrize("method", ["k=3", "one call, k=3", "n-gram", "capricious drafter"])
def test_a_network_whose_drafts_are_impossible(method):
    model = ContraryEngine(V, 9, seed=1)
    check(model, model, **METHODS[method])


FREE_ORDER = torch.tensor([0, 2, 5, 6, 8, 7, 3, 1, 4])


@pytest.mark.parametrize("method", ["k=3, bonus", "one call, k=2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_free_order_has_a_law_of_its_own(network, method):
    model, samples = NETWORKS[network], SAMPLES[network]
    law = enumerate_law(model, INPUT_IDS, known=KNOWN, order=FREE_ORDER)
    check(model, law, samples, order=FREE_ORDER.expand(samples, -1), **METHODS[method])


def test_another_order_is_another_law():
    model = NETWORKS["tabular"]
    law = enumerate_law(model, INPUT_IDS, known=KNOWN, order=FREE_ORDER)
    usual = infiller(model, method="assd", k=3)
    assert exactness_test(usual, law, samples=2000, input_ids=INPUT_IDS, known=KNOWN).p_value < 1e-20


@pytest.mark.parametrize("method", ["k=3, bonus", "one call, k=2", "n-gram", "gumbel"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_ragged_batch_of_four_texts(network, method):
    """Of different lengths and prompts, one of them empty; interleaved."""
    model, share = NETWORKS[network], SAMPLES[network] // 4
    given = ["110111010", "0101", "000", "01101"]
    known, attended = torch.zeros(4, 9, dtype=torch.bool), torch.zeros(4, 9, dtype=torch.bool)
    for row, text in enumerate(given):
        attended[row, : len(text)] = True
        known[row, : len(text)] = torch.tensor([c == "1" for c in text])
    ids, mask = INPUT_IDS.expand(4, -1), attended & ~known
    tokens = infill(
        model,
        ids.repeat(share, 1),
        mask=mask.repeat(share, 1),
        attention_mask=attended.repeat(share, 1),
        seed=0,
        **METHODS[method],
    ).tokens.view(share, 4, 9)
    for row, text in enumerate(given):
        N = len(text)
        result = exactness_test(
            lambda samples, seed, row=row, N=N: tokens[:, row, :N],
            model,
            samples=share,
            input_ids=ids[row, :N],
            known=known[row, :N],
        )
        assert result.p_value > 1e-4, (row, result)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_joint_log_probability_is_the_enumerated_law(network):
    model, G = NETWORKS[network], 4
    texts = INPUT_IDS.repeat(V**G, 1)
    texts[:, ~KNOWN] = torch.cartesian_prod(*[torch.arange(V)] * G)
    log_probs = joint_log_prob(model, texts, known=KNOWN.expand(V**G, -1))
    torch.testing.assert_close(
        log_probs.double(), enumerate_law(model, INPUT_IDS, known=KNOWN).flatten(), atol=2e-5, rtol=0
    )


CUTS = {
    "k=2": {"k": 2, "bonus": False},
    "k=3": {"k": 3, "bonus": False},
    "k=3, bonus": {"k": 3, "bonus": True},
    "one call, k=1": {"k": 1, "bonus": True, "one_call": True},
    "one call, k=2": {"k": 2, "bonus": True, "one_call": True},
    "one call, k=3": {"k": 3, "bonus": True, "one_call": True},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("cut", CUTS)
def test_calls_and_kept_drafts_are_what_the_laws_say(network, cut):
    """A draft is kept with probability sum min(p, q): means over 20 batches against the walk over all prefixes."""
    model, batch = NETWORKS[network], SAMPLES[network] // 20
    calls, tried, kept, law = expected(LAWS[network], **CUTS[cut])
    whole = enumerate_law(model, INPUT_IDS, known=KNOWN).exp().flatten()
    torch.testing.assert_close(law, whole, atol=1e-6, rtol=0)  # the walk itself is right
    observed = []
    for seed in range(20):
        ids, mask = INPUT_IDS.expand(batch, -1), ~KNOWN.expand(batch, -1)
        result = infill(model, ids, mask=mask, seed=seed, **METHODS[cut])
        by_rank = torch.cat([result.tried_by_rank, result.accepted_by_rank])
        observed.append(torch.cat([sum(result.calls.values()).sum()[None], by_rank]).double() / batch)
    means = torch.stack(observed)
    off = (means.mean(0) - torch.cat([torch.tensor([calls]), tried, kept])).abs()
    error = means.std(0) / 20**0.5
    assert (off <= 4 * error + 1e-9).all(), (off / error).tolist()


def reference(laws, k=3, **mistake):
    return lambda samples, seed: sample(laws, k, samples, seed, **mistake)[0]


def test_the_reference_sampler_is_accepted():
    law = enumerate_law(NETWORKS["tabular"], INPUT_IDS, known=KNOWN)
    for k in (1, 2, 3, 4):
        result = exactness_test(reference(LAWS["tabular"], k), law)
        assert result.p_value > 1e-4, (k, result)
    banned = enumerate_law(NETWORKS["tabular"], INPUT_IDS, known=KNOWN, banned=BANNED)
    laws = conditionals(NETWORKS["tabular"], INPUT_IDS, KNOWN, banned=BANNED)
    assert exactness_test(reference(laws), banned).p_value > 1e-4


MISTAKES = {
    "replacement from the target, not the residual": {"rejected": "target"},
    "a rejected draft is dropped": {"rejected": "later"},
    "drafts at a temperature that the ratio does not know": {
        "drawn_from": conditionals(NETWORKS["tabular"], INPUT_IDS, KNOWN, temperature=0.6)
    },
    "a banned id is zeroed and the rest not renormalised": {"laws": LAWS["tabular"].masked_fill(BANNED, 0)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_rejected(mistake):
    options = {"laws": LAWS["tabular"], **MISTAKES[mistake]}
    law = enumerate_law(NETWORKS["tabular"], INPUT_IDS, known=KNOWN, banned=BANNED if "banned" in mistake else None)
    result = exactness_test(reference(**options), law)
    assert result.outside == 0
    assert result.p_value < 1e-20
    assert result.tv > 2 * result.floor
