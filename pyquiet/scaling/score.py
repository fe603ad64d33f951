"""Nonconformity scores of a draft's chunk: how little the target would have written it; the larger, the worse."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pyquiet.checks import check_count, check_fraction, check_word
from pyquiet.scaling.backends.base import NO_USAGE, Backend, Choose, Prompt, RefusedError, Score, Scored, Usage
from pyquiet.scaling.records import Question
from pyquiet.scaling.views import encode_after

Reason = Literal["", "short", "empty"]
Per = Literal["token", "byte", "sum"]
RewardFn = Callable[[Question, str, str], float | Awaitable[float]]


@dataclass(frozen=True, slots=True)
class ChunkView:
    """A chunk as it is to be scored.

    Attributes:
        chain: the chain's name. prompt: what the target reads, up to and with the chunk.
        start: where the chunk begins in it: index of a token, or of a character where the prompt has no ids.
        text: the chunk's text.
    """

    chain: str
    question: Question
    prompt: Prompt
    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Graded:
    """A score, or None and the reason why there is none; what it cost, and whether a model was asked at all."""

    score: float | None
    reason: str = ""
    usage: Usage = NO_USAGE
    asked: bool = True


class ScoreFn(Protocol):
    """Scores chunks; larger is worse. What it raises is never a score: TransientError, after all tries, is a failed
    scoring, for which `on_score_failure` is; anything else ends the run, which its journal resumes."""

    @property
    def name(self) -> str:
        """Names the score and its settings; banks of scores of different names are never mixed."""

    async def __call__(self, view: ChunkView, target: Backend) -> Graded: ...


class _OfTokens:
    """Scores made of what the target says of each token of the chunk."""

    entropy = False

    def __init__(self, min_tokens: int) -> None:
        self.min_tokens = check_count("min_tokens", min_tokens, least=1)

    async def __call__(self, view: ChunkView, target: Backend) -> Graded:
        """The score; None, "empty" or "short" for a chunk of no or of less than `min_tokens` tokens of the target.

        Raises RefusedError for values that are not finite.
        """
        if reason := self._too_short(view):
            return Graded(None, reason, asked=False)
        answer = await target.score(Score(view.chain, view.prompt, view.start, self.entropy))
        if len(answer.log_probs) < self.min_tokens:  # where only the server counts tokens
            return Graded(None, "short", answer.usage)
        values = self._values(answer)
        if not all(map(math.isfinite, values)):
            raise RefusedError(f"the target answered a score of {view.chain} with values that are not finite")
        return Graded(self._combine(values, view), "", answer.usage)

    def _too_short(self, view: ChunkView) -> Reason:
        if view.prompt.ids is None:
            return "" if view.text else "empty"
        tokens = len(view.prompt.ids) - view.start
        if tokens == 0 or not view.text:
            return "empty"
        return "short" if tokens < self.min_tokens else ""

    def _values(self, answer: Scored) -> Sequence[float]:
        return answer.log_probs

    def _combine(self, values: Sequence[float], view: ChunkView) -> float:
        raise NotImplementedError


class MeanNLL(_OfTokens):
    """The mean negative log-probability of the chunk's tokens under the target, in nats; its exponential is the PPL.

    Args:
        per: "token" as in the paper; "byte", comparable across tokenizers: the sum over the UTF-8 bytes of the chunk;
            "sum" for no mean at all.
        min_tokens: a chunk of fewer has no score.
    """

    def __init__(self, per: Per = "token", min_tokens: int = 8) -> None:
        self.per = check_word("per", per, Per)
        super().__init__(min_tokens)

    @property
    def name(self) -> str:
        """Names it."""
        return f"nll/{self.per}/{self.min_tokens}"

    def _combine(self, values: Sequence[float], view: ChunkView) -> float:
        counts = {"token": len(values), "byte": len(view.text.encode()), "sum": 1}
        return -math.fsum(values) / counts[self.per]


class TailNLL(_OfTokens):
    """The mean negative log-probability of the least likely `share` of the chunk's tokens, at least one of them."""

    def __init__(self, share: float = 0.1, min_tokens: int = 8) -> None:
        if check_fraction("share", share) == 0:
            raise ValueError("share must be in (0, 1], got 0: no token would count")
        super().__init__(min_tokens)
        self.share = share

    @property
    def name(self) -> str:
        """Names it."""
        return f"tail/{self.share}/{self.min_tokens}"

    def _combine(self, values: Sequence[float], view: ChunkView) -> float:
        worst = sorted(values)[: math.ceil(self.share * len(values))]
        return -math.fsum(worst) / len(worst)


