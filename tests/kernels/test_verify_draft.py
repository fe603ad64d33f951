"""Draft verification: reference and native kernel against loops written from the spec, and the contract's corners."""

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from pyquiet import native
from pyquiet.kernels import Verification, draft_verification, verify_draft
from pyquiet.randomness import Purpose, Stream, draw, gumbel_noise, uniforms

from ..allocations import allocations

needs_native = pytest.mark.skipif(native.cpu is None, reason="the native module is not built")
SEED = 11


def law_by_loops(row, temperature=1.0, top_k=None, top_p=None, banned=None):
    """Probabilities of one row [V], one id at a time."""
    scores = [-math.inf if banned is not None and banned[v] else float(x) for v, x in enumerate(row)]
    if temperature == 0:
        best = max(range(len(scores)), key=lambda v: (scores[v], -v))
        return [float(v == best) for v in range(len(scores))]
    scores = [x / temperature for x in scores]
    if top_k is not None:
        least = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores = [x if x >= least else -math.inf for x in scores]
    top = max(scores)
    weights = [math.exp(x - top) for x in scores]
    if top_p is not None:
        mass, total = 0.0, math.fsum(weights)
        for least in sorted(weights, reverse=True):
            mass += least
            if mass >= top_p * total:
                break
        weights = [w if w >= least else 0.0 for w in weights]
    return [w / math.fsum(weights) for w in weights]


def invert_by_loops(weights, u):
    target, total = u * math.fsum(weights), 0.0
    for v, w in enumerate(weights):
        total += w
        if total > target:
            return v
    raise AssertionError


def verify_by_loops(q, p, d, seed=SEED, lengths=None, first_is_exact=False, coupling="rejection",
                    draft_temperature=None, draft_lse=None, temperature=1.0, **keep):  # fmt: skip
    """(tokens, accepted, bonus, log-probs) of each sequence, as lists."""
    results = []
    for b in range(len(d)):
        length = d.shape[1] if lengths is None else int(lengths[b])
        tokens, log_probs, accepted, bonus = [], [], 0, False

        def u(purpose, j):
            return uniforms(Stream(seed, purpose, sequence=b, position=5 + j), 1).item()  # noqa: B023

        for j in range(length + (q.shape[1] > d.shape[1])):
            law = law_by_loops(q[b, j], temperature, **keep)
            draft = int(d[b, j]) if j < length else None
            if j == 0 and first_is_exact and draft is not None:
                token = draft
            elif coupling == "gumbel" or temperature == 0:
                noise = gumbel_noise(Stream(seed, sequence=b, position=5 + j), 1, q.shape[2])[0].tolist()
                scores = [math.log(x) + n if x else -math.inf for x, n in zip(law, noise, strict=True)]
                token = max(range(len(law)), key=lambda v: scores[v]) if temperature else law.index(1.0)
            elif draft is None:
                token = invert_by_loops(law, u(Purpose.BONUS, j))
            else:
                own = law_by_loops(p[b, j], temperature if draft_temperature is None else draft_temperature, **keep)
                token = draft
                if not u(Purpose.ACCEPT, j) * own[draft] < law[draft]:
                    residual = [max(x - y, 0.0) for x, y in zip(law, own, strict=True)]
                    token = invert_by_loops(residual, u(Purpose.RESIDUAL, j))
            tokens.append(token)
            log_probs.append(0.0 if temperature == 0 else math.log(law[token]))
            bonus = draft is None
            if token != draft:
                break
            accepted += 1
        results.append((tokens, accepted, bonus, log_probs))
    return results


