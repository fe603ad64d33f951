"""Requests of the harness in batches, and what is written in answer to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from pyquiet.evaluation.prompts import continue_prompts, until_the_end
from pyquiet.quiet_star.thinking import Think

T = TypeVar("T")

_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call their number
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_WHOLE_LAW = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # what sampling is from, if not told otherwise


def batches(
    rows: Sequence[T], size: int, length: Callable[[T], int], kind: Callable[[T], str] = lambda _: ""
) -> list[list[int]]:
    """The rows' numbers in batches of one kind, the longest first."""
    kinds: dict[str, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: -length(rows[i])):
        kinds.setdefault(kind(rows[i]), []).append(i)
    return [group[i : i + size] for group in kinds.values() for i in range(0, len(group), size)]


def in_order(order: Sequence[Sequence[int]], answers: Sequence[T]) -> list[T]:
    """The answers to rows in such an order, as the rows were."""
    places = (i for batch in order for i in batch)
    return [answer for _, answer in sorted(zip(places, answers, strict=True), key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Wish:
    """How a task wants its prompts continued."""

    until: tuple[str, ...]
    new_tokens: int
    options: Mapping[str, Any]  # of `generate`

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], new_tokens: int) -> "Wish":
        """From a task's `generation_kwargs`; `new_tokens` where they do not say how many."""
        options = dict(kwargs)
        until = options.pop("until", None) or ()
        given = [options.pop(name) for name in _NEW_TOKENS if name in options]
        sampling = {name: value for name in _SAMPLING if (value := options.pop(name, None)) is not None}
        sample, law = options.pop("do_sample", None), _WHOLE_LAW | sampling
        if sample is None:
            sample = "temperature" in sampling
        drawn = bool(sample and law["temperature"])
        return cls(
            (until,) if isinstance(until, str) else tuple(until),
            int(given[0]) if given else new_tokens,
            options | (law if drawn else {}) | {"do_sample": drawn},
        )


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    wish: Wish,
    *,
    think: Think,
    seed: int,
    numbers: Sequence[int],
    thoughts_per_token: int | None,
) -> list[str]:
    """What the model writes behind each prompt, without its end of text and what follows a stop sequence."""
    start = max(map(len, prompts))
    stops = [_Stops(tokenizer, wish.until, start)] if wish.until else []
    output = continue_prompts(
        model,
        prompts,
        think=think,
        seed=seed,
        sequence_ids=numbers,
        thoughts_per_token=thoughts_per_token,
        max_new_tokens=wish.new_tokens,
        stopping_criteria=StoppingCriteriaList(stops),
        **wish.options,
    )
    texts = tokenizer.batch_decode(until_the_end(model, output.sequences[:, start:]), skip_special_tokens=True)
    return [_before(text, wish.until) for text in texts]


def _before(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


class _Stops(StoppingCriteria):
    """Ends a row once a stop sequence stands anywhere behind the prompt, whose last column is start - 1."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str], start: int) -> None:
        self._tokenizer, self._until, self._start = tokenizer, until, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([_before(text, self._until) != text for text in texts], device=input_ids.device)