class MeanEntropy(_OfTokens):
    """The mean entropy, in nats, of the target's laws at the chunk's tokens, whatever the draft wrote there.

    It needs a target that tells entropies: one in this process.
    """

    entropy = True

    def __init__(self, min_tokens: int = 8) -> None:
        super().__init__(min_tokens)

    @property
    def name(self) -> str:
        """Names it."""
        return f"entropy/{self.min_tokens}"

    def _values(self, answer: Scored) -> Sequence[float]:
        if answer.entropies is None:
            raise RefusedError("MeanEntropy: this target tells no entropies; take MeanNLL or TailNLL")
        return answer.entropies

    def _combine(self, values: Sequence[float], view: ChunkView) -> float:
        return math.fsum(values) / len(values)


class JudgeGrade:
    """The grade that the target gives when it is asked for one behind the chunk; the score is its negative.

    The grade is the expected index in `grades` under the target's probabilities of these continuations, so that the
    best of ten is 9. One forward; the history may come from the cache.

    Args:
        prompt: stands behind the chunk and asks for the grade. grades: from worst to best, each one a continuation.
    """

    def __init__(
        self,
        prompt: str = "\n\nHow sound is the last step, from 0 (wrong) to 9 (certainly right)? The grade is ",
        grades: Sequence[str] = "0123456789",
    ) -> None:
        if len(set(grades)) < 2 or len(set(grades)) != len(grades):
            raise ValueError(f"grades must be at least two different texts, from worst to best, got {grades!r}")
        self.prompt, self.grades = prompt, tuple(grades)

    @property
    def name(self) -> str:
        """Names it."""
        return f"judge/{self.grades!r}/{self.prompt!r}"

    async def __call__(self, view: ChunkView, target: Backend) -> Graded:
        """The score; None, "empty", for a chunk without text."""
        if not view.text:
            return Graded(None, "empty", asked=False)
        ids = view.prompt.ids
        if ids is not None:
            if target.codec is None:
                raise RefusedError("JudgeGrade: the prompt is token ids, but the target has no tokenizer to ask with")
            ids += encode_after(target.codec, view.prompt.text, self.prompt)
        prompt = Prompt(ids, view.prompt.text + self.prompt)
        answer = await target.choose(Choose(view.chain, prompt, self.grades))
        log_probs = answer.log_probs
        top = max(log_probs)
        if not math.isfinite(top):
            raise RefusedError(f"the target gives none of the grades {self.grades} any probability")
        weights = [math.exp(x - top) for x in log_probs]
        grade = math.fsum(i * w for i, w in enumerate(weights)) / math.fsum(weights)
        return Graded(-grade, "", answer.usage)


class Reward:
    """A reward model's word for the chunk, larger = better; the score is its negative.

    Args:
        fn: called with the question, the text that the target reads before the chunk (the question in its template
            and what was accepted), and the chunk. A plain function runs in another thread, several at a time. What may
            go well another time should be a `TransientError`: else it ends the run, see `ScoreFn`.
        name: names the model and its version.
    """

    def __init__(self, fn: RewardFn, name: str = "reward") -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable with (question, text before, chunk), got {type(fn).__name__}")
        self._fn, self.name = fn, name

    async def __call__(self, view: ChunkView, target: Backend) -> Graded:
        """The score; None, "empty", for a chunk without text. Raises RefusedError for a reward that is not finite."""
        if not view.text:
            return Graded(None, "empty", asked=False)
        arguments: Any = (view.question, view.prompt.text.removesuffix(view.text), view.text)
        fn: Any = self._fn
        plain = not inspect.iscoroutinefunction(self._fn)
        answer = await asyncio.to_thread(fn, *arguments) if plain else fn(*arguments)
        reward = float(await answer if inspect.isawaitable(answer) else answer)
        if not math.isfinite(reward):
            raise RefusedError(f"the reward of a chunk of {view.chain} is {reward}")
        return Graded(-reward)
