"""The CUDA kernels that draw candidates, executed on the CPU (shim.hpp), against the float64 reference and the CPU.

Every problem runs in two orders of the threads, which must give the same bits, under AddressSanitizer and UBSan, with
garbage in all that is to be written and NaN around the rows.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from pyquiet import native
from pyquiet.kernels import Candidates, draw_candidates, draw_candidates_from_hidden, importance_resampling
from pyquiet.kernels.importance_resampling import Arguments, reference
from pyquiet.randomness import Purpose, Stream, draw, uniforms

from ..chi_square import chi_square
from .driver import among_nan, built, name_of, run_program

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF, NONE = torch.nan, torch.inf, -torch.inf
OUTPUTS = ("tokens", "log_probs", "log_base", "lse", "fault")


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return built("draw_candidates", tmp_path_factory.mktemp("shim"))


def make(R=3, k=5, V=37, *, dtype=torch.float32, seed=0, spread=2.0, **options) -> Arguments:
    """Arguments of a call."""
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(R, V, generator=g)).to(dtype)
    defaults = dict.fromkeys(Arguments._fields)
    defaults |= {"stream_position": torch.randint(0, 2**31, (R,), generator=g), "stream_words": [-1, 0, 3, 5]}
    defaults |= {"seed": seed, "purpose": int(Purpose.CANDIDATE), "k": k, "temperature": 1.0, "deterministic": False}
    return Arguments(**(defaults | {"logits": logits} | options))


def run(driver: Path, a: Arguments) -> tuple[torch.Tensor, ...]:
    """What the kernels write."""
    rows = (len(a.logits),)
    shapes = {"tokens": (*rows, a.k), "log_probs": (*rows, a.k), "log_base": (*rows, a.k), "lse": rows, "fault": rows}
    written = {x: torch.full(shape, 77 if x in ("tokens", "fault") else NAN) for x, shape in shapes.items()}
    given = {name: among_nan(x) for name, x in zip(a._fields[:6], a[:6], strict=True) if x is not None} | written
    options = [DTYPES.index(a.logits.dtype), a.seed, *a.stream_words, a.purpose, a.top_k or 0, a.deterministic]
    given["options"] = torch.tensor(options)
    inverse = np.float32(1 / a.temperature) if a.temperature else 0.0
    given["reals"] = torch.tensor([inverse, a.top_p or 1.0], dtype=torch.float64)
    storages = run_program(driver, given, OUTPUTS)
    return tuple(storages[name].view(x.shape) if x.numel() else x for name, x in written.items())


def check(driver: Path, a: Arguments) -> None:
    actual, expected = run(driver, a), reference(*a)
    for i in (0, 4):
        assert torch.equal(actual[i], expected[i]), f"{OUTPUTS[i]}: {actual[i].tolist()}, not {expected[i].tolist()}"
    for x, y in zip(actual[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


BANNED = torch.arange(37) % 3 == 1
CASES = [
    {},
    {"k": 1},
    {"R": 1, "k": 19},
    {"V": 70, "temperature": 0.7},
    {"temperature": 1.4, "banned": BANNED},
    {"banned": BANNED},
    {"temperature": 0.0},
    {"temperature": 0.0, "banned": BANNED, "deterministic": True, "top_k": 3},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 9, "top_p": 0.7, "banned": BANNED, "temperature": 1.5},
    {"top_k": 40, "top_p": 1.0},  # which keep all
    {"deterministic": True},
    {"deterministic": True, "temperature": 0.6, "banned": BANNED},
    {"deterministic": True, "top_k": 9, "top_p": 0.7},
    {"R": 0},
    {"V": 1},
    {"V": 1, "deterministic": True},
    {"R": 2, "k": 9, "V": 512},
    {"R": 2, "k": 9, "V": 4097},
    {"R": 2, "k": 9, "V": 9001, "temperature": 0.9},  # several chunks
    {"R": 2, "k": 9, "V": 9001, "spread": 9.0},
    {"R": 2, "k": 9, "V": 9001, "deterministic": True},
    {"R": 1, "k": 9, "V": 9001, "top_k": 3000, "top_p": 0.95, "temperature": 2.0},
    {"R": 1, "k": 3, "V": 135_000},  # more chunks than a warp has lanes
    {"R": 1, "k": 3, "V": 135_000, "temperature": 0.0},
]


def cases() -> list:
    """Every case in every dtype; those with integer sums or many chunks, which are slow here, in one by turns."""
    integers = {"top_k", "top_p", "deterministic"}
    return [
        pytest.param(case, dtype, id=f"{name_of(case)}-{str(dtype)[6:]}")
        for i, case in enumerate(CASES)
        for dtype in ([DTYPES[i % 3]] if integers & case.keys() or case.get("V", 0) > 10_000 else DTYPES)
    ]


@pytest.mark.parametrize(("case", "dtype"), cases())
def test_kernels_equal_float64(driver, case, dtype):
    check(driver, make(dtype=dtype, **case))


def public(a: Arguments) -> Candidates:
    """What `draw_candidates` returns, wherever the tensors are."""
    options = {name: getattr(a, name) for name in ("temperature", "top_k", "top_p", "banned", "deterministic")}
    return draw_candidates(a.logits, a.k, stream=a.stream(), **options)


@pytest.mark.skipif(not hasattr(native.cpu, "draw_candidates"), reason="needs the native kernel of the CPU")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", [{}, {"top_k": 20, "top_p": 0.9}, {"temperature": 0.7}], ids=name_of)
def test_deterministic_tokens_are_those_of_the_cpu(driver, case, dtype):
    a = make(10, 12, 70, dtype=dtype, deterministic=True, **case)
    assert torch.equal(run(driver, a)[0], public(a).tokens)


def near_ties(R: int, seed: int = 2) -> Arguments:
    """Deterministic; the first of two ids weighs as nearly as float32 comes what the uniform of candidate 0 is."""
    position = torch.arange(R) * 5
    u = uniforms(Stream(seed, Purpose.CANDIDATE, position=position), R)
    a = make(R, 1, 3, deterministic=True, seed=seed, stream_position=position, stream_words=[-1, 0, 0, 0])
    logits = torch.tensor([[0.0, NONE, 0.0]]).repeat(R, 1)
    logits[:, 0] = u.logit()
    return a._replace(logits=logits)


@pytest.mark.skipif(not hasattr(native.cpu, "draw_candidates"), reason="needs the native kernel of the CPU")
def test_deterministic_near_ties_fall_as_on_the_cpu(driver):
    a = near_ties(100)
    tokens, in_floats = (run(driver, a._replace(deterministic=x))[0] for x in (True, False))
    assert torch.equal(tokens, public(a).tokens)
    assert (tokens != in_floats).any()
    assert set(tokens.flatten().tolist()) == {0, 2}


@pytest.mark.parametrize("case", [{}, {"temperature": 0.7, "top_k": 9}], ids=name_of)
def test_candidates_are_draws_at_the_following_indices(driver, case):
    a = make(**case)
    tokens = run(driver, a)[0]
    for j in range(a.k):
        some = a._replace(stream_words=[-1, 0, 3, 5 + j]).stream()
        assert torch.equal(tokens[:, j], draw(a.logits, stream=some, **case).tokens)


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=name_of)
def test_tokens_follow_their_law(driver, options):
    """All candidates of a few rows with the same, expanded logits."""
    logits = torch.tensor([0.0, 2.0, 2.0, NONE, 1.0])
    a = make(4, 400, 5, stream_position=None, seed=3, **options)._replace(logits=logits.expand(4, 5))
    counts = torch.bincount(run(driver, a)[0].flatten(), minlength=5)
    assert chi_square(counts, logits.double().softmax(-1)) > 1e-4
    assert chi_square(counts, torch.tensor([0.0, 2.0, 2.3, NONE, 1.0]).double().softmax(-1)) < 1e-4


@pytest.mark.parametrize("head", [0, 300, 511])
def test_ids_that_hardly_weigh_are_drawn(driver, head):
    """Of a segment's 512 ids all but one weigh 2^-25, which a sum of floats would leave out."""
    position = torch.arange(2**22)
    u = uniforms(Stream(0, Purpose.CANDIDATE, 0, position), len(position))
    position = position[u < 500 * 2**-25] if head == 511 else position[u > 1 - (511 - head) * 2**-25]
    a = make(len(position), 1, 512, stream_position=position, stream_words=[0, 0, 0, 0])
    logits = torch.full((512,), -25 * np.log(2)).index_fill(0, torch.tensor(head), 0)
    a = a._replace(logits=logits.expand_as(a.logits))
    check(driver, a)
    assert len(set(run(driver, a)[0].flatten().tolist()) - {head}) > 10


