"""Draws of candidates on a CUDA device: against the float64 reference and the CPU, their law, faults and graphs."""

import pytest
import torch

from pyquiet import native
from pyquiet.kernels import draw_candidates, draw_candidates_from_hidden, resample
from pyquiet.kernels.importance_resampling import SCHEMES, Arguments, reference
from pyquiet.randomness import Stream

from ..chi_square import chi_square
from ..cuda_shim.driver import name_of
from ..cuda_shim.test_draw_candidates import CASES, DTYPES, FAULTS, make, near_ties, public

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def native_kernels():
    if native.cuda() is None:
        pytest.fail("the CUDA kernels are not built")


def on_device(a: Arguments) -> Arguments:
    return Arguments(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in a))


def results(drawn):
    return [x.cpu() for x in vars(drawn).values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_the_reference(case, dtype):
    a = make(dtype=dtype, **case)
    tokens, *others = results(public(on_device(a)))
    expected = reference(*a)
    assert torch.equal(tokens, expected[0])
    for x, y in zip(others, expected[1:4], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("V", [997, 50257])
@pytest.mark.parametrize("case", [{}, {"top_k": 50, "top_p": 0.9}, {"temperature": 0.7}], ids=name_of)
def test_deterministic_tokens_are_those_of_the_cpu(case, V, dtype):
    a = make(64, 16, V, dtype=dtype, deterministic=True, **case)
    assert torch.equal(public(on_device(a)).tokens.cpu(), public(a).tokens)


def test_deterministic_near_ties_fall_as_on_the_cpu():
    a = near_ties(10_000)
    assert torch.equal(public(on_device(a)).tokens.cpu(), public(a).tokens)


def test_float_tokens_hardly_differ_from_those_of_the_cpu():
    """Sums are rounded otherwise, so that ids change places where the uniform is that near to the end of one."""
    a = make(128, 64, 50257)
    assert (public(on_device(a)).tokens.cpu() != public(a).tokens).float().mean() < 1e-3


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"deterministic": True}], ids=name_of)
def test_tokens_follow_their_law(options):
    q, p = 1.5 * torch.randn(2, 7, generator=torch.Generator().manual_seed(5)).cuda()
    counts = torch.bincount(draw_candidates(q.expand(1000, 7), 50, stream=Stream(3), **options).tokens.flatten())
    kept, other = (x if "top_k" not in options else x.masked_fill(x < x.topk(4).values[-1], -torch.inf) for x in (q, p))
    counts = torch.nn.functional.pad(counts, (0, 7 - len(counts))).cpu()
    assert chi_square(counts, kept.softmax(-1).cpu()) > 1e-4
    assert chi_square(counts, other.softmax(-1).cpu()) < 1e-4


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"deterministic": True}, {"temperature": 0.7}], ids=name_of)
def test_a_row_does_not_notice_the_batch(options):
    """Nor how it is aligned, nor how many candidates it has: the same bits."""
    a = on_device(make(9, 20, 50257, dtype=torch.bfloat16, stream_sequence=torch.arange(9) * 7, **options))
    together = results(public(a))
    for r in (0, 3, 8):
        some = [x[r : r + 1] if isinstance(x, torch.Tensor) else x for x in a[:6]]
        alone = results(public(Arguments(*some, *a[6:])._replace(k=3)))
        assert all(torch.equal(x[r : r + 1, :3], y) for x, y in zip(together[:3], alone[:3], strict=True))
        assert torch.equal(together[3][r : r + 1], alone[3])


@pytest.mark.parametrize(("named", "spoil"), FAULTS)
def test_faults_are_raised_by_name(named, spoil):
    a = on_device(make(stream_index=torch.zeros(3, dtype=torch.int64)))
    spoil(a)
    with pytest.raises(ValueError, match=named):
        public(a)
    public(on_device(make()))  # the device goes on


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"deterministic": True}], ids=name_of)
def test_a_graph_replays_it(options):
    first, second = (on_device(make(8, 4, 5003, seed=seed, **options)) for seed in (0, 1))
    second = second._replace(seed=0, stream_position=first.stream_position)
    expected = results(public(second))
    captured = Arguments(*(x.clone() if isinstance(x, torch.Tensor) else x for x in first))
    public(captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = public(captured)
    captured.logits.copy_(second.logits)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results(found), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_candidates_from_hidden_states_are_those_of_their_logits(dtype):
    """In chunks, of which no product differs from that of all rows by more than its rounding."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=g).to("cuda", dtype) for n in (700, 30_011))
    drawn = draw_candidates_from_hidden(hidden, weight, 4, stream=Stream(0))
    logits = hidden.double() @ weight.double().T
    exact = logits.log_softmax(-1).gather(-1, drawn.tokens)
    assert (exact - drawn.log_probs).abs().max() < (1e-3 if dtype is torch.float32 else 0.5)
    same = draw_candidates(torch.nn.functional.linear(hidden, weight), 4, stream=Stream(0)).tokens == drawn.tokens
    assert same.float().mean() > (0.99 if dtype is torch.float32 else 0.9)
    hidden[650, 3] = torch.nan
    with pytest.raises(ValueError, match="row 650"):
        draw_candidates_from_hidden(hidden, weight, 4, stream=Stream(0))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("survivors", [1, 5])
def test_survivors_are_those_of_the_cpu(scheme, survivors):
    lw = 2 * torch.randn(200, 3, 16, generator=torch.Generator().manual_seed(0))
    lw[5, 1], lw[6, 1, 3] = -torch.inf, -torch.inf
    there, here = (resample(x, survivors=survivors, scheme=scheme, stream=Stream(1)) for x in (lw.cuda(), lw))
    assert torch.equal(there.indices.cpu(), here.indices)
    torch.testing.assert_close(there.ess.cpu(), here.ess)
    torch.testing.assert_close(there.log_normalizer.cpu(), here.log_normalizer)
    with pytest.raises(ValueError, match="row 6 of"):
        resample(lw.cuda().index_fill(0, torch.tensor(2).cuda(), torch.nan), stream=Stream(1))
