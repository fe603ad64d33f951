"""The enumerable models: what their laws depend on, and the enumeration against a loop over single conditionals."""

import itertools

import pytest
import torch

from pyquiet.any_subset import as_engine
from pyquiet.testing import TabularEngine, enumerate_law, tiny_xlnet

INPUT_IDS = torch.tensor([1, 0, 2, 1, 0])
KNOWN = torch.tensor([True, False, True, False, False])
NETWORKS = {
    "tabular": TabularEngine(3, 5, dtype=torch.float64),
    "xlnet": tiny_xlnet(3, dtype=torch.float64),
}


def logits_of(engine, tokens, order, m, rank, sees):
    """One row, alone: the logits [V] of `rank` given `sees` ranks."""
    order, tokens = torch.tensor([order]), torch.tensor([tokens])
    cache = engine.start(order, torch.tensor([m]))
    hidden = engine.forward(cache, tokens, torch.tensor([max(sees, m)]), torch.tensor([[rank]]), torch.tensor([[sees]]))
    return engine.head(hidden)[0, 0]


def test_a_law_depends_on_the_set_and_on_nothing_else():
    engine = TabularEngine(3, 6, dtype=torch.float64)
    tokens = [2, 0, 1, 1, 2, 0]
    first = logits_of(engine, tokens, [0, 2, 5, 1, 3, 4], 2, 4, 3)
    assert torch.equal(first, logits_of(engine, tokens, [5, 0, 2, 3, 4, 1], 1, 3, 3))  # another order and prompt
    assert torch.equal(first, logits_of(engine, [2, 1, 1, 2, 1, 0], [0, 2, 5, 1, 3, 4], 2, 4, 3))  # hidden tokens
    others = [
        logits_of(engine, tokens, [0, 2, 5, 1, 3, 4], 2, 5, 3),  # another position
        logits_of(engine, tokens, [0, 2, 5, 1, 3, 4], 2, 4, 2),  # one token less
        logits_of(engine, tokens, [0, 2, 5, 1, 3, 4], 2, 4, 4),  # one more
        logits_of(engine, [2, 0, 1, 1, 2, 1], [0, 2, 5, 1, 3, 4], 2, 4, 3),  # another token
        logits_of(engine, [1, 0, 2, 1, 2, 0], [0, 2, 5, 1, 3, 4], 2, 4, 3),  # two tokens swapped
        logits_of(TabularEngine(3, 6, seed=1, dtype=torch.float64), tokens, [0, 2, 5, 1, 3, 4], 2, 4, 3),
    ]
    for other in others:
        assert not torch.isclose(first, other).any()
    doubled = TabularEngine(3, 6, strength=4.0, dtype=torch.float64)
    assert torch.equal(2 * first, logits_of(doubled, tokens, [0, 2, 5, 1, 3, 4], 2, 4, 3))


def test_logits_are_standard_normal_numbers():
    engine = TabularEngine(5, 3, strength=1.0, dtype=torch.float64)
    logits = engine.logits(torch.zeros(5000).long(), torch.arange(5000))
    assert abs(logits.mean()) < 4 / 25_000**0.5
    assert abs(logits.var() - 1) < 4 * (2 / 25_000) ** 0.5
    assert abs((logits[:, 0] * logits[:, 1]).mean()) < 4 / 5000**0.5


def test_the_cache_forgets_selects_and_ignores_idle_rows():
    engine = TabularEngine(3, 4, dtype=torch.float64)
    order, tokens = torch.tensor([[0, 1, 2, 3], [3, 1, 2, 0]]), torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])
    cache = engine.start(order, torch.tensor([1, 2]))
    ranks = torch.tensor([[1, 3], [2, -1]])
    hidden = engine.forward(cache, tokens, torch.tensor([3, 2]), ranks, torch.tensor([[1, 3], [2, 2]]))
    assert hidden.isfinite().all()
    assert torch.equal(hidden[0, 1], logits_of(engine, [0, 1, 2, 0], [0, 1, 2, 3], 1, 3, 3))
    cache.commit(torch.tensor([2, 2]))
    tokens[0, 2] = 1
    cache.select(torch.tensor([0]))
    hidden = engine.density(cache, tokens[:1], torch.tensor([[3]]))
    assert torch.equal(hidden[0, 0], logits_of(engine, [0, 1, 1, 0], [0, 1, 2, 3], 1, 3, 3))


