"""`pyquiet infill` and `pyquiet evaluate infilling` with a small random XLNet: what they print, and their errors."""

import json

import pytest
import torch

import pyquiet
from pyquiet.any_subset.gaps import fill_gaps
from pyquiet.cli import main
from pyquiet.evaluation import generative_table, infill_code, infill_stories, read_code_problems, read_stories
from pyquiet.gaps import Codec

from ..any_subset.models import random_xlnet
from .one_line import error_line

STORY = "a,t,Tom had a dog.,It was big.,The dog ran away.,Tom was sad.,The dog came home.\n"
CODE = {
    "task_id": "Line/0",
    "prompt": "def add(a, b):\n",
    "suffix": "\n",
    "canonical_solution": "    return a + b\n",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
    "entry_point": "add",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer, one without, a text, stories and problems."""
    folder = tmp_path_factory.mktemp("infill")
    tokenizer = pyquiet.load("tiny-causal")[1]
    model = random_xlnet(vocabulary=len(tokenizer))
    for name in ("model", "bare"):
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "model")
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "text.txt").write_text("Once upon a time there was a king who had three sons. " * 9)
    (folder / "stories.csv").write_text(
        f"storyid,storytitle,{','.join(f'sentence{i}' for i in range(1, 6))}\n{STORY * 3}"
    )
    (folder / "code.jsonl").write_text((json.dumps(CODE) + "\n") * 3)
    return folder


@pytest.fixture(scope="module")
def filler(folder):
    return random_xlnet(vocabulary=2048), pyquiet.load("tiny-causal")[1]


def run(folder, *arguments, model="model"):
    return main(["infill", "--model", str(folder / model), *arguments])


def evaluate(folder, *arguments):
    arguments = [a.replace("DATA", str(folder)) for a in arguments]
    return main(["evaluate", "infilling", "--model", str(folder / "model"), "--quiet", *arguments])


def expected(filler, parts, lengths, count=1, seed=0, **options):
    model, tokenizer = filler
    codec = Codec(tokenizer)
    texts = [codec.gapped(parts, lengths)] * count
    filled, took = fill_gaps(model, texts, seed=seed, banned=codec.banned(2048), **options)
    return [codec.parts(one.ids, one.given) for one in filled], filled, took


def test_the_filled_parts_are_marked_and_what_it_took_is_told(folder, filler, capsys):
    options = ["--method", "assd", "--k", "3", "--seed", "7", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.9"]
    assert run(folder, "--text", "The ___2___ sat on the ___.", "--gap-tokens", "4", *options) == 0
    law = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "method": "assd", "k": 3}
    (parts,), _, took = expected(
        filler, ["The", " sat on the", "."], [range(2, 3), range(4, 5)], seed=7, **law
    )  # fmt: skip
    text, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert text.replace("[", "").replace("]", "") == "".join(part for part, _ in parts)
    for part, is_filled in parts:
        assert (f"[{part.lstrip(' ')}]" in text) is is_filled
    calls = took["target_calls"] + took["draft_calls"]
    assert line.startswith(
        f"6 tokens, {calls} calls of the network ({took['target_calls']} exact, {took['draft_calls']} for drafts), "
        f"{6 / took['rounds']:.2f} tokens a round, "
    )
    assert line.endswith(" s")


def test_json_holds_the_samples(folder, filler, capsys):
    arguments = ["--text", "The ___1-3___ sat", "--num-samples", "3", "--json", "--method", "sequential"]
    assert run(folder, *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    parts, filled, took = expected(filler, ["The", " sat"], [range(1, 4)], count=3, method="sequential")
    assert [[(p["text"], p["filled"]) for p in sample["parts"]] for sample in report["samples"]] == parts
    assert [sample["lengths"] for sample in report["samples"]] == [list(one.lengths) for one in filled]
    assert [s["log_prob"] for s in report["samples"]] == pytest.approx([one.log_prob for one in filled], abs=1e-5)
    assert {name: report[name] for name in took if name != "seconds"} == {n: took[n] for n in took if n != "seconds"}
    assert len({sample["text"] for sample in report["samples"]}) > 1
    assert run(folder, *arguments, "--seed", "1") == 0
    assert json.loads(capsys.readouterr().out)["samples"] != report["samples"]


def test_a_terminal_is_marked_in_bold_unless_it_wants_no_colour(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ["--text", "The ___ sat", "--temperature", "0"]
    assert run(folder, *arguments) == 0
    bold = capsys.readouterr().out.split("\n")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(folder, *arguments) == 0
    plain = capsys.readouterr().out.split("\n")[0]
    assert bold == plain.replace("[", "\033[1m").replace("]", "\033[0m")
    assert "\033[1m" in bold


def test_a_file_of_weights_with_another_tokenizer(folder, capsys):
    arguments = ["--text", "The ___ sat", "--temperature", "0", "--tokenizer"]
    outs = []
    for model, tokenizer in (("model", "tiny-causal"), ("bare", str(folder / "model")), ("bare", "tiny-causal")):
        assert run(folder, *arguments, tokenizer, model=model) == 0
        outs.append(capsys.readouterr().out.split("\n")[0])
    assert len(set(outs)) == 1
    assert run(folder, *arguments, "tiny-causal", model="weights.pt") == 0  # its 2 heads are told by the shapes
    assert capsys.readouterr().out.split("\n")[0] == outs[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/no/such/folder"], "--model /no/such/folder"),
        (["--model", "tiny-causal"], "LlamaForCausalLM"),
        (["--model", "BARE"], "--tokenizer"),
        (["--text", "no gap"], "no gap"),
        (["--text", "a ___3-2___"], "'3-2'"),
        (["--text", "\udce4 ___"], "UTF-8"),
        (["--text", "___1-9___ ___1-9___"], "81 combinations"),
        (["--text", "a ___999999999___"], "GiB of memory"),
        (["--gap-tokens", "many"], "'many'"),
        (["--num-samples", "0"], "--num-samples"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--k", "3"], "--k 3 goes with a method"),
        (["--k", "0", "--method", "assd"], "--k must be in [1, 257), got 0"),
        (["--k", "99999", "--method", "assd"], "--k must be in [1, 257), got 99999"),
        (["--device", "nonsense"], "--device"),
        (["--code"], "cls_token"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(folder, capsys, arguments, named):
    arguments = [a.replace("BARE", str(folder / "bare")) for a in arguments]
    assert run(folder, "--text", "The ___", *arguments) == 2
    assert named in error_line(capsys)


def test_a_full_memory_is_told_in_words(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr("pyquiet.any_subset.gaps.fill_gaps", full)
    assert run(folder, "--text", "The ___") == 2
    assert "memory is full (CUDA out of memory.); give shorter texts" in capsys.readouterr().err


def test_the_table(folder, filler, capsys):
    options = ["--table", "DATA/text.txt", "--length", "16", "--limit", "2", "--prompt-fraction", "0.2", "--seed", "3"]
    assert evaluate(folder, *options, "--method", "assd", "ngram", "--k", "4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    texts = [(folder / "text.txt").read_text()]
    table = generative_table(
        *filler, texts, pyquiet.load("tiny-causal"), methods=("assd", "ngram"), limit=2, length=16,
        prompt_fraction=0.2, seed=3, k=4, progress=False,
    )  # fmt: skip
    for method, row in table.to_dict()["methods"].items():
        for name in set(row) - {"seconds"}:
            assert report["methods"][method][name] == pytest.approx(row[name], rel=1e-5), (method, name)
    assert (report["filled"], report["length"], report["judge"]) == (13, 16, "tiny-causal")
    assert set(report["environment"]["models"]) == {"model", "judge"}
    assert evaluate(folder, *options) == 0
    first, head, *rows = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first == "2 texts, 3 of 16 tokens given; judge tiny-causal; means +- standard errors"
    assert [row.split()[0] for row in rows] == ["sequential", "assd", "one_call", "ngram"]
    assert "tokens/round" in head


def test_stories(folder, filler, capsys):
    pytest.importorskip("rouge_score")
    options = [
        "--stories",
        "DATA/stories.csv",
        "--hidden",
        "3",
        "--num-samples",
        "2",
        "--limit",
        "2",
        "--method",
        "sequential",
    ]
    assert evaluate(folder, *options) == 0
    words, line = capsys.readouterr().out.rstrip("\n").split("\n")
    stories = read_stories(folder / "stories.csv")[:2]
    scores = infill_stories(*filler, stories, hidden=3, num_samples=2, method="sequential", progress=False)
    assert words == str(scores)
    assert line.startswith(f"{scores.cost['tokens']} tokens, {scores.cost['target_calls']} calls")
    assert evaluate(folder, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["fillings"] == scores.fillings


def test_code(folder, filler, capsys, monkeypatch):
    executed = []
    monkeypatch.setattr(
        "pyquiet.evaluation.code_infilling.passes", lambda *a: executed.append(a[2]) or len(executed) % 2
    )
    options = ["--humaneval", "DATA/code.jsonl", "--limit", "2", "--num-samples", "2", "--method", "assd", "--k", "3"]
    assert evaluate(folder, *options, "--output", "DATA/samples.jsonl") == 0
    assert executed == []
    problems = read_code_problems(folder / "code.jsonl")[:2]
    scores = infill_code(*filler, problems, num_samples=2, method="assd", k=3, progress=False)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]
    assert lines == [{"task_id": "Line/0", "completion": text} for texts in scores.fillings for text in texts]
    assert capsys.readouterr().out.split("\n")[0] == str(scores)
    more = ["--execute", "--timeout", "9", "--gap-tokens", "2-3", "--json"]
    assert evaluate(folder, *options, *more) == 0
    report = json.loads(capsys.readouterr().out)
    assert executed == [9.0] * 4
    assert report["pass@1"] == {"mean": 0.5, "standard_error": 0.0}
    assert report["tokens"] == 4 * 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--table", "/no/such/file"], "/no/such/file"),
        (["--table", "DATA/text.txt", "--length", "10000"], "--limit 16: the texts hold 0 pieces"),
        (["--table", "DATA/text.txt", "--judge", "/no/judge"], "--judge /no/judge"),
        (["--table", "DATA/text.txt", "--limit", "0"], "--limit"),
        (["--table", "DATA/text.txt", "--num-samples", "2"], "--num-samples has no use without --stories"),
        (["--stories", "DATA/text.txt"], "no file of stories"),
        (["--stories", "DATA/stories.csv", "--method", "assd", "ngram"], "--table alone"),
        (["--humaneval", "DATA/text.txt"], "line 1: not a problem"),
        (["--humaneval", "DATA/code.jsonl", "--output", "/no/folder/x"], "no folder /no/folder"),
        (["--stories", "DATA/text.txt", "--output", "x"], "--output has no use without --humaneval"),
        (["--humaneval", "DATA/code.jsonl", "--gap-tokens", "x"], "'x'"),
        (["--humaneval", "DATA/code.jsonl", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_errors_of_evaluation(folder, capsys, arguments, named):
    assert evaluate(folder, *arguments) == 2
    assert named in error_line(capsys)


def test_the_embedded_model_is_the_default(capsys):
    arguments = ["--text", "Once upon a time there was a little ___2___.", "--temperature", "0"]
    assert main(["infill", *arguments]) == 0
    text = capsys.readouterr().out
    assert main(["infill", *arguments, "--model", "tiny-any-subset"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == text.split("\n")[0]
    assert text.startswith("Once upon a time there was a little [")
