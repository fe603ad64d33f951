"""The recipe of plateaus: where its runs begin, what its table says, and that it goes on where it was cut off."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .modules import modules


@pytest.fixture
def plateaus() -> Iterator[ModuleType]:
    with modules("bilevel_speedup") as found:
        yield found.plateaus


def test_runs_begin_at_the_solution(plateaus: ModuleType) -> None:
    """Without noise they stay there."""
    problem = plateaus.Quadratics()
    sample = problem.sample
    problem.sample = lambda *given: {name: 0 * noise for name, noise in sample(*given).items()}
    method = plateaus.settled(problem, 32, 1, beta=0.05, eta=0.02, seed=0)
    for _ in range(3):
        method.step()
    assert float((method.x - problem.solution).norm()) < 1e-13


def test_it_goes_on_where_it_was_cut_off(
    plateaus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"STEPS": 6, "SEEDS": (0, 1), "SAMPLES": (1,), "BLOCKS": (8, 32), "BETAS": (0.2,)}.items():
        monkeypatch.setattr(plateaus, name, value)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["plateaus.py", str(out)])
    plateaus.main()
    whole = json.loads(out.read_text())
    assert [row["case"] for row in whole] == ["samples", "blocks", "blocks", "averaging"]
    assert all(len(row["runs"]) == 2 and row["runs"][0] != row["runs"][1] for row in whole)
    out.write_text(json.dumps(whole[:2]))
    plateaus.main()
    assert json.loads(out.read_text()) == whole
    few, many = (sum(run["plateau"] for run in row["runs"]) / 2 for row in whole[1:3])
    assert f"| {few / many:.2f} |" in capsys.readouterr().out


def test_its_sums_leave_out_the_first_third(plateaus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plateaus, "STEPS", 6)
    problem = plateaus.Quadratics()
    found = plateaus.measured(problem, 16, 2, beta=0.2, eta=0.02, seed=3)
    method, rows = plateaus.settled(problem, 16, 2, beta=0.2, eta=0.02, seed=3), []
    for _ in range(6):
        x = method.x
        method.step()
        gradients = [problem.curvature @ (point - problem.solution) for point in (method.x, x)]
        rows.append([float((a - b).square().sum()) for a, b in ((gradients[0], 0), (method._z, gradients[1]))])
    expected = torch.tensor(rows[2:]).mean(0)
    torch.testing.assert_close(torch.tensor([found["plateau"], found["z"]]), expected, rtol=1e-6, atol=0)
