"""The recipe of the pointer chase: its texts are what they should be, its stages run, resume and can be loaded again.

That thoughts are learned is what `recipes/pointer_chase/run.py --check` shows, in minutes.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyquiet

from .modules import RECIPES, modules

RECIPE = RECIPES / "pointer_chase"


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with modules("pointer_chase") as found:
        yield found


@pytest.fixture(scope="module")
def settings(recipe: SimpleNamespace) -> Any:
    return recipe.stages.Settings(
        pretraining_steps=6, pretraining_rows=8, adaptation_steps=3, adaptation_rows=4, evaluation_rows=8
    )


@pytest.fixture
def thinker(recipe: SimpleNamespace) -> Any:
    torch.manual_seed(1)
    return recipe.stages.thinking(recipe.stages.new_model(), 0).eval()


def queries(words: list[str]) -> tuple[dict[str, str], list[tuple[str, str, list[str], str]]]:
    """A text taken apart by its words: f, and (symbol, mark, chain or [], answer) of each query."""
    pairs, rest, found = words[:6], words[6:], []
    f = dict(pair.split(">") for pair in pairs)
    assert sorted(f) == sorted(f.values()) == list("abcdef")
    while rest:
        symbol, mark, *rest = rest
        chain: list[str] = []
        if rest[0] == "---":
            _, *chain, dashes = rest[:4]
            assert dashes == "---"
            rest = rest[4:]
        answer, *rest = rest
        found.append((symbol, mark, chain, answer))
    return f, found


def test_texts_ask_and_answer(recipe: SimpleNamespace) -> None:
    chase, forms, right, rows = recipe.chase, Counter(), [], 24
    for step in range(100):
        texts = chase.mixed_texts(0, step, rows)
        kinds = []
        for row, ids in enumerate(texts.ids.tolist()):
            f, found = queries([chase.WORDS[i] for i in ids])
            for q, (symbol, mark, chain, answer) in enumerate(found):
                three = f[f[f[symbol]]]
                assert answer == (f[symbol] if mark == "?1" else three)
                assert chase.WORDS[texts.answers[row, q]] == three
                assert [chase.WORDS[i] for i in texts.chains[row, q]] == [f[symbol], f[f[symbol]]]
                assert chase.WORDS[ids[texts.marks[q]]] == mark
                if chain:
                    assert mark == "?3"
                    right.append(chain == [f[symbol], f[f[symbol]]])
            kinds.append([(mark, bool(chain)) for _, mark, chain, _ in found])
        assert len(kinds[0]) == 4
        assert all(kind == kinds[0] for kind in kinds)
        forms.update(kinds[0])
    for kind, share in {("?1", False): 1 / 2, ("?3", False): 1 / 4, ("?3", True): 1 / 4}.items():
        assert abs(forms[kind] / 400 - share) < 4 * math.sqrt(share * (1 - share) / 400)
    share = 1 / 2 + 1 / 2 / 36  # noise can be right too
    assert abs(sum(right) / len(right) - share) < 4 * math.sqrt(share * (1 - share) / len(right))


def test_permutation_order_and_symbols_are_uniform(recipe: SimpleNamespace) -> None:
    texts = recipe.chase.direct_texts(recipe.chase.Use.ADAPTATION, 0, 0, 6000)
    counts = texts.ids[:, 0].bincount(minlength=36)  # the first pair: any of 36
    assert (counts[:36] - 6000 / 36).abs().max() < 5 * math.sqrt(6000 / 36)
    asked = texts.ids[:, texts.marks - 1].flatten().bincount()[recipe.chase.FIRST_SYMBOL :]
    assert (asked - 4000).abs().max() < 5 * math.sqrt(4000)


def test_texts_depend_on_use_seed_and_step_alone(recipe: SimpleNamespace) -> None:
    Use, draw = recipe.chase.Use, recipe.chase.direct_texts
    first = draw(Use.ADAPTATION, 0, 0, 4).ids
    assert torch.equal(first, draw(Use.ADAPTATION, 0, 0, 4).ids)
    for other in ((Use.EVALUATION, 0, 0), (Use.ADAPTATION, 1, 0), (Use.ADAPTATION, 0, 1)):
        assert not torch.equal(first, draw(*other, 4).ids)


def test_targets_of_the_pretraining(recipe: SimpleNamespace) -> None:
    texts = recipe.chase.mixed_texts(0, 0, 5)
    assert (texts.after_pairs[:, :6] == -100).all()
    assert torch.equal(texts.after_pairs[:, 6:], texts.ids[:, 6:])


def test_evaluation(recipe: SimpleNamespace, thinker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = recipe.chase.direct_texts(recipe.chase.Use.EVALUATION, 0, 0, 8)
    labels = torch.full_like(texts.ids, -100)
    labels[:, [8, 11, 14, 17]] = texts.answers
    assert torch.equal(labels[labels != -100], texts.ids[labels != -100])
    loss = thinker.base(texts.ids, labels=labels).loss.item()
    scores = recipe.stages.evaluate(thinker, rows=8)
    assert scores.base == pytest.approx(loss, abs=1e-5)
    assert scores.mixed == pytest.approx(scores.base, abs=1e-5)  # a fresh model does not use its thoughts
    assert scores.averaged == pytest.approx(scores.base, abs=1e-5)
    assert scores.weight == 0
    think = thinker.think_at_every_token

    def knowing(*args: Any, **kwargs: Any) -> Any:
        thoughts = think(*args, **kwargs)
        thoughts.tokens[:] = -1
        thoughts.tokens[:, texts.marks, 0] = texts.chains
        thoughts.tokens[:, texts.marks, 1, 0] = texts.chains[..., 0]
        thoughts.mixed_log_probs[:] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
        return thoughts

    monkeypatch.setattr(thinker, "think_at_every_token", knowing)
    scores = recipe.stages.evaluate(thinker, rows=8)
    assert scores.chain == 1 / 4  # the first thought of four; half of a chain is none
    assert scores.averaged == pytest.approx(-math.log(0.25), abs=1e-6)
    assert scores.mixed == pytest.approx(-math.log(0.1 * 0.2 * 0.3 * 0.4) / 4, abs=1e-6)


def test_pretraining_is_repeatable_and_learns(recipe: SimpleNamespace, settings: Any) -> None:
    texts = recipe.chase.mixed_texts(0, 1000, 32)

    def trained() -> Any:
        return recipe.stages.pretrain(settings, quiet=True)

    model, again = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    torch.manual_seed(0)
    fresh = recipe.stages.new_model()
    losses = [m(texts.ids, labels=texts.after_pairs).loss.item() for m in (fresh, model)]
    assert losses[1] < losses[0] - 0.01


@pytest.mark.parametrize("name", ["plain", "no-reinforce", "full", "weight-1e6"])
def test_adaptation(recipe: SimpleNamespace, settings: Any, name: str) -> None:
    torch.manual_seed(0)
    base = recipe.stages.new_model()
    before = {key: value.clone() for key, value in recipe.stages.thinking(base, 0).state_dict().items()}
    model = recipe.stages.adapt(base, recipe.stages.VARIANTS[name], 0, settings, quiet=True)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    own = {"mixing_head", "start_embedding", "end_embedding"}
    assert changed == ({"base"} if name == "plain" else {"base"} | own)


def test_work_goes_on_where_it_stopped(
    recipe: SimpleNamespace, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = recipe.run, tmp_path / "work"
    work = run.Work(folder, settings, quiet=True)
    trained = work.thinker("full", 0)
    assert len(work.misses()) == 3  # nothing learned in three steps, and two variants are not there
    with monkeypatch.context() as patch:
        for stage in ("pretrain", "adapt"):
            patch.setattr(run, stage, lambda *args, **kwargs: pytest.fail("trained again"))
        again = run.Work(folder, settings, quiet=True)
        loaded = again.thinker("full", 0)
    assert again.table() == work.table()
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), loaded.parameters(), strict=True))
    work.thinker("full", 1)
    assert [line.count(" / ") for line in work.table().splitlines()] == [0, 0, 0, 3]
    with pytest.raises(ValueError, match="another work folder"):
        run.Work(folder, recipe.stages.Settings())


def test_check_is_about_every_seed(recipe: SimpleNamespace, settings: Any, tmp_path: Path) -> None:
    good = {"plain-0": 0.8, "plain-1": 0.8, "no-reinforce-0": 0.45, "no-reinforce-1": 0.4, "full-0": 0.1, "full-1": 0.1}
    for changed, missed in (
        ({}, ""),
        ({"full-1": 0.2}, "full"),
        ({"no-reinforce-0": 0.7}, "no"),
        ({"plain-1": 0.6}, "p"),
    ):
        work = recipe.run.Work(tmp_path, settings)
        work.results["runs"] = {key: {"nll": nll} for key, nll in (good | changed).items()}
        assert [miss[: len(missed)] for miss in work.misses()] == ([missed] if missed else [])


def test_a_thinker_is_a_model_folder(recipe: SimpleNamespace, thinker: Any, tmp_path: Path) -> None:
    folder = tmp_path / "thinker"
    recipe.stages.export(thinker, folder)
    recipe.stages.export(thinker, folder)  # over the old one
    assert [path.name for path in tmp_path.iterdir()] == ["thinker"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, pyquiet.QuietStarForCausalLM)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), thinker.parameters(), strict=True))
    words = "a>b b>a c>c f>d d>e e>f a ?3 --- b"
    ids = tokenizer(words).input_ids
    assert [recipe.chase.WORDS[i] for i in ids] == words.split()
    assert tokenizer.decode(ids) == words


@pytest.mark.parametrize("objective", ["nll", "released", "paper", "kl", "advantage"])
def test_no_thought_stage_changes_the_student_alone(
    recipe: SimpleNamespace, settings: Any, thinker: Any, objective: str
) -> None:
    with torch.no_grad():
        thinker.mixing_head[-1].weight.fill_(0.1)
        thinker.base.lm_head.weight.mul_(0.5)
    kept = [p.clone() for p in thinker.parameters()]
    torch.manual_seed(5)
    student = recipe.stages.new_model()
    before = [p.clone() for p in student.parameters()]
    recipe.no_thought.distil(student, thinker, objective, settings, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, thinker.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_results_are_written_as_json(recipe: SimpleNamespace, settings: Any, tmp_path: Path) -> None:
    work = recipe.run.Work(tmp_path, settings, quiet=True)
    work.pretrained()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["runs"]["before"]["nll"] == written["runs"]["before"]["base"]
    assert set(written["runs"]["before"]) >= {"nll", "base", "mixed", "averaged", "chain", "seconds"}
