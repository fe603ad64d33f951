"""Reasoning aloud, several times, and the majority's number (arXiv 2403.09629, section 5; Wang et al., 2203.11171)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyquiet.checks import check_count
from pyquiet.evaluation.estimates import Estimate
from pyquiet.evaluation.prompts import check_think, continue_prompts, until_the_end
from pyquiet.evaluation.tasks import AnswerItem
from pyquiet.quiet_star.thinking import Think
from pyquiet.randomness import check_temperature
from pyquiet.tokens import continuation_ids, opening_ids, token_ids

STEPS = " Let's think step by step."
THEREFORE = "\nTherefore, the answer (arabic numerals) is"
ANSWER_TOKENS = 12
_MOST_SAMPLES = 256

# With separators of thousands or without; the sign of a number, not the hyphen of a word.
_INTEGER = re.compile(r"(?:(?<!\w)-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)")


@dataclass(frozen=True)
class MajorityVote:
    """Votes on the items of a file that were drawn, in the order in which they were."""

    items: list[int]  # their numbers in the file
    votes: list[list[int | None]]  # of each item's samples; None where there is no integer
    answers: list[int]  # the right ones

    @property
    def winners(self) -> list[int | None]:
        """`majority` of each item's votes."""
        return [majority(votes) for votes in self.votes]

    @property
    def correct(self) -> Tensor:
        """bool [items]"""
        return torch.tensor([won == answer for won, answer in zip(self.winners, self.answers, strict=True)])

    @property
    def sample_accuracy(self) -> Estimate:
        """How often a single sample is right; the error is that between items."""
        pairs = zip(self.votes, self.answers, strict=True)
        return Estimate.of(torch.tensor([sum(v == answer for v in votes) / len(votes) for votes, answer in pairs]))

    def to_dict(self) -> dict[str, Any]:
        """Accuracies and every vote as JSON values."""
        columns = zip(self.items, self.answers, self.winners, self.votes, strict=True)
        return {
            "accuracy": Estimate.of(self.correct).to_dict(),
            "sample_accuracy": self.sample_accuracy.to_dict(),
            "items": [dict(zip(("item", "answer", "winner", "votes"), row, strict=True)) for row in columns],
        }

    def __str__(self) -> str:
        given = sum(vote is not None for votes in self.votes for vote in votes)
        return (
            f"majority of {len(self.votes[0])}: {Estimate.of(self.correct)}; a single sample: {self.sample_accuracy}; "
            f"{len(self.items)} items, {given} votes of {sum(map(len, self.votes))} hold an integer"
        )


def first_integer(text: str) -> int | None:
    """The first integer in a text, None without one: 1,000 is one number, -3 negative, $ no part of it."""
    found = _INTEGER.search(text.replace("$", ""))
    return int(found[0].replace(",", "")) if found else None


def majority(votes: Sequence[int | None]) -> int | None:
    """The most frequent vote; of several, the one that first reached that count. None if nobody voted."""
    counts: Counter[int] = Counter()
    winner = None
    for vote in votes:
        if vote is not None:
            counts[vote] += 1
            if winner is None or counts[vote] > counts[winner]:
                winner = vote
    return winner


def chosen_items(size: int, items: int, shuffle_seed: int = 42) -> list[int]:
    """The first `items` numbers of 0..size-1 in the order that datasets' `shuffle(seed=shuffle_seed)` gives them."""
    return [int(i) for i in np.random.default_rng(shuffle_seed).permutation(size)[:items]]


@torch.no_grad()
def majority_vote(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[AnswerItem],
    *,
    think: Think = "always",
    limit: int = 128,
    num_samples: int = 8,
    temperature: float = 0.9,
    seed: int = 0,
    thoughts_per_token: int | None = None,
    max_new_tokens: int = 384,
    batch_size: int = 16,
    progress: bool = True,
) -> MajorityVote:
    """Answers to the first `limit` items, shuffled by seed 42 as datasets does: each reasons aloud `num_samples` times.

    A sample continues "Q: question\\nA: Let's think step by step." by `max_new_tokens` at most; behind that and
    "\\nTherefore, the answer (arabic numerals) is" it writes 12 tokens more, whose first integer is its vote.

    Args:
        items: with integers for answers (`read_gsm8k`). think: "never" for the base, or a plain model.
        seed: of the samples. Those of a thinking model are counted by item and sample, whatever the batch; others are
            drawn by torch's generator, seeded for each batch and put back.

    Raises:
        ValueError, TypeError: as `model.generate`; an option out of range, or a question too long for the context.
    """
    check_think(model, think)
    counts = {"limit": limit, "num_samples": num_samples, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for name, value in counts.items():
        check_count(name, value, least=1)
    if num_samples > _MOST_SAMPLES:
        raise ValueError(f"num_samples must be at most {_MOST_SAMPLES}, got {num_samples}")
    check_temperature("temperature", temperature)
    if not items:
        raise ValueError("items is empty: give at least one question")
    chosen = chosen_items(len(items), limit)
    answers = [int(items[i].answer.replace(",", "")) for i in chosen]
    opening = opening_ids(tokenizer)
    prompts = {i: opening + token_ids(tokenizer, items[i].prompt + STEPS) for i in chosen}
    therefore = continuation_ids(tokenizer, "so it is 12.", THEREFORE)
    _check_room(model, max(map(len, prompts.values())), max_new_tokens, len(therefore))
    jobs = [(i, sample) for i in chosen for sample in range(num_samples)]
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    votes: list[int | None] = []
    for start in tqdm(range(0, len(jobs), batch_size), f"think={think}", disable=None if progress else True):
        batch = jobs[start : start + batch_size]
        texts = [prompts[i] for i, _ in batch]
        for tail, length in (([], max_new_tokens), (therefore, ANSWER_TOKENS)):
            texts = [text + tail for text in texts]
            output = continue_prompts(
                model,
                texts,
                think=think,
                seed=seed,
                sequence_ids=[sample << 24 | i for i, sample in batch],
                thoughts_per_token=thoughts_per_token,
                max_new_tokens=length,
                **options,
            )
            new = until_the_end(model, output.sequences[:, max(map(len, texts)) :])
            texts = [text + more for text, more in zip(texts, new, strict=True)]
        votes += [first_integer(tokenizer.decode(tokens)) for tokens in new]
    return MajorityVote(chosen, [votes[i : i + num_samples] for i in range(0, len(votes), num_samples)], answers)


def _check_room(model: PreTrainedModel, prompt: int, max_new_tokens: int, therefore: int) -> None:
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    thought = getattr(model.config, "thought_tokens", -2) + 2
    needed = prompt + max_new_tokens + therefore + ANSWER_TOKENS + thought
    if context is not None and needed > context:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} is too much: the longest question has {prompt} tokens, and with what "
            f"follows it needs {needed} of the model's context (max_position_embeddings) of {context}; lower it by "
            f"{needed - context}, or leave long questions out"
        )