@pytest.mark.parametrize("case", [{}, {"V": 4099}, {"top_p": 0.9}, {"temperature": 0.7}], ids=name_of)
def test_a_row_does_not_notice_the_batch(driver, case):
    """Nor where it is aligned in memory, nor how many candidates it has: the same bits."""
    a = make(dtype=torch.bfloat16, stream_sequence=torch.tensor([9, 2, 7]), **case)
    together = run(driver, a)
    for r in range(3):
        some = [x[r : r + 1] if isinstance(x, torch.Tensor) else x for x in a[:6]]
        alone = run(driver, Arguments(*some, *a[6:])._replace(k=2))
        for x, y in zip(together[:3], alone[:3], strict=True):
            assert torch.equal(x[r : r + 1, :2], y)
        assert torch.equal(together[3][r : r + 1], alone[3])


@pytest.mark.parametrize(
    "options", [{}, {"deterministic": True}, {"top_p": 0.9}, {"temperature": 0.0}, {"temperature": 0.7}], ids=name_of
)
@pytest.mark.parametrize("value", [NAN, INF, NONE])
def test_a_bad_row_is_reported_and_no_other_suffers(driver, options, value):
    a = make(3, 4, 5000, **options)
    expected = run(driver, a)
    a.logits[1, slice(None) if value == NONE else slice(4321, 4322)] = value
    tokens, log_probs, log_base, lse, fault = run(driver, a)
    assert fault.tolist() == [0, 1, 0]
    assert (tokens[1] == -1).all()
    assert torch.cat([log_probs[1], log_base[1], lse[1:2]]).isnan().all()
    for x, y in zip((tokens, log_probs, log_base, lse), expected, strict=False):
        assert torch.equal(x[::2], y[::2])


