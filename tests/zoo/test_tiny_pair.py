"""The shipped draft and target solve word problems, the target more of them, and spell with the same tokenizer."""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyquiet
from pyquiet import zoo

FOLDERS = {name: Path(zoo.__file__).parent / name for name in ("tiny-draft", "tiny-target")}
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_pair"
NUMBER = 40


def rows(use: str) -> list[dict[str, str]]:
    lines = (FOLDERS["tiny-target"] / f"{use}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def written() -> dict[str, list[str]]:
    """Greedy solutions of the first shipped questions, by model."""
    found = {}
    for name in FOLDERS:
        model, tokenizer = pyquiet.load(name)
        tokenizer.padding_side = "left"
        prompts = [row["question"] + "\n" for row in rows("questions")[:NUMBER]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        found[name] = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :])
    return found


def right(solutions: list[str]) -> int:
    boxes = [re.findall(r"\\boxed\{(\d+)\}", solution) for solution in solutions]
    answers = [row["answer"] for row in rows("questions")]
    return sum(bool(box) and box[-1] == answer for box, answer in zip(boxes, answers, strict=False))


def test_they_have_the_tokenizer_of_the_family_and_end_by_themselves() -> None:
    family = (Path(zoo.__file__).parent / "tiny-causal" / "tokenizer.json").read_bytes()
    for name, folder in FOLDERS.items():
        assert (folder / "tokenizer.json").read_bytes() == family
        model, tokenizer = pyquiet.load(name)
        assert model.config.use_cache
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
        message = [{"role": "user", "content": "How many?"}]
        assert tokenizer.apply_chat_template(message)["input_ids"] == tokenizer("How many?\n").input_ids


def test_the_target_solves_nearly_all_and_the_draft_some(written: dict[str, list[str]]) -> None:
    assert right(written["tiny-target"]) >= 0.8 * NUMBER
    assert 0.1 * NUMBER <= right(written["tiny-draft"]) < right(written["tiny-target"])


def test_solutions_are_lines_of_one_step_and_an_answer(written: dict[str, list[str]]) -> None:
    for solutions in written.values():
        for solution in solutions:
            *lines, last = solution.partition("<eos>")[0].removesuffix("\n").split("\n")
            assert re.fullmatch(r"(The|Wait, the) answer is \\boxed\{\d+\}\.", last), solution
            assert all(re.fullmatch(r".*(: |Wait, )\d+ [-+*/] \d+ = \d+\.|Wait, the answer.*", x) for x in lines), lines


def test_scores_of_the_target_tell_a_wrong_result(written: dict[str, list[str]]) -> None:
    model, tokenizer = pyquiet.load("tiny-target")
    nlls: dict[int, list[float]] = {0: [], 1: []}
    for row, solution in zip(rows("questions")[:20], written["tiny-target"], strict=False):
        words, result = solution.split("\n")[0].removesuffix(".").rsplit(" ", 1)
        given = tokenizer(row["question"] + "\n").input_ids
        for off, found in nlls.items():
            line = tokenizer(f"{words} {int(result) + off}.\n", add_special_tokens=False).input_ids
            labels = torch.tensor([[-100] * len(given) + line])
            with torch.inference_mode():
                found.append(model(torch.tensor([given + line]), labels=labels).loss.item())
    assert max(nlls[0]) < 0.1 < 0.15 < min(nlls[1])


def test_questions_are_those_that_the_recipe_holds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if not RECIPE.is_dir():
        pytest.skip(f"no recipe folder {RECIPE}")
    monkeypatch.syspath_prepend(RECIPE)
    for name in [file.stem for file in RECIPE.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import texts

    for use, count in (("questions", 64), ("calibration", 128)):
        found = rows(use)
        assert len(found) == len({row["id"] for row in found}) == count
        held_out: list[Any] = texts.held_out(use)
        assert [(row["question"], row["answer"]) for row in found] == [(p.question, str(p.answer)) for p in held_out]
    shipped = {row["question"] for use in ("questions", "calibration") for row in rows(use)}
    assert len(shipped) == 192
    assert not [question for question, _ in texts.training_texts(3000) if question.strip() in shipped]
    for name in [file.stem for file in RECIPE.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", FOLDERS)
def test_any_text_can_be_spelled(name: str) -> None:
    _, tokenizer = pyquiet.load(name)
    generator = random.Random(0)
    for _ in range(20):
        text = "".join(
            chr(generator.choice((generator.randrange(32, 127), generator.randrange(0x3B1, 0x4E00)))) for _ in range(30)
        )
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
