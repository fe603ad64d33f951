"""Properties of `draw_candidates` over random calls, from its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyquiet import native
from pyquiet.kernels import draw_candidates, importance_resampling
from pyquiet.randomness import Stream, process_logits

pytestmark = pytest.mark.skipif(native.cpu is None, reason="the native module is not built")


@st.composite
def calls(draw):
    """Logits in 1/64, so that adding an integer is exact, a stream, and options."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    V, R, k = pick(1, 2, 5, 63, 65, 130, 255, 257, 2047, 2049, 4200), pick(1, 2, 5), pick(1, 2, 7, 33)
    options = {
        "temperature": pick(1.0, 1.0, 0.5, 2.0, 0),
        "top_k": pick(None, None, 1, 3, 50),
        "top_p": pick(None, None, 0.3, 0.95),
    }
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logits = (pick(0.2, 1.0, 3.0, 30.0) * torch.randn(R, V, generator=g) * 64).round() / 64
    if pick(False, True):
        logits[torch.rand(R, V, generator=g) < 0.3] = -torch.inf
    if pick(False, False, True):
        options["banned"] = torch.rand(V, generator=g) < 0.3
        options["banned"][0] = False
    logits[:, 0] = logits[:, 0].clamp_min(-1)
    ids = torch.randint(0, 1000, (R,), generator=g)
    return logits, k, Stream(pick(0, 2**63), sequence=ids, position=3, step=1, index=draw(st.integers(0, 9))), options


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(calls())
def test_the_kernel_equals_the_reference(call):
    logits, k, stream, options = call
    actual = draw_candidates(logits, k, stream=stream, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance_resampling, "reads_natively", lambda logits: False)
        expected = draw_candidates(logits, k, stream=stream, **options)
    assert torch.equal(actual.tokens, expected.tokens)
    for name in ("log_probs", "log_base", "lse"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=3e-7, atol=3e-6)


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(calls(), st.booleans())
def test_candidates_have_mass_and_say_how_much(call, deterministic):
    logits, k, stream, options = call
    drawn = draw_candidates(logits, k, stream=stream, deterministic=deterministic, **options)
    law = process_logits(logits, **options).double().log_softmax(-1)
    base = process_logits(logits, banned=options.get("banned")).double()
    assert law.gather(-1, drawn.tokens).isfinite().all()
    for x, y in (
        (drawn.log_probs, law.gather(-1, drawn.tokens)),
        (drawn.log_base, base.log_softmax(-1).gather(-1, drawn.tokens)),
        (drawn.lse, base.logsumexp(-1)),
    ):
        torch.testing.assert_close(x.double(), y, rtol=3e-7, atol=5e-6)
    if options["temperature"] == 0:
        assert torch.equal(drawn.tokens, base.argmax(-1, keepdim=True).expand(-1, k))


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(calls(), st.booleans(), st.integers(1, 33))
def test_rows_and_candidates_do_not_depend_on_each_other(call, deterministic, fewer):
    logits, k, stream, options = call
    options = options | {"deterministic": deterministic}
    whole = draw_candidates(logits, k, stream=stream, **options)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(k))
    moved = Stream(stream.seed, None, stream.sequence[order], 3, 1, stream.index)
    some = draw_candidates(logits[order], min(k, fewer), stream=moved, **options)
    for a, b in zip(vars(whole).values(), vars(some).values(), strict=True):
        assert torch.equal(a[order][:, :fewer] if a.ndim == 2 else a[order], b)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(calls(), st.booleans())
def test_logits_count_up_to_a_constant(call, deterministic):
    logits, k, stream, options = call
    expected = draw_candidates(logits, k, stream=stream, deterministic=deterministic, **options)
    actual = draw_candidates(logits + 16, k, stream=stream, deterministic=deterministic, **options)
    assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(actual.lse, expected.lse + 16, rtol=3e-7, atol=1e-5)
