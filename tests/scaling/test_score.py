"""Scores of chunks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from pyquiet.scaling.backends.base import Prompt, RefusedError, Scored, Usage
from pyquiet.scaling.backends.codec import HFCodec
from pyquiet.scaling.records import Question
from pyquiet.scaling.score import ChunkView, Graded, JudgeGrade, MeanEntropy, MeanNLL, Reward, TailNLL

from .byte_tokens import byte_tokenizer

LOG_PROBS = (-1.0, -0.5, -3.0, -0.25)
USAGE, COST = Usage(9, 5, 0), Usage(27, 10, 1)
QUESTION = Question("q", "2+2?")


class Told:
    """A target that says what it was told to say, and keeps what it was asked."""

    def __init__(self, log_probs: Sequence[float] = LOG_PROBS, entropies: Any = None) -> None:
        self.codec = HFCodec(byte_tokenizer())
        self.log_probs, self.entropies = tuple(log_probs), entropies
        self.asked: list[Any] = []

    async def score(self, request: Any) -> Scored:
        self.asked.append(request)
        return Scored(self.log_probs, USAGE, self.entropies)

    async def choose(self, request: Any) -> Scored:
        self.asked.append(request)
        return Scored(self.log_probs, COST)


def view(text: str = "é+2", ids: bool = True) -> ChunkView:
    """The chunk behind "2+2?"; four tokens in bytes."""
    whole = QUESTION.text + text
    tokens = HFCodec(byte_tokenizer()).encode(whole).ids if ids else None
    return ChunkView("run/q/0", QUESTION, Prompt(tokens, whole), 4, text)


def grade(score: Any, chunk: ChunkView, target: Any) -> Graded:
    return asyncio.run(score(chunk, target))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (MeanNLL(min_tokens=4), 4.75 / 4),
        (MeanNLL("byte", min_tokens=4), 4.75 / 4),
        (MeanNLL("sum", min_tokens=4), 4.75),
        (TailNLL(0.5, min_tokens=1), 2.0),
        (TailNLL(min_tokens=1), 3.0),
    ],
)
def test_scores_of_log_probabilities(score: Any, expected: float) -> None:
    target = Told()
    assert grade(score, view(), target) == Graded(expected, "", USAGE)
    (request,) = target.asked
    assert (request.chain, request.prompt, request.start, request.entropy) == ("run/q/0", view().prompt, 4, False)


def test_bytes_are_counted_and_not_tokens() -> None:
    assert grade(MeanNLL("byte", min_tokens=1), view("€", ids=False), Told((-1.5, -1.5))).score == 1.0


def test_sums_lose_nothing() -> None:
    log_probs = [-1e16, -1.0, -1.0]
    assert grade(MeanNLL("sum", min_tokens=1), view(), Told(log_probs)).score == 1e16 + 2


def test_entropy() -> None:
    target = Told(entropies=(1.0, 2.0, 3.0, 4.0))
    assert grade(MeanEntropy(min_tokens=4), view(), target).score == 2.5
    assert target.asked[0].entropy
    with pytest.raises(RefusedError, match="tells no entropies; take MeanNLL"):
        grade(MeanEntropy(min_tokens=4), view(), Told())


@pytest.mark.parametrize("ids", [True, False])
def test_short_and_empty_chunks_have_no_score_but_a_reason(ids: bool) -> None:
    target = Told()
    assert grade(MeanNLL(min_tokens=5), view(ids=ids), target).reason == "short"
    assert len(target.asked) == (not ids)  # a server has to count its tokens
    assert grade(MeanNLL(min_tokens=1), view("", ids=ids), target) == Graded(None, "empty", asked=False)
    assert grade(JudgeGrade(), view("", ids=ids), target) == Graded(None, "empty", asked=False)
    assert grade(Reward(lambda *_: 1.0), view("", ids=ids), target) == Graded(None, "empty", asked=False)
    assert len(target.asked) == (not ids)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_is_no_score(bad: float) -> None:
    for score in (MeanNLL(min_tokens=1), TailNLL(min_tokens=1), Reward(lambda *_: bad)):
        with pytest.raises(RefusedError, match=r"finite|nan|inf"):
            grade(score, view(), Told((-1.0, bad, -1.0, -1.0)))
    with pytest.raises(RefusedError, match="none of the grades"):
        grade(JudgeGrade(grades="ab"), view(), Told((bad, bad)))


def test_a_judge_is_asked_behind_the_chunk() -> None:
    target = Told([math.log(p) for p in (0.05, 0.15, 0.3)])
    graded = grade(JudgeGrade("?", grades="abc"), view(), target)
    assert graded.score == pytest.approx(-(0.15 + 2 * 0.3) / 0.5)
    assert graded.usage == COST
    (request,) = target.asked
    assert request.options == ("a", "b", "c")
    assert request.prompt == Prompt(target.codec.encode("2+2?é+2?").ids, "2+2?é+2?")
    assert grade(JudgeGrade("?", grades="abc"), view(ids=False), target).score == graded.score
    assert target.asked[-1].prompt == Prompt(None, "2+2?é+2?")


def test_rewards_plain_and_awaited() -> None:
    seen = []

    def plain(*arguments: Any) -> float:
        seen.append(arguments)
        return 0.25

    async def awaited(question: Question, before: str, chunk: str) -> float:
        return plain(question, before, chunk)

    for fn in (plain, awaited):
        assert grade(Reward(fn), view(), Told()).score == -0.25
    assert seen == [(QUESTION, "2+2?", "é+2")] * 2


def test_names_tell_settings_apart() -> None:
    scores = [MeanNLL(), MeanNLL("byte"), MeanNLL(min_tokens=4), TailNLL(), TailNLL(0.2), MeanEntropy(), JudgeGrade()]
    assert len({score.name for score in scores}) == len(scores)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="per must be one of token"):
        MeanNLL("word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_tokens must be at least 1"):
        MeanNLL(min_tokens=0)
    with pytest.raises(ValueError, match="share must be in"):
        TailNLL(0)
    with pytest.raises(ValueError, match="at least two different texts"):
        JudgeGrade(grades="00")
    with pytest.raises(TypeError, match="fn must be callable"):
        Reward(3)  # type: ignore[arg-type]
