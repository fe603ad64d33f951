"""The CUDA kernels of thought attention, executed on the CPU (shim.hpp), against float64.

Every problem runs in two orders of the threads, which must give the same bits, under AddressSanitizer and UBSan, with
NaN wherever nothing may be read and in all that is to be written.
"""

import math
from pathlib import Path

import pytest
import torch

from pyquiet.kernels.thought_attention import reference

from .driver import built, run_program

INPUTS = ["query", "text_key", "text_value", "path_key", "path_value"]
GRADIENTS = ["d_" + name for name in INPUTS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return built("thought_attention", tmp_path_factory.mktemp("shim"))


def make(B, H, G, T, P, Q, D, S, window=None, softcap=None, padded=False, dtype=torch.float32, seed=0):
    """Tensors and options of a call, limits in any order."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, Q, D), (B, G, S, D), (B, G, S, D), (B, G, T, P, D), (B, G, T, P, D)]
    tensors = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    options = {
        "text_limits": torch.randint(0, S + 1, (B, T), generator=g),
        "text_start": torch.randint(0, S // 2 + 1, (B,), generator=g) if padded else None,
        "scale": D**-0.5,
        "window": window,
        "softcap": softcap,
    }
    return tensors, options


def lay_out(x, layout):
    """x itself (None), a copy, or a view of a storage of NaN: dimensions 1 and 2 swapped, rows padded, start moved."""
    if layout is None:
        return x
    if layout == "dense":
        return x.clone()
    padding, start = {"strided": (8, 16), "unaligned": (1, 3)}[layout]
    order = (0, 2, 1, *range(3, x.ndim))
    shape = [x.shape[i] for i in order]
    shape[-1] += padding
    storage = x.new_full((start + math.prod(shape),), math.nan)
    view = storage[start:].view(shape)[..., : x.shape[-1]].permute(order)
    return view.copy_(x)


def run(driver, tensors, options, d_out=None, layout="dense", without=()):
    """{name: tensor} of what the kernels write: out and lse, and with `d_out` the gradients."""
    nan = lambda x, dtype: torch.full_like(x, math.nan, dtype=dtype, memory_format=torch.contiguous_format)  # noqa: E731
    query = tensors[0]
    written = {"out": nan(query, query.dtype), "lse": nan(query[..., 0], torch.float32)}
    if d_out is not None:
        written |= {name: nan(x, x.dtype) for name, x in zip(GRADIENTS, tensors, strict=True)}
    written = {name: x for name, x in written.items() if name not in without}
    given = dict(zip(INPUTS, tensors, strict=True)) | written
    given = {name: lay_out(x, layout) for name, x in given.items()}
    given |= {"d_out": lay_out(d_out, layout)} if d_out is not None else {}
    given |= {name: options[name] for name in ("text_limits", "text_start") if options[name] is not None}
    given["options"] = torch.tensor([DTYPES.index(query.dtype), options["window"] or 0])
    given["reals"] = torch.tensor([options["scale"], options["softcap"] or 0], dtype=torch.float64)
    outputs = {}
    for name, storage in run_program(driver, given, written).items():
        x = given[name]
        outputs[name] = storage.as_strided(x.shape, x.stride(), x.storage_offset())
        outside = torch.ones(storage.shape, dtype=torch.bool)
        outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
        assert storage[outside].isnan().all(), f"{name} is written outside of its elements"
    return outputs


def seen(query, limits, start, S, P, window):
    """bool [B, 1, T, Q, S + P], the contract's sentence on who sees whom."""
    place = limits[:, :, None] + torch.arange(P - query.shape[3], P)  # [B, T, Q]
    text, own = torch.arange(S), limits[:, :, None] + torch.arange(P)  # [S], [B, T, P]
    key = torch.cat([text.expand(*limits.shape, S), own], -1)[:, :, None]  # [B, T, 1, S + P], as positions
    first = torch.zeros_like(limits[:, 0]) if start is None else start
    in_text = (text >= first[:, None, None]) & (text < limits[:, :, None])
    allowed = torch.cat([in_text, torch.ones_like(own, dtype=torch.bool)], -1)[:, :, None]
    distance = place[..., None] - key
    return (allowed & (distance >= 0) & (distance < (window or math.inf)))[:, None]


def eager(query, text_key, text_value, path_key, path_value, *, text_limits, text_start, scale, window, softcap):
    """What one would write in torch, in the tensors' own dtype."""
    S, group = text_key.shape[2], query.shape[1] // text_key.shape[1]
    tk, tv, pk, pv = (x.repeat_interleave(group, 1) for x in (text_key, text_value, path_key, path_value))
    scores = torch.cat(
        [torch.einsum("bhtqd,bhsd->bhtqs", query, tk), torch.einsum("bhtqd,bhtpd->bhtqp", query, pk)], -1
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = seen(query, text_limits, text_start, S, path_key.shape[3], window)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    out = torch.einsum("bhtqs,bhsd->bhtqd", weights[..., :S], tv)
    return out + torch.einsum("bhtqp,bhtpd->bhtqd", weights[..., S:], pv)


def with_gradients(attention, tensors, options, d_out):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = attention(*tensors, **options)
    gradients = torch.autograd.grad(out, tensors, d_out, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, tensors, strict=True)]
    return {"out": out.detach()} | dict(zip(GRADIENTS, gradients, strict=True))


def check(driver, shape, dtype, layout="dense", change=lambda tensors, options: None):
    tensors, options = make(*shape, dtype=dtype)
    change(tensors, options)
    d_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = run(driver, tensors, options, d_out, layout)
    doubles = [x.double() for x in tensors]
    expected = with_gradients(lambda *x, **o: reference(*x, **o)[0], doubles, options, d_out.double())
    lse = reference(*doubles, **options)[1]
    torch.testing.assert_close(actual["lse"].double(), lse, rtol=1e-6, atol=5e-6)
    rough = None if dtype is torch.float32 else with_gradients(eager, tensors, options, d_out)
    for name, e in expected.items():
        if not e.numel():
            continue
        size = max(1.0, e.abs().max().item())
        # FlashAttention's rule for 16 bits: at most twice the error of the same arithmetic in plain torch.
        limit = 5e-6 * size
        if rough is not None:
            limit = 2 * (rough[name].double() - e).abs().max().item() + torch.finfo(dtype).eps / 2 * size
        error = (actual[name].double() - e).abs().max().item()
        assert error <= limit, f"{name}: error {error:.2g}, allowed {limit:.2g}"


# B, H, G, T, P, Q, D, S, window, softcap, left padding
SHAPES = [
    (2, 2, 2, 5, 3, 3, 8, 7),
    (1, 4, 2, 5, 3, 1, 24, 9, 4, 2.0, True),
    (1, 4, 2, 5, 3, 3, 64, 5, None, None, True),
    (1, 2, 1, 5, 3, 3, 72, 6, None, 3.0),
    (1, 2, 1, 5, 3, 1, 136, 6, 3),
    (1, 1, 1, 3, 3, 3, 256, 4),
    (1, 2, 1, 5, 3, 3, 24, 0),
    (1, 6, 2, 31, 3, 3, 16, 150, None, None, True),  # several tiles of rows, several blocks of keys
    (1, 2, 2, 40, 4, 4, 40, 90, 33, 4.0),
    (1, 2, 1, 2, 150, 70, 16, 5, 100),  # a position larger than a tile, a path larger than a block
    (1, 1, 1, 3, 70, 2, 128, 70),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_float64(driver, shape, dtype):
    check(driver, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_any_strides(driver, layout, dtype):
    check(driver, (2, 4, 2, 7, 3, 2, 24, 70, 50, None, True), dtype, layout)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_float64_at_random_shapes(driver, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (1,), generator=g))]  # noqa: E731
    G, Q = pick(1, 2), pick(1, 2, 3, 8)
    shape = (pick(1, 2), G * pick(1, 2, 5), G, pick(1, 2, 13), Q + pick(0, 1, 4), Q, 8 * pick(1, 2, 5, 8, 9, 17))
    shape += (pick(0, 1, 31, 64, 65, 129), pick(None, 1, 9), pick(None, 1.5), pick(True, False))
    check(driver, shape, dtype, pick("dense", "strided", "unaligned"))


def test_keys_whose_rows_are_far_apart(driver):
    """More rows than one look at their ranges takes in, of which the first and the last alone see the text."""

    def change(tensors, options):
        options["text_limits"][:, 1:-1] = 0

    check(driver, (1, 1, 1, 720, 3, 3, 8, 70), torch.float32, change=change)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(driver, dtype):
    tensors, options = make(1, 2, 2, 6, 3, 3, 16, 20, dtype=dtype)
    tensors[0] *= 1e3
    out = run(driver, tensors, options)["out"]
    expected = reference(*[x.double() for x in tensors], **options)[0]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps + 2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_out_of_sight_do_not_matter(driver, dtype):
    """Left padding, keys at or above every limit and keys out of every window may hold NaN."""
    tensors, options = make(1, 2, 1, 4, 2, 2, 16, 40, 6, dtype=dtype)
    options["text_limits"] = torch.tensor([[20, 21, 22, 23]])
    options["text_start"] = torch.tensor([5])
    d_out = torch.ones_like(tensors[0])
    expected = run(driver, tensors, options, d_out)
    for x in tensors[1:3]:
        x[:, :, :15] = math.nan
        x[:, :, 23:] = math.nan
    actual = run(driver, tensors, options, d_out)
    for name in ("out", "lse", "d_query", "d_path_key", "d_path_value"):
        assert torch.equal(actual[name], expected[name])
    for name in ("d_text_key", "d_text_value"):
        assert torch.equal(actual[name][:, :, 15:23], expected[name][:, :, 15:23])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", range(5))
def test_nan_is_passed_on(driver, which, dtype):
    tensors, options = make(1, 1, 1, 3, 2, 2, 8, 6, dtype=dtype)
    options["text_limits"] = torch.tensor([[6, 6, 6]])
    tensors[which].view(-1)[0] = math.nan
    actual = run(driver, tensors, options, torch.ones_like(tensors[0]))
    assert actual["out"][0, 0, 0].isnan().any()
    assert actual["d_query"][0, 0, 0].isnan().any()


@pytest.mark.parametrize("limit", [-1, 8, 2**62, -(2**63)])
def test_a_limit_out_of_range_gives_nan_to_its_rows_alone(driver, limit):
    tensors, options = make(1, 4, 2, 5, 3, 3, 24, 7, dtype=torch.bfloat16)
    d_out = torch.ones_like(tensors[0])
    expected = run(driver, tensors, options, d_out)
    options["text_limits"][0, 2] = limit
    actual = run(driver, tensors, options, d_out)
    others = [0, 1, 3, 4]
    for name in ("out", "lse", "d_query", "d_path_key", "d_path_value"):
        assert actual[name][:, :, 2].isnan().any(-1).all()
        assert torch.equal(actual[name][:, :, others], expected[name][:, :, others])
    assert not actual["d_text_key"].isnan().any()


@pytest.mark.parametrize("start", [-1, 8, 2**62])
def test_a_start_out_of_range_gives_nan_to_its_sequence(driver, start):
    tensors, options = make(2, 2, 1, 5, 3, 3, 24, 7, padded=True)
    d_out = torch.ones_like(tensors[0])
    expected = run(driver, tensors, options, d_out)
    options["text_start"][1] = start
    actual = run(driver, tensors, options, d_out)
    for name in ("out", "lse", "d_query"):
        assert actual[name][1].isnan().all()
        assert torch.equal(actual[name][0], expected[name][0])


def test_the_lse_is_optional(driver):
    tensors, options = make(1, 2, 1, 5, 3, 3, 24, 7)
    expected = run(driver, tensors, options)
    assert torch.equal(run(driver, tensors, options, without=("lse",))["out"], expected["out"])


def test_a_text_may_be_expanded(driver):
    tensors, options = make(2, 4, 2, 5, 3, 3, 16, 9)
    copied = [x[:1].repeat(2, 1, 1, 1) for x in tensors[1:3]]
    expected = run(driver, [tensors[0], *copied, *tensors[3:]], options)
    shared = [x[:1].expand(2, -1, -1, -1) for x in tensors[1:3]]
    assert torch.equal(run(driver, [tensors[0], *shared, *tensors[3:]], options, layout=None)["out"], expected["out"])


@pytest.mark.parametrize(("H", "T"), [(2, 0), (0, 3)])
def test_without_a_row_the_gradients_are_zero(driver, H, T):
    tensors, options = make(1, H, 1, T, 3, 3, 24, 70)
    actual = run(driver, tensors, options, torch.ones_like(tensors[0]))
    assert all((actual[name] == 0).all() for name in GRADIENTS)
