"""What `infill` takes and returns; its law is tested in test_exactness.py, its calls in test_calls.py."""

import itertools

import pytest
import torch

import pyquiet
from pyquiet.any_subset import generate
from pyquiet.any_subset.cost import SEQUENTIAL, CostModel, Plan
from pyquiet.randomness import process_logits

from .models import random_xlnet

B, N, V = 4, 12, 11
K = {"sequential": "auto", "assd": 3, "one_call": 2, "ngram": 4}
METHODS = [*K]


@pytest.fixture(scope="module")
def model():
    return random_xlnet(V)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, V, (B, N), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def mask():
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[1], mask[2] = True, False  # all of a text, and nothing of one
    return mask


def uniform_drafter(context):
    return torch.zeros(*context.positions.shape, V)


@pytest.mark.parametrize("method", [*METHODS, "auto", uniform_drafter])
def test_given_tokens_stay_and_masked_ones_are_not_looked_at(model, ids, mask, method):
    options = {"mask": mask, "method": method, "k": K.get(method, "auto"), "seed": 5}
    out = pyquiet.infill(model, ids, **options)
    assert torch.equal(out.tokens[~mask], ids[~mask])
    assert out.tokens.min() >= 0
    assert out.tokens.max() < V
    assert (out.log_probs[~mask] == 0).all()
    assert (out.log_probs[mask] < 0).all()
    garbage = torch.where(mask, -1, ids)
    assert torch.equal(pyquiet.infill(model, garbage, **options).tokens, out.tokens)


@pytest.mark.parametrize("method", METHODS)
def test_log_probs_add_up_to_the_joint(model, ids, mask, method):
    out = pyquiet.infill(model, ids, mask=mask, method=method, k=K[method], seed=5)
    joint = pyquiet.joint_log_prob(model, out.tokens, known=~mask)
    torch.testing.assert_close(out.log_probs.sum(1), joint, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_log_probs_are_those_of_the_processed_law(model, ids, mask, method):
    banned = torch.zeros(V, dtype=torch.bool)
    banned[[0, 4]] = True
    law = {"temperature": 0.7, "top_k": 6, "top_p": 0.95, "banned": banned}
    out = pyquiet.infill(model, ids, mask=mask, method=method, k=K[method], seed=1, **law)
    assert not torch.isin(out.tokens[mask], torch.tensor([0, 4])).any()
    row = 0
    for position in mask[row].nonzero().flatten().tolist():  # left to right
        order, m = pyquiet.any_subset.order_from_mask(~mask[row])
        rank = int((order == position).nonzero())
        engine = pyquiet.any_subset.as_engine(model)
        with torch.no_grad():
            cache = engine.start(order[None], torch.tensor([m]))
            logits = engine.head(engine.density(cache, out.tokens[row : row + 1], torch.tensor([[rank]])))[0]
        expected = process_logits(logits, **law).log_softmax(-1)[0, out.tokens[row, position]]
        torch.testing.assert_close(out.log_probs[row, position], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_neither_seen_nor_filled(model, ids, mask, method):
    options = {"method": method, "k": 3, "seed": 5, "sequence_ids": torch.arange(B)}
    alone = pyquiet.infill(model, ids, mask=mask, **options)
    padded, attention = torch.full((B, N + 3), 7), torch.zeros(B, N + 3, dtype=torch.int64)
    padded[:, :N], attention[:, :N] = ids, 1
    wide = torch.ones(B, N + 3, dtype=torch.bool)
    wide[:, :N] = mask
    out = pyquiet.infill(model, padded, mask=wide, attention_mask=attention, **options)
    assert torch.equal(out.tokens[:, :N], alone.tokens)
    assert (out.tokens[:, N:] == 7).all()
    assert (out.log_probs[:, N:] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_text_does_not_depend_on_its_batch(model, ids, mask, method):
    together = pyquiet.infill(
        model, ids, mask=mask, method=method, k=K[method], seed=5, sequence_ids=torch.tensor([9, 4, 6, 2])
    )
    alone = pyquiet.infill(
        model, ids[3:], mask=mask[3:], method=method, k=K[method], seed=5, sequence_ids=torch.tensor([2])
    )
    assert torch.equal(together.tokens[3], alone.tokens[0])
    assert together.calls["density"][3] == alone.calls["density"][0]
    other = pyquiet.infill(
        model, ids[3:], mask=mask[3:], method=method, k=K[method], seed=6, sequence_ids=torch.tensor([2])
    )
    assert not torch.equal(other.tokens, alone.tokens)


def test_any_order_is_filled_by_its_own_chain(model, ids):
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(s)) for s in range(B)])
    known = torch.zeros(B, N, dtype=torch.bool)
    known.scatter_(1, order[:, :3], True)
    results = [
        pyquiet.infill(model, ids, mask=~known, order=order, method=method, k=K[method], seed=1, coupling="gumbel")
        for method in METHODS
    ]
    for out in results:
        assert torch.equal(out.tokens, results[0].tokens)
        joint = pyquiet.joint_log_prob(model, out.tokens, known=known, order=order)
        torch.testing.assert_close(out.log_probs.sum(1), joint, rtol=0, atol=1e-4)
    ascending = pyquiet.joint_log_prob(model, results[0].tokens, known=known)
    assert (ascending - joint).abs().max() > 1e-2


