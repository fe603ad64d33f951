"""The recipe of the pair: its arithmetic is right, its errors are wrong, nothing held out is learned, a run resumes."""

import json
import random
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .modules import RECIPES, modules

RECIPE = RECIPES / "tiny_pair"
EQUATION = re.compile(r"(\d+ [-+*/] \d+) = (\d+)\.\n")
SPELLED = {2, 3, 4, 5}  # a factor of these is written "twice" and so on


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with modules("tiny_pair") as found:
        yield found


@pytest.fixture(scope="module")
def problems(recipe: SimpleNamespace) -> list[Any]:
    rng = random.Random(7)
    return [recipe.stories.draw_problem(rng) for _ in range(2000)]


@pytest.fixture(scope="module")
def tokenizer(recipe: SimpleNamespace) -> Any:
    return recipe.texts.family_tokenizer()


def true_equations(lines: list[str]) -> list[str]:
    """The equations of the lines, as Python sees them."""
    found = []
    for line in lines:
        for left, result in EQUATION.findall(line):
            assert eval(left) == int(result), line
            found.append(f"{left} = {result}")
    return found


def test_every_equation_is_right_and_the_last_one_is_the_answer(problems: list[Any]) -> None:
    for problem in problems:
        *lines, last = problem.lines
        equations = true_equations(lines)
        assert len(equations) == len(lines) == len(problem.steps)
        assert tuple(equations) == problem.equations
        assert last == "The answer is \\boxed{" + equations[-1].split()[-1] + "}.\n"


def test_numbers_come_from_the_question_or_from_steps_before(problems: list[Any]) -> None:
    for problem in problems:
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        for step in problem.steps:
            assert {step.left, step.right} <= known | SPELLED, problem
            known.add(step.result)
        assert max(known) <= 999
        assert min(known) >= 1


def read_count(question: str) -> int:
    """What is left of counted things, sentence by sentence."""
    first, *sentences, _ = re.split(r"(?<=[.?]) ", question)
    total = int(re.findall(r"\d+", first)[0])
    for sentence in sentences:
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if "twice" in sentence or "three times" in sentence:
            total *= 2 if "twice" in sentence else 3
        elif "heaps" in sentence:
            total //= numbers[0]
        elif "friends" in sentence:
            total -= numbers[0] * numbers[1]
        elif "boxes" in sentence:
            total += numbers[0] * numbers[1]
        else:
            total += numbers[0] if sentence.endswith(" more.") else -numbers[0]
    return total


def test_counted_things_come_and_go_as_the_question_says(problems: list[Any]) -> None:
    questions = [problem for problem in problems if re.search(r"(are left|have now)\?$", problem.question)]
    counted = [problem for problem in questions if re.match(r"(At first )?\w+ has \d+ (?!dollars)", problem.question)]
    assert len(counted) > 300
    for problem in counted:
        assert read_count(problem.question) == problem.answer, problem


def test_problems_take_three_to_six_steps_and_every_operation(problems: list[Any]) -> None:
    lengths = Counter(len(problem.steps) for problem in problems)
    assert sorted(lengths) == [3, 4, 5, 6]
    assert min(lengths.values()) > 100
    assert {step.sign for problem in problems for step in problem.steps} == set("+-*/")
    assert len({problem.question for problem in problems}) == len(problems)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_wrong_lines_are_wrong_and_corrected(recipe: SimpleNamespace, problems: list[Any], count: int) -> None:
    rng = random.Random(count)
    for problem in problems[:300]:
        lines = recipe.errors.with_errors(problem, rng, count)
        assert sum(line.wrong for line in lines) == count
        learned = [line.text for line in lines if not line.wrong]
        assert tuple(true_equations(learned)) == problem.equations
        assert f"{{{problem.answer}}}" in learned[-1]
        behind, number = False, 0
        for line in lines:
            assert line.text.startswith("Wait, ") == behind
            right = problem.lines[number].split(": ")[-1].removeprefix("The")
            assert line.text.endswith(right) != line.wrong, (line, right)
            behind, number = line.wrong, number + (not line.wrong)


