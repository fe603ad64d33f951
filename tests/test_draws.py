"""`process_logits` and `draw`: the law of a draw, its independence of the batch, and bad input."""

import math

import pytest
import torch
from torch import Tensor

from pyquiet import randomness
from pyquiet.randomness import Purpose, Stream, draw, process_logits, uniforms

from .chi_square import chi_square


def answers(**fields: Tensor | int) -> Stream:
    return Stream(0, Purpose.ANSWER, **fields)


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_processing_nothing_returns_the_input():
    logits = torch.randn(2, 5)
    assert process_logits(logits, top_k=5, top_p=1.0) is logits
    assert process_logits(logits.double()).dtype == torch.float64
    assert process_logits(logits.bfloat16()).dtype == torch.float32


def test_ties_at_the_threshold_are_all_kept():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]])
    assert kept(process_logits(logits, top_k=1)) == [[1]]
    assert kept(process_logits(logits, top_k=2)) == [[1, 2, 3, 5]]
    assert kept(process_logits(logits, top_k=5)) == [[0, 1, 2, 3, 5]]
    assert kept(process_logits(torch.zeros(1, 4), top_p=0.1)) == [[0, 1, 2, 3]]


def test_top_p_keeps_the_fewest_that_reach_it():
    law = torch.tensor([[0.125, 0.5, 0.25, 0.0625, 0.0625]]).log()
    for top_p, ids in [(0.1, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.8, [0, 1, 2])]:
        assert kept(process_logits(law.double(), top_p=top_p)) == [ids]


def test_order_is_banned_temperature_top_k_top_p():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).double()
    banned = torch.tensor([True, False, False, False, False])
    law = process_logits(logits, temperature=2.0, top_k=3, banned=banned)
    assert law.tolist() == [[-math.inf, 1.5, 1.0, 0.5, -math.inf]]
    # Top-p counts the mass after temperature and top-k: 0.81 for the first two. Before it would be
    # 0.88, and without top-k 0.73.
    p = law.softmax(-1)[0, 1:3].sum().item()
    assert kept(process_logits(logits, temperature=2.0, top_k=3, top_p=p - 1e-9, banned=banned)) == [[1, 2]]
    assert kept(process_logits(logits, temperature=2.0, top_k=3, top_p=p + 1e-9, banned=banned)) == [[1, 2, 3]]


def test_removed_ids_stay_removed_and_values_of_the_others_stay():
    logits = torch.tensor([[0.5, -math.inf, 2.0, 1.0]])
    assert kept(process_logits(logits, top_k=4)) == [[0, 2, 3]]
    assert kept(process_logits(logits, top_k=3, top_p=1.0)) == [[0, 2, 3]]
    assert process_logits(logits, top_k=2).tolist() == [[-math.inf, -math.inf, 2.0, 1.0]]
    zero = process_logits(torch.tensor([[1.0, 2.0, 2.0]]), temperature=0)
    assert zero.tolist() == [[-math.inf, 2.0, -math.inf]]


PROCESSINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "banned": {"banned": torch.arange(13) % 3 == 0},
    "all": {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "banned": torch.arange(13) == 4},
}


@pytest.mark.parametrize("options", PROCESSINGS.values(), ids=PROCESSINGS)
def test_draws_follow_the_processed_law(options):
    logits = torch.randn(13, generator=torch.Generator().manual_seed(1)) * 1.5
    law = process_logits(logits.unsqueeze(0), **options).softmax(-1)[0]
    rows = 20_000
    drawn = draw(logits.expand(rows, -1), stream=Stream(17, Purpose.CANDIDATE), **options)
    counts = torch.bincount(drawn.tokens, minlength=13)
    assert chi_square(counts, law) > 1e-4
    torch.testing.assert_close(drawn.log_probs, law.log()[drawn.tokens])
    assert drawn.log_probs.dtype == torch.float32


def test_the_chi_square_test_rejects_a_law_that_is_slightly_off():
    logits = torch.randn(1, 13, generator=torch.Generator().manual_seed(1)) * 1.5
    drawn = draw(logits.expand(20_000, -1), stream=Stream(17, Purpose.CANDIDATE))
    counts = torch.bincount(drawn.tokens, minlength=13)
    assert chi_square(counts, (logits[0] / 1.1).softmax(-1)) < 1e-6


