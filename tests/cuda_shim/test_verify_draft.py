"""The CUDA kernels of draft verification, executed on the CPU (shim.hpp), against the float64 reference and the CPU.

Every problem runs in two orders of the threads, which must give the same bits, under AddressSanitizer and UBSan, with
garbage in all that is to be written and NaN around the rows.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from pyquiet import native
from pyquiet.kernels import Verification, verify_draft
from pyquiet.kernels.draft_verification import Arguments, reference
from pyquiet.randomness import Purpose, Stream, draw, uniforms

from ..chi_square import chi_square
from .driver import among_nan, built, name_of, run_program

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF, NONE = torch.nan, torch.inf, -torch.inf
OUTPUTS = ("tokens", "count", "accepted", "log_probs", "bonus", "fault")


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return built("verify_draft", tmp_path_factory.mktemp("shim"))


def make(B=3, k=4, V=37, *, bonus=True, dtype=torch.float32, seed=0, apart=0.7, lse=False, **options) -> Arguments:
    """Arguments of a call. Draft rows are the target's and noise times `apart`; the drafts are drawn from them."""
    g = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(B, k + bonus, V, generator=g)
    draft = (target[:, :k] + apart * torch.randn(B, k, V, generator=g)).to(dtype)
    target = target.to(dtype)
    defaults = dict.fromkeys(Arguments._fields)
    defaults |= {"stream_position": torch.randint(0, 2**31, (B,), generator=g), "stream_words": [-1, 0, 3, 5]}
    defaults |= {"seed": seed, "temperature": 1.0, "draft_temperature": options.get("temperature", 1.0)}
    defaults |= {"first_is_exact": False, "gumbel": False, "deterministic": False}
    a = Arguments(**(defaults | {"target_logits": target, "draft_logits": draft} | options))
    law = {"temperature": a.draft_temperature, "top_k": a.top_k, "top_p": a.top_p, "banned": a.banned}
    stream = Stream(seed, Purpose.DRAFT, sequence=torch.arange(B * k))
    drawn = draw(draft.reshape(B * k, V).float(), stream=stream, **law)
    return a._replace(draft_tokens=drawn.tokens.view(B, k), draft_lse=drawn.lse.view(B, k) if lse else None)


def run(driver: Path, a: Arguments) -> tuple[torch.Tensor, ...]:
    """What the kernels write."""
    (B, k), target = a.draft_tokens.shape, a.target_logits
    garbage = [torch.full(shape, 77, dtype=torch.int64) for shape in ((B, k + 1), (B,), (B,), (B,))]
    log_probs, bonus = torch.full((B, k + 1), torch.nan), torch.ones(B, dtype=torch.bool)
    written = dict(zip(OUTPUTS, (*garbage[:3], log_probs, bonus, garbage[3]), strict=True))
    flags = [a.top_k or 0, a.first_is_exact, a.gumbel, a.deterministic]
    inverses = [np.float32(1 / t) if t else 0.0 for t in (a.temperature, a.draft_temperature)]
    given = {name: among_nan(x) for name, x in zip(a._fields[:10], a[:10], strict=True) if x is not None} | written
    given["options"] = torch.tensor([DTYPES.index(target.dtype), a.seed, *a.stream_words, *flags])
    given["reals"] = torch.tensor([*inverses, a.top_p or 1.0], dtype=torch.float64)
    storages = run_program(driver, given, OUTPUTS)
    return tuple(storages[name].view(x.shape) if x.numel() else x for name, x in written.items())


def check(driver: Path, a: Arguments) -> None:
    actual, expected = run(driver, a), reference(*a)
    for name, x, y in zip(OUTPUTS, actual, expected, strict=True):
        if name != "log_probs":
            assert torch.equal(x, y), f"{name}: {x.tolist()}, expected {y.tolist()}"
    torch.testing.assert_close(actual[3].double(), expected[3].double(), rtol=0, atol=2e-6)


BANNED = torch.arange(37) % 3 == 1
CASES = [
    {},
    {"bonus": False},
    {"V": 70, "temperature": 0.7},
    {"lse": True},
    {"lse": True, "top_k": 6, "apart": 2.0},
    {"temperature": 0.8, "draft_temperature": 1.3, "apart": 2.0},
    {"draft_temperature": 0.0},
    {"draft_temperature": 0.0, "lse": True, "apart": 2.0},
    {"temperature": 0.0, "apart": 0.2},
    {"temperature": 0.0, "gumbel": True, "apart": 0.2},
    {"banned": BANNED},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 9, "top_p": 0.7, "banned": BANNED, "temperature": 1.5},
    {"first_is_exact": True, "apart": 3.0},
    {"first_is_exact": True, "apart": 3.0, "gumbel": True},
    {"lengths": torch.tensor([2, 0, 4])},
    {"lengths": torch.tensor([2, 0, 4]), "bonus": False, "deterministic": True},
    {"gumbel": True, "apart": 0.1},
    {"gumbel": True, "top_k": 3, "banned": BANNED, "draft_logits": None},
    {"deterministic": True},
    {"deterministic": True, "draft_temperature": 0.0, "apart": 2.0},
    {"deterministic": True, "top_k": 9, "top_p": 0.7, "lse": True},
    {"apart": 0.0},
    {"k": 0},
    {"k": 0, "bonus": False},
    {"B": 0},
    {"V": 1},
    {"B": 2, "k": 19, "V": 5, "apart": 0.1},  # more rows than a block has warps
    {"B": 2, "k": 2, "V": 4096},
    {"B": 2, "k": 2, "V": 9001, "apart": 2.0},  # several chunks
    {"B": 2, "k": 2, "V": 9001, "apart": 2.0, "deterministic": True},
    {"B": 2, "k": 2, "V": 9001, "gumbel": True, "apart": 0.1},
    {"B": 1, "k": 1, "V": 9001, "top_k": 3000, "top_p": 0.95, "temperature": 2.0},
]


