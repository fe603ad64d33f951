"""`pyquiet bilevel demo`: what it finds on data of either kind, and its errors."""

import json

import pytest
import torch

from pyquiet.bilevel.demonstration import auc
from pyquiet.cli import main

from .one_line import error_line

pytestmark = pytest.mark.filterwarnings("error:gamma tau:UserWarning")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """900 rows of a linear rule, in LIBSVM's format."""
    g = torch.Generator().manual_seed(0)
    X, rule = torch.randn(900, 8, generator=g), torch.randn(8, generator=g)
    rows = [
        f"{'+1' if x @ rule > 0 else '-1'} " + " ".join(f"{i + 1}:{value:.4f}" for i, value in enumerate(x.tolist()))
        for x in X
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.txt"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_file_is_cleaned(file, tmp_path, capsys):
    figure = tmp_path / "curves.svg"
    command = ["bilevel", "demo", "--data", str(file), "--epochs", "30", "--json", "--quiet", "--plot", str(figure)]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 600
    assert 120 < found["wrong"] < 240
    assert found["auc"] > 0.9
    assert found["accuracy"] > found["plain_accuracy"] - 0.02
    assert b"wrong labels" in figure.read_bytes()
    assert main(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert found.pop("environment")["command"] == again.pop("environment")["command"] == "pyquiet bilevel demo"
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_digits_are_there_without_a_file(variant, capsys):
    assert main(["bilevel", "demo", "--epochs", "4", "--rows", "300", "--variant", variant, "--quiet"]) == 0
    words = capsys.readouterr().out
    assert words.startswith("300 rows, ")
    assert "wrong labels told from right ones with AUC 0." in words


@pytest.mark.parametrize("wrong", [0, 1])
def test_labels_that_are_all_right_or_all_wrong_cannot_be_told_apart(wrong, capsys):
    command = ["bilevel", "demo", "--epochs", "1", "--rows", "100", "--quiet", "--wrong", str(wrong)]
    assert main(command) == 0
    words = capsys.readouterr().out
    assert words.startswith(f"100 rows, {100 * wrong} with a wrong label")
    assert "there were not both wrong and right labels to tell apart" in words
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auc"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["--wrong", "1.5"], "wrong must be in [0, 1], got 1.5"),
        (["--rows", "3"], "rows must be at least 10, got 3"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--plot", "curves.gif"], "its name must end in one of .png, .svg, .pdf"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options, words, capsys):
    assert main(["bilevel", "demo", "--quiet", *options]) == 2
    assert words in error_line(capsys)


def test_a_file_of_three_classes_is_refused(tmp_path, capsys):
    path = tmp_path / "three.txt"
    path.write_text("1 1:0.5\n2 1:0.1\n3 1:0.2\n")
    assert main(["bilevel", "demo", "--data", str(path)]) == 2
    assert "must have two classes, got [1.0, 2.0, 3.0]" in error_line(capsys)


def test_auc_counts_equal_scores_as_half():
    scores = torch.tensor([0.1, 0.5, 0.5, 0.9])
    assert auc(scores, torch.tensor([False, False, True, True])) == pytest.approx(3.5 / 4)
    assert auc(scores, torch.tensor([True, True, False, False])) == pytest.approx(0.5 / 4)
