"""Gains by decile against a slow count, and thinking over texts against the model's own methods."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from pyquiet.evaluation import gain_by_decile, thinking_gains
from pyquiet.evaluation.difficulty import _windows

from ..quiet_star.thinkers import random_ids, thinker


@pytest.fixture(scope="module")
def model():
    return thinker("llama", m=2)


def slow_table(difficulty, base, mixed, bins):
    """The rows of the table, token by token."""
    n = len(difficulty)
    order = sorted(range(n), key=lambda i: (difficulty[i], i))
    rows, start = [], 0
    for b in range(min(bins, n)):
        size = n // min(bins, n) + (b < n % min(bins, n))
        chosen, start = order[start : start + size], start + size
        gains = [base[i] - mixed[i] for i in chosen]
        mean = math.fsum(gains) / size
        error = math.sqrt(math.fsum((g - mean) ** 2 for g in gains) / (size - 1) / size) if size > 1 else None
        rows.append(
            {
                "count": size,
                "low": difficulty[chosen[0]],
                "high": difficulty[chosen[-1]],
                "base_nll": math.fsum(base[i] for i in chosen) / size,
                "mixed_nll": math.fsum(mixed[i] for i in chosen) / size,
                "gain": mean,
                "gain_error": error,
            }
        )
    return rows


def assert_rows(actual, expected):
    assert len(actual) == len(expected)
    for row, slow in zip(actual, expected, strict=True):
        assert row.keys() == slow.keys()
        for name, value in slow.items():
            assert row[name] == (None if value is None else pytest.approx(value, rel=1e-12, abs=1e-12)), name


@pytest.mark.parametrize("n", [1, 3, 10, 23, 1009])
@pytest.mark.parametrize("bins", [1, 4, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_is_that_of_a_slow_count(n, bins, dtype):
    generator = torch.Generator().manual_seed(n)
    base, mixed = -torch.rand(2, n, generator=generator, dtype=dtype).log()
    difficulty = torch.randint(0, 7, (n,), generator=generator).to(dtype)  # ties
    table = gain_by_decile(difficulty, base, mixed, bins)
    values = [x.double().tolist() for x in (difficulty, base, mixed)]
    assert_rows(table.rows(), slow_table(*values, bins))
    assert_rows(table.total.rows(), slow_table(*values, 1))
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["bins"] == table.rows()


def test_sums_are_taken_in_float64():
    n = 300_000
    base = torch.full((n,), 3.3)
    base[0] = 2.0**20
    expected = np.mean(base.numpy().astype(np.float64))
    table = gain_by_decile(torch.zeros(n), base, torch.zeros(n), bins=1)
    assert table.gain.dtype == torch.float64
    assert table.base_nll.item() == pytest.approx(expected, rel=1e-14)
    assert table.gain.item() == pytest.approx(expected, rel=1e-14)


def test_equal_difficulties_keep_their_order():
    gain = torch.arange(20.0)
    table = gain_by_decile(torch.ones(20), gain, torch.zeros(20))
    assert table.gain.tolist() == [0.5 + 2 * i for i in range(10)]


def test_the_table_in_words_has_a_line_a_bin_and_one_for_all():
    lines = str(gain_by_decile(torch.arange(3.0), torch.ones(3), torch.zeros(3))).split("\n")
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "all"]
    assert "+1.0000" in lines[-1]
    assert lines[1].endswith(" -")
    assert lines[-1].endswith(" 0.0000")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)), r"\[2, 3\]"),
        ((torch.ones(3), torch.ones(4), torch.ones(3)), r"\[4\]"),
        ((torch.ones(0), torch.ones(0), torch.ones(0)), "n >= 1"),
        ((torch.ones(3), torch.ones(3), torch.ones(3), 0), "bins"),
        ((torch.tensor([1.0, math.nan]), torch.ones(2), torch.ones(2)), "NaN"),
    ],
)
def test_bad_tables_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        gain_by_decile(*arguments)


@torch.no_grad()
def test_a_text_of_one_window_is_what_the_model_says(model):
    ids = random_ids(1, 19)
    gains = thinking_gains(model, [ids[0]], seed=5, thoughts_per_token=3, progress=False)
    thoughts = model.think_at_every_token(ids, seed=5, sequence_ids=torch.tensor([0]), thoughts_per_token=3)
    assert torch.equal(gains.token, ids[0, 1:])
    assert torch.equal(gains.index, torch.arange(1, 19))
    assert torch.equal(gains.row, torch.zeros(18, dtype=torch.int64))
    assert torch.equal(gains.base_nll, -thoughts.base_log_probs[0])
    assert torch.equal(gains.thoughts, thoughts.tokens[0, :-1])
    assert torch.equal(gains.weight, thoughts.weight[0, :-1])
    # The mean of the laws, from the logits of the forward that averages them.
    logits = model(ids, think="always", seed=5, thoughts_per_token=3).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    torch.testing.assert_close(gains.mixed_nll, expected, rtol=0, atol=1e-12)
    assert (gains.mixed_nll + thoughts.mixed_log_probs[0].mean(-1)).abs().max() > 1e-4  # not the mean of logarithms


@torch.no_grad()
def test_entropy_is_that_of_the_base(model, monkeypatch):
    monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", 300)  # three rows at a time
    ids = random_ids(2, 11)
    gains = thinking_gains(model, list(ids), seed=0, progress=False)
    law = model.base(ids).logits[:, :-1].softmax(-1).tolist()
    expected = [-math.fsum(p * math.log(p) for p in token) for row in law for token in row]
    assert gains.entropy.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(gains.difficulty("entropy"), gains.entropy)
    assert torch.equal(gains.difficulty("loss"), gains.base_nll)
    table = gains.table("loss", bins=4)
    assert_rows(table.rows(), gain_by_decile(gains.base_nll, gains.base_nll, gains.mixed_nll, 4).rows())
    with pytest.raises(ValueError, match="difficulty"):
        gains.difficulty("difficulty")


@pytest.mark.parametrize(
    ("opening", "max_length", "overlap"),
    [([], 2, 1), ([], 7, 1), ([], 9, 4), ([1], 3, 0), ([1], 8, 2), ([1, 5], 64, 1)],
)
def test_windows_cover_every_token_once_behind_what_came_before(opening, max_length, overlap):
    rows = [list(range(100 * r, 100 * r + length)) for r, length in enumerate([1, 2, 7, 8, 23, 40])]
    seen = []
    for window in _windows(rows, opening, max_length, overlap):
        assert len(window.ids) <= max_length
        assert window.ids[: len(opening)] == opening
        row, here = rows[window.row], window.index
        known = window.first - len(opening)
        assert known == min(overlap, here)
        text = window.ids[len(opening) :]
        assert text == row[here - known : here - known + len(text)]
        seen += [(window.row, here + j) for j in range(len(text) - known)]
    first = 0 if opening else 1
    assert seen == [(r, i) for r, row in enumerate(rows) for i in range(first, len(row))]


@pytest.mark.parametrize("opening", [[], [1]])
@torch.no_grad()
def test_long_texts_are_read_window_by_window_whatever_the_batch(model, opening):
    rows = [row[:length] for row, length in zip(random_ids(3, 30), (30, 3, 17), strict=True)]
    options = {"seed": 1, "opening": opening, "max_length": 9, "overlap": 3, "progress": False}
    gains = thinking_gains(model, rows, batch_size=3, **options)
    alone = thinking_gains(model, rows, batch_size=1, **options)
    for name in gains.__dataclass_fields__:
        x, y = getattr(gains, name), getattr(alone, name)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 if x.is_floating_point() else 0)
    for j, (r, i) in enumerate(zip(gains.row.tolist(), gains.index.tolist(), strict=True)):
        assert gains.token[j] == rows[r][i]
        first = 0 if opening else 1
        fresh = 9 - len(opening) - 3  # tokens a window adds, but for the first ones, which know less
        starts, start = [], first
        while start <= i:
            starts.append(start)
            start += fresh + 3 - min(3, start)
        assert starts
        context = [*opening, *rows[r][max(0, starts[-1] - 3) : i].tolist()]
        law = model.base(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        assert gains.base_nll[j].item() == pytest.approx(-law[rows[r][i]].item(), abs=1e-12)


def test_dropout_is_off_and_the_mode_put_back():
    model = thinker("gpt2", m=1, embd_pdrop=0.5)
    ids = random_ids(1, 12)
    quiet = thinking_gains(model, ids, seed=0, progress=False)
    model.train()
    assert torch.equal(thinking_gains(model, ids, seed=0, progress=False).base_nll, quiet.base_nll)
    assert model.training
    assert model.base.training


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"overlap": 0}, "overlap=0"),
        ({"opening": [1], "max_length": 2}, "max_length=2"),
        ({"batch_size": 0}, "batch_size"),
        ({"rows": [[5], []]}, "none of the 2 texts"),
        ({"max_length": 500, "rows": [[5] * 400]}, "max_position_embeddings"),
        ({"thoughts_per_token": 0}, "thoughts_per_token"),
    ],
)
def test_bad_options_are_named(model, options, named):
    with pytest.raises(ValueError, match=named):
        thinking_gains(model, **({"rows": [[5, 6, 7]], "seed": 0, "progress": False} | options))


def test_windows_fill_the_context_and_no_more(model):
    row = [5] * 300
    gains = thinking_gains(model, [row], seed=0, progress=False)  # a context of 96
    assert len(gains.token) == 299
