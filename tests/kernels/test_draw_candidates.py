"""Draws of candidates: reference and native kernel against loops written from the spec, and the contract's corners."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyquiet import native
from pyquiet.kernels import Candidates, draw_candidates, draw_candidates_from_hidden, importance_resampling
from pyquiet.randomness import Purpose, Stream, draw, uniforms

from ..allocations import allocations
from .test_verify_draft import invert_by_loops, law_by_loops

needs_native = pytest.mark.skipif(native.cpu is None, reason="the native module is not built")
SEED = 17
STREAM = Stream(SEED, position=5, step=2, index=3)


def by_loops(logits, k, temperature=1.0, banned=None, **keep):
    """(tokens, log_probs, log_base, lse) of each row, as lists."""
    results = []
    for r, row in enumerate(logits):
        law = law_by_loops(row, temperature, banned=banned, **keep)
        left = [x for v, x in enumerate(row.tolist()) if banned is None or not banned[v]]
        lse = max(left) + math.log(math.fsum(math.exp(x - max(left)) for x in left))
        tokens = []
        for j in range(k):
            u = uniforms(Stream(SEED, Purpose.CANDIDATE, r, 5, 2, 3 + j), 1).item()
            tokens.append(invert_by_loops(law, u))
        results.append((tokens, [math.log(law[v]) for v in tokens], [float(row[v]) - lse for v in tokens], lse))
    return results


def rows(R=4, V=19, seed=0, scale=2.0):
    return scale * torch.randn(R, V, generator=torch.Generator().manual_seed(seed))


BANNED = torch.arange(19) % 4 == 1
CALLS = {
    "plain": {},
    "banned": {"banned": BANNED},
    "temperature": {"temperature": 0.7},
    "hot, banned": {"temperature": 1.6, "banned": BANNED},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "greedy": {"temperature": 0},
    "greedy, banned": {"temperature": 0, "banned": BANNED, "top_k": 3},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "banned": BANNED},
}


def check(dtype, options, deterministic=False):
    logits = rows().to(dtype)
    actual = draw_candidates(logits, 6, stream=STREAM, deterministic=deterministic, **options)
    tokens, log_probs, log_base, lse = zip(*by_loops(logits.double(), 6, **options), strict=True)
    assert actual.tokens.tolist() == list(tokens)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for x, y in zip((actual.log_probs, actual.log_base, actual.lse), (log_probs, log_base, lse), strict=True):
        torch.testing.assert_close(x.double(), torch.tensor(y, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_candidates_are_those_of_loops(dtype, options):
    check(dtype, options)
    check(dtype, options, deterministic=True)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_candidate_j_is_the_draw_at_the_next_index_but_j(dtype, options):
    logits = rows(R=40).to(dtype)
    candidates = draw_candidates(logits, 5, stream=STREAM, **options)
    for j in range(5):
        drawn = draw(logits, stream=Stream(SEED, Purpose.CANDIDATE, None, 5, 2, 3 + j), **options)
        assert torch.equal(candidates.tokens[:, j], drawn.tokens)
        torch.testing.assert_close(candidates.log_probs[:, j], drawn.log_probs, rtol=0, atol=2e-6)
        if not options or set(options) == {"banned"}:  # the law is the base
            torch.testing.assert_close(candidates.lse, drawn.lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"top_k": 60}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("V", [1, 2, 63, 64, 255, 256, 257, 511, 2047, 2048, 2049, 16385, 50257])
def test_any_vocabulary_size(V, options):
    """Ids at which the row is cut for its sums count as all others; float32 against the reference in float64.

    A uniform in a thousand may be so near to a step of the CDF that the roundings of its sums decide.
    """
    logits = rows(R=3, V=V)
    actual = draw_candidates(logits, 400, stream=STREAM, **options)
    expected = draw_candidates(logits.double(), 400, stream=STREAM, **options)
    other = actual.tokens != expected.tokens
    assert other.sum() <= 1
    for name in ("log_probs", "log_base"):
        x, y = getattr(actual, name).double()[~other], getattr(expected, name)[~other]
        torch.testing.assert_close(x, y, rtol=0, atol=5e-6)
    torch.testing.assert_close(actual.lse.double(), expected.lse, rtol=0, atol=5e-6)


@needs_native
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_inverse_of_the_cdf_at_its_steps(deterministic):
    """Every id of a row has its turn, at the uniform that it alone covers: ends of parts and of chunks too."""
    V = 2500
    logits = torch.zeros(1, V)
    tokens = draw_candidates(logits, 60_000, stream=Stream(SEED), deterministic=deterministic).tokens[0]
    u = uniforms(Stream(SEED, Purpose.CANDIDATE, 0, index=torch.arange(60_000)), 60_000)
    assert torch.equal(tokens, (u * V).floor().long())
    assert tokens.unique().numel() == V


def test_peaks_far_above_what_came_before():
    """A later score that is e^200 times as likely leaves nothing to those before it, and one e^-30 its share."""
    logits = torch.zeros(1, 5000)
    logits[0, 4321] = 200.0
    logits[0, 4990] = 200.0 - math.log(3)
    drawn = draw_candidates(logits, 4000, stream=Stream(SEED))
    share = (drawn.tokens == 4990).double().mean().item()
    assert set(drawn.tokens.unique().tolist()) == {4321, 4990}
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def long_results(deterministic, **options):
    """Few long rows, whose chunks threads share, and many short ones."""
    results = []
    for R, V in ((1, 40_001), (3, 20_000), (33, 301)):
        drawn = draw_candidates(rows(R, V), 33, stream=Stream(SEED), deterministic=deterministic, **options)
        results += [x.view(torch.int32 if x.dtype == torch.float32 else x.dtype).tolist() for x in vars(drawn).values()]
    return results


@needs_native
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8}, {"top_k": 50, "top_p": 0.9}, {"temperature": 0}], ids=str
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_do_not_change_a_bit(deterministic, options):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = long_results(deterministic, **options)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert long_results(deterministic, **options) == expected
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.slow
def test_every_instruction_set_draws_the_same_ids():
    code = """
