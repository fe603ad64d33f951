"""Properties of `verify_draft` over random calls, from its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyquiet import native
from pyquiet.kernels import draft_verification, verify_draft
from pyquiet.randomness import Stream

from .test_verify_draft import SEED, problem

pytestmark = pytest.mark.skipif(native.cpu is None, reason="the native module is not built")


@st.composite
def calls(draw):
    """Logits in 1/64, so that adding an integer is exact, drafts, and options."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    V, k = pick(1, 2, 5, 63, 65, 130, 2047, 2049, 4200), pick(0, 1, 2, 5)
    options = {
        "temperature": pick(1.0, 1.0, 0.5, 2.0, 0),
        "top_k": pick(None, None, 1, 3, 50),
        "top_p": pick(None, None, 0.3, 0.95),
        "coupling": pick("rejection", "rejection", "gumbel"),
        "first_is_exact": draw(st.booleans()),
    }
    seed = draw(st.integers(0, 2**20))
    if pick(False, False, True):
        options["banned"] = torch.rand(V, generator=torch.Generator().manual_seed(seed)) < 0.3
        options["banned"][seed % V] = False
    if options["coupling"] == "rejection" and pick(False, True):
        options["draft_temperature"] = pick(0, 0.5, 1.5)
    B = pick(1, 2, 5)
    q, p, d, options = problem(B, k, V, k + pick(0, 1), pick(0.2, 1.0, 3.0), seed, **options)
    q, p = ((x * 64).round() / 64 for x in (q, p))
    if pick(False, True):
        options["lengths"] = torch.randint(0, k + 1, (B,), generator=torch.Generator().manual_seed(seed))
    return q, p, d, options


def verify(q, p, d, options, ids=None, **more):
    return verify_draft(q, p, d, stream=Stream(SEED, sequence=ids, position=3, step=1), **(options | more))


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(calls())
def test_the_kernel_equals_the_reference(call):
    q, p, d, options = call
    actual = verify(q, p, d, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_verification, "reads_natively", lambda logits: False)
        expected = verify(q, p, d, options)
    for name in ("tokens", "count", "accepted", "bonus"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=3e-6)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(calls(), st.booleans(), st.randoms(use_true_random=False))
def test_a_sequence_does_not_depend_on_its_neighbours(call, deterministic, random):
    q, p, d, options = call
    ids = torch.tensor(random.sample(range(1000), len(q)))
    whole = verify(q, p, d, options, ids, deterministic=deterministic)
    order = torch.randperm(len(q), generator=torch.Generator().manual_seed(len(q)))
    if "lengths" in options:
        options = options | {"lengths": options["lengths"][order]}
    other = verify(q[order], p[order], d[order], options, ids[order], deterministic=deterministic)
    for a, b in zip(vars(whole).values(), vars(other).values(), strict=True):
        assert torch.equal(a[order], b)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(calls(), st.booleans())
def test_logits_count_up_to_a_constant(call, deterministic):
    q, p, d, options = call
    shift = torch.arange(q.shape[1])[:, None] * 8.0 - 16
    expected = verify(q, p, d, options, deterministic=deterministic)
    actual = verify(q + shift, p - 24, d, options, deterministic=deterministic)
    if options["coupling"] == "rejection":  # the sum with noise is rounded elsewhere
        assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=1e-5)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(calls(), st.integers(0, 5))
def test_fewer_drafts_give_the_same_beginning(call, length):
    q, p, d, options = call
    whole = verify(q, p, d, options)
    lengths = options.get("lengths", torch.full((len(q),), d.shape[1])).clamp_max(length)
    cut = verify(q, p, d, options, lengths=lengths)
    assert torch.equal(cut.accepted, torch.minimum(whole.accepted, lengths))
    for j in range(d.shape[1]):
        here = (whole.count > j) & (lengths > j)
        assert torch.equal(cut.tokens[here, j], whole.tokens[here, j])
    assert ((cut.tokens >= 0).sum(-1) == cut.count).all()
    assert torch.equal(cut.bonus, (cut.accepted == lengths) & (q.shape[1] > d.shape[1]))
