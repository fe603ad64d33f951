"""The generator, its counters and the uniforms that `pyquiet.randomness` promises."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pyquiet import native, philox, randomness
from pyquiet.randomness import Purpose, Stream, draw, resolve_seed, uniforms

from .chi_square import chi_square

MASK = 0xFFFFFFFF
# kat_vectors of Random123: key, counter and the ten-round block, words in order.
KNOWN_ANSWERS = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (MASK,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0_A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
needs_native = pytest.mark.skipif(native.cpu is None, reason="the native module is not built")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the native code and on the torch reference."""
    if request.param == "torch":
        monkeypatch.setattr(randomness, "cpu", None)
    return request.param


def answers(**fields: Tensor | int) -> Stream:
    return Stream(0, Purpose.ANSWER, **fields)


@pytest.mark.parametrize(("seed", "counter", "block"), KNOWN_ANSWERS)
def test_philox_known_answers_in_torch(seed, counter, block):
    words = torch.tensor(counter).unsqueeze(-1).expand(4, 3)
    assert philox.philox(seed, words).T.tolist() == [list(block)] * 3


@needs_native
@pytest.mark.parametrize(("seed", "counter", "block"), KNOWN_ANSWERS)
def test_philox_known_answers_in_native_code(seed, counter, block):
    assert native.cpu.philox(seed, counter) == list(block)