def test_draw_is_the_inverse_cdf_in_vocabulary_order():
    rows = 999
    logits = torch.randn(rows, 37, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stream = answers(position=torch.arange(rows))
    drawn = draw(logits, stream=stream)
    cdf = logits.softmax(-1).cumsum(-1)
    expected = (cdf <= uniforms(stream, rows).unsqueeze(-1)).sum(-1)
    assert torch.equal(drawn.tokens, expected)
    torch.testing.assert_close(
        drawn.log_probs,
        logits.log_softmax(-1).gather(-1, expected[:, None])[:, 0],
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("options", PROCESSINGS.values(), ids=PROCESSINGS)
def test_draws_do_not_depend_on_batch_or_chunks(monkeypatch, options):
    rows = 11
    logits = torch.randn(rows, 13, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(rows) * 7
    whole = draw(logits, stream=answers(sequence=ids, position=2), **options)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(4))
    shuffled = draw(logits[order], stream=answers(sequence=ids[order], position=2), **options)
    assert torch.equal(shuffled.tokens, whole.tokens[order])
    monkeypatch.setattr(randomness, "_CHUNK", 3 * 13)
    chunked = draw(logits, stream=answers(sequence=ids, position=2), **options)
    assert torch.equal(chunked.tokens, whole.tokens)
    torch.testing.assert_close(chunked.log_probs, whole.log_probs, rtol=0, atol=1e-6)
    for row in range(rows):
        alone = draw(logits[row : row + 1], stream=answers(sequence=ids[row], position=2), **options)
        assert alone.tokens.item() == whole.tokens[row]


def test_large_batches_make_no_float64_copy(monkeypatch):
    seen = []
    invert = randomness.invert_cdf
    monkeypatch.setattr(randomness, "_CHUNK", 100)
    monkeypatch.setattr(randomness, "invert_cdf", lambda *a: seen.append(a[0].numel()) or invert(*a))
    draw(torch.zeros(64, 10, dtype=torch.float16), stream=answers(), top_p=0.5)
    assert sum(seen) == 640
    assert max(seen) <= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_temperature_zero_takes_the_lowest_of_the_largest(dtype):
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, -math.inf, 0.5]], dtype=dtype)
    drawn = draw(logits, stream=answers(), temperature=0)
    assert drawn.tokens.tolist() == [1, 0]
    assert drawn.log_probs.tolist() == [0, 0]
    banned = torch.tensor([False, True, False])
    drawn = draw(logits, stream=answers(), temperature=0, banned=banned, top_k=1, top_p=0.1)
    assert drawn.tokens.tolist() == [2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 60.0, -300.0, 1e4, 1.3e5, 1.4e5, -1e7, 1e9])
def test_large_scores_keep_their_law(level, dtype):
    """Rows about a level, and rows of which one part in three lies there: their weights have bases far apart."""
    logits = torch.randn(40, 6100, generator=torch.Generator().manual_seed(5)) * 3
    logits[:20] += level
    logits[20:, 2100:4000] += level
    logits = logits.to(dtype)
    stream = answers(sequence=torch.arange(40))
    drawn, exact = draw(logits, stream=stream), draw(logits.double(), stream=stream)
    assert (drawn.tokens == exact.tokens).sum() >= 39
    size = 1e-7 * exact.lse.abs()
    assert ((drawn.lse - exact.lse).abs() <= 1e-6 + size).all()
    log_probs = logits.double().log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    assert ((drawn.log_probs - log_probs).abs() <= 2e-6).all()


def test_low_precision_logits_follow_their_float32_law():
    logits = torch.randn(5, 37).bfloat16()
    low, full = (draw(x, stream=answers(), temperature=0.9) for x in (logits, logits.float()))
    assert torch.equal(low.tokens, full.tokens)
    assert torch.equal(low.log_probs, full.log_probs)


