"""Thought attention as its contract says: values, gradients, invariances, exact zeros, bits and memory.

Everything goes through the public function. The truth is `dense`, one softmax over all S + T*P keys under an explicit
mask, written from the contract alone; gradients are autograd's through it, in float64.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from pyquiet import native
from pyquiet.kernels import thought_attention

from ..allocations import allocations

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
ABSOLUTE = {F64: 1e-10, F32: 5e-6}
NAMES = ["output", "d query", "d text_key", "d text_value", "d path_key", "d path_value"]


needs_native = pytest.mark.skipif(native.cpu is None, reason="a promise of the native module, which is not built")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take ten times as long; that they change no bit is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(count: int) -> Callable:
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@dataclass(frozen=True, repr=False)
class Call:
    """query, text_key, text_value, path_key, path_value; the keyword arguments; the gradient of the output."""

    tensors: tuple[Tensor, ...]
    options: dict
    d_out: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        B, H, T, Q, D = self.tensors[0].shape
        _, G, S, _ = self.tensors[1].shape
        return B, H, G, T, self.tensors[3].shape[3], Q, D, S

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name}={n}" for name, n in zip(["B", "H", "G", "T", "P", "Q", "D", "S"], self.sizes, strict=True)
        )
        options = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return f"Call({sizes}, {self.d_out.dtype}, {options})"

    def _repr_pretty_(self, printer, cycle) -> None:  # else Hypothesis prints the tensors
        printer.text(repr(self))

    def to(self, dtype: torch.dtype) -> "Call":
        return replace(self, tensors=tuple(x.to(dtype) for x in self.tensors), d_out=self.d_out.to(dtype))

    def set(self, **options) -> "Call":
        return replace(self, options=self.options | options)


def make(B, H, G, T, P, Q, D, S, *, limits="any", padded=False, dtype=F32, seed=0, steep=1, **options) -> Call:
    """A call with standard normal tensors and scores of deviation `steep`; limits any, rising, none (0) or all (S)."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, Q, D), (B, G, S, D), (B, G, S, D), (B, G, T, P, D), (B, G, T, P, D), (B, H, T, Q, D)]
    *tensors, d_out = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    ends = torch.randint(0, S + 1, (B, T), generator=g)
    ends = {"any": ends, "rising": ends.sort().values, "none": ends * 0, "all": ends * 0 + S}[limits]
    start = torch.randint(0, S // 2 + 2, (B,), generator=g).clamp(max=S) if padded else None  # at times above a limit
    fixed = {"text_limits": ends, "text_start": start, "scale": steep * D**-0.5}
    return Call(tuple(tensors), fixed | options, d_out)


@st.composite
def calls(
    draw, dtypes=(F32, BF16), T=(1, 2, 3, 7, 19), S=(0, 1, 5, 20, 63, 64, 65, 131), D=(8, 16, 24, 40, 64)
) -> Call:
    G, Q = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 9))
    sizes = {
        "B": draw(st.integers(1, 2)),
        "H": G * draw(st.sampled_from([1, 2, 3])),
        "G": G,
        "T": draw(st.sampled_from(T)),
        "P": Q + draw(st.sampled_from([0, 1, 0, 3])),
        "Q": Q,
        "D": draw(st.sampled_from(D)),
        "S": draw(st.sampled_from(S)),
    }
    return make(
        **sizes,
        limits=draw(st.sampled_from(["any", "rising", "none", "all"])),
        padded=draw(st.booleans()),
        window=draw(st.sampled_from([None, None, 1, 4, 9, 13, 70])),
        softcap=draw(st.sampled_from([None, None, 0.7, 3.0, 50.0])),
        steep=draw(st.sampled_from([1, 0.5])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**20)),
    )


