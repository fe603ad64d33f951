"""Stories and code filled in by a small random XLNet: what is hidden, scored, executed and refused."""

import gzip
import json
import time

import pytest
import torch

import pyquiet
from pyquiet.evaluation import infill_code, infill_stories, read_code_problems, read_stories
from pyquiet.evaluation.code_infilling import CodeProblem, passes
from pyquiet.gaps import Codec

from ..any_subset.models import random_xlnet
from ..any_subset.tokenizers import small_xlnet_tokenizer

STORIES = [
    ["Tom had a dog.", "It was big.", "The dog ran away.", "Tom was sad.", "The dog came home."],
    ["Ann sat down.", "She was hot.", "Children drank some cold water.", "It was good.", "Ann slept."],
]
CLOZE = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4"
QUIZ = "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding"
SOLUTION = "    return a + b\n"
PROBLEM = CodeProblem(
    "Line/0", "def add(a, b):\n", "\n\nx = 1\n", SOLUTION, "def check(f):\n    assert f(1, 2) == 3\n", "add"
)


@pytest.fixture(scope="module")
def tokenizer():
    return pyquiet.load("tiny-causal")[1]


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_xlnet(vocabulary=len(tokenizer))


def test_stories_are_read_from_both_files(tmp_path):
    rows = "\n".join(f"{i},t,{','.join(story)}" for i, story in enumerate(STORIES))
    (tmp_path / "roc.csv").write_text(f"storyid,storytitle,{','.join(f'sentence{i}' for i in range(1, 6))}\n{rows}\n")
    assert read_stories(tmp_path / "roc.csv") == STORIES
    first, second = STORIES
    rows = [",".join(["x", *first, "No.", "1"]), ",".join(["y", *second[:4], "No.", second[4], "2"])]
    (tmp_path / "cloze.csv").write_text("\n".join([f"{CLOZE},{QUIZ}", *rows]))
    assert read_stories(tmp_path / "cloze.csv") == STORIES


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", f"{CLOZE},{QUIZ}\nx,a,b,c,d,e,f,third\n", f"{CLOZE},{QUIZ}\nx,a\n"])
def test_other_files_are_no_stories(tmp_path, text):
    (tmp_path / "file.csv").write_text(text)
    with pytest.raises(ValueError, match="is no file of stories"):
        read_stories(tmp_path / "file.csv")


def words(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def rouge_1(truth, found):
    """F-measure in percent of the words in common."""
    truth, found = words(truth), words(found)
    common = sum(min(truth.count(word), found.count(word)) for word in {*truth})
    return 200 * common / (len(truth) + len(found)) if truth and found else 0.0


@pytest.mark.parametrize(("hidden", "missing"), [(1, slice(2, 3)), (3, slice(1, 4))])
def test_stories_are_filled_and_scored(model, tokenizer, hidden, missing):
    pytest.importorskip("rouge_score")
    options = {"hidden": hidden, "num_samples": 2, "progress": False, "method": "sequential", "seed": 4}
    scores = infill_stories(model, tokenizer, STORIES, **options)
    codec, expected = Codec(tokenizer), []
    for number, story in enumerate(STORIES):
        before, middle, after = (" ".join(story[x]) for x in (slice(missing.start), missing, slice(missing.stop, None)))
        parts = [codec.encode(part) for part in (before, f" {middle}", f" {after}")]
        ids = torch.tensor([[tokenizer.bos_token_id, *parts[0], *parts[1], *parts[2]]])
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        mask[:, 1 + len(parts[0]) : -len(parts[2])] = True
        assert int(mask.sum()) == len(parts[1])
        for trial in range(2):
            out = pyquiet.infill(
                model, ids, mask=mask, method="sequential", seed=4, banned=codec.banned(len(tokenizer)),
                sequence_ids=torch.tensor([2 * number + trial]),
            )  # fmt: skip
            expected.append((middle, codec.decode(out.tokens[mask].tolist()).strip()))
    assert [text for texts in scores.fillings for text in texts] == [found for _, found in expected]
    assert scores.measures["ROUGE-1"].flatten().tolist() == pytest.approx([rouge_1(*pair) for pair in expected])
    values = scores.measures["ROUGE-1"].mean(1)
    assert scores.estimates()["ROUGE-1"].mean == pytest.approx(values.mean().item())
    assert scores.estimates()["ROUGE-1"].error == pytest.approx((values[0] - values[1]).abs().item() / 2)
    assert (
        scores.cost["tokens"]
        == scores.cost["target_calls"]
        == sum(2 * len(codec.encode(" " + " ".join(story[missing]))) for story in STORIES)
    )
    assert infill_stories(model, tokenizer, STORIES, **options, batch_size=3).fillings == scores.fillings


def test_the_truth_has_the_best_score(model, tokenizer, monkeypatch):
    pytest.importorskip("rouge_score")
    truth = [story[2] for story in STORIES]
    monkeypatch.setattr("pyquiet.evaluation.infilling.fill_all", lambda *_, **__: ([f" {text}" for text in truth], {}))
    scores = infill_stories(model, tokenizer, STORIES, progress=False)
    assert {name: estimate.mean for name, estimate in scores.estimates().items()} == dict.fromkeys(
        scores.measures, 100.0
    )
    assert [*scores.measures] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]