def cases() -> list:
    """Every case in every dtype; those with integer sums, whose blocks are large and slow here, in one by turns."""
    integers = {"top_k", "top_p", "deterministic"}
    return [
        pytest.param(case, dtype, id=f"{name_of(case)}-{str(dtype)[6:]}")
        for i, case in enumerate(CASES)
        for dtype in ([DTYPES[i % 3]] if integers & case.keys() else DTYPES)
    ]


@pytest.mark.parametrize(("case", "dtype"), cases())
def test_kernels_equal_float64(driver, case, dtype):
    a = make(dtype=dtype, **{name: x for name, x in case.items() if name != "draft_logits"})
    check(driver, a._replace(draft_logits=None) if "draft_logits" in case else a)


def public(a: Arguments) -> Verification:
    """What `verify_draft` returns, wherever the tensors are."""
    options = {name: getattr(a, name) for name in ("draft_lse", "banned", "lengths", "temperature", "top_k", "top_p")}
    options |= {name: getattr(a, name) for name in ("draft_temperature", "first_is_exact", "deterministic")}
    stream = Stream(
        a.seed, sequence=a.stream_sequence, position=a.stream_position, step=a.stream_words[2], index=a.stream_words[3]
    )
    coupling = "gumbel" if a.gumbel else "rejection"
    return verify_draft(*a[:3], stream=stream, coupling=coupling, **options)


@pytest.mark.skipif(not hasattr(native.cpu, "verify_draft"), reason="needs the native kernel of the CPU")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "case", [{}, {"top_k": 20, "top_p": 0.9}, {"draft_temperature": 0.0}, {"gumbel": True}], ids=name_of
)
def test_deterministic_tokens_are_those_of_the_cpu(driver, case, dtype):
    a = make(10, 2, 70, dtype=dtype, deterministic=True, apart=1.5, **case)
    there, here = run(driver, a), public(a)
    for x, y in zip(there[:3], (here.tokens, here.count, here.accepted), strict=True):
        assert torch.equal(x, y)


def near_ties(B: int, seed: int = 2) -> Arguments:
    """Deterministic; logits are as near as float32 comes to where an accept test, then a residual draw, changes."""
    position = torch.arange(B) * 5
    u = uniforms(Stream(seed, Purpose.ACCEPT, position=position), B)
    v = uniforms(Stream(seed, Purpose.RESIDUAL, position=position + 1), B)
    p = torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64).softmax(-1)[1]
    target, draft = torch.zeros(B, 2, 3), torch.zeros(B, 2, 3)
    target[:, 0, 0] = (u / 2).logit()  # u / 2 = q against p = 1 / 2
    target[:, 1, 1] = (p + v * (1 - 2 * p)).logit()  # of q - p, the share v is at id 1
    target[:, 0, 2] = target[:, 1, 0] = draft[:, 0, 2] = NONE
    draft[:, 1, 1:] = -1
    a = make(B, 2, 3, bonus=False, deterministic=True, stream_position=position, stream_words=[-1, 0, 0, 0], seed=seed)
    return a._replace(target_logits=target, draft_logits=draft, draft_tokens=torch.zeros_like(a.draft_tokens))


@pytest.mark.skipif(not hasattr(native.cpu, "verify_draft"), reason="needs the native kernel of the CPU")
def test_deterministic_near_ties_fall_as_on_the_cpu(driver):
    a = near_ties(60)
    tokens, in_floats = (run(driver, a._replace(deterministic=x))[0] for x in (True, False))
    assert torch.equal(tokens, public(a).tokens)
    assert (tokens != in_floats).any(dim=0)[:2].all()


def test_a_draft_that_its_own_law_leaves_out_is_kept(driver):
    """p(d) = 0 < q(d); with a log-sum-exp, the draft counts as kept by its law."""
    target, draft = torch.tensor([[-9.0, -9.0, 0.0, 3.0], [1.0, 1.1, 0.9, -9.0]])
    for options in ({}, {"deterministic": True}, {"lse": True}):
        a = make(8, 1, 4, top_k=2, **options)
        a.target_logits[:, 0], a.draft_logits[:] = target, draft
        a = a._replace(draft_tokens=torch.full_like(a.draft_tokens, 2))
        assert options.get("lse") or (run(driver, a)[2] == 1).all()
        check(driver, a)


