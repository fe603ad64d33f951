"""Thought attention: the reference against plain loops, the native kernel against the reference."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pyquiet import native
from pyquiet.kernels import thought_attention
from pyquiet.kernels.thought_attention import reference

from ..allocations import allocations

# B, H, G, T, P, Q, D, S, window, softcap, left padding
SHAPES = [
    (1, 1, 1, 1, 1, 1, 8, 1, None, None, False),
    (2, 4, 2, 7, 3, 3, 24, 7, None, None, False),
    (2, 4, 2, 7, 3, 3, 24, 7, 6, 2.0, True),
    (1, 6, 3, 1, 4, 1, 40, 50, None, None, True),
    (2, 4, 4, 31, 8, 8, 64, 40, 5, None, True),
    (2, 4, 1, 30, 8, 2, 256, 40, None, 5.0, False),
    (1, 2, 2, 100, 1, 1, 8, 131, 17, 3.0, True),
    (3, 2, 2, 5, 70, 70, 16, 3, None, None, False),
    (2, 3, 1, 9, 5, 4, 80, 300, 90, None, True),
    (1, 8, 8, 1, 2, 1, 128, 700, None, None, False),
    (1, 2, 1, 6, 4, 4, 72, 1, None, None, False),
    (1, 2, 1, 6, 4, 2, 136, 0, None, None, False),
]


def make(B, H, G, T, P, Q, D, S, window, softcap, padded, dtype=torch.float32, seed=0):
    """Tensors and options of a call; limits in any order, some of them empty of text."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, Q, D), (B, G, S, D), (B, G, S, D), (B, G, T, P, D), (B, G, T, P, D)]
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    options = {
        "text_limits": torch.randint(0, S + 1, (B, T), generator=g),
        "text_start": torch.randint(0, S // 2 + 1, (B,), generator=g) if padded else None,
        "scale": D**-0.5,
        "window": window,
        "softcap": softcap,
    }
    return tensors, options


def by_loops(tensors, options):
    """One row and one key at a time, from the contract's sentences."""
    query, text_key, text_value, path_key, path_value = tensors
    B, H, T, Q, D = query.shape
    P, group = path_key.shape[3], H // text_key.shape[1]
    window, cap = options["window"] or math.inf, options["softcap"]
    out, lse = torch.empty_like(query), query.new_empty(B, H, T, Q)
    for b, h, t, q in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, T, Q))).tolist():
        limit, place = int(options["text_limits"][b, t]), P - Q + q
        start = 0 if options["text_start"] is None else int(options["text_start"][b])
        text = [s for s in range(start, limit) if limit + place - s < window]
        own = [j for j in range(place + 1) if place - j < window]
        keys = torch.cat([text_key[b, h // group, text], path_key[b, h // group, t, own]])
        values = torch.cat([text_value[b, h // group, text], path_value[b, h // group, t, own]])
        scores = keys @ query[b, h, t, q] * options["scale"]
        if cap:
            scores = cap * torch.tanh(scores / cap)
        out[b, h, t, q] = scores.softmax(0) @ values
        lse[b, h, t, q] = scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("shape", SHAPES[:9])
def test_reference_equals_loops(shape):
    tensors, options = make(*shape, dtype=torch.float64)
    for actual, expected in zip(reference(*tensors, **options), by_loops(tensors, options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference(shape):
    tensors, options = make(*shape)
    actual = thought_attention(*tensors, **options, return_lse=True)
    expected = reference(*[x.double() for x in tensors], **options)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=0, atol=5e-6)


@pytest.mark.skipif(native.cpu is None, reason="the native module is not built")
@pytest.mark.parametrize("isa", native.cpu.supported_isas() if native.cpu else [])
def test_every_instruction_set(isa):
    """The same checks in a process that is made to use another instruction set."""
    names = ["test_native_equals_reference", "test_the_thread_count_changes_no_bit"]
    tests = [f"{__file__}::{name}" for name in names]
    env = {**os.environ, "PYQUIET_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_thread_count_changes_no_bit():
    tensors, options = make(2, 4, 2, 60, 4, 4, 64, 60, None, None, True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(thought_attention(*tensors, **options, return_lse=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_views_need_no_copy():
    """Transposed projections, slices of a packed pass and an expanded text enter as they are."""
    tensors, options = make(2, 4, 2, 5, 3, 3, 16, 9, None, None, True)
    q, tk, tv, pk, pv = tensors
    expected = thought_attention(*tensors, **options)
    packed = torch.zeros(2, 7 + 15, 4, 16)
    packed[:, 7:] = q.flatten(2, 3).transpose(1, 2)
    q_view = packed.transpose(1, 2)[:, :, 7:].unflatten(2, (5, 3))
    wide = torch.zeros(2, 2, 20, 32)
    wide[:, :, 4:13, :16] = tk
    assert not q_view.is_contiguous()
    out = thought_attention(q_view, wide[:, :, 4:13, :16], tv, pk, pv, **options)
    assert torch.equal(out, expected)
    one = options | {"text_start": None, "text_limits": options["text_limits"][:1].expand(2, 5)}
    shared = thought_attention(q, tk[:1].expand(2, -1, -1, -1), tv[:1].expand(2, -1, -1, -1), pk, pv, **one)
    copied = thought_attention(q, tk[:1].repeat(2, 1, 1, 1), tv[:1].repeat(2, 1, 1, 1), pk, pv, **one)
    assert torch.equal(shared, copied)


def test_keys_out_of_sight_do_not_matter():
    """Left padding, keys at or above every limit and keys out of every window may hold anything, NaN too."""
    tensors, options = make(1, 2, 1, 4, 2, 2, 16, 40, 6, None, False)
    options["text_limits"] = torch.tensor([[20, 21, 22, 23]])
    options["text_start"] = torch.tensor([5])
    expected = thought_attention(*tensors, **options)
    for x in tensors[1:3]:
        x[:, :, :15] = math.nan
        x[:, :, 23:] = math.nan
    assert torch.equal(thought_attention(*tensors, **options), expected)


@pytest.mark.parametrize("which", range(5))
def test_nan_is_passed_on(which):
    tensors, options = make(1, 1, 1, 3, 2, 2, 8, 6, None, None, False)
    options["text_limits"] = torch.tensor([[6, 6, 6]])
    tensors[which].view(-1)[0] = math.nan
    out = thought_attention(*tensors, **options)
    assert out[0, 0, 0].isnan().any()


def test_large_scores_do_not_overflow():
    tensors, options = make(1, 2, 2, 6, 3, 3, 16, 20, None, None, False)
    tensors[0] *= 1e4
    out, lse = thought_attention(*tensors, **options, return_lse=True)
    expected, expected_lse = reference(*[x.double() for x in tensors], **options)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)  # scores of 1e5 carry errors of 1e-2
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6 * expected_lse.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_the_reference(dtype):
    tensors, options = make(1, 2, 1, 5, 2, 2, 16, 7, None, None, False, dtype=dtype)
    out = thought_attention(*tensors, **options)
    expected = reference(*[x.double() for x in tensors], **options)[0]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_compiles_without_a_graph_break():
    tensors, options = make(2, 4, 2, 3, 2, 2, 16, 5, None, None, True)

    def twice(*x):
        return 2 * thought_attention(*x, **options)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), twice(*tensors))


@pytest.mark.skipif(native.cpu is None, reason="the reference forms all scores")
def test_no_tensor_of_scores():
    tensors, options = make(1, 1, 1, 512, 2, 2, 8, 512, None, None, False)
    _, largest = allocations(lambda: thought_attention(*tensors, **options))
    assert largest <= 4 * 512 * 2 * 8  # the output
    _, largest = allocations(lambda: reference(*tensors, **options))
    assert largest >= 4 * 512 * 2 * 512  # the recorder sees scores where they are formed


PATHS = ("path_key", "path_value")
TENSORS = ("query", "text_key", "text_value", *PATHS)


def broken(change):
    tensors, options = make(2, 4, 2, 3, 2, 2, 16, 5, None, None, True)
    names = ["query", "text_key", "text_value", "path_key", "path_value"]
    arguments = dict(zip(names, tensors, strict=True)) | options
    change(arguments)
    return arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("error", "named", "change"),
    [
        (ValueError, "query", lambda a: a.update(query=a["query"][0])),
        (TypeError, "text_key", lambda a: a.update(text_key=a["text_key"].half())),
        (TypeError, "query", lambda a: a.update(query=a["query"].long())),
        (ValueError, "text_value", lambda a: a.update(text_value=a["text_value"][:, :, :4])),
        (ValueError, "path_value", lambda a: a.update(path_value=a["path_value"][:, :1])),
        (ValueError, "path_key", lambda a: a.update(path_key=a["path_key"][:, :, :, :1])),
        (ValueError, "H=3", lambda a: a.update(query=a["query"][:, :3])),
        (ValueError, "multiple of 8", lambda a: a.update(query=a["query"][..., :12])),
        (
            ValueError,
            "stride",
            lambda a: a.update(text_key=a["text_key"].transpose(2, 3).contiguous().transpose(2, 3)),
        ),
        (TypeError, "text_limits", lambda a: a.update(text_limits=a["text_limits"].int())),
        (ValueError, "text_limits", lambda a: a.update(text_limits=a["text_limits"] + 6)),
        (ValueError, "text_limits", lambda a: a.update(text_limits=a["text_limits"][:1])),
        (ValueError, "text_start", lambda a: a.update(text_start=a["text_start"] - 9)),
        (ValueError, "window", lambda a: a.update(window=0)),
        (ValueError, "softcap", lambda a: a.update(softcap=-1.0)),
        (ValueError, "softcap", lambda a: a.update(softcap=math.nan)),
        (ValueError, "softcap", lambda a: a.update(softcap=1e-50)),
        (ValueError, "scale", lambda a: a.update(scale=1e300)),
        (ValueError, "scale", lambda a: a.update(scale=math.nan)),
        (ValueError, "scale / softcap", lambda a: a.update(scale=1e30, softcap=1e-30)),
        (
            ValueError,
            "P=8388608",
            lambda a: a.update({x: a[x][:, :, :, :1].expand(-1, -1, -1, 2**23, -1) for x in PATHS}),
        ),
        (TypeError, "scale", lambda a: a.update(scale=None)),
        (TypeError, "window", lambda a: a.update(window=2.5)),
        (TypeError, "softcap", lambda a: a.update(softcap="a")),
        (TypeError, "text_limits", lambda a: a.update(text_limits=None)),
        (TypeError, "text_key", lambda a: a.update(text_key=None)),
        (TypeError, "query", lambda a: a.update(query=None)),
        (TypeError, "query", lambda a: a.update({x: a[x].to(torch.float8_e4m3fn) for x in TENSORS})),
    ],
)
def test_bad_arguments_are_named(dtype, error, named, change):
    def change_after_cast(arguments):
        for name in ("query", "text_key", "text_value", "path_key", "path_value"):
            arguments[name] = arguments[name].to(dtype)
        change(arguments)

    with pytest.raises(error, match=named):
        thought_attention(**broken(change_after_cast))


def test_an_overlapping_query_gives_a_dense_output():
    query = torch.randn(2, 4, 200).unfold(2, 16, 1)[:, :, :120].unflatten(2, (60, 2))
    tensors, options = make(2, 4, 2, 60, 2, 2, 16, 20, None, None, False)
    out = thought_attention(query, *tensors[1:], **options)
    assert torch.equal(out, thought_attention(query.contiguous(), *tensors[1:], **options))


def a_call():
    """(f, q): thought attention as a function of the query alone."""
    (q, *others), options = make(2, 4, 2, 5, 4, 3, 24, 9, None, None, True)
    return lambda q: thought_attention(q, *others, **options), q


def test_transforms_and_tracers_meet_the_op():
    f, q = a_call()
    expected = f(q)
    assert torch.equal(torch.func.functionalize(f)(q), expected)
    assert torch.equal(torch.func.vmap(f)(torch.stack([q, 2 * q]))[0], expected)
    graph = make_fx(f)(2 * q)
    assert torch.equal(graph(q), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_torch_func():
    f, q = a_call()

    def loss(q):
        return f(q).square().sum()

    def mapped(q):
        return torch.func.vmap(f)(q).square().sum()

    leaf, pair = q.clone().requires_grad_(), torch.stack([q, q])
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(q), expected)
    assert torch.equal(torch.func.vjp(loss, q)[1](torch.ones(()))[0], expected)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(pair)[1], expected)
    assert torch.equal(torch.func.grad(mapped)(pair)[1], expected)
    with pytest.raises(NotImplementedError, match="twice"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_is_refused(needs_grad):
    f, q = a_call()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        f(forward_ad.make_dual(q.clone().requires_grad_(needs_grad), q))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(f, (q,), (q,))


@pytest.mark.parametrize("registered", [False, True])
def test_a_second_derivative_is_refused(registered, monkeypatch):
    f, q = a_call()
    q.requires_grad_()
    if registered:
        monkeypatch.setattr("pyquiet.kernels.registration.is_compiling", lambda: True)
    (gradient,) = torch.autograd.grad(f(q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="not differentiable twice"):
        gradient.square().sum().backward()


def test_gradients_of_overlapping_views():
    """`empty_like` of such a view has no contiguous rows; its gradient must have."""
    base = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    tensors, options = make(2, 4, 4, 17, 1, 1, 40, 9, None, None, False)
    tensors[0] = base.as_strided((2, 4, 17, 1, 40), (8, 1, 2, 1, 1)).requires_grad_()
    dense = tensors[0].detach().contiguous().requires_grad_()
    view_gradient = torch.autograd.grad(thought_attention(*tensors, **options).square().sum(), tensors[0])
    dense_gradient = torch.autograd.grad(thought_attention(dense, *tensors[1:], **options).square().sum(), dense)
    torch.testing.assert_close(view_gradient, dense_gradient, rtol=0, atol=0)


def test_meta_tensors_give_shapes():
    tensors, options = make(2, 4, 2, 5, 4, 3, 24, 9, None, None, False)
    options["text_limits"] = options["text_limits"].to("meta")
    out, lse = thought_attention(*(x.to("meta") for x in tensors), **options, return_lse=True)
    assert out.is_meta
    assert out.shape == tensors[0].shape
    assert lse.shape == out.shape[:-1]


def test_autocast_does_not_reach_the_reference():
    tensors, options = make(1, 2, 1, 5, 2, 2, 16, 7, None, None, False)
    expected = reference(*tensors, **options)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference(*tensors, **options)[0], expected)