@pytest.mark.parametrize("u", [2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(monkeypatch, u, dtype):
    monkeypatch.setattr(randomness, "uniforms", lambda *a: torch.full((a[1],), u, dtype=torch.float64))
    logits = torch.full((3, 50), -math.inf, dtype=dtype)
    logits[0, 7] = 3.0
    logits[1, [5, 9]] = 0.0
    logits[2, 10:40] = torch.linspace(-1, 1, 30).to(dtype)
    logits[2, 40:] = -1000.0  # underflows: weight zero in float64 as well
    tokens = draw(logits, stream=answers()).tokens
    assert tokens[0] == 7
    assert tokens[1] in (5, 9)
    assert 10 <= tokens[2] < 40


def test_a_scan_that_is_not_monotone_yields_no_token_of_weight_zero():
    weights = torch.tensor([[0.5, 0.0, 1.0, 0.0]]).double()
    cdf = torch.tensor([[0.5, 0.5000001, 1.5, 1.4999999]]).double()
    for u, token in [(0.1, 0), (0.50000005 / 1.4999999, 2), (0.9, 2), (1 - 2.0**-53, 2)]:
        chosen = randomness.invert_cdf(cdf, weights, torch.tensor([u]).double())
        assert chosen.tolist() == [token]


def test_draw_carries_no_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    assert not draw(logits, stream=answers()).log_probs.requires_grad


def test_no_rows_draw_no_tokens():
    drawn = draw(torch.empty(0, 5), stream=answers(), top_k=2, top_p=0.5)
    assert drawn.tokens.shape == drawn.log_probs.shape == (0,)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(("value", "message"), [(math.nan, "row 2 holds nan"), (math.inf, "row 2 holds inf")])
def test_logits_that_are_not_finite_name_their_row(monkeypatch, temperature, value, message):
    monkeypatch.setattr(randomness, "_CHUNK", 8)
    logits = torch.zeros(4, 4)
    logits[2, 1] = value
    with pytest.raises(ValueError, match=message):
        draw(logits, stream=answers(), temperature=temperature)


def test_rows_with_nothing_left_name_their_row():
    logits = torch.zeros(3, 4)
    logits[1, 1:] = -math.inf
    draw(logits, stream=answers())
    banned = torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match="row 1 has no id left"):
        draw(logits, stream=answers(), banned=banned)
    logits[1] = -math.inf
    with pytest.raises(ValueError, match="row 1 has no id left"):
        draw(logits, stream=answers(), temperature=0)


def test_temperature_that_overflows_the_logits_is_refused():
    with pytest.raises(ValueError, match="row 0 holds inf"):
        draw(torch.tensor([[1e9, 0.0]]), stream=answers(), temperature=1e-37)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be 0 .*got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be 0"),
        ({"temperature": math.inf}, ValueError, "temperature must be 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str '1'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer, got 1.5"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.01}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"top_p": "1"}, TypeError, "top_p must be a number, got str '1'"),
        ({"banned": torch.zeros(3, dtype=torch.bool)}, ValueError, r"banned .* \[V\] = \[4\]"),
        ({"banned": torch.zeros(4)}, ValueError, "banned must be bool"),
        ({"banned": [False] * 4}, TypeError, "banned must be a bool tensor .* got list"),
    ],
)
def test_arguments_out_of_range_are_refused(options, error, message):
    for function, stream in ((process_logits, {}), (draw, {"stream": answers()})):
        with pytest.raises(error, match=message):
            function(torch.zeros(2, 4), **options, **stream)


def test_logits_of_wrong_shape_or_dtype_are_refused():
    with pytest.raises(ValueError, match=r"logits must have shape \[R, V\].*got \[4\]"):
        draw(torch.zeros(4), stream=answers())
    with pytest.raises(ValueError, match=r"logits must have shape \[R, V\].*got \[2, 0\]"):
        draw(torch.zeros(2, 0), stream=answers())
    with pytest.raises(TypeError, match=r"logits must be a tensor \[R, V\], got list"):
        draw([[0.0]], stream=answers())
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
        draw(torch.zeros(2, 3, dtype=torch.int64), stream=answers())