def problem(B=3, k=3, V=9, rows=None, spread=1.0, seed=0, scale=1.5, **options):
    """Target and draft logits, float32, drafts drawn from the latter, and the options of a call."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, k + 1 if rows is None else rows, V, generator=g) * scale
    p = q[:, :k] + spread * torch.randn(B, k, V, generator=g)
    if options.get("first_is_exact"):
        p[:, :1] = q[:, :1]
    coupling, T = options.get("coupling", "rejection"), options.get("temperature", 1.0)
    own = {name: options[name] for name in ("top_k", "top_p", "banned") if name in options}
    own["temperature"] = options.get("draft_temperature", T)
    drawn = [
        draw(p[:, j], stream=Stream(SEED, Purpose.DRAFT, position=5 + j), coupling=coupling, **own) for j in range(k)
    ]
    d = torch.stack([x.tokens for x in drawn], 1) if k else torch.empty(B, 0, dtype=torch.int64)
    if options.pop("give_lse", False):
        options["draft_lse"] = torch.stack([x.lse for x in drawn], 1)
    return q, p, d, options


BANNED = torch.arange(9) % 4 == 1
CALLS = {
    "plain": {},
    "far": {"spread": 4.0},
    "no bonus": {"rows": 3},
    "lse": {"give_lse": True},
    "temperature": {"temperature": 0.7},
    "two temperatures": {"temperature": 1.4, "draft_temperature": 0.6},
    "greedy": {"temperature": 0, "spread": 0.3},
    "greedy draft": {"draft_temperature": 0},
    "greedy target": {"temperature": 0, "draft_temperature": 1.0},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "banned": {"banned": BANNED},
    "all": {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "banned": BANNED, "give_lse": True},
    "lengths": {"lengths": torch.tensor([2, 0, 3, 1] * 3)},
    "exact first": {"first_is_exact": True},
    "exact first, lengths": {"first_is_exact": True, "lengths": torch.tensor([0, 1, 2, 3] * 3), "rows": 3},
    "gumbel": {"coupling": "gumbel", "spread": 0.3},
    "gumbel, all": {"coupling": "gumbel", "spread": 0.3, "temperature": 0.8, "top_p": 0.9, "banned": BANNED},
    "steep": {"scale": 70.0, "spread": 0.5, "V": 300},
    "no drafts": {"k": 0},
    "one draft": {"k": 1},
    "one id": {"V": 1},
    "many ids": {"V": 4500, "B": 2, "top_k": 3000, "top_p": 0.99},
}


def call(q: Tensor, p: Tensor | None, d: Tensor, options: dict, **more) -> Verification:
    return verify_draft(q, p, d, stream=Stream(SEED, position=5), **(options | more))


def compare(actual: Verification, expected: list, atol: float) -> None:
    k = actual.tokens.shape[1] - 1
    for b, (tokens, accepted, bonus, log_probs) in enumerate(expected):
        padding = k + 1 - len(tokens)
        assert actual.tokens[b].tolist() == tokens + [-1] * padding
        assert (actual.count[b], actual.accepted[b], actual.bonus[b]) == (len(tokens), accepted, bonus)
        torch.testing.assert_close(
            actual.log_probs[b].double(),
            torch.tensor(log_probs + [0.0] * padding, dtype=torch.float64),
            rtol=0,
            atol=atol,
        )


def check(dtype: torch.dtype, name: str, deterministic: bool = False) -> Verification:
    q, p, d, options = problem(**({"B": 12} | CALLS[name]))
    if dtype == torch.float64:
        options["draft_lse"] = options["draft_lse"].double() if "draft_lse" in options else None
    q, p = q.to(dtype), p.to(dtype)
    actual = call(q, p, d, options, deterministic=deterministic)
    compare(actual, verify_by_loops(q.double(), p.double(), d, **options), 1e-12 if dtype == torch.float64 else 3e-6)
    return actual


@pytest.mark.parametrize("name", CALLS)
def test_reference_equals_loops(name):
    assert check(torch.float64, name).log_probs.dtype == torch.float64


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_kernel_equals_loops(dtype, name, deterministic):
    assert check(dtype, name, deterministic).log_probs.dtype == torch.float32


LONG = {
    "one sequence": {"B": 1, "k": 5, "V": 33_001},
    "top-p": {"B": 1, "k": 2, "V": 33_001, "top_p": 0.9, "spread": 0.2},
    "many": {"B": 20, "k": 2, "V": 3000, "temperature": 0.9, "top_k": 40},
    "gumbel": {"B": 1, "k": 3, "V": 20_000, "coupling": "gumbel", "spread": 0.3},
}


def long_tokens(deterministic: bool) -> list:
    """What the long problems give: everything, so that bits can be compared."""
    everything = []
    for options in LONG.values():
        q, p, d, rest = problem(**options)
        everything.append([x.tolist() for x in vars(call(q, p, d, rest, deterministic=deterministic)).values()])
    return everything


@needs_native
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_thread_count_changes_no_bit(deterministic):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = long_tokens(deterministic)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert long_tokens(deterministic) == expected
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.slow
def test_every_instruction_set_gives_the_same_tokens():
    """Each level passes the checks against loops; in the deterministic mode all return the same tokens."""
    code = """
import torch
from tests.kernels import test_verify_draft as t
for name in list(t.CALLS)[:-1]:
    t.check(torch.float32, name), t.check(torch.bfloat16, name, True)