def test_drafts_may_look_at_those_before_them(model, ids, mask):
    seen = []

    def chain(context):
        law = torch.zeros(len(context.tokens), V)
        for _ in range(context.positions.shape[1]):
            law = torch.zeros_like(law).scatter_(1, context.draw(law)[:, None], 3.0)
        seen.append(context)

    exact = pyquiet.infill(model, ids, mask=mask, method="sequential", seed=2, coupling="gumbel")
    out = pyquiet.infill(model, ids, mask=mask, method=chain, k=3, seed=2, coupling="gumbel")
    assert torch.equal(out.tokens, exact.tokens)
    assert (out.drafter_calls == out.rounds).all()
    assert torch.equal(seen[0].known, ~mask)


def test_what_a_drafter_says_of_no_position_is_not_looked_at(model, ids, mask):
    def draft(context, idle):
        return uniform_drafter(context).masked_fill((context.positions < 0)[..., None], idle)

    options = {"mask": mask, "k": 5, "seed": 2}
    clean, *others = (
        pyquiet.infill(model, ids, method=lambda context, x=x: draft(context, x), **options).tokens
        for x in (0.0, -torch.inf, torch.nan)
    )
    assert all(torch.equal(tokens, clean) for tokens in others)


@pytest.mark.parametrize("method", ["assd", "one_call", "ngram"])
def test_more_drafts_than_tokens_are_no_rows(model, ids, mask, method):
    few, many = (pyquiet.infill(model, ids, mask=mask, method=method, k=k, seed=2) for k in (N, 10**9))
    assert torch.equal(few.tokens, many.tokens)
    assert many.k == 10**9
    assert torch.equal(few.tried_by_rank, many.tried_by_rank)


def test_rounds_of_all_kinds_may_follow_each_other(model, monkeypatch):
    """What `auto` may come to do: drafts that are pending are thrown away, or other numbers of them follow."""
    ids = torch.randint(0, V, (40, N), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(N).expand(40, N) > 0
    some = [Plan("one_call", 2), SEQUENTIAL, Plan("one_call", 2), Plan("assd", 3), Plan("one_call", 1)]
    plans = itertools.cycle(some)
    monkeypatch.setattr(CostModel, "choose", lambda *_: next(plans))
    out = pyquiet.infill(model, ids, mask=mask, seed=2)
    exact = pyquiet.infill(model, ids, mask=mask, method="sequential", seed=2, coupling="gumbel")
    assert int(out.rounds.max()) > len(some)
    assert torch.equal(out.tokens, exact.tokens)
    torch.testing.assert_close(out.log_probs, exact.log_probs, rtol=0, atol=1e-4)
    assert (sum(out.calls.values()) <= mask.sum(1)).all()


def test_greedy_and_seedless(model, ids, mask):
    greedy = [pyquiet.infill(model, ids, mask=mask, method=m, temperature=0) for m in METHODS]
    assert all(torch.equal(out.tokens, greedy[0].tokens) for out in greedy)
    assert all((out.log_probs == 0).all() for out in greedy)
    torch.manual_seed(0)
    first, second = (pyquiet.infill(model, ids, mask=mask, method="assd", seed=None).tokens for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, pyquiet.infill(model, ids, mask=mask, method="assd", seed=None).tokens)
    assert not torch.equal(first, second)
    default = pyquiet.infill(model, ids, mask=mask, method="assd").tokens
    assert torch.equal(default, pyquiet.infill(model, ids, mask=mask, method="assd", seed=0).tokens)


def test_through_generate(model, ids, mask):
    decode = generate(known=~mask, seed=5, method="assd", k=3)
    everything = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=everything, custom_generate=decode, max_new_tokens=1)
    assert torch.equal(out, pyquiet.infill(model, ids, mask=mask, seed=5, method="assd", k=3).tokens)
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(ids, attention_mask=everything.tril(), custom_generate=decode, max_new_tokens=1)
    with pytest.raises(ValueError, match="logits_processor"):
        model.generate(ids, attention_mask=everything, custom_generate=decode, max_new_tokens=1, repetition_penalty=1.2)
    with pytest.raises(ValueError, match="num_beams=2"):
        model.generate(ids, attention_mask=everything, custom_generate=decode, max_new_tokens=1, num_beams=2)
    with pytest.raises(ValueError, match=r"known must be \[3, 12\] as input_ids, got \[4, 12\]"):
        model.generate(ids[:3], attention_mask=everything[:3], custom_generate=decode, max_new_tokens=1)