import torch
from tests.kernels import test_draw_candidates as t
for options in t.CALLS.values():
    t.check(torch.float32, options), t.check(torch.bfloat16, options, True)
print([t.long_results(False, **o)[::4] for o in ({}, {"temperature": 0.8}, {"top_p": 0.9})])
print(t.long_results(True)[::4])"""
    root, outputs = Path(__file__).parents[2], set()
    for level in native.cpu.supported_isas():
        env = {**os.environ, "PYQUIET_ISA": level}
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, f"{level}: {done.stderr[-2000:]}"
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_tensors_in_the_stream_address_the_rows():
    logits = rows(R=4)
    ids, places, steps, index = torch.tensor([9, 2, 2, 4]), torch.tensor([0, 7, 8, 1]), torch.tensor([3]), 6
    whole = draw_candidates(logits, 5, stream=Stream(-1, Purpose.ANSWER, ids, places, steps, index)).tokens
    for r in range(4):
        stream = Stream(2**64 - 1, Purpose.ANSWER, int(ids[r]), int(places[r]), 3, 6)
        for row in (logits[r : r + 1], logits[r : r + 1].double()):
            assert torch.equal(draw_candidates(row, 5, stream=stream).tokens[0], whole[r])
    other = draw_candidates(logits, 5, stream=Stream(-1, None, ids, places, steps, index)).tokens
    assert not torch.equal(other, whole)  # its own purpose


def test_strided_and_expanded_rows():
    logits = rows(R=4)
    expected = draw_candidates(logits, 5, stream=STREAM)
    wide = torch.zeros(9, 40)
    wide[1::2, 7:26] = logits
    for view in (wide[1::2, 7:26], logits.mT.contiguous().mT):
        assert same(draw_candidates(view, 5, stream=STREAM), expected)
    shared = draw_candidates(logits[:1].expand(4, -1), 5, stream=STREAM)
    again = draw_candidates(logits[:1].repeat(4, 1), 5, stream=STREAM)
    assert same(shared, again)


def same(a: Candidates, b: Candidates) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_no_rows():
    drawn = draw_candidates(torch.empty(0, 9), 3, stream=Stream(0))
    assert [tuple(x.shape) for x in vars(drawn).values()] == [(0, 3), (0, 3), (0, 3), (0,)]


FAULTS = {
    "nan": (math.nan, "logits: row 2 holds nan"),
    "inf": (math.inf, "logits: row 2 holds inf"),
    "nothing": (-math.inf, "logits: row 2 has no id left"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 2.0}, {"top_k": 3, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_are_no_law_are_named(fault, deterministic, options, dtype):
    logits, (value, message) = rows().to(dtype), FAULTS[fault]
    logits[2] = value if fault == "nothing" else logits[2]
    logits[2, 5] = value
    options = options | {"deterministic": deterministic}
    with pytest.raises(ValueError, match=message):
        draw_candidates(logits, 2, stream=Stream(0), **options)
    if fault != "nothing":  # what is banned is not looked at
        draw_candidates(logits, 2, stream=Stream(0), banned=torch.arange(19) == 5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, r"logits must be a tensor \[R, V\], got list"),
        ({"logits": torch.zeros(9)}, TypeError, r"logits must be a tensor \[R, V\], got shape \[9\]"),
        ({"logits": torch.zeros(2, 9, dtype=torch.int64)}, TypeError, "logits must be floating point"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "1 <= V <= 2"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 1.0}, TypeError, "k must be an int"),
        ({"k": 2**26, "stream": Stream(0, index=1)}, ValueError, "stream.index "),
        ({"stream": Stream(0, index=torch.tensor([0, 2**26 - 1]))}, ValueError, "stream.index must be in"),
        ({"stream": Stream(0, sequence=torch.arange(3))}, ValueError, r"stream.sequence must have shape \[2\]"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 0.0}, ValueError, "top_p must be in"),
        ({"banned": [False] * 9}, TypeError, "banned must be a bool tensor .* got list"),
        ({"banned": torch.zeros(9)}, ValueError, "banned must be bool"),
        ({"banned": torch.zeros(8, dtype=torch.bool)}, ValueError, r"banned must be bool of shape \[V\] = \[9\]"),
        ({"banned": torch.ones(9, dtype=torch.bool)}, ValueError, "row 0 has no id left"),
    ],
)
def test_arguments_that_break_the_contract_are_named(change, error, message, dtype):
    arguments = {"logits": torch.zeros(2, 9, dtype=dtype), "k": 2, "stream": Stream(0)}
    with pytest.raises(error, match=message):
        draw_candidates(**(arguments | change))


def test_compiles_to_one_graph_and_passes_opcheck():
    logits, options = rows(), {"top_k": 7, "temperature": 0.9, "banned": BANNED}
    expected = draw_candidates(logits, 3, stream=STREAM, **options)
    compiled = torch.compile(
        lambda x: draw_candidates(x, 3, stream=STREAM, **options), fullgraph=True, backend="aot_eager"
    )
    assert same(compiled(logits), expected)
    with pytest.raises(ValueError, match="row 1 holds nan"):
        compiled(logits.index_fill(0, torch.tensor(1), math.nan))
    arguments = importance_resampling._arguments(logits, 3, STREAM, 0.9, 7, None, BANNED, False)
    torch.library.opcheck(importance_resampling._kernel.op, tuple(arguments))


def test_no_gradient_is_recorded():
    logits = rows().requires_grad_()
    for x in (logits, logits.double()):
        assert not any(y.requires_grad for y in vars(draw_candidates(x, 2, stream=STREAM)).values())


def test_meta_tensors_give_shapes():
    drawn = draw_candidates(torch.empty(4, 9, device="meta"), 3, stream=Stream(0))
    assert [tuple(x.shape) for x in vars(drawn).values()] == [(4, 3), (4, 3), (4, 3), (4,)]


@needs_native
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}], ids=str)
def test_no_copy_of_the_rows(options):
    """The peak is below twice the logits, by far: only what is returned, and the faults."""
    logits = rows(R=64, V=20_000)
    peak, _ = allocations(lambda: draw_candidates(logits, 16, stream=Stream(0), **options))
    assert peak <= 64 * (16 * (8 + 4 + 4) + 4 + 8) + 4096 < 0.01 * logits.nbytes
    references, _ = allocations(lambda: draw_candidates(logits.double(), 16, stream=Stream(0), **options))
    assert references > logits.nbytes  # what is counted


class TestFromHidden:
    @staticmethod
    def problem(dtype=torch.float32, R=13, d=8, V=300):
        g = torch.Generator().manual_seed(3)
        hidden, weight, bias = (
            torch.randn(R, d, generator=g),
            torch.randn(V, d, generator=g),
            torch.randn(V, generator=g),
        )
        return hidden.to(dtype), weight.to(dtype), bias.to(dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("rows_at_a_time", [13, 5, 1])
    def test_candidates_are_those_of_the_logits(self, monkeypatch, rows_at_a_time, dtype):
        hidden, weight, bias = self.problem(dtype)
        monkeypatch.setattr(importance_resampling, "_LOGITS_IN_FLIGHT", rows_at_a_time * 300 * dtype.itemsize)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        streams = [STREAM, Stream(SEED, sequence=torch.arange(13) * 3, position=torch.tensor([4]), step=1)]
        for stream, options in ((s, o) for s in streams for o in ({}, {"temperature": 0.7, "top_k": 20})):
            actual = draw_candidates_from_hidden(hidden, weight, 4, bias=bias, stream=stream, **options)
            expected = draw_candidates(logits, 4, stream=stream, **options)
            # Products of other shapes may round otherwise.
            assert (actual.tokens == expected.tokens).double().mean() > (0.9 if dtype == torch.bfloat16 else 0.999)
            torch.testing.assert_close(actual.lse, expected.lse, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)

    def test_the_logits_never_exist(self):
        hidden, weight, _ = self.problem(R=600, d=4, V=20_000)  # 48 MB of them
        peak, largest = allocations(lambda: draw_candidates_from_hidden(hidden, weight, 2, stream=STREAM))
        assert largest <= importance_resampling._LOGITS_IN_FLIGHT
        assert peak < 1.5 * importance_resampling._LOGITS_IN_FLIGHT

    def test_rows_that_are_no_law_are_named(self, monkeypatch):
        hidden, weight, _ = self.problem()
        monkeypatch.setattr(importance_resampling, "_LOGITS_IN_FLIGHT", 5 * 300 * 4)
        hidden[7] = math.nan
        with pytest.raises(ValueError, match=r"row 2 holds nan.* its logits were counted from row 5 of hidden"):
            draw_candidates_from_hidden(hidden, weight, 2, stream=STREAM)

    def test_no_rows(self):
        _, weight, bias = self.problem()
        drawn = draw_candidates_from_hidden(torch.empty(0, 8), weight, 2, bias=bias, stream=STREAM)
        assert [tuple(x.shape) for x in vars(drawn).values()] == [(0, 2), (0, 2), (0, 2), (0,)]

    @pytest.mark.parametrize("shape", [(2, 3, 8), (13, 9), (8,)])
    def test_shapes_that_do_not_fit_are_named(self, shape):
        with pytest.raises(ValueError, match=r"hidden must be \[R, d\] and weight \[V, d\], got"):
            draw_candidates_from_hidden(torch.zeros(shape), torch.zeros(30, 8), 2, stream=STREAM)
        with pytest.raises(TypeError, match="hidden and weight must be tensors, got list and shape"):
            draw_candidates_from_hidden([[0.0]], torch.zeros(30, 8), 2, stream=STREAM)