@needs_native
@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 0x0123456789ABCDEF, -(2**63)])
def test_native_uniforms_equal_the_reference(seed):
    rows, generator = 999, torch.Generator().manual_seed(seed % 2**63)
    limits = (2**32, 2**32, 2**32, 2**26)
    words = [torch.randint(limit, (rows,), generator=generator) for limit in limits]
    for word, limit in zip(words, limits, strict=True):
        word[:4] = torch.tensor([0, 1, limit - 1, limit // 2])
    for purpose in Purpose:
        ours = uniforms(Stream(seed, purpose, *words), rows)
        reference = philox.reference_uniforms(seed, purpose, words, rows, ours.device)
        assert torch.equal(ours, reference)


def test_uniform_is_made_of_the_first_two_words_at_the_counter_of_the_design(route):
    seed, sequence, position, step, index = 2**63 + 12345, 7, 2**32 - 1, 5, 2**26 - 1
    stream = Stream(seed, Purpose.GUMBEL, torch.tensor([sequence]), position, step, index)
    counter = torch.tensor([sequence, position, step, Purpose.GUMBEL << 26 | index]).unsqueeze(-1)
    word0, word1, _, _ = philox.philox(seed, counter).squeeze(-1).tolist()
    expected = ((word1 * 2**32 + word0 >> 12) + 0.5) * 2.0**-52
    assert uniforms(stream, 1).tolist() == [expected]


def test_purposes_have_the_fixed_values_that_stored_runs_rely_on():
    names = "THOUGHT ANSWER DRAFT ACCEPT RESIDUAL BONUS CANDIDATE REVEAL RESAMPLE GUMBEL EPOCH CROP"
    assert [p.name for p in sorted(Purpose)] == names.split()
    assert sorted(Purpose) == list(range(12))


def test_a_row_depends_on_its_address_alone(route):
    sequence = torch.tensor([3, 11, 5, 2**32 - 1])
    together = uniforms(answers(sequence=sequence, position=9), 4)
    alone = [uniforms(answers(sequence=s, position=9), 1).item() for s in sequence.split(1)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4


@pytest.mark.parametrize("field", ["seed", "purpose", "sequence", "position", "step", "index"])
def test_every_field_changes_the_number(route, field):
    base = {
        "seed": 1,
        "purpose": Purpose.DRAFT,
        "sequence": 1,
        "position": 1,
        "step": 1,
        "index": 1,
    }
    other = base | {field: Purpose.BONUS if field == "purpose" else 2}
    assert uniforms(Stream(**base), 1) != uniforms(Stream(**other), 1)


def test_shapes_dtypes_and_layouts_of_stream_fields_are_equivalent(route):
    rows = torch.arange(6)
    expected = uniforms(answers(sequence=rows, position=4, index=rows), 6)
    assert expected.dtype == torch.float64
    strided = torch.stack([rows, rows], 1)[:, 0]
    for stream in (
        answers(position=torch.tensor(4), index=strided),
        answers(position=torch.tensor([4]), index=rows.int()),
        answers(sequence=rows.to(torch.uint8), position=torch.full((6,), 4), index=rows),
    ):
        assert torch.equal(uniforms(stream, 6), expected)


def test_no_rows_give_no_numbers(route):
    assert uniforms(answers(), 0).shape == (0,)


def test_negative_seeds_are_their_unsigned_twins(route):
    a, b = Stream(-1, Purpose.ACCEPT), Stream(2**64 - 1, Purpose.ACCEPT)
    assert torch.equal(uniforms(a, 3), uniforms(b, 3))


@pytest.mark.parametrize(("block", "expected"), [(0, 2.0**-53), (MASK, 1 - 2.0**-53)], ids=["lowest", "highest"])
def test_uniforms_never_reach_zero_or_one(monkeypatch, block, expected):
    monkeypatch.setattr(randomness, "cpu", None)
    monkeypatch.setattr(philox, "philox", lambda _, counter: torch.full_like(counter, block))
    assert uniforms(answers(), 1).item() == expected


def test_uniforms_are_uniform():
    u = uniforms(answers(), 40_000)
    assert chi_square(torch.histc(u, 64, 0, 1), torch.full((64,), 1 / 64)) > 1e-4
    assert chi_square(torch.histc(u**1.05, 64, 0, 1), torch.full((64,), 1 / 64)) < 1e-6


@pytest.mark.parametrize(
    ("field", "limit"),
    [("sequence", 2**32), ("position", 2**32), ("step", 2**32), ("index", 2**26)],
)
def test_fields_out_of_range_are_named(route, field, limit):
    uniforms(answers(**{field: torch.tensor([0, limit - 1])}), 2)
    for wrong in (-1, limit):
        with pytest.raises(ValueError, match=rf"stream\.{field} must be in .*got {wrong}"):
            answers(**{field: wrong})
        with pytest.raises(ValueError, match=rf"stream\.{field} .*got {wrong} at row 1"):
            uniforms(answers(**{field: torch.tensor([0, wrong])}), 2)


def test_integers_of_numpy_are_integers(route):
    for seed in (np.int64(-5), np.uint64(2**63 + 1)):
        numpys, pythons = (Stream(kind(seed), Purpose.ANSWER, step=kind(np.int64(2))) for kind in (lambda x: x, int))
        assert torch.equal(uniforms(numpys, 3), uniforms(pythons, 3))


def test_bad_streams_are_refused(route):
    with pytest.raises(ValueError, match=r"seed must be in .*got 18446744073709551616"):
        Stream(2**64)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 0\.5"):
        Stream(0.5)
    with pytest.raises(TypeError, match=r"stream\.step must be an integer, got 'a'"):
        answers(step="a")
    with pytest.raises(TypeError, match=r"stream\.position must hold integers, got torch.float32"):
        answers(position=torch.zeros(2))
    with pytest.raises(ValueError, match=r"stream\.index must have shape \[3\], got \[2\]"):
        uniforms(answers(index=torch.zeros(2, dtype=torch.int64)), 3)
    with pytest.raises(ValueError, match=r"stream\.purpose is None"):
        uniforms(Stream(0), 1)


def test_resolve_seed():
    assert [resolve_seed(s) for s in (0, -5, 2**64 - 1)] == [0, -5, 2**64 - 1]
    with pytest.raises(ValueError, match="seed must be in"):
        resolve_seed(-(2**63) - 1)
    torch.manual_seed(3)
    first, second = resolve_seed(None), resolve_seed(None)
    torch.manual_seed(3)
    assert first == resolve_seed(None) != second
    assert 0 <= first < 2**63


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), stream=answers())
    assert torch.equal(torch.get_rng_state(), before)