def test_generate_gives_several_fillings_and_a_dict(model, ids, mask):
    decode = generate(known=~mask, seed=5, method="assd", k=3, attention_mask=torch.ones_like(ids))
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "return_dict_in_generate": True}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=decode, max_new_tokens=1, **options
    ).sequences
    twice = {"mask": mask.repeat_interleave(2, 0), "seed": 5, "method": "assd", "k": 3}
    assert torch.equal(out, pyquiet.infill(model, ids.repeat_interleave(2, 0), **twice).tokens)
    assert not torch.equal(out[0], out[1])


def test_what_would_change_the_law_is_refused_or_kept_out(ids, mask):
    model = random_xlnet(V)
    known = ~mask
    clean = pyquiet.infill(model, ids, mask=mask, method="assd", k=3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pyquiet.infill(model, ids, mask=mask, method="assd", k=3, seed=1).tokens, clean.tokens)
        pyquiet.joint_log_prob(model, clean.tokens, known=known)

    def vandal(context):
        context.tokens.fill_(3)
        return torch.zeros(*context.positions.flip(1).shape, V).transpose(0, 1).contiguous().transpose(0, 1)

    assert torch.equal(pyquiet.infill(model, ids, mask=mask, method=vandal, seed=1).tokens[known], ids[known])
    for function in (pyquiet.joint_log_prob, pyquiet.marginals):
        with pytest.raises(ValueError, match="training mode"):
            function(model.train(), clean.tokens, known=known)
    with pytest.raises(ValueError, match="training mode"):
        pyquiet.infill(model, ids, mask=mask)
    model.eval().lm_loss.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"model\.to\(dtype\)"):
        pyquiet.infill(model, ids, mask=mask)


@pytest.mark.parametrize("method", METHODS)
def test_a_column_may_say_what_is_banned(model, ids, mask, method):
    banned = torch.eye(V, dtype=torch.bool)[:, 3]
    out = pyquiet.infill(model, ids, mask=mask, method=method, k=K[method], seed=1, banned=banned)
    assert torch.equal(
        out.tokens,
        pyquiet.infill(model, ids, mask=mask, method=method, k=K[method], seed=1, banned=banned.clone()).tokens,
    )
    assert not (out.tokens[mask] == 3).any()


GOOD = {"mask": torch.ones(2, 3, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask": torch.ones(2, 3)}, "mask"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask"),
        ({"mask": [[True] * 3] * 2}, "mask"),
        ({"banned": [False] * V}, "banned"),
        ({"input_ids": [[0] * 3] * 2}, "input_ids"),
        ({"mask": torch.tensor([[True, False, True]] * 2), "input_ids": torch.full((2, 3), V)}, "input_ids"),
        ({"mask": torch.tensor([[True, False, True]] * 2), "input_ids": torch.full((2, 3), -1)}, "input_ids"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids"),
        ({"method": "beam"}, "method"),
        ({"method": "assd", "k": 0}, "k must"),
        ({"method": "assd", "k": 2.0}, "k must"),
        ({"k": 3}, "k=3"),
        ({"coupling": "none"}, "coupling"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"banned": torch.zeros(V + 1, dtype=torch.bool)}, "banned"),
        ({"banned": torch.ones(V, dtype=torch.bool)}, "banned"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask"),
        ({"attention_mask": torch.zeros(2, 3)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[0.0, 0.0, -torch.inf]] * 2)}, "attention_mask must hold 1"),
        ({"sequence_ids": torch.zeros(3, dtype=torch.int64)}, "sequence_ids"),
        ({"sequence_ids": torch.tensor([-1, 0])}, "sequence_ids"),
        ({"order": torch.zeros(2, 3, dtype=torch.int64)}, "order"),
        ({"seed": 2**64}, "seed"),
        ({"method": lambda context: torch.zeros(1)}, "method"),
        ({"method": lambda context: None}, "method"),
        ({"method": lambda context: [0]}, "method: the drafter drew 0 drafts and returned list"),
        ({"method": lambda context: torch.full((*context.positions.shape, V), -torch.inf)}, "method"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named(model, options, named):
    ids = options.get("input_ids", torch.zeros(2, 3, dtype=torch.int64))
    options = GOOD | {name: value for name, value in options.items() if name != "input_ids"}
    with pytest.raises((TypeError, ValueError), match=named):
        pyquiet.infill(model, ids, **options)


def test_a_broken_model_is_an_error_and_not_a_text(ids, mask):
    model = random_xlnet(V)
    with torch.no_grad():
        model.lm_loss.bias.fill_(torch.nan)
    for method in METHODS:
        with pytest.raises(ValueError, match=r"(?i)nan"):
            pyquiet.infill(model, ids, mask=mask, method=method)