t.test_gumbel_noise_is_that_of_the_reference()
print([one[:3] for one in t.long_tokens(True)])"""
    root, outputs = Path(__file__).parents[2], set()
    for level in native.cpu.supported_isas():
        env = {**os.environ, "PYQUIET_ISA": level}
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, f"{level}: {done.stderr[-2000:]}"
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_gumbel_noise_is_that_of_the_reference():
    """With flat logits the winner is the largest noise; over many draws, near ties would show an address gone wrong."""
    for V in (2, 7, 64, 4099):
        stream = Stream(3, sequence=torch.arange(50) * 9, position=2, step=4, index=5)
        noise = gumbel_noise(stream, 50, V)
        drawn = draw(torch.zeros(50, V), stream=stream, coupling="gumbel")
        assert torch.equal(drawn.tokens, noise.argmax(-1))


def test_gumbel_verification_equals_sequential_draws():
    q, p, d, options = problem(B=40, k=4, V=50, spread=0.4, coupling="gumbel", temperature=0.8, top_p=0.95)
    result = call(q, None, d, options)
    assert 0 < result.accepted.float().mean() < 4
    for j in range(5):
        stream = Stream(SEED, position=5 + j)
        one_by_one = draw(q[:, j], stream=stream, coupling="gumbel", temperature=0.8, top_p=0.95)
        here = result.count > j
        assert torch.equal(result.tokens[here, j], one_by_one.tokens[here])
        torch.testing.assert_close(result.log_probs[here, j], one_by_one.log_probs[here])


@pytest.mark.parametrize("deterministic", [False, True])
def test_equal_laws_accept_everything(deterministic):
    q = torch.randn(2000, 4, 7, generator=torch.Generator().manual_seed(0))
    d = torch.randint(0, 7, (2000, 3), generator=torch.Generator().manual_seed(1))
    result = call(q, q[:, :3], d, {}, deterministic=deterministic)
    assert (result.accepted == 3).all()
    assert result.bonus.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deterministic", [False, True])
def test_without_a_residual_the_replacement_is_the_targets(dtype, deterministic):
    """Rows that are equal, but a log-sum-exp that makes every draft look too likely: rejected, and nothing is left."""
    q = torch.randn(50, 1, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    lse = torch.full((50, 1), -60.0, dtype=dtype)
    result = call(q, q, torch.zeros(50, 1, dtype=torch.int64), {"draft_lse": lse}, deterministic=deterministic)
    if deterministic and dtype == torch.float32:  # which has its own
        assert (result.accepted == 1).all()
        return
    assert (result.accepted == 0).all()
    stream = Stream(SEED, Purpose.RESIDUAL, position=5)
    assert torch.equal(result.tokens[:, 0], draw(q[:, 0], stream=stream).tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_draft_of_no_mass(dtype, deterministic):
    """Its own law gives the draft 0: accepted where the target gives it anything, else rejected."""
    q = torch.tensor([[0.0, 1.0, 2.0], [0.0, -math.inf, 2.0]], dtype=dtype)[:, None].repeat_interleave(200, 0)
    p = torch.tensor([[0.0, -math.inf, 0.0]], dtype=dtype).expand(400, 1, 3)
    result = call(q, p, torch.ones(400, 1, dtype=torch.int64), {}, deterministic=deterministic)
    assert (result.accepted[:200] == 1).all()
    assert (result.accepted[200:] == 0).all()
    assert (result.tokens[200:, 0] == 2).all()  # all that q has more of than p


def test_ties_at_the_top_k_are_kept():
    row = torch.tensor([1.0, 0.0, 1.0, -1.0, 1.0, 0.5])
    result = call(row.expand(3000, 1, 6), None, torch.empty(3000, 0, dtype=torch.int64), {"top_k": 2})
    assert set(result.tokens.flatten().tolist()) == {0, 2, 4}
    torch.testing.assert_close(result.log_probs, torch.full((3000, 1), -math.log(3)))


def test_strided_and_expanded_rows_enter_as_they_are():
    q, p, d, options = problem(B=4, k=2, V=40)
    expected = call(q, p, d, options)
    wide = torch.zeros(4, 7, 100)
    wide[:, 1:7:2, 5:45] = q
    narrow = torch.zeros(2, 4, 41)
    narrow[..., 1:] = p.transpose(0, 1)
    views = wide[:, 1:7:2, 5:45], narrow[..., 1:].transpose(0, 1), torch.stack([d, d], -1)[..., 0]
    for a, b in zip(vars(expected).values(), vars(call(*views, options)).values(), strict=True):
        assert torch.equal(a, b)
    shared = call(q[:1].expand(4, -1, -1), p[:1].expand(4, -1, -1), d, options)
    for b in range(4):
        stream = Stream(SEED, sequence=b, position=5)
        alone = verify_draft(q[:1], p[:1], d[b : b + 1], stream=stream)
        assert torch.equal(alone.tokens[0], shared.tokens[b])


def test_tensors_in_the_stream_address_the_rows():
    q, p, d, options = problem(B=4, k=2, V=40)
    ids, places, steps, index = torch.tensor([9, 2, 2, 4]), torch.tensor([0, 7, 8, 1]), torch.tensor([3]), 6
    whole = verify_draft(q, p, d, stream=Stream(-1, None, ids, places, steps, index))
    for b in range(4):
        stream = Stream(2**64 - 1, Purpose.ANSWER, int(ids[b]), int(places[b]), 3, 6)
        alone = verify_draft(q[b : b + 1], p[b : b + 1], d[b : b + 1], stream=stream)
        assert torch.equal(alone.tokens[0], whole.tokens[b])
        exact = verify_draft(q[b : b + 1].double(), p[b : b + 1].double(), d[b : b + 1], stream=stream)
        assert torch.equal(exact.tokens[0], whole.tokens[b])


FAULTS = {
    "nan": (math.nan, r"target_logits\[1, 0\] holds nan"),
    "inf": (math.inf, r"target_logits\[1, 0\] holds inf"),
    "nothing": (-math.inf, r"target_logits\[1, 0\] has no id left"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"coupling": "gumbel"}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_are_no_law_are_named(dtype, options, fault):
    q, p, d, _ = problem(B=2, k=2, V=70)
    value, message = FAULTS[fault]
    q[1, 0] = value if fault == "nothing" else q[1, 0]
    q[1, 0, 3] = value
    with pytest.raises(ValueError, match=message):
        call(q.to(dtype), p.to(dtype), d, options)
    if fault != "nothing":  # what is banned is not looked at
        call(q.to(dtype), p.to(dtype), d * 0, options | {"banned": torch.arange(70) == 3})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [False, True])
def test_draft_rows_that_are_no_law_are_named(dtype, given):
    q, p, d, options = problem(B=2, k=2, V=70, give_lse=given)
    p[1, 0, 3] = math.nan
    d[1, 0], q[1, 0, 4] = 4, -math.inf
    d[1, 0] = 4  # rejected, so the row is read in any case
    if given:
        options["draft_lse"] = options["draft_lse"].to(dtype)
    with pytest.raises(ValueError, match=r"draft_logits\[1, 0\] holds nan"):
        call(q.to(dtype), p.to(dtype), d, options)
    if given:
        options["draft_lse"][0, 0] = math.nan
        with pytest.raises(ValueError, match="draft_lse or draft_logits of sequence 0 holds NaN, in row 0"):
            call(q.to(dtype), p.to(dtype), d, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_after_a_rejection_are_not_looked_at(dtype):
    q, p, d, options = problem(B=1, k=2, V=30)
    q[0, 0, d[0, 0]] = -math.inf
    q[0, 1:], p[0, 1:] = math.nan, math.nan
    assert call(q.to(dtype), p.to(dtype), d, options).count.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_logits": torch.zeros(2, 5, 9)}, ValueError, r"target_logits must be \[2, 4 or 3, V\] for 3 drafts"),
        ({"target_logits": torch.zeros(3, 4, 9)}, ValueError, r"target_logits must be \[2, 4 or 3, V\]"),
        ({"target_logits": torch.zeros(2, 4, 0)}, ValueError, "1 <= V <= 2"),
        ({"target_logits": torch.zeros(2, 4, 9, dtype=torch.int64)}, TypeError, "target_logits must be floating"),
        ({"target_logits": [[[0.0]]]}, TypeError, "target_logits must be a tensor, got list"),
        ({"target_logits": torch.zeros(2, 9, 4).mT}, ValueError, "target_logits has stride 4 .*contiguous"),
        ({"draft_logits": [0.0]}, TypeError, "draft_logits must be a tensor, got list"),
        ({"draft_logits": torch.zeros(2, 3, 8)}, ValueError, r"draft_logits must have shape \[2, 3, 9\]"),
        ({"draft_logits": torch.zeros(2, 3, 9).double()}, TypeError, "draft_logits must have dtype torch.float32"),
        ({"draft_logits": None}, ValueError, "draft_logits is None, but coupling 'rejection'"),
        ({"draft_tokens": torch.zeros(2, 3).int()}, TypeError, "draft_tokens must have dtype torch.int64"),
        ({"draft_tokens": torch.full((2, 3), 9)}, ValueError, "draft_tokens must lie in 0..V-1=8, got .* 9 to 9"),
        ({"draft_tokens": torch.full((2, 3), -1)}, ValueError, "draft_tokens must lie in 0..V-1=8"),
        ({"draft_lse": torch.zeros(2, 2)}, ValueError, r"draft_lse must have shape \[2, 3\]"),
        ({"draft_lse": torch.zeros(2, 3).double()}, TypeError, "draft_lse must have dtype torch.float32"),
        ({"lengths": torch.tensor([4, 0])}, ValueError, "lengths must lie in 0..k=3, got values from 0 to 4"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths must have shape \[2\]"),
        ({"banned": [False] * 9}, TypeError, "banned must be a tensor, got list"),
        ({"banned": torch.zeros(9)}, ValueError, "banned must be bool"),
        ({"banned": torch.ones(9, dtype=torch.bool)}, ValueError, r"target_logits\[0, 0\] has no id left"),
        ({"temperature": -1.0}, ValueError, "^temperature must be 0"),
        ({"draft_temperature": math.nan}, ValueError, "draft_temperature must be 0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 1.5}, ValueError, "top_p must be in"),
        ({"coupling": "none"}, ValueError, "coupling must be one of .*got 'none'"),
        ({"stream": Stream(0, sequence=torch.arange(3))}, ValueError, r"stream.sequence must have shape \[2\]"),
        ({"stream": Stream(0, position=2**32 - 3)}, ValueError, "stream.position"),
        ({"stream": Stream(0, position=torch.tensor([2**32]))}, ValueError, r"stream.position must be in \[0, "),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_that_break_the_contract_are_named(change, error, message, dtype):
    arguments = {
        "target_logits": torch.zeros(2, 4, 9),
        "draft_logits": torch.zeros(2, 3, 9),
        "draft_tokens": torch.zeros(2, 3, dtype=torch.int64),
        "stream": Stream(0),
    }
    if dtype == torch.float64:
        lower = {"draft_logits": torch.float64, "draft_lse": torch.float64}
        if any(name in change and getattr(change[name], "dtype", None) == kind for name, kind in lower.items()):
            pytest.skip("right in float64")
        arguments["target_logits"] = arguments["target_logits"].double()
        arguments["draft_logits"] = arguments["draft_logits"].double()
        change = {n: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 and n != "banned" else x
                  for n, x in change.items()}  # fmt: skip
    with pytest.raises(error, match=message):
        verify_draft(**(arguments | change))


def test_drafts_beyond_the_length_are_not_looked_at():
    q, p, d, _ = problem(B=2, k=3)
    lengths = torch.tensor([1, 2])
    expected = call(q, p, d, {"lengths": lengths})
    d[0, 1:], d[1, 2:] = -7, 99
    q[0, 2:], q[1, 3:], p[0, 1:] = math.nan, math.nan, math.nan
    assert torch.equal(call(q, p, d, {"lengths": lengths}).tokens, expected.tokens)


def test_the_first_draft_is_accepted_as_a_rule():
    """Also where another number of rows has made its logits differ in the last bits, or where chance would reject."""
    q, p, d, _ = problem(B=50, k=2, spread=5.0)
    assert (call(q, p, d, {"first_is_exact": True}).accepted >= 1).all()
    assert not (call(q, p, d, {}).accepted >= 1).all()


def test_compiles_to_one_graph_and_passes_opcheck():
    q, p, d, options = problem(B=2, k=2, V=20, give_lse=True, top_k=7)
    expected = call(q, p, d, options)
    compiled = torch.compile(lambda q, p, d: call(q, p, d, options), fullgraph=True, backend="aot_eager")
    for a, b in zip(vars(expected).values(), vars(compiled(q, p, d)).values(), strict=True):
        assert torch.equal(a, b)
    kernel = draft_verification._kernel
    with patch.object(draft_verification, "_kernel", wraps=kernel) as seen:
        call(q, p, d, options)
    (arguments,) = seen.call_args.args
    torch.library.opcheck(kernel.op, tuple(arguments))


def test_meta_tensors_give_shapes():
    q, p = torch.empty(2, 4, 9, device="meta"), torch.empty(2, 3, 9, device="meta")
    result = call(q, p, torch.empty(2, 3, dtype=torch.int64, device="meta"), {})
    assert [tuple(x.shape) for x in vars(result).values()] == [(2, 4), (2,), (2,), (2, 4), (2,)]


@needs_native
def test_no_tensor_is_as_large_as_a_row():
    q, p, d, options = problem(B=4, k=4, V=20_000, top_p=0.9, temperature=0.7)
    peak, largest = allocations(lambda: call(q, p, d, options))
    assert peak < 4096
    assert largest < 1024
