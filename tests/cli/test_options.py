"""The command line as a whole: an option that several commands have is the same in all, and bad input is one line."""

import argparse
import importlib.util
import inspect
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

import pyquiet
from pyquiet import QuietStarForCausalLM, cli, evaluation
from pyquiet.bilevel.demonstration import demonstrate
from pyquiet.cli import main
from pyquiet.cli.options import Number, Temperature, Whole, given_text

from .one_line import error_line


def commands(
    parser: argparse.ArgumentParser | None = None, path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], dict[str, argparse.Action]]:
    """The options of each command, by the words that call it."""
    actions = (parser or cli.command_line())._actions
    below = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    found = {path: {a.option_strings[-1]: a for a in actions if a.option_strings and a.dest not in ("help", "version")}}
    for action in below:
        for name, child in action.choices.items():
            found |= commands(child, (*path, name))
    return {path: options for path, options in found.items() if options}


COMMANDS = commands()
# What must stand in front of an option, as little as parsing asks for.
NEEDED = {
    ("scale", "report"): ["run.jsonl"],
    ("train", "energy"): ["--denoiser", "tiny-denoiser", "--text", "x", "--output", "y"],
    ("evaluate", "thoughts"): ["--text", "x"],
    ("evaluate", "answers"): ["--task", "gsm8k", "--data", "x"],
    ("evaluate", "infilling"): ["--table", "x"],
    ("evaluate", "diffusion"): ["--text", "x"],
} | {("train", name): ["--text", "x", "--output", "y"] for name in ("quiet-star", "any-subset", "diffusion")}
# option -> its type, and what its words hold
SHARED = {
    "--seed": (Whole(-(2**63), 2**64), "same seed, same "),
    "--temperature": (Temperature(), "; 0 takes the likeliest token"),
    "--top-k": (Whole(), "draw from the N likeliest tokens (default: all)"),
    "--top-p": (Number(0, 1, open=True), "draw from the likeliest tokens that have this probability together"),
    "--max-new-tokens": (Whole(), "tokens to write at most"),
    "--batch-size": (Whole(), " at a time"),
    "--thoughts-per-token": (Whole(), "thoughts to average"),
    "--device": (None, "where to run"),
    "--dtype": (None, "to compute in; "),
    "--tokenizer": (None, "folder or embedded model's name (default: the model's)"),
    "--quiet": (None, "show no progress"),
    "--json": (None, "print the report as JSON, or write it to FILE; the environment stands in it"),
    "--plot": (None, ".png, .svg or .pdf"),
    "--judge": (None, "causal model, whose perplexity is shown"),
}
ELSEWHERE = {"bilevel"}  # commands whose options are not made by `pyquiet.cli.options`


def having(option: str) -> list[tuple[str, ...]]:
    return [path for path, options in COMMANDS.items() if option in options]


@pytest.mark.parametrize("option", SHARED)
def test_a_shared_option_has_one_type_and_the_same_words_in_all_commands(option: str) -> None:
    kind, words = SHARED[option]
    paths = [path for path in having(option) if path[0] not in ELSEWHERE]
    assert len(paths) > 1
    for path in paths:
        action = COMMANDS[path][option]
        assert words in (action.help or ""), path
        assert action.type == (Whole(0, 2**32) if path[0] == "train" and option == "--seed" else kind), path
        first = COMMANDS[paths[0]][option]
        assert (action.nargs, action.const) == (first.nargs, first.const), path
        assert action.metavar == first.metavar or path[0] == "train", path  # which knows two devices, and names them