@pytest.mark.parametrize("deterministic", [False, True])
def test_scores_that_overflow_are_reported(driver, deterministic):
    a = make(temperature=1e-3, deterministic=deterministic)
    a.logits[0, 3], a.logits[1] = 1e37, -1e37
    a.logits[2, 5] = -1e37  # which leaves the others
    assert run(driver, a)[-1].tolist() == [1, 1, 0]


def test_bad_values_of_banned_ids_are_not_looked_at(driver):
    a = make(banned=BANNED)
    expected = run(driver, a)
    a.logits[:, BANNED] = NAN
    assert all(torch.equal(x, y) for x, y in zip(run(driver, a), expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"temperature": 0.0}], ids=name_of)
def test_addresses_out_of_range_are_reported(driver, options):
    fits = {"stream_sequence": 2**32 - 1, "stream_position": 0, "stream_step": 2**32 - 1, "stream_index": 2**26 - 3}
    a = make(8, 3, 7, **{name: torch.full((8,), x) for name, x in fits.items()}, **options)
    a.stream_sequence[0], a.stream_position[1], a.stream_step[2], a.stream_index[3] = 2**32, 2**40, -1, 2**26 - 2
    a.stream_index[4], a.stream_sequence[5] = -1, -(2**63)
    tokens, *_, fault = run(driver, a)
    assert fault.tolist() == [-1] * 6 + [0, 0]
    assert torch.equal(tokens[6:], reference(*a._replace(**dict.fromkeys(fits), stream_words=[*fits.values()]))[0][6:])


@pytest.fixture
def below_the_door(driver, monkeypatch):
    """Puts these kernels, which mark faults and raise none, where those of a device would be."""
    monkeypatch.setattr(importance_resampling._kernel, "forward", lambda a, _: run(driver, Arguments(*a)))
    monkeypatch.setattr(importance_resampling, "left_to_check", lambda fault: True)


FAULTS = [
    ("row 1 holds nan", lambda a: a.logits[1, 30].fill_(NAN)),
    ("row 2 holds inf", lambda a: a.logits[2, 0].fill_(INF)),
    ("row 0 has no id left", lambda a: a.logits[0].fill_(NONE)),
    ("stream.position must be .* at row 1", lambda a: a.stream_position[1].fill_(2**32)),
    ("stream.index must be .* at row 2", lambda a: a.stream_index[2].fill_(2**26 - 4)),
]


@pytest.mark.parametrize(("named", "spoil"), FAULTS)
def test_faults_are_raised_by_name(below_the_door, named, spoil):
    a = make(stream_index=torch.zeros(3, dtype=torch.int64))
    assert torch.equal(public(a).tokens, reference(*a)[0])
    spoil(a)
    with pytest.raises(ValueError, match=named):
        public(a)


def test_faults_of_hidden_states_are_raised_by_their_row(below_the_door, monkeypatch):
    monkeypatch.setattr(importance_resampling, "_LOGITS_IN_FLIGHT", 2 * 37 * 4)
    hidden, weight = torch.randn(7, 4), torch.randn(37, 4)
    draw_candidates_from_hidden(hidden, weight, 2, stream=Stream(0))
    hidden[5, 1] = NAN
    with pytest.raises(ValueError, match="logits: row 5 holds nan"):
        draw_candidates_from_hidden(hidden, weight, 2, stream=Stream(0))
