"""Direct answers: how probable the right one is among all that could stand there (arXiv 2403.09629, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from pyquiet.checks import check_count
from pyquiet.evaluation.estimates import Estimate
from pyquiet.evaluation.prompts import check_think, continue_prompts
from pyquiet.evaluation.tasks import AnswerItem, spell
from pyquiet.quiet_star.thinking import Think
from pyquiet.tokens import opening_ids, token_ids


@dataclass(frozen=True)
class AnswerScores:
    """What a model makes of each item's answer. On the CPU."""

    probability: Tensor  # float64 [items] product over the answer's tokens, each among its valid set
    correct: Tensor  # bool [items] every token of the answer is the likeliest of its valid set

    def to_dict(self) -> dict[str, Any]:
        """Means and standard errors as JSON values."""
        return {
            "probability": Estimate.of(self.probability).to_dict(),
            "accuracy": Estimate.of(self.correct).to_dict(),
        }


@dataclass(frozen=True)
class DirectAnswers:
    """Scores by way of thinking, "never" and "always", on the same items."""

    scores: dict[Think, AnswerScores]
    truncated: int  # items whose question lost its beginning

    @property
    def gain(self) -> Estimate | None:
        """What thinking adds to the probability, item by item; None if it was not asked for both."""
        if len(self.scores) < 2:
            return None
        return Estimate.of(self.scores["always"].probability - self.scores["never"].probability)

    def to_dict(self) -> dict[str, Any]:
        """Means and standard errors as JSON values."""
        report: dict[str, Any] = {think: scores.to_dict() for think, scores in self.scores.items()}
        if self.gain is not None:
            report["gain"] = self.gain.to_dict()
        return report | {"items": len(next(iter(self.scores.values())).correct), "truncated": self.truncated}

    def __str__(self) -> str:
        lines = [f"{'thinking':<10}{'probability':>18}{'argmax accuracy':>20}"]
        for think, scores in self.scores.items():
            estimates = Estimate.of(scores.probability), Estimate.of(scores.correct)
            lines.append(f"{think:<10}{estimates[0]!s:>18}{estimates[1]!s:>20}")
        if self.gain is not None:
            lines.append(f"{'gain':<10}{self.gain!s:>18}")
        return "\n".join([*lines, f"{self.to_dict()['items']} items, {self.truncated} with a shortened question"])


@torch.no_grad()
def direct_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[AnswerItem],
    symbols: str,
    *,
    think: Sequence[Think] = ("never", "always"),
    seed: int = 0,
    thoughts_per_token: int | None = None,
    max_length: int = 256,
    batch_size: int = 16,
    progress: bool = True,
) -> DirectAnswers:
    """Scores of "Q: question\\nA: answer\\n", no example before it and nothing reasoned aloud.

    An item's score is the product, over its answer's symbols and the newline, of the softmax restricted to all symbols
    and the newline; its mean is what the paper calls accuracy. With N thoughts their laws are averaged first. A comma
    or a sign in the answer is given. The cost is that of generating the answers, a batch at a time.

    Args:
        model: a thinking model, or a plain one with think=("never",). symbols: `DIGITS` or `LETTERS`.
        seed: of the thoughts, counted by the item's number, so the batch size does not matter.
        max_length: tokens of question and answer; a longer question loses its beginning, the answer nothing.

    Raises:
        ValueError: `spell` cannot score an answer, no items, or no room for an answer.
    """
    for word in think:
        check_think(model, word)
    check_count("batch_size", batch_size, least=1)
    for name, given, what in (("items", items, "question"), ("think", think, "way to think")):
        if not given:
            raise ValueError(f"{name} is empty: give at least one {what}")
    opening = opening_ids(tokenizer)
    encoded = [_encode(tokenizer, item, symbols, opening, max_length) for item in items]
    scores: dict[Think, AnswerScores] = {}
    for word in think:
        parts = []
        for start in tqdm(range(0, len(items), batch_size), f"think={word}", disable=None if progress else True):
            batch = encoded[start : start + batch_size]
            parts += _score(model, batch, think=word, seed=seed, first=start, thoughts_per_token=thoughts_per_token)
        probability, correct = (torch.stack(column) for column in zip(*parts, strict=True))
        scores[word] = AnswerScores(probability, correct)
    return DirectAnswers(scores, sum(item.truncated for item in encoded))


@dataclass(frozen=True)
class _Encoded:
    prompt: list[int]  # up to the first token that is scored
    answer: list[int]  # from there on
    valid: list[list[int]]  # for each of these what it is scored against; empty: not scored
    truncated: bool


def _encode(
    tokenizer: PreTrainedTokenizerBase, item: AnswerItem, symbols: str, opening: list[int], max_length: int
) -> _Encoded:
    question = token_ids(tokenizer, item.prompt)
    tokens, valid = spell(tokenizer, item.answer, symbols)
    room = max_length - len(opening) - len(tokens)
    if room < 1:
        raise ValueError(f"max_length={max_length} leaves no room before the answer {item.answer!r}: raise it")
    first = next(i for i, choices in enumerate(valid) if choices)
    prompt = opening + question[-room:] + tokens[:first]
    return _Encoded(prompt, tokens[first:], valid[first:], len(question) > room)


def _score(
    model: PreTrainedModel,
    batch: list[_Encoded],
    *,
    think: Think,
    seed: int,
    first: int,
    thoughts_per_token: int | None,
) -> list[tuple[Tensor, Tensor]]:
    """Probability and correctness of each item: its answer is generated, each token whatever its law, and laws kept."""
    steps = max(len(item.answer) for item in batch)
    answers = torch.tensor([item.answer + item.answer[-1:] * (steps - len(item.answer)) for item in batch])
    output = continue_prompts(
        model,
        [item.prompt for item in batch],
        think=think,
        seed=seed,
        sequence_ids=range(first, first + len(batch)),
        thoughts_per_token=thoughts_per_token,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        logits_processor=[_Dictated(answers.to(model.device))],
    )
    scores = []
    for b, item in enumerate(batch):
        scored = [(step, choices) for step, choices in enumerate(item.valid) if choices]
        law = torch.stack([output.logits[step][b, choices].double().cpu() for step, choices in scored]).log_softmax(-1)
        truth = torch.tensor([choices.index(item.answer[step]) for step, choices in scored])
        probability = law.gather(1, truth[:, None]).sum().exp()
        scores.append((probability, (law.argmax(-1) == truth).all()))
    return scores


class _Dictated(LogitsProcessor):  # type: ignore[misc]
    """Makes generation write the tokens [B, steps], one after another."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