def test_every_command_has_the_options_that_go_with_what_it_does() -> None:
    for path, options in COMMANDS.items():
        measures = path[0] != "train"
        assert ("--json" in options) == measures, path
        assert ("--quiet" in options) == (path not in (("doctor",), ("scale", "report"))), path
        assert ("--seed" in options) == (path not in (("doctor",), ("scale", "report"))), path
        runs = path[0] in ("think", "infill", "diffuse", "train", "evaluate") or path == ("scale",)
        assert ("--device" in options) == runs, path


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_each_option_is_described_and_a_default_is_told_once(path: tuple[str, ...], capsys) -> None:
    for option, action in COMMANDS[path].items():
        assert action.help or path[0] in ELSEWHERE, option
    with pytest.raises(SystemExit):
        main([*path, "--help"])
    text = capsys.readouterr().out
    if path[0] not in ELSEWHERE:
        assert "(default: None)" not in text
    for part in text.split("\n  -"):
        assert part.count("(default:") <= 1 or path[0] in ELSEWHERE, part


def test_numbers_out_of_range_are_told_alike_while_reading_the_line() -> None:
    parser, seen = cli.command_line(), 0
    for path, options in COMMANDS.items():
        for option, action in options.items():
            if not isinstance(action.type, Whole | Number):
                continue
            for word in ("many", "-9.5", "1e400", "nan"):
                with pytest.raises(ValueError, match=rf"^{option} must be .*, got '?{word}'?$"):
                    parser.parse_args([*path, *NEEDED.get(path, []), option, word])
                seen += 1
    assert seen > 400


@pytest.mark.parametrize(
    ("kind", "word", "words"),
    [
        (Whole(), "0", "must be at least 1, got 0"),
        (Whole(0, 8), "8", "must be in [0, 8), got 8"),
        (Whole(0), "1.5", "must be a whole number, got '1.5'"),
        (Number(0), "-1", "must be at least 0, got -1"),
        (Number(0, open=True), "0", "must be above 0, got 0"),
        (Number(0, 1), "1.1", "must be in [0, 1], got 1.1"),
        (Number(0, 1, open=True), "0", "must be in (0, 1], got 0"),
        (Number(0, 1, below=True), "1", "must be in [0, 1), got 1"),
        (Number(0, 1, open=True, below=True), "0", "must be in (0, 1), got 0"),
        (Number(), "inf", "must be finite, got inf"),
        (Temperature(), "1e-38", "must be 0 (greedy) or in [1e-37, 1e37], got 1e-38"),
    ],
)
def test_types_say_what_they_take(kind, word, words) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(word)
    assert str(error.value) == words


def test_types_take_their_bounds() -> None:
    assert [Whole()("1"), Whole(0, 8)("7"), Number(0, 1)("0"), Number(0, 1, open=True)("1")] == [1, 7, 0.0, 1.0]
    assert [Temperature()("0"), Temperature()("1e-37")] == [0.0, 1e-37]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["think", "--think", "maybe"], "--think must be one of always, never, got 'maybe'"),
        (["think", "--device", "nonsense"], "--device nonsense: "),
        (["scale", "--device", "nonsense"], "--device nonsense: "),
        (["think", "--prompt"], "--prompt: expected one argument"),
        (["infill", "--text", "___", "--gap-tokens", "x"], "--gap-tokens must be a number of tokens, 3, or a range"),
        (["train", "quiet-star", "--text", "x"], "the following arguments are required: --output; see "),
        (["bilevel", "demo", "--wrong", "2"], "--wrong must be in [0, 1], got 2"),  # checked by the library
        (["evaluate", "dreams"], "MEASURE must be one of thoughts, answers, infilling, diffusion, got 'dreams'"),
        (["infill", "--nonsense"], "unrecognized arguments: --nonsense; see pyquiet --help"),
        (["evaluate", "thoughts", "--text", "/no/such/file"], "/no/such/file: No such file or directory"),
    ],
)
def test_what_is_wrong_is_a_line(arguments, line, capsys) -> None:
    assert main(arguments) == 2
    assert error_line(capsys).startswith(f"pyquiet: error: {line}")


def test_ctrl_c_is_no_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli.doctor, "examine", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "pyquiet: stopped\n"