def test_tokens_follow_the_target(driver):
    """The first token of many sequences with the same, expanded rows, of which the draft's have another law."""
    B = 400
    logits = torch.tensor([[0.0, 2.0, 2.0, -torch.inf], [2.0, 1.0, -1.0, 0.0]])  # target, draft
    target, draft = (x.expand(B, 1, 4) for x in logits)
    drafts = draw(draft[:, 0], stream=Stream(1, Purpose.DRAFT)).tokens.unsqueeze(1)
    a = make(B, 1, 4, bonus=False, stream_position=None, seed=3)
    tokens = run(driver, a._replace(target_logits=target, draft_logits=draft, draft_tokens=drafts))[0][:, 0]
    q, p = logits.double().softmax(-1)
    residual = (q - p).clamp_min(0)
    assert chi_square(torch.bincount(tokens, minlength=4), q) > 1e-4
    replaced = tokens[tokens != drafts[:, 0]]
    assert chi_square(torch.bincount(replaced, minlength=4), residual / residual.sum()) > 1e-4


@pytest.mark.parametrize("case", [{}, {"V": 4099, "k": 1}, {"gumbel": True}, {"top_p": 0.9, "k": 1}], ids=name_of)
def test_a_sequence_does_not_notice_the_batch(driver, case):
    """Nor where its rows are aligned in memory: the same bits, in log_probs as well."""
    a = make(dtype=torch.bfloat16, stream_sequence=torch.tensor([9, 2, 7]), **case)
    together = run(driver, a)
    for b in range(3):
        rows = [x[b : b + 1] if isinstance(x, torch.Tensor) else x for x in a[:10]]
        alone = run(driver, Arguments(*rows, *a[10:]))
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


def test_without_a_residual_the_target_itself_is_drawn_from(driver):
    """A log-sum-exp that is too small has every draft rejected and leaves nothing of q - p."""
    a = make(B=8, apart=0.0, lse=True)
    a = a._replace(draft_lse=a.draft_lse - 30)
    expected = reference(*a)
    assert (expected[2] == 0).all()
    check(driver, a)


@pytest.mark.parametrize(
    "options",
    [{}, {"lse": True}, {"deterministic": True}, {"top_p": 0.9}, {"top_p": 0.9, "lse": True}, {"gumbel": True}],
    ids=name_of,
)
@pytest.mark.parametrize("value", [NAN, INF, NONE])
def test_the_first_bad_row_that_is_met_is_reported(driver, options, value):
    """Row 1 is bad in the target; in the draft, of a draft that is kept, then of one that is not; nowhere; row 2 is."""
    a = make(5, 2, 5000, apart=0.0, first_is_exact=True, **options)
    bad = slice(None) if value == NONE else slice(4321, 4322)
    a.draft_tokens[:, 1] = drafts = reference(*a)[0][:, 1] if a.gumbel else a.target_logits[:, 1].argmax(-1)
    for b in (2, 3):
        a.target_logits[b, 1, drafts[b]] = NONE
    a.target_logits[0, 1, bad] = value
    a.draft_logits[1:3, 1, bad] = value
    a.target_logits[4, 2, bad] = value  # the bonus
    kept = 0 if a.draft_lse is not None else 4
    assert run(driver, a)[-1].tolist() == ([3, 0, 0, 0, 5] if a.gumbel else [3, kept, 4, 0, 5])


def test_a_log_sum_exp_that_is_nan_is_reported(driver):
    a = make(lse=True, first_is_exact=True, apart=0.0)
    a.draft_lse[:2, 2], a.draft_lse[2, 0] = NAN, NAN  # the last is of the exact draft
    a.target_logits[1, 1, a.draft_tokens[1, 1]] = NONE  # which ends the sequence
    assert run(driver, a)[-1].tolist() == [6, 0, 0]


def test_bad_values_of_banned_ids_are_not_looked_at(driver):
    a = make(banned=BANNED)
    expected = run(driver, a)
    for x in a[:2]:
        x[:, :, BANNED] = NAN
    assert all(torch.equal(x, y) for x, y in zip(run(driver, a), expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"gumbel": True}], ids=name_of)
def test_lengths_and_drafts_out_of_range_are_reported(driver, options):
    a = make(6, 3, first_is_exact=True, apart=0.0, lengths=torch.tensor([-1, 4, 2**62, 3, 3, 0]), **options)
    a.draft_tokens[3, 0], a.draft_tokens[4, 0], a.draft_tokens[5, 0] = -1, 37, 2**62
    *results, fault = run(driver, a)
    assert fault.tolist() == [-1] * 5 + [0]
    assert results[1].tolist() == [0] * 5 + [1]