def test_options_out_of_range(model, tokenizer):
    for option in ({"hidden": 2}, {"num_samples": 0}, {"batch_size": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            infill_stories(model, tokenizer, STORIES, progress=False, **option)
    with pytest.raises(ValueError, match="samples"):
        infill_code(model, tokenizer, [PROBLEM], num_samples=0)


def test_problems_are_read_packed_or_not(tmp_path):
    lines = json.dumps(PROBLEM.__dict__ | {"more": 1}) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_code_problems(tmp_path / "a.jsonl") == read_code_problems(tmp_path / "a.jsonl.gz") == [PROBLEM]
    whole = {name: value for name, value in PROBLEM.__dict__.items() if name != "suffix"}
    (tmp_path / "b.jsonl").write_text(json.dumps(whole))
    assert read_code_problems(tmp_path / "b.jsonl")[0].suffix == ""
    for text, named in ((lines + "{}", "line 2: not a problem"), ("", "no problems"), ("[1]", "line 1")):
        (tmp_path / "c.jsonl").write_text(text)
        with pytest.raises(ValueError, match=named):
            read_code_problems(tmp_path / "c.jsonl")


def test_completions_have_as_many_tokens_as_the_solution_or_as_told(model, tokenizer):
    codec = Codec(tokenizer)
    options = {"progress": False, "method": "assd", "k": 3}
    scores = infill_code(model, tokenizer, [PROBLEM] * 2, num_samples=2, **options)
    assert scores.cost["tokens"] == 4 * len(codec.encode(SOLUTION))
    assert [len(texts) for texts in scores.fillings] == [2, 2]
    assert len({text for texts in scores.fillings for text in texts}) == 4
    assert [*scores.measures] == ["exact match"]
    assert infill_code(model, tokenizer, [PROBLEM], lengths=range(2, 4), **options).cost["tokens"] == 5


def test_exact_matches_and_passes_are_counted(model, tokenizer, monkeypatch):
    found = [SOLUTION, "    return b + a\n", "    return a\n", SOLUTION]
    monkeypatch.setattr("pyquiet.evaluation.code_infilling.fill_all", lambda *_, **__: (found, {}))
    scores = infill_code(model, tokenizer, [PROBLEM] * 2, num_samples=2, execute=True, progress=False)
    assert scores.measures["exact match"].tolist() == [[1, 0], [0, 1]]
    assert scores.measures["pass@1"].tolist() == [[1, 1], [0, 1]]
    assert scores.to_dict()["pass@1"]["mean"] == 0.75


def test_nothing_is_executed_unless_asked(model, tokenizer, monkeypatch):
    monkeypatch.setattr("pyquiet.evaluation.code_infilling.passes", lambda *_: pytest.fail("executed"))
    infill_code(model, tokenizer, [PROBLEM], progress=False, method="sequential")


def test_code_of_a_tokenizer_without_white_space_comes_back_with_it():
    tokenizer = small_xlnet_tokenizer()
    model = random_xlnet(vocabulary=len(tokenizer), scale=0.2)
    torch.nn.init.zeros_(model.lm_loss.bias)  # all tokens come
    problem = CodeProblem("0", "def f(a):\n", "  return a\n", "  a = 1\n", "", "f")
    scores = infill_code(model, tokenizer, [problem], num_samples=30, progress=False, method="sequential")
    text = "".join(scores.fillings[0])
    assert all(space in text for space in ("\n", "\t", "  "))
    assert not any(special in text for special in tokenizer.all_special_tokens)


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        (SOLUTION, True),
        ("    return a - b\n", False),
        ("    return (\n", False),
        ("    import os\n    os._exit(0)\n", False),
        ("    raise SystemExit\n", False),
        ("    open('big', 'w').write('x' * 2**21)\n    return a + b\n", False),
        ("    input()\n    return a + b\n", False),
        ("    print('x' * 2**20)\n    return a + b\n", True),
    ],
)
def test_a_program_passes_only_where_its_test_ends_well(completion, passed):
    assert passes(PROBLEM, completion, timeout=20) is passed


def test_a_program_ends_at_its_time_with_all_that_it_started(tmp_path):
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    completion = (
        f"    import subprocess, sys\n    subprocess.Popen([sys.executable, '-c', {child!r}])\n    while True: pass\n"
    )
    began = time.monotonic()
    assert not passes(PROBLEM, completion, timeout=1.0)
    time.sleep(max(0.0, began + 3.5 - time.monotonic()))
    assert not late.exists()


def test_the_benchmark_itself(shared):
    problems = read_code_problems(shared / "data/infilling/HumanEval-SingleLineInfilling.jsonl.gz")
    assert len(problems) == 1033
    for problem in problems[:2]:
        assert passes(problem, problem.canonical_solution, timeout=30)
        assert not passes(problem, "    return None\n", timeout=30)
    assert read_code_problems(shared / "data/humaneval/HumanEval.jsonl.gz")[0].suffix == ""
    stories = read_stories(shared / "data/storycloze/spring2016_val.csv")
    assert len(stories) == 1871
    assert stories[0][4] == "He is happy now."