@pytest.mark.parametrize("group", [(), ("bilevel",), ("train",), ("evaluate",)], ids=" ".join)
def test_a_command_that_only_has_others_shows_them(group, capsys) -> None:
    assert main(group) == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(('pyquiet', *group))} ")


def test_a_warning_is_a_line_as_an_error_is(monkeypatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", None)
    monkeypatch.setattr(sys, "argv", ["pyquiet"])
    assert main() == 0
    line = warnings.formatwarning(UserWarning("two\nlines"), UserWarning, "file.py", 1)
    assert line == "pyquiet: warning: two lines\n"


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    run = f"{sys.executable} -m pyquiet doctor --json | true"
    done = subprocess.run(["bash", "-c", f"{run}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == "1\n"


def test_a_text_is_the_options_or_standard_input_and_on_a_terminal_an_example(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n\n"))
    assert given_text("--prompt", "Twice", "an example") == "Twice"
    assert given_text("--prompt", None, "an example") == "Once"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert given_text("--prompt", None, "an example") == "an example"
    assert capsys.readouterr().err == "--prompt is not given; an example:\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    with pytest.raises(ValueError, match=r"^standard input: not UTF-8 text$"):
        given_text("--prompt", None, "an example")
    monkeypatch.setattr(sys, "stdin", None)  # so Python has it where it is closed
    with pytest.raises(ValueError, match=r"^--prompt is not given, and standard input is closed"):
        given_text("--prompt", None, "an example")


@pytest.mark.parametrize("command", ["think", "infill"])
def test_an_example_shows_what_the_embedded_models_can(monkeypatch, capsys, command) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main([command]) == 0
    assert {"think": "three times, came to Emma", "infill": "Then Joe had [five] books"}[
        command
    ] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "function", "otherwise"),
    [
        ("think", QuietStarForCausalLM.generate, set()),
        ("infill", pyquiet.infill, set()),
        ("diffuse", pyquiet.diffuse, {"temperature", "steps"}),  # a text to read; the help tells them
        ("evaluate thoughts", evaluation.thinking_gains, set()),
        ("evaluate answers", evaluation.direct_answers, {"think"}),
        ("evaluate answers", evaluation.majority_vote, {"think", "limit"}),
        ("evaluate infilling", evaluation.generative_table, {"batch_size", "limit"}),  # the help tells them
        ("evaluate infilling", evaluation.infill_stories, {"batch_size", "num_samples"}),
        ("evaluate infilling", evaluation.infill_code, {"batch_size", "num_samples"}),
        ("evaluate diffusion", evaluation.diffusion_table, {"steps"}),  # the same, as a tuple
        ("bilevel demo", demonstrate, set()),
    ],
)
def test_options_have_the_defaults_of_the_arguments_that_they_are(path: str, function, otherwise: set[str]) -> None:
    options = {action.dest: action for action in COMMANDS[tuple(path.split())].values()}
    parameters = inspect.signature(function).parameters.items()
    shared = [name for name, p in parameters if name in options and p.default is not p.empty]
    differ = {name for name in shared if options[name].default != dict(parameters)[name].default}
    assert len(shared) > 1
    assert differ - {"seed"} == otherwise


def test_the_reference_shows_the_same_command_line() -> None:
    file = Path(__file__).parents[2] / "docs" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "same seed, same answer (default: 0)" in module.commands()


def test_think_thinks_and_training_begins_with_a_plain_model(capsys) -> None:
    assert main(["think", "--prompt", "Once", "--max-new-tokens", "1", "--temperature", "0", "--show-thoughts"]) == 0
    captured = capsys.readouterr()
    assert "w " in captured.out
    assert captured.err == ""  # no note that its thoughts have no weight
    assert COMMANDS[("train", "quiet-star")]["--model"].default == "tiny-causal"


def test_nothing_but_what_was_asked_for_is_shown(capfd) -> None:
    logging.enable_progress_bar()  # of loading weights
    assert main(["infill", "--text", "The king ___1___.", "--temperature", "0"]) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith("The king [")
    assert captured.err == ""
