"""Calibrators that were saved are what they were, or refused."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyquiet.scaling.calibration import Calibrator, PerQuestion, PerTurn, fit
from pyquiet.scaling.calibration_files import load_calibrator, save_calibrator
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.conformal import Bank
from pyquiet.scaling.learning import Adaptive, Online

SCORES = [(float(i), Cell(f"q{i % 3}", "", i % 2)) for i in range(12)]
CELLS = [Cell("q1", "", 0), Cell("q1", "", 1), Cell("new", "", 5)]


def learned(calibrator: Calibrator) -> Calibrator:
    """After some decisions, the last of them in a batch that has not ended."""
    for i, u in enumerate((3.5, 0.25, 11.0, 7.0, 1.5)):
        calibrator.observe(u, Cell(f"n{i}", "", 0), bool(i % 2))
        if i == 2:
            calibrator.advance()
    return calibrator


def made(kind: str) -> Calibrator:
    if kind == "per_question":
        return PerQuestion({"q1": Bank(np.array([2.0, 1.0])), "q 2": Bank(np.array([]))}, n_min=2)
    if kind.startswith("online"):
        update: Any = kind.split()[1]
        return learned(Online(Bank(np.arange(4.0)), update=update, window=5 if update == "window" else None, batch=2))
    if kind.startswith("adaptive"):
        return learned(Adaptive(made(kind.split(maxsplit=1)[1]), step=0.1))
    return fit(kind, SCORES, buckets=(0, 1, 4), n_min=2, chains=3)  # type: ignore[arg-type]


KINDS = [
    "pooled", "hierarchical", "per_turn", "per_question", "online frozen", "online epoch", "online stream",
    "online window", "adaptive hierarchical", "adaptive online window",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_judges_and_goes_on_as_it_did(kind: str, tmp_path: Path) -> None:
    calibrator = made(kind)
    save_calibrator(calibrator, tmp_path, {})
    back = load_calibrator(tmp_path)
    assert type(back) is type(calibrator)
    assert (back.version, back.rate(0.3)) == (calibrator.version, calibrator.rate(0.3))
    for one in (calibrator, back):
        one.observe(5.0, CELLS[2], True)
        one.observe(6.0, Cell("late", "", 0), True)
        one.advance()
    for u, cell in itertools.product((0.5, 3.0, 20.0), CELLS):
        assert back.p_value(u, cell, 0.3) == calibrator.p_value(u, cell, 0.3)
    assert (back.version, back.rate(0.3)) == (calibrator.version, calibrator.rate(0.3))
    if isinstance(calibrator, PerTurn):
        assert isinstance(back, PerTurn)
        assert (back.buckets, back.base, back.n_min) == ((0, 1, 4), "hierarchical", 2)


@pytest.mark.parametrize("kind", ["pooled", "per_turn", "online stream"])
def test_what_was_changed_or_belongs_elsewhere_is_refused(kind: str, tmp_path: Path) -> None:
    save_calibrator(made(kind), tmp_path, {"draft": "a"})
    assert load_calibrator(tmp_path, {"draft": "a", "rule": "any"}).version == made(kind).version
    for other in ({"draft": "b"}, {}):
        with pytest.raises(ValueError, match="draft='a'"):
            load_calibrator(tmp_path, other)
    about = tmp_path / "calibration.json"
    about.write_text(about.read_text().replace('"a"', '"b"'))
    with pytest.raises(ValueError, match="was changed"):
        load_calibrator(tmp_path, {"draft": "b"})
    save_calibrator(made("pooled"), tmp_path / "other", {})
    save_calibrator(fit("pooled", SCORES[:6]), tmp_path, {})
    (tmp_path / "scores.safetensors").write_bytes((tmp_path / "other" / "scores.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not hold the scores"):
        load_calibrator(tmp_path)


@pytest.mark.parametrize("junk", [b"{nope", b"\xff\xfe", b"", b"[1]"])
def test_a_file_that_is_no_calibration_is_named(junk: bytes, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_bytes(junk)
    with pytest.raises(ValueError, match=r"calibration.json (is no calibration|was changed).*calibrate again"):
        load_calibrator(tmp_path)


def test_a_calibrator_from_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    class Own(PerQuestion):
        pass

    class Foreign:
        version = ""

        def p_value(self, score: float, cell: Cell, uniform: float) -> None: ...

    for calibrator in (Foreign(), Adaptive(Foreign())):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="Foreign is none of this package's"):
            save_calibrator(calibrator, tmp_path / "bank", {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Own is none"):
        save_calibrator(Own(), tmp_path / "bank", {})
    assert not (tmp_path / "bank").exists()