def sight(call: Call) -> Tensor:
    """Which keys, the text's and then every position's path, each query step sees: [B, T*Q, S + T*P] of bool."""
    B, _, _, T, P, Q, _, S = call.sizes
    limits, start, window = (call.options.get(name) for name in ("text_limits", "text_start", "window"))
    start = limits.new_zeros(B) if start is None else start
    position, step = torch.arange(T).repeat_interleave(Q), torch.arange(P - Q, P).repeat(T)
    owner = torch.cat([torch.full((S,), -1), torch.arange(T).repeat_interleave(P)])  # -1 is the text
    index = torch.cat([torch.arange(S), torch.arange(P).repeat(T)])
    of_text, end = owner < 0, limits[:, position, None]
    text = of_text & (index >= start[:, None, None]) & (index < end)
    own = (owner == position[:, None]) & (index <= step[:, None])
    place = torch.where(of_text, index, limits[:, owner] + index)  # of the keys
    near = limits[:, position] + step  # the queries' own places
    in_window = near[:, :, None] - place[:, None] < (math.inf if window is None else window)
    return (text | own) & in_window


def dense(call: Call) -> Callable[..., tuple[Tensor, Tensor]]:
    """The attention by torch's own operations in the tensors' dtype: output and log-sum-exp."""
    _, H, G, T, _, Q, _, _ = call.sizes
    hidden, scale, cap = ~sight(call)[:, None], call.options["scale"], call.options.get("softcap")

    def attend(query, text_key, text_value, path_key, path_value):
        key = torch.cat([text_key, path_key.flatten(2, 3)], 2).repeat_interleave(H // G, 1)
        value = torch.cat([text_value, path_value.flatten(2, 3)], 2).repeat_interleave(H // G, 1)
        scores = query.flatten(2, 3) @ key.transpose(2, 3) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(hidden, -math.inf)
        return (scores.softmax(-1) @ value).unflatten(2, (T, Q)), scores.logsumexp(-1).unflatten(2, (T, Q))

    return attend


def kernel(call: Call, **options) -> Callable[..., Tensor]:
    return lambda *tensors: thought_attention(*tensors, **call.options | options)


def results(attend: Callable[..., Tensor], call: Call) -> list[Tensor]:
    """Output and five gradients."""
    leaves = [x.detach().requires_grad_() for x in call.tensors]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, call.d_out)]


def expected(call: Call) -> list[Tensor]:
    exact = call.to(F64)
    return results(lambda *x: dense(exact)(*x)[0], exact)


def size(x: Tensor) -> float:
    return max(1.0, x.abs().max().item()) if x.numel() else 1.0


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def close(actual: list[Tensor], exact: list[Tensor]) -> None:
    """Equal up to the dtype's tolerance, in units of the largest element where that is above 1.

    The tolerance is meant for D = 64. A softmax of one key cancels two sums over D, whose rounding grows with the root
    of D.
    """
    for name, a, e in zip(NAMES, actual, exact, strict=False):
        assert a.shape == e.shape, name
        # Two ways through bf16 may differ by the rounding of P and of the result, each half an epsilon on either side.
        unit = max(size(e), (a.shape[-1] / 64) ** 0.5)
        allowed = ABSOLUTE.get(a.dtype, 2 * torch.finfo(a.dtype).eps) * unit
        assert error(a, e) <= allowed, f"{name}: error {error(a, e):.2e}, allowed {allowed:.2e}"


def agree(call: Call, other: Callable[..., Tensor]) -> None:
    """`other`, a rearrangement around the kernel, has the output and the gradients of the plain call."""
    close(results(other, call), results(kernel(call), call))


# Values and gradients against the dense computation.


def check_without_gradients(call: Call, out: Tensor) -> None:
    """The output is `out` there too, to rounding; the log-sum-exp is a float32 at least, as accurate as one."""
    plain, lse = kernel(call, return_lse=True)(*call.tensors)
    close([plain], [out])
    exact = call.to(F64)
    exact_lse = dense(exact)(*exact.tensors)[1]
    assert lse.dtype == (F64 if call.d_out.dtype == F64 else F32)
    assert error(lse, exact_lse) <= ABSOLUTE[lse.dtype] * size(exact_lse)


@examples(60)
@given(calls(dtypes=[F64], T=(1, 2, 3, 7)))
def test_float64_equals_dense(call):
    actual = results(kernel(call), call)
    close(actual, expected(call))
    check_without_gradients(call, actual[0])


@examples(300)
@given(calls(dtypes=[F32], T=(1, 2, 3, 7, 19, 40), D=(8, 16, 24, 40, 64, 72, 128, 136, 256)))
def test_float32_equals_dense(call):
    actual = results(kernel(call), call)
    close(actual, expected(call))
    check_without_gradients(call, actual[0])


