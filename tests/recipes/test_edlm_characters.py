"""The recipe of the characters: its text, a short run through all of it, and what its check refuses."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyquiet.evaluation.diffusion import DiffusionRow, DiffusionTable

from .modules import RECIPES, modules

RECIPE = RECIPES / "edlm_characters"
STEPS = {"ar": 2, "denoiser": 2, "energy": 2}


@pytest.fixture
def recipe() -> Iterator[SimpleNamespace]:
    with modules("edlm_characters") as found:
        yield found


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for number, animal in enumerate(("cat", "dog", "café hen")):
        text = "\n\n".join(f"The {animal} saw {i} mice; they ran -- and the {animal} slept." for i in range(60))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def test_books_are_letters_and_their_ends_are_held_out(recipe: SimpleNamespace, books: Path) -> None:
    letters = recipe.letters
    text, held_out = letters.read(books)
    assert set(text) <= set(letters.SYMBOLS)
    assert text.startswith("the cat saw mice they ran and the cat slept the cat")
    assert "the cafe hen saw" in text
    assert 3 * len(held_out) < len(text) < 5 * len(held_out)
    assert all(f"the {animal} " in held_out for animal in ("cat", "dog", "cafe hen"))
    rows, spelling = letters.windows(text), letters.tokenizer()
    assert spelling.decode(rows[3]) == text[3 * letters.STRIDE :][: letters.T]
    assert spelling(text[: letters.T]).input_ids == rows[0].tolist()
    assert (spelling.mask_token_id, spelling.bos_token_id) == (letters.MASK, letters.BOS)
    assert spelling.decode(spelling(" a  b ").input_ids) == " a  b "


def test_a_short_run_is_kept_and_summed_up(
    recipe: SimpleNamespace, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, work = recipe.run, tmp_path / "work"
    text, held_out = recipe.letters.read(books)
    held_out *= 3
    found = run.networks(text, work, STEPS)
    again = run.networks(text, work, STEPS)  # as they were saved
    for name, model in found.items():
        assert not model.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again[name].parameters(), strict=True))
    table = run.table(found, held_out, work, (2, 4), count=4)
    monkeypatch.delattr(run, "diffusion_table")
    assert str(run.table(found, held_out, work, (2, 4), count=4)) == str(table)  # as it was kept
    assert [(row.energy, row.steps) for row in table.rows[1:-1]] == [(e, k) for e in run.NAMES for k in (2, 4)]
    assert (table.rows[-1].sampler, table.rows[-1].energy, table.rows[-1].steps) == ("first_hitting", "none", 64)
    for row in table.rows[1:]:
        here = row.estimates()
        passes = 0 if row.energy == "none" else run.CANDIDATES * here["denoiser_calls"].mean
        assert here["energy_passes"].mean == pytest.approx(passes)
    lines = run.summary(table).splitlines()
    assert len(lines) == 2 + 1 + 6 + 1
    assert len({line.count("|") for line in [*lines, run.from_the_left(found["ar"], held_out, 4)]}) == 1


def test_the_check_refuses_what_should_not_be(recipe: SimpleNamespace) -> None:
    run = recipe.run

    def table(**nll: float) -> Any:
        def row(energy: str, steps: int | None, bits: float, entropy: float = 4.0) -> Any:
            values = {
                "perplexity": [9.0] * 2,
                "ngram_nll": [bits, bits + 0.1],
                "entropy_bits": [entropy] * 2,
                "denoiser_calls": [2.0] * 2,
            }
            tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}
            tensors["energy_passes"] = tensors["denoiser_calls"]
            return DiffusionRow("schedule_first", energy, steps, tensors, {})

        rows = [row("none", None, 2.0, nll.get("text_entropy", 4.05)), row("none", 2, 3.0)]
        return DiffusionTable([*rows, row("AR", 2, nll["ar"]), row("NCE", 2, nll["nce"])], 64, "character")

    run.check(table(ar=2.5, nce=2.9))
    with pytest.raises(AssertionError, match=r"NCE, 2 steps: n-gram NLL 0\.100 above"):
        run.check(table(ar=2.5, nce=3.1))
    with pytest.raises(AssertionError, match=r"AR, 2 steps: n-gram NLL 0\.000 above"):
        run.check(table(ar=3.0, nce=2.9))
    with pytest.raises(AssertionError, match=r"entropy is 0\.200 bits"):
        run.check(table(ar=2.5, nce=2.9, text_entropy=4.2))
    fewer = table(ar=2.5, nce=2.9)
    fewer.rows[2] = replace(fewer.rows[2], values=fewer.rows[2].values | {"denoiser_calls": torch.ones(2)})
    with pytest.raises(AssertionError, match="calls differ"):
        run.check(fewer)
