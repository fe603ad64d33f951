"""The paper's tasks and the uses on language models, each on data whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyquiet import load
from pyquiet.bilevel import BSVRB, solve_lower
from pyquiet.bilevel.demonstration import auc, demonstrate
from pyquiet.bilevel.domains import Part, calibrate_temperatures, domain_mixing_heads, reweight_domains
from pyquiet.bilevel.logistic import WeightedLogistic, clean_labels
from pyquiet.bilevel.ranking import TopKNDCG, dcg
from pyquiet.zoo import held_out


def flipped(n: int = 1500, validation: int = 500) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of a linear rule of which 30 % have the wrong label, clean validation rows, and which are wrong."""
    g = torch.Generator().manual_seed(0)
    rule, X, V = (torch.randn(*shape, generator=g) for shape in ((20,), (n, 20), (validation, 20)))
    y, right = ((rows @ rule + 0.5 * torch.randn(len(rows), generator=g)).sign() for rows in (X, V))
    wrong = torch.rand(n, generator=g) < 0.3
    return X, torch.where(wrong, -y, y), V, right, wrong


@pytest.mark.filterwarnings("error:gamma tau")
@pytest.mark.parametrize(("variant", "least"), [("v1", 0.7), ("v2", 0.9)])
def test_cleaning_finds_the_flipped_labels(variant: str, least: float) -> None:
    *data, wrong = flipped()
    found = clean_labels(*data, blocks=10, epochs=60, variant=variant, progress=False)
    assert auc(found.weights, ~wrong) >= least
    assert found.loss[-1] < 0.7 * found.loss[0]


def test_with_the_sign_turned_cleaning_keeps_the_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    *data, wrong = flipped()
    right = BSVRB._move
    monkeypatch.setattr(BSVRB, "_move", lambda self, z: right(self, -z))
    found = clean_labels(*data, blocks=10, epochs=20, progress=False)
    assert auc(found.weights, ~wrong) < 0.5


def test_rows_are_shown_in_either_precision() -> None:
    X, y, *_ = flipped(60, 5)
    single, double = (demonstrate(rows, y, epochs=1, progress=False) for rows in (X, X.double()))
    assert single.oracle_accuracy == pytest.approx(double.oracle_accuracy, abs=0.1)
    assert double.cleaned.weights.dtype == torch.float64


def test_the_losses_of_batches_are_those_of_all_rows_in_the_mean() -> None:
    X, y, V, right, _ = flipped(6, 5)
    problem = WeightedLogistic(X, y, V, right, temperatures=torch.tensor([0.5, 2.0]))
    x, Y, idx = torch.randn(6), torch.randn(2, 20), torch.arange(2)
    every = torch.arange(6).expand(2, 6), torch.arange(5).expand(2, 5)
    torch.testing.assert_close(problem.lower(x, Y, idx, every[0]), problem.lower(x, Y, idx, None))
    torch.testing.assert_close(problem.upper(x, Y, idx, every[1]), problem.upper(x, Y, idx, None))
    margins = (V * right[:, None]) @ Y.T / problem.temperatures  # [5, 2]
    expected = torch.nn.functional.softplus(-margins).mean(0)
    torch.testing.assert_close(problem.upper(x, Y, idx, None), expected)


@pytest.mark.parametrize("samples", [4, None])
def test_losses_at_two_points_are_those_of_each(samples: int | None) -> None:
    X, y, V, right, _ = flipped(6, 5)
    g = torch.Generator().manual_seed(3)
    problem = WeightedLogistic(X, y, V, right, temperatures=torch.tensor([0.5, 1.0, 2.0]))
    x, Y, idx = torch.randn(2, 6, generator=g), torch.randn(2, 2, 20, generator=g), torch.tensor([2, 0])
    lower, upper = problem.sample(idx, samples, g), problem.sample_upper(idx, samples, g)
    for losses, batch in ((problem.lower, lower), (problem.upper, upper)):
        each = torch.stack([losses(x[p], Y[p], idx, batch) for p in range(2)])
        torch.testing.assert_close(losses(x, Y, idx, batch), each)
        assert float((each[0] - each[1]).abs().min()) > 1e-3


def test_labels_that_are_none_are_told() -> None:
    X, y, V, right, _ = flipped(6, 5)
    with pytest.raises(ValueError, match=r"labels of features must be 1 or -1, got \[0"):
        WeightedLogistic(X, (y + 1) / 2, V, right, temperatures=torch.ones(2))
    with pytest.raises(TypeError, match="validation_features and their labels must be tensors, got ndarray, Tensor"):
        WeightedLogistic(X, y, V.numpy(), right, temperatures=torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"temperatures must be above 0, got \[0\.0, 1\.0"):
        WeightedLogistic(X, y, V, right, temperatures=torch.arange(2.0))
    with pytest.raises(ValueError, match="l2 must be a finite number above 0, got 0"):
        WeightedLogistic(X, y, V, right, temperatures=torch.ones(2), l2=0)