@examples(200)
@given(calls(dtypes=[BF16], T=(1, 2, 3, 7, 19, 40), D=(8, 16, 24, 40, 64, 72, 128, 136, 256)))
def test_bf16_errs_at_most_twice_as_much_as_torch(call):
    """FlashAttention's rule: against float64 on the same inputs, twice the error of torch's bf16 operations.

    One rounding of the result is allowed on top, since on a few elements torch may err by nothing at all.
    """
    actual, exact = results(kernel(call), call), expected(call)
    torchs = results(lambda *x: dense(call)(*x)[0], call)
    for name, a, t, e in zip(NAMES, actual, torchs, exact, strict=True):
        assert a.dtype == BF16
        allowed = 2 * error(t, e) + torch.finfo(BF16).eps / 2 * size(e)
        assert error(a, e) <= allowed, f"{name}: error {error(a, e):.2e}, allowed {allowed:.2e}"
    check_without_gradients(call, actual[0])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_plain_causal_attention(dtype):
    """With one step per position, and text i in its path, position i of a text is attended as everywhere else."""
    call = make(2, 6, 2, 70, 1, 1, 24, 70, dtype=dtype).set(text_limits=torch.arange(70).expand(2, 70))
    query, key, value = call.tensors[0][..., 0, :], *call.tensors[1:3]
    text = replace(call, tensors=(query, key, value), d_out=call.d_out[..., 0, :])
    actual = results(
        lambda q, k, v: kernel(call)(q[..., None, :], k, v, k[..., None, :], v[..., None, :])[..., 0, :], text
    )
    exact = results(lambda *x: scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), text.to(F64))
    close(actual, exact)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 2, 1, 3, 2, 2, 8, 4), {}),
        ((2, 2, 2, 2, 3, 2, 8, 3), {"window": 3, "padded": True}),
        ((1, 2, 1, 2, 3, 1, 8, 4), {"softcap": 0.8}),
        ((1, 4, 2, 2, 2, 1, 8, 5), {"softcap": 2.0, "window": 2, "padded": True, "limits": "rising"}),
        ((1, 1, 1, 2, 2, 2, 8, 0), {}),
    ],
)
def test_finite_differences(sizes, options):
    call = make(*sizes, dtype=F64, **options)
    tensors = [x.requires_grad_() for x in call.tensors if x.numel()]

    def attend(query, *rest):
        text = rest[:2] if len(rest) == 4 else call.tensors[1:3]
        return kernel(call)(query, *text, *rest[-2:])

    assert torch.autograd.gradcheck(attend, tensors)


# What may be asked of autograd.


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_the_log_sum_exp_has_no_gradient(dtype):
    call = make(2, 4, 2, 5, 3, 2, 16, 9, window=7, softcap=3.0, dtype=dtype)
    leaves = [x.requires_grad_() for x in call.tensors]
    out, lse = kernel(call, return_lse=True)(*leaves)
    assert out.requires_grad
    assert not lse.requires_grad
    gradients = torch.autograd.grad(out, leaves, call.d_out)
    close([out, *gradients], results(kernel(call), call))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_for_some_inputs(dtype):
    call = make(2, 4, 2, 5, 4, 3, 16, 9, window=8, softcap=3.0, padded=True, dtype=dtype)
    everything = results(kernel(call), call)[1:]
    for count in range(1, 5):
        for wanted in combinations(range(5), count):
            tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(call.tensors)]
            gradients = torch.autograd.grad(kernel(call)(*tensors), [tensors[i] for i in wanted], call.d_out)
            close(list(gradients), [everything[i] for i in wanted])


