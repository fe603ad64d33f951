"""`pyquiet scale`: the embedded pair answers, resumes from its journal, and reports."""

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyquiet.cli import main, scale, scale_models
from pyquiet.environment import fingerprint
from pyquiet.scaling import Retry, read_journal
from pyquiet.scaling.backends.base import TransientError
from pyquiet.scaling.backends.huggingface import HFBackend
from pyquiet.zoo import load

from .one_line import error_line

SMALL = ["--limit", "2", "--chains", "2", "--turns", "8", "--quiet"]


def test_the_embedded_pair_answers_embedded_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = str(tmp_path / "run.jsonl")
    assert main(["scale", *SMALL, "--journal", journal, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["environment"]["models"]["draft"]["fingerprint"] == fingerprint(load("tiny-draft")[0])
    assert "target" in shown["environment"]["models"]
    assert list(shown["answers"]) == ["questions-000", "questions-001"]
    assert shown["bank"].startswith("the one that came with the pair")
    guaranteed = {int(turn): told["guaranteed"] for turn, told in shown["guaranteed"].items()}
    assert len(guaranteed) >= 3
    assert all(sure == (turn < 7) for turn, sure in guaranteed.items())
    assert shown["finished"]
    assert shown["environment"]["arguments"]["draft"] == "tiny-draft"
    assert sum(shown["report"]["outcomes"].values()) == 4
    assert main(["scale", *SMALL, "--journal", journal, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == shown["answers"]
    figure = tmp_path / "run.svg"
    assert main(["scale", "report", journal, "--against", journal, "--plot", str(figure)]) == 0
    assert "1.00 times the speed" in capsys.readouterr().out
    assert main(["scale", "report", journal, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["environment"]["command"] == "pyquiet scale report"
    assert "promised" in figure.read_text()


def test_a_bank_is_calibrated_saved_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = tmp_path / "questions.jsonl"
    rows = [
        {"id": f"b{i}", "question": f"Ann has {i + 3} apples. Ann buys {i} more. How many are left?"} for i in range(3)
    ]
    bank.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibrate = ["--calibrate", str(bank), "--calibrator", "hierarchical", "--calibration-chains", "1"]
    folder = str(tmp_path / "bank")
    assert main(["scale", *SMALL, *calibrate, "--save-calibration", folder]) == 0
    text = capsys.readouterr().out
    assert "turn 0: the rate is guaranteed" in text
    assert "bank: hierarchical, made now of 3 questions of questions.jsonl with 1 chains each" in text
    assert main(["scale", *SMALL, "--calibration", folder]) == 0
    assert text.splitlines()[:2] == capsys.readouterr().out.splitlines()[:2]


def test_a_run_that_calibrates_is_resumed_and_its_calibration_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, journal = tmp_path / "few.jsonl", str(tmp_path / "run.jsonl")
    few.write_text("".join(scale_models.embedded_file("calibration.jsonl").read_text().splitlines(True)[:6]))
    command = ["scale", *SMALL, "--calibrate", str(few), "--calibration-chains", "1", "--journal", journal]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "no calibration counted" not in first
    shutil.copy(journal, whole := str(tmp_path / "whole.jsonl"))
    Path(journal).unlink()
    assert main(command) == 0  # the same bank, whatever else the batches would be
    assert capsys.readouterr().out.splitlines()[:2] == first.splitlines()[:2]
    assert read_journal(journal)[0]["bank"] == read_journal(whole)[0]["bank"]
    calibrated = read_journal(f"{journal}.calibration.jsonl")[1]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["report"]
    assert told["calibration"] > 0
    assert main(["scale", "report", journal, "--json", "--against", whole]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["calibration"] == told["calibration"]
    assert report["calibration_cost"]["draft"]["requests"] == sum(r.key.stage == "draft" for r in calibrated)
    assert main(["scale", "report", journal, "--against", whole]) == 0
    text = capsys.readouterr().out
    assert f"{told['calibration']:.1f} s to calibrate before" in text
    assert f"calibration counted: {told['calibration']:.1f} s here, 0.0 s there" in text
    assert main(["scale", "report", whole]) == 0
    assert "no calibration counted" in capsys.readouterr().out


def test_a_run_of_which_every_chain_failed_is_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(self: object, request: object) -> None:
        raise TransientError("lost")

    monkeypatch.setattr(HFBackend, "generate", lost)
    monkeypatch.setattr(Retry, "pause", lambda self, tries, error: 0.0)
    assert main(["scale", *SMALL]) == 1
    shown = capsys.readouterr()
    assert "chains ended by: failed 4" in shown.out
    assert "every chain failed" in shown.err


def test_models_of_this_process_run_where_and_in_what_was_asked_for() -> None:
    backend = scale_models.model("draft", "tiny-draft", None, torch.device("cpu"), torch.bfloat16)
    assert {weight.dtype for weight in backend.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("journal", "rest"), [(None, ""), ("run", "; the same command goes on from run")])
def test_a_run_that_was_stopped_says_how_it_goes_on(
    journal: str | None, rest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = SimpleNamespace(finished=False, report=SimpleNamespace(outcomes={}))
    assert scale._status(result, journal) == 130
    assert capsys.readouterr().err == f"pyquiet: stopped{rest}\n"


def test_a_server_that_is_not_there_is_one_line_and_no_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["scale", *SMALL, "--draft", f"http://127.0.0.1:{port}/v1"]) == 1
    assert "is the server up" in error_line(capsys)


def test_without_the_shipped_bank_one_is_made_or_each_question_makes_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["scale", *SMALL, "--calibrator", "per_question"]) == 0
    text = capsys.readouterr().out
    assert "bank: first chunks drafted for each question beforehand" in text
    assert "turn 1: no guarantee" in text
    few = tmp_path / "few.jsonl"
    few.write_text("".join(scale_models.embedded_file("calibration.jsonl").read_text().splitlines(True)[:6]))
    embedded = scale_models.embedded_file
    monkeypatch.setattr(scale_models, "embedded_file", lambda name: few if "jsonl" in name else embedded(name))
    assert main(["scale", *SMALL, "--takeover-rate", "0.5", "--calibration-chains", "1"]) == 0
    text = capsys.readouterr().out
    assert "bank: per_turn, made now of 6 questions of few.jsonl with 1 chains each" in text
    assert "turn 1: the rate is guaranteed: ranked among scores of turn 1" in text
    assert main(["scale", *SMALL, "--preset", "paper", "--calibration-chains", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bank"].startswith("pooled, made now of 6 questions")
    assert shown["report"]["turns"]["0"]["promised"] == pytest.approx(3 / 7)  # at least 0.4 of 6 + 1 ranks


def test_discards_a_cold_start_and_drift_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, journal = tmp_path / "few.jsonl", str(tmp_path / "run.jsonl")
    few.write_text("".join(scale_models.embedded_file("calibration.jsonl").read_text().splitlines(True)[:6]))
    promise = ["--takeover-rate", "0.6", "--discard-rate", "0.5", "--resamples", "1", "--drift-level", "0.1"]
    bank = ["--calibrate", str(few), "--calibrator", "hierarchical", "--calibration-chains", "1"]
    command = ["scale", *SMALL, *promise, *bank, "--journal", journal]
    assert main(command) == 0
    text = capsys.readouterr().out
    header, records = read_journal(journal)
    thrown = sum(r.decision is not None and r.decision.action == "resample" for r in records)
    assert thrown
    assert f"{thrown} drafts thrown away for another one" in text
    assert "drift, e-values (of so many p-values): turn 0" in text
    told = {name: header["config"][name] for name in ("discard_rate", "resamples", "on_cold", "drift")}
    drift = {"level": 0.1, "freeze": False}
    assert told == {"discard_rate": 0.5, "resamples": 1, "on_cold": "takeover", "drift": drift}
    assert main(["scale", "report", journal, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["discards"], report["drift"]["0"]["watched"]) == (thrown, 2)
    assert main([*command[:-1], str(tmp_path / "cold.jsonl"), "--n-min", "7", "--on-cold", "presample", "--json"]) == 0
    cold = json.loads(capsys.readouterr().out)
    assert cold["guaranteed"]["0"]["why"] == "first turn, ranked among the question's own first chunks"
    assert cold["report"]["calibration_cost"]["draft"]["requests"] == 6 + 2 * 2


@pytest.mark.parametrize("begun", [False, True])
def test_a_bank_that_grows(begun: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(scale_models.embedded_file("calibration.jsonl").read_text().splitlines(True)[:6]))
    bank = ["--calibrate", str(few), "--calibration-chains", "1"] if begun else []
    grows = ["--calibrator", "online", "--on-cold", "accept", "--drift-level", "0.1", "--freeze-on-drift"]
    assert main(["scale", *SMALL, *bank, *grows, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bank"].startswith(f"online, {'pooled, made now of 6' if begun else 'empty at first'}")
    assert set(shown["report"]["reasons"]) == {"p" if begun else "cold"}
    assert not any(told["guaranteed"] for told in shown["guaranteed"].values())
    assert bool(shown["report"]["drift"]) == begun


def test_a_bank_that_grows_promises_what_comes_before_it_is_warm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *SMALL, "--calibrator", "online", "--on-cold", "presample"]) == 0
    text = capsys.readouterr().out
    assert "no rate is guaranteed but to first turns of questions that come while it holds too few scores" in text
    assert "turn 0: the rate is guaranteed" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slots", "1,2"], "--slots must be three numbers"),
        (["--takeover-rate", "2"], "--takeover-rate must be in (0, 1), got 2"),
        (["--questions", "missing.jsonl"], "missing.jsonl"),
        (["--draft-tokenizer", "tiny-draft"], "--draft-tokenizer is for servers; tiny-draft brings its own"),
        (
            ["--draft", "nowhere"],
            "--draft nowhere: no model folder (a folder with a config.json) and no embedded model",
        ),
        (["--target", "localhost:8001/v1"], "the address of a server begins with http://"),
        (
            ["--draft", "http://127.0.0.1:9/v1", "--draft-tokenizer", "nowhere"],
            "--draft-tokenizer nowhere: no embedded model, no folder with a tokenizer, and not fetched",
        ),
        (
            ["--calibrate", str(scale_models.embedded_file("questions.jsonl")), "--save-calibration", "/dev/null"],
            "/dev/null is no folder; give the name of one",
        ),
        (["--limit", "-63"], "--limit must be at least 1, got -63"),
        (["--draft-tokens", "0"], "--draft-tokens must be at least 1, got 0"),
        (["--target-tokens", "0"], "--target-tokens must be at least 1, got 0"),
        (["--calibration-turns", "0"], "--calibration-turns must be at least 1, got 0"),
        (["--calibrator", "per_question", "--save-calibration", "x"], "--save-calibration makes a bank, but every"),
        (["--calibration", "x", "--save-calibration", "y"], "--save-calibration makes a bank, but --calibration"),
        (["--calibration", "x", "--calibrate", "y"], "--calibrate makes a bank, but --calibration brings"),
        (["--draft", "tiny-target", "--calibrator", "pooled"], "--calibrator pooled needs questions"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--chains", "0"], "--chains must be at least 1, got 0"),
        (["--turns", "many"], "--turns must be a whole number, got 'many'"),
        (["--inflight", "0"], "--inflight must be at least 1, got 0"),
        (["--slots", "4,0,4"], "--slots must be three numbers from 1 on"),
        (["--calibration-chains", "0"], "--calibration-chains must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must be"),
        (["--top-p", "0"], "--top-p must be in (0, 1], got 0"),
        (["--n-min", "0"], "--n-min must be at least 1, got 0"),
        (["--resamples", "-1"], "--resamples must be at least 0, got -1"),
        (["--discard-rate", "0.5"], "--discard-rate must lie in [0, takeover_rate], got 0.5"),
        (["--drift-level", "0"], "--drift-level must be in (0, 1], got 0"),
        (["--drift-level", "0.1", "--early-majority"], "drift watches what is promised, and nothing is"),
        (["--freeze-on-drift"], "--freeze-on-drift has no use without --drift-level"),
        (["--calibrator", "online", "--save-calibration", "x"], "--save-calibration makes a bank, but that of"),
        (["--calibrator", "per_question", "--n-min", "3"], "--n-min must be at most --chains, 2, the scores in such"),
        (["--calibration", "x", "--n-min", "3"], "--n-min makes a bank, but --calibration brings"),
    ],
)
def test_bad_input_is_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *SMALL, *options]) == 2
    assert words in error_line(capsys)