def test_a_query_that_sees_what_was_never_computed_is_an_error():
    engine = TabularEngine(3, 4)
    order, tokens = torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 4).long()
    cache = engine.prefill(tokens, order, torch.tensor([2]))
    with pytest.raises(ValueError, match="query 1 of sequence 0 sees 3 ranks, but the cache holds 2"):
        engine.forward(cache, tokens, torch.tensor([2]), torch.tensor([[2, 3]]), torch.tensor([[2, 3]]))
    with pytest.raises(ValueError, match="order has 5 positions, but the table was made for 4"):
        engine.start(torch.arange(5)[None], torch.tensor([1]))


def textbook(logits, temperature=1.0, top_k=None, top_p=None, banned=None):
    """Probabilities [V] by sorting: bans, temperature, top-k, top-p."""
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    law = (logits / temperature).softmax(-1)
    order = law.argsort(descending=True)[:top_k]
    if top_p is not None:
        ranked = law[order] / law[order].sum()
        order = order[ranked.cumsum(0) - ranked < top_p]
    kept = torch.zeros_like(law).index_put((order,), law[order])
    return kept / kept.sum()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 2, "temperature": 1.3},
        {"top_p": 0.8},
        {"banned": torch.tensor([False, True, False])},
        {"order": torch.tensor([2, 0, 4, 1, 3])},
        {"batch_size": 4},
    ],
    ids=str,
)
def test_the_enumeration_is_the_chain_of_conditionals(network, options):
    engine = as_engine(NETWORKS[network])
    law = enumerate_law(engine, INPUT_IDS, known=KNOWN, **options)
    assert law.shape == (3, 3, 3)
    assert float(law.exp().sum()) == pytest.approx(1, abs=1e-9)
    processing = {k: v for k, v in options.items() if k not in ("order", "batch_size")}
    order = options.get("order", torch.tensor([0, 2, 1, 3, 4])).tolist()
    for completion in itertools.product(range(3), repeat=3):
        tokens = INPUT_IDS.tolist()
        tokens[1], tokens[3], tokens[4] = completion
        chain = 1.0
        with torch.no_grad():
            for rank in (2, 3, 4):
                conditional = textbook(logits_of(engine, tokens, order, 2, rank, rank), **processing)
                chain *= float(conditional[tokens[order[rank]]])
        assert float(law[completion].exp()) == pytest.approx(chain, abs=1e-9)


@pytest.mark.parametrize("network", [TabularEngine(4, 9), tiny_xlnet(4, seed=1)], ids=["tabular", "xlnet"])
def test_the_tokens_depend_on_each_other(network):
    known = torch.tensor([True, False, True, True, False, False, True, False, True])
    law = enumerate_law(network, torch.arange(9) % 4, known=known).exp()
    margins = [law.sum([d for d in range(4) if d != g]) for g in range(4)]
    independent = torch.einsum("a,b,c,d->abcd", *margins)
    assert (law - independent).abs().sum() / 2 > 0.2


def test_models_are_made_by_their_seed_alone():
    state = torch.random.get_rng_state()
    a, b, c = tiny_xlnet(seed=1), tiny_xlnet(seed=1), tiny_xlnet(seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [m.transformer.layer[1].rel_attn.q for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"known": KNOWN[:4]}, "one shape"),
        ({"known": KNOWN.long()}, "known .bool.*got .*int64"),
        ({"known": torch.ones(5, dtype=torch.bool)}, "known leaves 0 positions"),
        ({"input_ids": torch.zeros(30).long(), "known": torch.zeros(30, dtype=torch.bool)}, r"30 positions, 3\^30"),
        ({"order": torch.tensor([1, 0, 2, 3, 4])}, "order must hold each position once, the given ones first"),
        ({"order": torch.tensor([0, 2, 1, 3, 3])}, "order must hold each position once"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        enumerate_law(NETWORKS["tabular"], **{"input_ids": INPUT_IDS, "known": KNOWN, **arguments})