def test_ranking_learns_what_makes_documents_relevant() -> None:
    g = torch.Generator().manual_seed(1)
    features = torch.randn(40, 30, 6, generator=g)
    hidden = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 0.0])
    score = features @ hidden + 0.3 * torch.randn(40, 30, generator=g)
    relevance = (score > score.quantile(0.8, dim=1, keepdim=True)).float() * 2
    problem = TopKNDCG(features, relevance, K=5)
    x = 0.1 * torch.randn(6, generator=g)
    before = problem.ndcg(x)
    method = BSVRB(problem, x, blocks_per_step=10, samples_per_block=30, variant="v1", eta=0.05)
    for _ in range(300):
        method.step()
    assert problem.ndcg(method.x) > before + 0.3
    assert problem.ndcg(method.x) > 0.85


def test_a_network_ranks_what_no_weights_of_features_can() -> None:
    """Relevant are documents with a large first and a small second feature, whatever its sign."""
    g = torch.Generator().manual_seed(1)
    features = torch.randn(40, 30, 3, generator=g)
    worth = features[..., 0] - 2 * features[..., 1].square()
    relevance = (worth > worth.quantile(0.8, dim=1, keepdim=True)).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    problem = TopKNDCG(features, relevance, K=5, smoothing=0.5, scorer=network)
    method = BSVRB(
        problem, network, blocks_per_step=10, samples_per_block=30, variant="v1", eta=0.02, optimizer=torch.optim.Adam
    )
    for _ in range(200):
        method.step()
    linear = TopKNDCG(features, relevance, K=5)
    best = max(linear.ndcg(torch.tensor([1.0, slope, 0.0])) for slope in torch.linspace(-1, 1, 11))
    assert best < 0.7
    assert problem.ndcg(method.x) > 0.9
    scores = network(features)[..., 0]  # the network itself has moved
    assert problem.ndcg(method.x) == pytest.approx(float((dcg(scores, relevance, 5) / problem.best).mean()))


def test_rankings_that_do_not_fit_are_told() -> None:
    features, relevance = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"K in 1 \.\. n - 1, got \[2, 5, 3\], \[2, 5\] and K=5"):
        TopKNDCG(features, relevance, K=5)
    with pytest.raises(TypeError, match="relevance must be a tensor, got ndarray"):
        TopKNDCG(features, relevance.numpy(), K=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"smoothing must be a finite number above 0, got 0\.0"):
        TopKNDCG(features, relevance, K=2, smoothing=0.0)


def test_a_querys_threshold_lets_k_documents_pass() -> None:
    features = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    problem = TopKNDCG(features, torch.ones(3, 50).double(), K=7, smoothing=1e-3, ridge=1e-6)
    x = torch.ones(4, dtype=torch.float64)
    start = (features @ x).quantile(0.8, dim=1, keepdim=True)
    threshold = solve_lower(problem, x, start)
    above = ((features @ x - threshold) / 1e-3).sigmoid().sum(1)
    torch.testing.assert_close(above, torch.full((3,), 7.5).double(), rtol=0, atol=1e-3)  # the eighth one half


def texts_of(count: int, length: int) -> Tensor:
    """Texts that a real model wrote, int64 [count, length]."""
    model, tokenizer = load("tiny-causal")
    start = tokenizer("Once upon a time", return_tensors="pt")["input_ids"].expand(count, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.generate(start, max_new_tokens=length - start.shape[1], do_sample=True, top_k=0, pad_token_id=0)


def test_each_domain_gets_its_own_temperature() -> None:
    """A real model's texts, whose logits are spoilt by another factor in each domain."""
    model, _ = load("tiny-causal")
    ids = texts_of(16, 48)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1).float()
    labels, domains = ids[:, 1:].flatten(), torch.arange(16).repeat_interleave(47) % 4
    spoilt = torch.tensor([0.5, 1.0, 1.6, 2.5])
    first_half = torch.arange(len(labels)) % 47 < 24
    train, held_out = (
        Part((logits * spoilt[domains][:, None])[some], labels[some], domains[some])
        for some in (first_half, ~first_half)
    )
    found = calibrate_temperatures(train, held_out, steps=200)
    assert float((found.values[:, 0] * spoilt - 1).abs().max()) < 0.3
    nlls = [
        torch.nn.functional.cross_entropy(*(x[held_out.domains == i] for x in (held_out.logits, held_out.labels)))
        for i in range(4)
    ]
    assert found.before == pytest.approx(float(torch.stack(nlls).mean()), rel=1e-5)
    assert found.after < found.before - 0.1


