"""The bilevel recipes: what they call trained is trained, and their tables and figures come out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .modules import modules


def recipe(name: str) -> ModuleType:
    with modules(name) as found:
        return found.run


def rows(path: Path, count: int) -> Path:
    g = torch.Generator().manual_seed(count)
    X = torch.randint(2, (count, 6), generator=g)
    labels = X[:, 0] * 2 + X[:, 1] + torch.randn(count, generator=g) > 1.5
    lines = [
        f"{'+1' if label else '-1'} " + " ".join(f"{i + 1}:1" for i in range(6) if row[i])
        for row, label in zip(X.tolist(), labels.tolist(), strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a8a_starts_from_trained_regressions_and_ends_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a8a = recipe("bilevel_a8a")
    small = {"M": 4, "BLOCKS": 2, "SAMPLES": 8, "EXACT": slice(None), "EPOCHS": 2, "ETAS": (0.01,)}
    for name, value in small.items():
        monkeypatch.setattr(a8a, name, value)
    training, testing = rows(tmp_path / "training.txt", 200), rows(tmp_path / "testing.txt", 50)
    task = a8a.Task(training, testing)
    Y = task.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.problem.lower(torch.zeros(task.n), Y, torch.arange(4), None).sum(), Y)
    assert float(gradient.abs().max()) < 1e-6
    out, figure = tmp_path / "out.json", tmp_path / "figure.svg"
    monkeypatch.setattr(sys, "argv", ["run.py", str(training), str(testing), str(out), str(figure)])
    a8a.main()
    shown = capsys.readouterr().out
    runs = json.loads(out.read_text())["runs"]
    assert [one["method"] for one in runs] == 2 * ["BSVRB v2"] + 2 * ["block SOBA"] + 2 * ["stocBiO"] + ["BSVRB v1"]
    assert runs[0]["looks"][0][1] == pytest.approx(task.exact(torch.zeros(task.n))[0], abs=1e-6)
    assert runs[0]["steps"] == 2 * task.n // 16
    assert all(f"| {name} | 0.01 | " in shown for name in a8a.METHODS)
    assert b"stocBiO" in figure.read_bytes()


def test_steps_are_counted_until_the_mean_norm_is_at_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    speedup = recipe("bilevel_speedup")
    monkeypatch.setattr(speedup, "ETAS", (0.1, 0.05))
    monkeypatch.setattr(speedup, "SEEDS", (0,))
    row = speedup.measure("BSVRB v2", 32, 16)
    method = speedup.method_of("BSVRB v2", 32, 16, row["eta"], row["setting"], 0)
    norms = []
    for _ in range(int(row["steps"])):
        method.step()
        norms.append(float((speedup.PROBLEM.curvature @ (method.x - speedup.PROBLEM.solution)).norm()))
    last = sum(norms[-speedup.LAST :]) / speedup.LAST
    assert last <= speedup.GOAL < sum(norms[-speedup.LAST - 1 : -1]) / speedup.LAST
    assert speedup.steps_to_goal(method, 0) is None


def test_cleaning_is_shown_by_both_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaning = recipe("bilevel_cleaning")
    monkeypatch.setattr(cleaning, "ROWS", 480)
    monkeypatch.setattr(cleaning, "CLEAN", 300)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["run.py", str(out)])
    cleaning.main()
    v2, v1 = json.loads(out.read_text())
    assert (v2["variant"], v1["variant"], v2["steps"]) == ("v2", "v1", 120 * 480 // 160)
    assert v2["auc"] > 0.8
    assert v1["auc"] > 0.6
    for found in (v2, v1):
        assert found["loss"][1] < found["loss"][0]


def test_rankings_go_on_where_they_were_cut_off_and_end_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranking = recipe("bilevel_ranking")
    small = {"QUERIES": 20, "DOCUMENTS": 20, "BLOCKS": 5, "STEPS": 40, "LOOKS": 2, "ETAS": (0.03,), "SEEDS": (0, 1)}
    for name, value in small.items():
        monkeypatch.setattr(ranking, name, value)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["run.py", str(out)])
    ranking.main()
    runs, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert [(one["method"], one["seed"]) for one in runs] == [
        (name, seed) for name in ranking.METHODS for seed in (0, 1)
    ]
    assert all(f"| {name} | 0.03 | " in shown for name in ranking.METHODS)
    for one in runs:
        assert one["train"] > 0.5  # of scores that know nothing about 0.2
        assert one["looks"][0] != one["looks"][1]
        assert [one[key] for key in ("train", "validation", "test")] in one["looks"]
    out.write_text(json.dumps(runs[:3]))
    ranking.main()
    again = json.loads(out.read_text())
    assert [{**one, "ms": 0} for one in again] == [{**one, "ms": 0} for one in runs]


def test_a_loss_of_all_documents_is_that_of_no_threshold() -> None:
    ranking = recipe("bilevel_ranking")
    data = [part[:3] for part in ranking.generated(0)]
    scorer = ranking.network(0)
    x, idx = dict(scorer.named_parameters()), torch.arange(3)
    every = ranking.AllNDCG(*data, K=5, scorer=scorer)
    top = ranking.TopKNDCG(*data, K=5, scorer=scorer)
    batch = torch.arange(ranking.DOCUMENTS).expand(3, -1)
    low = torch.full((3, 1), -100.0)  # below all scores
    torch.testing.assert_close(ranking.smoothed(every, x, idx), top.upper(x, low, idx, batch))