STRIDED = {
    "expanded scalar": lambda x: x.new_tensor(0.7).expand(x.shape),
    "expanded over D": lambda x: x[..., :1].expand(x.shape),
    "expanded over B": lambda x: x[:1].expand(x.shape),
    "D not contiguous": lambda x: x.transpose(0, 4).contiguous().transpose(0, 4),
    "H and T transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other element": lambda x: torch.stack([x, x * math.nan], -1)[..., 0],
    "at an odd offset": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", STRIDED)
def test_d_out_of_any_strides(layout, dtype):
    call = make(2, 4, 2, 5, 4, 3, 16, 9, window=8, dtype=dtype)
    strided = STRIDED[layout](call.d_out)
    given_strided, given_dense = (replace(call, d_out=d) for d in (strided, strided.contiguous()))
    close(results(kernel(call), given_strided), results(kernel(call), given_dense))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_of_strided_and_expanded_inputs(dtype):
    """Gradients land in one packed projection of text and paths, and sum over a text that is expanded over B."""
    B, H, G, T, P, D, S = 3, 4, 2, 5, 3, 16, 9
    call = make(B, H, G, T, P, P, D, S, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    packed = torch.randn(B, T * P, (H + 2 * G) * D, generator=g).to(dtype).requires_grad_()  # as a projection gives it
    text = torch.randn(1, S, 2 * G, D, generator=g).to(dtype).requires_grad_()

    def views(copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
        heads = packed.unflatten(2, (-1, D)).transpose(1, 2).unflatten(2, (T, P))
        of_text = text.transpose(1, 2).expand(B, -1, -1, -1)
        return [copy(x) for x in (heads[:, :H], *of_text.split(G, 1), *heads[:, H:].split(G, 1))]

    outputs = [kernel(call)(*views(copy)) for copy in (lambda x: x, lambda x: x.contiguous())]
    strided, copied = ([x.detach(), *torch.autograd.grad(x, [packed, text], call.d_out)] for x in outputs)
    close(strided, copied)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_inputs_are_left_alone(dtype):
    call = make(2, 4, 2, 5, 4, 3, 16, 9, window=8, softcap=3.0, padded=True, dtype=dtype)
    before = [x.clone() for x in (*call.tensors, call.d_out, call.options["text_limits"], call.options["text_start"])]
    results(kernel(call), call)
    after = (*call.tensors, call.d_out, call.options["text_limits"], call.options["text_start"])
    assert all(map(torch.equal, before, after))


# Invariances: the same attention asked for in another way.


@examples(40)
@given(calls(), st.integers(1, 70))
def test_left_padding_shifts_the_text(call, n):
    """What the padding holds does not matter, as long as it is finite."""
    B, _, G, *_, D, _ = call.sizes
    junk = torch.full((B, G, n, D), 1e18, dtype=call.d_out.dtype)
    start = 0 if call.options["text_start"] is None else call.options["text_start"]
    shifted = {"text_limits": call.options["text_limits"] + n, "text_start": torch.full((B,), n) + start}

    def padded(query, text_key, text_value, *path):
        return kernel(call, **shifted)(query, torch.cat([junk, text_key], 2), torch.cat([-junk, text_value], 2), *path)

    agree(call, padded)


@examples(40)
@given(calls(T=(2, 3, 7, 19)), st.data())
def test_positions_in_any_order_and_number_of_calls(call, data):
    order = torch.tensor(data.draw(st.permutations(range(call.sizes[3]))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(order) - 1), max_size=2)))
    limits = call.options["text_limits"]

    def in_parts(query, text_key, text_value, path_key, path_value):
        parts = [
            kernel(call, text_limits=limits[:, i])(
                query[:, :, i], text_key, text_value, path_key[:, :, i], path_value[:, :, i]
            )
            for i in (order[a:b] for a, b in pairwise([0, *cuts, len(order)]))
        ]
        return torch.cat(parts, 2)[:, :, order.argsort()]

    agree(call, in_parts)


@examples(40)
@given(calls(T=(2, 6, 12)), st.sampled_from([1, 2]))
def test_thoughts_folded_into_positions_or_sequences(call, N):
    """T = N x t positions over one text are N sequences of t positions that share the text."""
    B, _, _, T, *_ = call.sizes
    start = call.options["text_start"]
    options = {
        "text_limits": call.options["text_limits"].view(B * N, T // N),
        "text_start": None if start is None else start.repeat_interleave(N),
    }

    def unfold(x):
        return x.unflatten(2, (N, T // N)).transpose(1, 2).flatten(0, 1)

    def shared(x):
        return x[:, None].expand(-1, N, -1, -1, -1).flatten(0, 1)

    def as_sequences(query, text_key, text_value, *path):
        out = kernel(call, **options)(unfold(query), shared(text_key), shared(text_value), *map(unfold, path))
        return out.unflatten(0, (B, N)).transpose(1, 2).flatten(2, 3)

    agree(call, as_sequences)


@examples(40)
@given(calls())
def test_sequences_alone(call):
    def one_by_one(*tensors):
        of = lambda b: {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in call.options.items()}  # noqa: E731
        return torch.cat([kernel(call, **of(b))(*(x[b : b + 1] for x in tensors)) for b in range(len(tensors[0]))])

    agree(call, one_by_one)


@examples(40)
@given(calls())
def test_groups_share_what_repetition_repeats(call):
    group = call.sizes[1] // call.sizes[2]
    agree(call, lambda query, *kv: kernel(call)(query, *(x.repeat_interleave(group, 1) for x in kv)))


@examples(40)
@given(calls(), st.integers(0, 3))
def test_a_window_wider_than_everything(call, more):
    P, S = call.sizes[4], call.sizes[7]
    agree(call.set(window=None), kernel(call, window=S + P + more))


@examples(40)
@given(calls(), st.sampled_from([1e4, 1e5]))
def test_a_huge_softcap(call, cap):
    agree(call.set(softcap=None), kernel(call, softcap=cap))


@examples(40)
@given(calls(), st.sampled_from([8, 56, 72]))
def test_zeros_appended_to_the_heads(call, n):
    D = call.sizes[6]
    agree(call, lambda *tensors: kernel(call)(*(pad(x, (0, n)) for x in tensors))[..., :D])


@examples(40)
@given(calls())
def test_the_last_queries_of_a_path(call):
    """Q < P is Q = P with the first P-Q queries left out."""
    B, H, _, T, P, Q, D, _ = call.sizes
    first = torch.randn(B, H, T, P - Q, D, generator=torch.Generator().manual_seed(2)).to(call.d_out.dtype)
    agree(call, lambda query, *kv: kernel(call)(torch.cat([first, query], 3), *kv)[:, :, :, P - Q :])


@examples(40)
@given(calls())
def test_a_path_continues_the_text(call):
    """The path keys that every step sees may as well end the text, one sequence per position."""
    B, _, G, T, P, Q, _, S = call.sizes
    call = call.set(text_limits=torch.full((B, T), S))
    n = P - Q
    start = call.options["text_start"]
    options = {
        "text_limits": torch.full((B * T, 1), S + n),
        "text_start": None if start is None else start.repeat_interleave(T),
    }

    def alone(x):  # [B, H, T, P, D] -> [B*T, H, 1, P, D]
        return x.transpose(1, 2).flatten(0, 1)[:, :, None]

    def text(of_text, of_path):
        each = of_text[:, None].expand(-1, T, -1, -1, -1).flatten(0, 1)
        return torch.cat([each, alone(of_path[:, :, :, :n])[:, :, 0]], 2)

    def moved(query, text_key, text_value, path_key, path_value):
        texts = text(text_key, path_key), text(text_value, path_value)
        out = kernel(call, **options)(alone(query), *texts, *(alone(x[:, :, :, n:]) for x in (path_key, path_value)))
        return out[:, :, 0].unflatten(0, (B, T)).transpose(1, 2)

    agree(call, moved)


@examples(40)
@given(calls(S=(1, 5, 64, 131)))
def test_limits_of_zero_are_no_text(call):
    B, _, G, *_, D, _ = call.sizes
    empty = torch.empty(B, G, 0, D, dtype=call.d_out.dtype)
    zero = call.set(text_limits=torch.zeros_like(call.options["text_limits"]), text_start=None)

    def without_text(query, text_key, text_value, *path):
        return kernel(zero)(query, empty, empty, *path) + 0 * (text_key.sum() + text_value.sum())

    agree(zero, without_text)
    assert not any(d.any() for d in results(kernel(zero), zero)[2:4])


# Exact zeros: what is not seen has no gradient.


@examples(40)
@given(calls(dtypes=[F64, F32, BF16]))
def test_unseen_keys_have_no_gradient(call):
    B, _, _, T, P, _, _, S = call.sizes
    seen = sight(call).any(1)
    text, path = seen[:, None, :S], seen[:, None, S:].unflatten(2, (T, P))
    _, _, *gradients = results(kernel(call), call)
    for name, d, mask in zip(NAMES[2:], gradients, [text, text, path, path], strict=True):
        assert not d.masked_fill(mask[..., None], 0).any(), name
        if "value" in name:
            assert torch.equal(d.any(-1), mask.expand(d.shape[:-1])), f"{name}: zero at a seen key"


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("i", [0, 4, 12])
def test_positions_do_not_see_each_other(i, window, dtype):
    """The Jacobian of position i with respect to another position's query and path, and to text above it, is 0."""
    call = make(2, 4, 2, 13, 4, 3, 16, 20, limits="rising", window=window, dtype=dtype)
    only = torch.zeros_like(call.d_out)
    only[:, :, i] = call.d_out[:, :, i]
    _, d_query, *d_text, d_path_key, d_path_value = results(kernel(call), replace(call, d_out=only))
    for d in (d_query, d_path_key, d_path_value):
        assert d[:, :, i].any()
        assert not d[:, :, [j for j in range(13) if j != i]].any()
    above = torch.arange(20) >= call.options["text_limits"][:, i, None]
    assert not any(d.masked_fill(~above[:, None, :, None], 0).any() for d in d_text)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_step_has_no_gradient_from_earlier_steps(dtype):
    call = make(1, 4, 2, 5, 6, 6, 16, 9, dtype=dtype)
    for q in range(6):
        only = torch.zeros_like(call.d_out)
        only[:, :, :, q] = call.d_out[:, :, :, q]
        d_query, *_, d_path_key, d_path_value = results(kernel(call), replace(call, d_out=only))[1:]
        assert not any(d[:, :, :, q + 1 :].any() for d in (d_query, d_path_key, d_path_value))
        assert not d_query[:, :, :, :q].any()


# The same bits.


def check_bits(call: Call) -> None:
    """Neither the number of threads nor a repeat changes a bit."""
    once = [*results(kernel(call), call), kernel(call)(*call.tensors)]
    try:
        for count in (2, 3, 1):
            torch.set_num_threads(count)
            again = [*results(kernel(call), call), kernel(call)(*call.tensors)]
            for name, a, b in zip([*NAMES, "output without gradients"], once, again, strict=True):
                assert torch.equal(a, b), f"{name} with {count} threads"
    finally:
        torch.set_num_threads(1)


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 4, 2, 60, 4, 4, 64, 60), {"padded": True}),
        ((1, 1, 1, 300, 8, 8, 64, 300), {"limits": "rising"}),  # one head: its rows and keys must be split
        ((1, 3, 1, 130, 5, 5, 40, 257), {"window": 50, "softcap": 5.0}),  # a group, and more heads than threads
        ((1, 8, 1, 1, 2, 1, 128, 2000), {"limits": "all"}),  # cached generation
        ((3, 2, 2, 2, 90, 70, 24, 3), {}),
    ],
)
def test_the_same_bits_at_sizes_worth_sharing_out(sizes, options, dtype):
    check_bits(make(*sizes, dtype=dtype, **options))


