"""A judge's perplexity is that of its own log-probabilities, one text or several, and never comes without entropy."""

import math

import pytest
import torch

import pyquiet
from pyquiet.evaluation import Estimate, Judged, histogram_entropy, judge_texts

TEXTS = [
    "The king sat down.",
    "Once",
    "",
    "And the three sons went out into the wide world, one by one.",
    "He said so.",
]


@pytest.fixture(scope="module")
def judge():
    return pyquiet.load("tiny-causal")


def perplexity(judge, texts, **options):
    return judge_texts(judge, texts, [torch.zeros(1)] * len(texts), **options).perplexity


def token_nll(judge, text):
    model, tokenizer = judge
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        laws = model(ids).logits[0].log_softmax(-1)
    return [-laws[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)]


def test_perplexity_is_that_of_the_judge_behind_its_opening(judge, monkeypatch):
    nll = token_nll(judge, TEXTS[0])
    assert perplexity(judge, TEXTS[:1]).item() == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    monkeypatch.setattr(judge[0].config, "max_position_embeddings", 4)
    assert perplexity(judge, TEXTS[:1]).item() == pytest.approx(math.exp(sum(nll[:3]) / 3), rel=1e-5)


def test_the_last_batch_and_texts_without_tokens_are_kept(judge):
    alone = torch.cat([perplexity(judge, [text]) for text in TEXTS])
    assert alone.isnan().tolist() == [False, False, True, False, False]
    for size in (2, 3, 8):
        assert torch.allclose(perplexity(judge, TEXTS, batch_size=size), alone, rtol=1e-5, equal_nan=True), size


def test_without_an_opening_the_first_token_is_not_scored(judge, monkeypatch):
    monkeypatch.setattr("pyquiet.evaluation.judging.opening_ids", lambda tokenizer: [])
    model, tokenizer = judge
    ids = torch.tensor([tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        laws = model(ids).logits[0].log_softmax(-1)
    nll = [-laws[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)]
    assert perplexity(judge, TEXTS[:2])[0].item() == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_entropy_in_nats_and_bits():
    tokens = torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4], [1, 1, 2, 2], [5, 5, 5, 7]])
    bits = torch.tensor([0.0, 2.0, 1.0, -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))], dtype=torch.float64)
    assert torch.allclose(histogram_entropy(tokens), bits * math.log(2))
    assert torch.allclose(Judged(torch.ones(4), histogram_entropy(tokens)).entropy_bits, bits)
    ragged = [torch.tensor([1, 2]), torch.tensor([1, 2, 3])]
    assert histogram_entropy(ragged).tolist() == pytest.approx([math.log(2), math.log(3)])


def test_perplexity_is_printed_with_entropy_in_both_units():
    judged = Judged(torch.tensor([10.0, 1000.0]), torch.tensor([4.0, 4.0]))
    perplexity = Estimate(100.0, 100 * math.log(1000 / 10) / 2)
    assert str(judged) == f"gen. PPL {perplexity}, entropy 4 +- 0 nats = {4 / math.log(2):.4g} +- 0 bits"
    assert str(Estimate.of(torch.tensor([2.5]))) == "2.5"


def test_texts_and_tokens_must_be_as_many(judge):
    with pytest.raises(ValueError, match="2 texts and 1 rows"):
        judge_texts(judge, ["a", "b"], [torch.zeros(3)])
    with pytest.raises(ValueError, match="batch_size"):
        judge_texts(judge, ["a"], [torch.zeros(3)], batch_size=0)