def test_each_domain_takes_as_much_of_the_second_opinion_as_helps_it() -> None:
    """A real model that sees four tokens, and a second opinion: itself with the whole text, or of another text."""
    model, _ = load("tiny-causal")
    ids = texts_of(16, 48)
    windows = ids.unfold(1, 4, 1)[:, :-1]  # the four tokens before each from the fifth on
    with torch.no_grad():
        short = model(windows.flatten(0, 1)).logits[:, -1].float()
        whole = model(ids).logits[:, 3:-1].float()
    helpful = torch.arange(16) % 2 == 0
    second = torch.where(helpful[:, None, None], whole, whole.roll(7, 0)).flatten(0, 1)
    labels, domains = ids[:, 4:].flatten(), torch.arange(16).repeat_interleave(44) % 2
    features, first_half = torch.ones(len(labels), 1), torch.arange(len(labels)) % 44 < 22
    train, held_out = (
        Part(short[some], labels[some], domains[some], second[some], features[some])
        for some in (first_half, ~first_half)
    )
    found = domain_mixing_heads(train, held_out, steps=200)
    assert float(found.values[0, 0]) > 0.5
    assert abs(float(found.values[1, 0])) < 0.25
    assert found.after < found.before - 0.1


def test_domains_weigh_the_sources_that_are_right() -> None:
    """Three sources, one of which has random labels, and one the wrong ones."""
    g = torch.Generator().manual_seed(4)
    rule, X, T = (torch.randn(*shape, generator=g) for shape in ((8,), (900, 8), (300, 8)))
    y, right = (X @ rule > 0).long(), (T @ rule > 0).long()
    domain = torch.arange(900) % 3
    y = torch.where(domain == 1, torch.randint(2, (900,), generator=g), torch.where(domain == 2, 1 - y, y))
    source = Part(torch.zeros(900, 2), y, domain, features=X)
    target = Part(torch.zeros(300, 2), right, torch.arange(300) % 5, features=T)
    weights = reweight_domains(source, target, steps=300)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert float(weights[0]) > 0.7
    assert float(weights[0]) > float(weights[1]) > float(weights[2])


def test_sources_are_weighed_by_a_real_models_features() -> None:
    """Stories told from books by what a model makes of their beginnings; of three sources one's labels are right, one's
    random and one's turned over."""
    model, tokenizer = load("tiny-causal")
    kinds = [[row["text"] for row in held_out(kind)] for kind in ("stories", "passages")]
    count = min(map(len, kinds))
    ids = torch.tensor([tokenizer(text).input_ids[:12] for pair in zip(*kinds, strict=False) for text in pair])
    with torch.no_grad():
        features = model.base_model(ids).last_hidden_state.mean(1)
    features = (features - features.mean(0)) / features.std(0) / features.shape[1] ** 0.5
    labels = torch.arange(2 * count) % 2
    domain = torch.arange(2 * count) // 2 % 4  # the last one is the target
    spoilt = torch.where(
        domain == 1, torch.randint(2, labels.shape, generator=torch.Generator().manual_seed(0)), labels
    )
    spoilt = torch.where(domain == 2, 1 - labels, spoilt)
    source, target = (
        Part(torch.zeros(int(some.sum()), 2), y[some], d[some], features=features[some])
        for some, y, d in ((domain < 3, spoilt, domain), (domain == 3, labels, torch.arange(2 * count) // 8 % 3))
    )
    weights = reweight_domains(source, target, steps=100)
    assert float(weights[0]) > 0.5
    assert float(weights[0]) > float(weights[1]) > float(weights[2])


def test_parts_that_do_not_fit_are_told() -> None:
    part = Part(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 2, 2]))
    with pytest.raises(ValueError, match=r"domains: \[1\] have no rows"):
        calibrate_temperatures(part, part)
    more, few = (
        Part(torch.zeros(4, 3), part.labels, torch.tensor(domains)) for domains in ([0, 1, 2, 7], [0, 0, 1, 1])
    )
    with pytest.raises(ValueError, match=r"domains must be in 0 \.\. 1, those of the rows to train on; got \[2, 7\]"):
        calibrate_temperatures(few, more)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        calibrate_temperatures(few, few, steps=0)
    with pytest.raises(ValueError, match="train needs thought_logits"):
        domain_mixing_heads(part, part)
    with pytest.raises(ValueError, match="source needs features"):
        reweight_domains(part, part)
    with pytest.raises(ValueError, match="labels must have a row for each of the 4 logits, got 3"):
        Part(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