@needs_native
@examples(40)
@given(calls())
def test_the_same_bits(call):
    check_bits(call)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_second_backward_gives_the_same_bits(dtype):
    call = make(2, 4, 2, 30, 4, 4, 64, 60, dtype=dtype)
    leaves = [x.requires_grad_() for x in call.tensors]
    out = kernel(call)(*leaves)
    first, second = (torch.autograd.grad(out, leaves, call.d_out, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


# Large scores, one key that takes it all, NaN.


def check_at_large_scores(call: Call) -> None:
    """A score or log-sum-exp of size M has an error of M * eps / 2, which a query's gradient multiplies by the keys."""
    exact = call.to(F64)
    largest = dense(exact)(*exact.tensors)[1].abs().max().item()
    assert largest > 30
    factors = {"d query": size(call.tensors[1]), "d text_key": size(call.tensors[0])}
    for name, a, e in zip(NAMES, results(kernel(call), call), expected(call), strict=True):
        allowed = 4 * largest * torch.finfo(F32).eps * max(size(e), factors.get(name, 1))
        assert error(a, e) <= allowed, f"{name}: error {error(a, e):.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("order", ["rising", "falling", "any"])
def test_large_scores_in_any_order_of_keys(order, softcap):
    """Scores of several hundred that rise or fall along the text: no rescaling of a running sum may overflow."""
    call = make(1, 2, 1, 9, 4, 4, 16, 200, limits="all", softcap=softcap)
    query, text_key, *rest = call.tensors
    ramp = {"rising": torch.linspace(-1, 1, 200), "falling": torch.linspace(1, -1, 200)}.get(order)
    if ramp is None:
        text_key = text_key * 100
    else:
        query = query.abs() + 0.5
        text_key = 50 * ramp[None, None, :, None] * torch.ones_like(text_key)
    check_at_large_scores(replace(call, tensors=(query, text_key, *rest)))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("where", ["text", "own path"])
def test_one_key_takes_it_all(where, dtype):
    """Every other probability is e**-400: the output is that key's value, whose gradient is that of the output."""
    call = make(2, 4, 2, 5, 3, 2, 16, 80, limits="all", dtype=dtype)
    query, text_key, text_value, path_key, path_value = (x.clone() for x in call.tensors)
    query[..., 0] = 40
    text_key[..., 0] = path_key[..., 0] = 0
    (text_key[:, :, 70] if where == "text" else path_key[:, :, :, 1])[..., 0] = 40  # a score of 400 above the others
    call = replace(call, tensors=(query, text_key, text_value, path_key, path_value))
    out, d_query, d_text_key, d_text_value, d_path_key, d_path_value = results(kernel(call), call)
    taken = text_value[:, :, None, None, 70] if where == "text" else path_value[:, :, :, None, 1]
    close([out], [taken.repeat_interleave(2, 1).expand(out.shape)])
    total = call.d_out.double().unflatten(1, (2, 2)).sum((2, 4))  # over the group and the steps: [B, G, T, D]
    actual, elsewhere = (d_text_value, d_path_value) if where == "text" else (d_path_value, d_text_value)
    assert elsewhere.abs().max() <= 1e-36
    if where == "text":
        actual, total = actual[:, :, 70], total.sum(2)
    else:
        actual = actual[:, :, :, 1]
    close([actual], [total])
    # The softmax is flat: nothing but rounding is left, which a query or key of 40 enlarges.
    for d in (d_query, d_text_key, d_path_key):
        assert d.abs().max() <= 40 * 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_saturated_softcap_has_no_gradient(dtype):
    call = make(1, 4, 2, 5, 3, 3, 16, 9, softcap=2.0, dtype=dtype)
    query, *rest = call.tensors
    _, d_query, d_text_key, d_text_value, d_path_key, _ = results(
        kernel(call), replace(call, tensors=(query * 1e9, *rest))
    )
    assert not any(d.any() for d in (d_query, d_text_key, d_path_key))
    assert d_text_value.any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_in_a_value_stays_in_its_column(dtype):
    """It reaches column d of every row that sees the key, no other column, group or sequence, no other path."""
    call = make(2, 4, 2, 5, 3, 3, 16, 80, dtype=dtype).set(text_limits=torch.tensor([[7, 80, 3, 60, 30]] * 2))
    text_value, path_value = call.tensors[2].clone(), call.tensors[4].clone()
    text_value[0, 1, 20, 3] = path_value[1, 0, 2, 1, 5] = math.nan
    found = kernel(call)(*call.tensors[:2], text_value, call.tensors[3], path_value).isnan()
    assert found[0, 2:, [1, 3, 4], :, 3].all()
    assert found[1, :2, 2, 1:, 5].all()
    found[0, 2:, ..., 3] = found[1, :2, 2, :, 5] = False
    assert not found.any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_in_d_out_stays_with_its_row(dtype):
    """It reaches that row's query and all keys it sees, no other query, path, group or sequence."""
    call = make(2, 4, 2, 5, 4, 3, 16, 80, dtype=dtype).set(text_limits=torch.tensor([[7, 80, 3, 60, 30]] * 2))
    d_out = call.d_out.clone()
    d_out[1, 2, 3, 1, 5] = math.nan  # sequence 1, group 1, position 3, path step 4-3+1 = 2, column 5
    out, *gradients = results(kernel(call), replace(call, d_out=d_out))
    assert out.isfinite().all()
    d_query, d_text_key, d_text_value, d_path_key, d_path_value = (d.isnan() for d in gradients)
    assert d_query[1, 2, 3, 1].all()
    assert d_text_key[1, 1, :60].all()
    assert d_text_value[1, 1, :60, 5].all()
    assert d_path_key[1, 1, 3, :3].all()
    assert d_path_value[1, 1, 3, :3, 5].all()
    d_query[1, 2, 3, 1] = d_text_key[1, 1] = d_text_value[1, 1, :, 5] = False
    d_path_key[1, 1, 3] = d_path_value[1, 1, 3, :, 5] = False
    for name, d in zip(NAMES[1:], (d_query, d_text_key, d_text_value, d_path_key, d_path_value), strict=True):
        assert not d.any(), name


@needs_native
def test_keys_out_of_sight_may_hold_nan_under_gradients():
    call = make(1, 2, 1, 4, 2, 2, 16, 300, window=6).set(text_limits=torch.tensor([[220, 221, 222, 223]]))
    exact = expected(call)
    unseen = ~sight(call).any(1)[0, :300]
    text_key, text_value = (x.clone() for x in call.tensors[1:3])
    text_key[:, :, unseen] = text_value[:, :, unseen] = math.nan
    query, _, _, *path = call.tensors
    close(results(kernel(call), replace(call, tensors=(query, text_key, text_value, *path))), exact)


# torch.compile, registration, memory.


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled_equals_eager(dtype):
    call = make(2, 4, 2, 5, 4, 3, 16, 20, window=9, softcap=3.0, padded=True, dtype=dtype)

    def between_other_operations(*tensors):
        out, lse = kernel(call, return_lse=True)(*(1.5 * x for x in tensors))
        return out.sigmoid() + lse[..., None].to(dtype)

    compiled = torch.compile(between_other_operations, fullgraph=True, backend="aot_eager")
    close(results(compiled, call), results(between_other_operations, call))


class Operators(TorchDispatchMode):
    """Remembers the calls of pyquiet's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyquiet":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operators_of_a_compiled_step(call: Call) -> dict[str, tuple]:
    """By name, pyquiet's operators that a compiled forward and backward pass runs, and their arguments."""
    operators = Operators()

    def recorded(graph, _):
        def run(*args):
            with operators:
                return graph(*args)

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=recorded, bw_compiler=recorded)
    results(torch.compile(kernel(call), fullgraph=True, backend=backend), call)
    return {func.name().split(".")[0]: (func, args, kwargs) for func, args, kwargs in operators.calls}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", [{}, {"window": 4, "softcap": 3.0, "padded": True}])
def test_every_operator_passes_opcheck(dtype, options):
    ran = operators_of_a_compiled_step(make(2, 4, 2, 3, 3, 2, 16, 5, dtype=dtype, **options))
    assert set(ran) == {"pyquiet::thought_attention", "pyquiet::thought_attention_backward"}
    for name, (func, args, kwargs) in ran.items():
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        if not name.endswith("backward"):
            args = [x.requires_grad_() if isinstance(x, Tensor) and x.dtype == dtype else x for x in args]
        torch.library.opcheck(func, tuple(args), kwargs)


def training_step(T: int) -> tuple[Call, int, int]:
    """A call with T positions in T text tokens, its largest allocation in bytes, the elements kept for the backward."""
    call = make(1, 2, 1, T, 3, 3, 8, T, limits="rising")
    kept = {}
    leaves = [x.requires_grad_() for x in call.tensors]

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = kernel(call)(*leaves)
        torch.autograd.grad(out, leaves, call.d_out)

    _, largest = allocations(run)
    return call, largest, sum(kept.values())


@needs_native
def test_no_tensor_of_scores_in_training():
    T = 512
    call, largest, kept = training_step(T)
    assert largest < 4 * T * T  # one head's scores of one step
    assert kept <= 2 * sum(x.numel() for x in (*call.tensors, call.d_out))  # the inputs, the output, its log-sum-exp


@needs_native
def test_what_is_kept_for_the_backward_pass_is_linear_in_the_text():
    assert training_step(512)[2] <= 2.1 * training_step(256)[2]