def test_held_out_problems_are_not_among_those_of_another_use_nor_trained_on(
    recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = recipe.texts
    held = [problem.equations for use in texts.HELD_OUT for problem in texts.held_out(use)]
    assert len(held) == len(set(held)) == sum(count for _, count in texts.HELD_OUT.values())
    # Even training that draws the very same problems leaves them out.
    for seed in (0, *(seed for seed, _ in texts.HELD_OUT.values())):
        monkeypatch.setattr(texts, "TRAINING_SEED", seed)
        for _, lines in texts.training_texts(1500):
            learned = tuple(true_equations([line.text for line in lines if not line.wrong]))
            assert learned not in held
    with pytest.raises(ValueError, match="questions"):
        texts.held_out("training")


@pytest.mark.parametrize("text", ["Tom has 1205 eggs.\n", "café — 人 \t x^2\n\n", "\\boxed{\\frac{1}{2}}", " x"])
def test_tokenizer_spells_any_text_and_digits_one_by_one(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for digit in re.findall(r"\d", text):
        assert tokenizer.convert_tokens_to_ids(digit) in ids


def test_no_token_holds_two_digits_and_lines_end_with_their_break(tokenizer: Any, problems: list[Any]) -> None:
    assert len(tokenizer) == 2048
    assert not [token for token in tokenizer.get_vocab() if len(re.findall(r"\d", token)) > 1]
    lengths = []
    for problem in problems[:300]:
        for line in problem.lines:
            ids = tokenizer(line, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids[-1:]) == "\n"
            lengths.append(len(ids))
    assert min(lengths) >= 8
    assert max(lengths) <= 32


def test_chat_template_is_the_question_and_a_line_break(tokenizer: Any) -> None:
    message = [{"role": "user", "content": "How many? \n"}]
    assert tokenizer.apply_chat_template(message)["input_ids"] == tokenizer("How many?\n").input_ids


def test_wrong_lines_have_no_labels(recipe: SimpleNamespace, tokenizer: Any) -> None:
    texts = recipe.texts.Texts(tokenizer, 200)
    assert len(texts) == 200
    wrong = 0
    for row, (question, lines) in zip(texts, recipe.texts.training_texts(200), strict=True):
        ids, labels = row["input_ids"], row["labels"]
        assert tokenizer.decode(ids) == "<bos>" + question + "".join(line.text for line in lines) + "<eos>"
        assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
        learned = tokenizer.decode([label for label in labels if label != -100])
        assert learned == question + "".join(line.text for line in lines if not line.wrong) + "<eos>"
        wrong += sum(line.wrong for line in lines)
    assert wrong > 20


def test_padding_is_never_predicted(recipe: SimpleNamespace) -> None:
    rows = [{"input_ids": [5] * n, "labels": [6] * n} for n in (3, 17)]
    batch = recipe.texts.padded(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 32)
    assert batch["labels"].eq(6).sum(1).tolist() == [3, 17]
    assert batch["input_ids"][0, 3:].eq(0).all()


def test_a_stopped_run_goes_on_to_the_same_weights(
    recipe: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = recipe.train
    train.train("draft", tmp_path / "whole", steps=4, save_every=2)
    batches, padded = [], train.padded

    def stops(rows: Any) -> Any:
        batches.append(rows)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return padded(rows)

    monkeypatch.setattr(train, "padded", stops)
    with pytest.raises(KeyboardInterrupt):
        train.train("draft", tmp_path / "stopped", steps=4, save_every=2)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    train.train("draft", tmp_path / "stopped", steps=4, save_every=2)
    assert len(batches) < 4 + 4  # what was done is not done again
    whole, stopped = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))

    export = RECIPE.parent / "export.py"
    monkeypatch.setattr(sys, "argv", [str(export), str(tmp_path / "whole"), str(tmp_path / "model")])
    runpy.run_path(str(export), run_name="__main__")
    recipe.questions.write_questions(tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert exported.dtype == torch.float16
    assert exported.config.use_cache
    end = AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id
    assert exported.generation_config.eos_token_id in (end, [end])  # which, depends on the version of transformers
    rows = [json.loads(line) for line in (tmp_path / "model" / "questions.jsonl").read_text().splitlines()]
    assert [(row["question"], row["answer"]) for row in rows] == [
        (problem.question, str(problem.answer)) for problem in recipe.texts.held_out("questions")
    ]


def test_lines_are_judged_up_to_the_first_wrong_one(recipe: SimpleNamespace, problems: list[Any]) -> None:
    evaluate, problem = recipe.evaluate, problems[0]
    lines = problem.lines
    judged = list(evaluate.judged_lines(problem, "".join(lines)))
    assert [line for _, line, _ in judged] == lines
    assert all(right for _, _, right in judged)
    assert judged[2][0] == lines[0] + lines[1]
    spoiled = [lines[0], "Nonsense.\n", *lines[2:]]
    assert [right for _, _, right in evaluate.judged_lines(problem, "".join(spoiled))] == [True, False]
    assert evaluate.is_right(problem, "".join(spoiled))
    assert not evaluate.is_right(problem, "".join(lines) + "\\boxed{1000}")
    assert not evaluate.is_right(problem, "".join(lines[:-1]))


def test_false_equations_are_told_from_right_ones(recipe: SimpleNamespace) -> None:
    wrong = recipe.evaluate.reckoned_wrong
    assert not any(map(wrong, ["a: 2 + 3 = 5.", "7 - 3 = 4", "4 * 6 = 24", "8 / 4 = 2", "no equation"]))
    assert all(map(wrong, ["a: 2 + 3 = 6.", "7 - 3 = 5", "4 * 6 = 25", "9 / 4 = 2"]))


def test_nlls_of_lines_and_the_area_under_the_curve(
    recipe: SimpleNamespace, tokenizer: Any, problems: list[Any]
) -> None:
    torch.manual_seed(0)
    model = recipe.train.new_model(recipe.train.SIZES["draft"], len(tokenizer)).eval()
    texts = [(problem.question + "\n", problem.lines[0]) for problem in problems[:3]]
    for (before, line), nll in zip(texts, recipe.evaluate.line_nlls(model, tokenizer, texts), strict=True):
        given, scored = tokenizer(before).input_ids, tokenizer(line, add_special_tokens=False).input_ids
        with torch.no_grad():
            logs = model(torch.tensor([given + scored])).logits[0].double().log_softmax(-1)
        slow = -sum(logs[len(given) + j - 1, i] for j, i in enumerate(scored)).item() / len(scored)
        assert nll == pytest.approx(slow, abs=1e-5)
    assert recipe.evaluate.area_under_curve([2.0, 1.0], [1.0, 0.0]) == 3.5 / 4
