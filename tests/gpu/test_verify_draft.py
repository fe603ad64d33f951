"""Draft verification on a CUDA device: against the float64 reference and the CPU, its law, its faults, its graphs."""

import pytest
import torch

from pyquiet import native
from pyquiet.kernels import verify_draft
from pyquiet.kernels.draft_verification import Arguments, reference
from pyquiet.randomness import Purpose, Stream, draw

from ..chi_square import chi_square
from ..cuda_shim.test_verify_draft import CASES, make, name_of, near_ties, public

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def native_kernels():
    if native.cuda() is None:
        pytest.fail("the CUDA kernels are not built")


def on_device(a: Arguments) -> Arguments:
    return Arguments(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in a))


def results(verification):
    return [x.cpu() for x in vars(verification).values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_the_reference(case, dtype):
    a = make(dtype=dtype, **{name: x for name, x in case.items() if name != "draft_logits"})
    a = a._replace(draft_logits=None) if "draft_logits" in case else a
    tokens, count, accepted, log_probs, bonus = results(public(on_device(a)))
    expected = reference(*a)
    for actual, exact in zip((tokens, count, accepted, bonus), (*expected[:3], expected[4]), strict=True):
        assert torch.equal(actual, exact)
    torch.testing.assert_close(log_probs.double(), expected[3].double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("V", [997, 50257])
@pytest.mark.parametrize(
    "case",
    [{}, {"top_k": 50, "top_p": 0.9}, {"draft_temperature": 0.0}, {"temperature": 0.7}, {"gumbel": True}],
    ids=name_of,
)
def test_deterministic_tokens_are_those_of_the_cpu(case, V, dtype):
    a = make(64, 5, V, dtype=dtype, deterministic=True, **({"apart": 0.2} | case))
    there, here = results(public(on_device(a))), results(public(a))
    assert (here[2] < 5).any()
    for x, y in zip(there[:3], here[:3], strict=True):
        assert torch.equal(x, y)


def test_deterministic_near_ties_fall_as_on_the_cpu():
    a = near_ties(10_000)
    assert torch.equal(public(on_device(a)).tokens.cpu(), public(a).tokens)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"deterministic": True}], ids=name_of)
def test_tokens_follow_the_target(options):
    B, V = 50_000, 7
    q, p = 1.5 * torch.randn(2, V, generator=torch.Generator().manual_seed(5)).cuda()
    law = {name: x for name, x in options.items() if name == "top_k"}
    drafts = draw(p.expand(B, V), stream=Stream(1, Purpose.DRAFT), **law).tokens[:, None]
    tokens = verify_draft(q.expand(B, 1, V), p.expand(B, 1, V), drafts, stream=Stream(3), **options).tokens[:, 0].cpu()
    kept = q if "top_k" not in options else q.masked_fill(q < q.topk(4).values[-1], -torch.inf)
    assert chi_square(torch.bincount(tokens, minlength=V), kept.softmax(-1).cpu()) > 1e-4
    assert chi_square(torch.bincount(drafts[:, 0].cpu(), minlength=V), kept.softmax(-1).cpu().clamp_min(1e-9)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"lse": True}, {"top_p": 0.9}, {"gumbel": True}], ids=name_of)
def test_a_sequence_does_not_notice_the_batch(options):
    """Nor how its rows are aligned: the same bits."""
    a = on_device(make(9, 3, 50257, dtype=torch.bfloat16, stream_sequence=torch.arange(9) * 7, **options))
    together = results(public(a))
    for b in (0, 3, 8):
        alone = Arguments(*(x[b : b + 1] if isinstance(x, torch.Tensor) else x for x in a[:10]), *a[10:])
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, results(public(alone)), strict=True))


@pytest.mark.parametrize(
    ("named", "spoil"),
    [
        (r"target_logits\[1, 2\]", lambda a: a.target_logits[1, 2, 30].fill_(torch.nan)),
        (r"target_logits\[2, 0\]", lambda a: a.target_logits[2, 0].fill_(-torch.inf)),
        (r"draft_logits\[0, 1\]", lambda a: a.draft_logits[0, 1, 36].fill_(torch.inf)),
        ("lengths", lambda a: a.lengths[1].fill_(9)),
        ("draft_tokens", lambda a: a.draft_tokens[1, 0].fill_(37)),
    ],
)
def test_faults_are_raised_by_name(named, spoil):
    a = on_device(make(apart=0.0, lengths=torch.full((3,), 4)))
    spoil(a)
    with pytest.raises(ValueError, match=named):
        public(a)
    public(on_device(make()))  # the device goes on


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"deterministic": True}, {"gumbel": True}], ids=name_of)
def test_a_graph_replays_it(options):
    first, second = (on_device(make(8, 4, 5003, seed=seed, **options)) for seed in (0, 1))
    second = second._replace(seed=0, stream_position=first.stream_position)
    expected = results(public(second))
    captured = Arguments(*(x.clone() if isinstance(x, torch.Tensor) else x for x in first))
    public(captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = public(captured)
    for into, x in zip(captured[:3], second[:3], strict=True):
        into.copy_(x)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results(found), expected, strict=True))
