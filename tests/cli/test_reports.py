"""`--json`, which all commands that measure share: on standard output or in a file, with the environment."""

import json
from pathlib import Path

import pytest

import pyquiet
from pyquiet.cli import main
from pyquiet.cli.reports import in_marks
from pyquiet.environment import fingerprint

from .one_line import error_line


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> Path:
    """A folder with a thinking model."""
    folder = tmp_path_factory.mktemp("reports") / "thinker"
    base, tokenizer = pyquiet.load("tiny-causal")
    for part in (pyquiet.QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, thought_tokens=1), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def command(thinker: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king.")
    return ["evaluate", "thoughts", "--model", str(thinker), "--text", str(text), "--quiet", "--seed", "4"]


def test_on_standard_output_there_is_json_alone(command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    record = report["environment"]
    assert record["command"] == "pyquiet evaluate thoughts"
    assert record["arguments"]["seed"] == 4
    assert record["arguments"]["by"] == "entropy"  # a default
    assert not {"run", "command"} & set(record["arguments"])
    assert record["models"]["model"]["class"] == "QuietStarForCausalLM"
    assert report["seed"] == 4


def test_in_a_file_it_leaves_the_words(
    command, thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    assert main([*command, "--json", str(file)]) == 0
    assert capsys.readouterr().out.startswith("base entropy and NLL in nats\n")
    report = json.loads(file.read_text())
    model = pyquiet.QuietStarForCausalLM.from_pretrained(thinker)
    assert report["environment"]["models"]["model"]["fingerprint"] == fingerprint(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "text.txt"]


def test_marks_stand_around_words_and_no_space_ends_a_line() -> None:
    parts = [("The", False), (" king\n", True), ("sat", False), (" ", True), (" on", False), (" it.\n\n", True)]
    assert in_marks(parts) == "The [king]\nsat [] on [it.]"


@pytest.mark.parametrize(
    "more",
    [
        ["evaluate", "thoughts", "--text", "TEXT"],
        ["evaluate", "answers", "--task", "gsm8k", "--data", "TEXT"],
        ["evaluate", "infilling", "--table", "TEXT"],
        ["evaluate", "diffusion", "--text", "TEXT"],
        ["bilevel", "demo"],
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_any_work(more, monkeypatch, tmp_path, capsys) -> None:
    for name in ("pyquiet.load", "pyquiet.zoo.load"):
        monkeypatch.setattr(name, None)
    (tmp_path / "text.txt").write_text("words")
    arguments = [a.replace("TEXT", str(tmp_path / "text.txt")) for a in more]
    assert main([*arguments, "--json", "/no/folder/report.json"]) == 2
    assert "there is no folder /no/folder" in error_line(capsys)
