"""Routes to the log-probabilities of a prompt's own tokens, one for each way in which servers tell them."""

from typing import Any, NamedTuple, Protocol

from pyquiet.scaling.backends.base import Prompt, Scored, Usage
from pyquiet.scaling.backends.dialects import (
    PLAIN,
    Call,
    aborted,
    log_prob,
    named,
    native_prompt,
    native_usage,
    shown,
    usage,
)

NEAR = 8  # characters that a token's text may be away from where the one before it ended


class Told(NamedTuple):
    """What a server says of one token of a prompt; None where it says nothing."""

    value: Any
    id: int | None = None
    text: str | None = None


UNREAD = Told(None)


class Route(Protocol):
    """One way to score.

    `first`: index of the first token that is told of, when those from `start` on are wanted. `told`: what is told of it
    and of all behind it; of the first `skip` of these nothing needs to be read.
    """

    name: str

    def first(self, prompt: Prompt, start: int) -> int: ...

    def call(self, prompt: Prompt, start: int) -> Call: ...

    def told(self, answer: Any, prompt: Prompt, skip: int = 0) -> list[Told]: ...

    def usage(self, answer: Any) -> Usage: ...


def scored(route: Route, answer: Any, prompt: Prompt, start: int) -> Scored:
    """The log-probs that were asked for; ValueError or the like if one of them is missing or no log-prob."""
    if prompt.ids is None:
        told = route.told(answer, prompt)
        ends = [end for _, end in spans([t.text or "" for t in told], prompt.text)]
        counted = [t for t, end in zip(told, ends, strict=True) if end > start]
    else:
        first = route.first(prompt, start)
        told = route.told(answer, prompt, start - first)
        if len(told) != len(prompt.ids) - first:
            raise ValueError(f"{len(told)} log-probs for {len(prompt.ids) - first} tokens")
        counted = told[start - first :]
        if any(t.id is not None and t.id != i for t, i in zip(counted, prompt.ids[start:], strict=True)):
            raise ValueError("log-probs of other tokens than those sent")
    return Scored(tuple(log_prob(t.value) for t in counted), route.usage(answer))


class _Whole:
    """Routes that tell of all tokens from the first on, which has no log-prob, and write one token more."""

    def __init__(self, model: str, *, ids: bool) -> None:
        self._model, self._ids = model, ids

    def first(self, prompt: Prompt, start: int) -> int:
        return 0

    def call(self, prompt: Prompt, start: int) -> Call:
        body = {"model": self._model, "prompt": shown(prompt), "n": 1, "max_tokens": 1, "temperature": 0.0}
        return Call("/v1/completions", body | self.fields())

    def fields(self) -> dict[str, Any]:
        raise NotImplementedError

    def usage(self, answer: Any) -> Usage:
        return usage(answer)


class PromptLogProbs(_Whole):
    """vLLM's `prompt_logprobs`: for each token a table by id, in which the token itself always is."""

    name = "prompt_logprobs"

    def fields(self) -> dict[str, Any]:
        return PLAIN | {"prompt_logprobs": 0}

    def told(self, answer: Any, prompt: Prompt, skip: int = 0) -> list[Told]:
        tables = answer["choices"][0]["prompt_logprobs"]
        ids = prompt.ids or (None,) * len(tables)
        return [UNREAD] * skip + [_from_table(table, ids[i]) for i, table in enumerate(tables[skip:], skip)]


class Echo(_Whole):
    """Completions with `echo`: the prompt is told with the new token behind it."""

    name = "echo"

    def fields(self) -> dict[str, Any]:
        return {"echo": True, "logprobs": 1} | (PLAIN | {"return_tokens_as_token_ids": True} if self._ids else {})

    def told(self, answer: Any, prompt: Prompt, skip: int = 0) -> list[Told]:
        listed = answer["choices"][0]["logprobs"]
        pairs = list(zip(listed["token_logprobs"], listed["tokens"], strict=True))
        read = pairs[skip : len(pairs) - usage(answer).completion_tokens]
        return [UNREAD] * skip + [_echoed(value, named(name)) for value, name in read]


class NativeLogProbs:
    """SGLang's /generate, which tells of tokens from one on that itself has no log-prob: asked for from start - 1."""

    name = "generate"

    def first(self, prompt: Prompt, start: int) -> int:
        return 0 if prompt.ids is None else start - 1

    def call(self, prompt: Prompt, start: int) -> Call:
        wanted = {
            "return_logprob": True,
            "logprob_start_len": self.first(prompt, start),
            "return_text_in_logprobs": prompt.ids is None,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        }
        return Call("/generate", native_prompt(prompt) | wanted)

    def told(self, answer: Any, prompt: Prompt, skip: int = 0) -> list[Told]:
        meta = answer["meta_info"]
        end = meta.get("finish_reason") or {}
        if end.get("type") == "abort":
            raise aborted(end)
        return [Told(value, number, text) for value, number, text in meta["input_token_logprobs"]]

    def usage(self, answer: Any) -> Usage:
        return native_usage(answer["meta_info"])


def spans(tokens: list[str], text: str) -> list[tuple[int, int]]:
    """The characters [begin, end) of a text that each of its tokens stands for.

    Tokens that are not found where they should be, such as one that opens the text, or pieces of a character, share
    what lies between those that are. ValueError if the rest of the text is not told of.
    """
    found: list[tuple[int, int]] = []
    waiting = done = 0
    for token in tokens:
        begin = text.find(token, done, done + len(token) + NEAR * (waiting + 1))
        if begin < 0:
            waiting += 1
            continue
        found += [(done, begin)] * waiting
        found.append((done if not waiting else begin, begin + len(token)))
        waiting, done = 0, begin + len(token)
    if len(text) - done > NEAR * waiting:
        raise ValueError(f"log-probs for another text: nothing is told of {text[done:][:20]!r}")
    return found + [(done, len(text))] * waiting


def _from_table(table: Any, wanted: int | None) -> Told:
    if table is None:
        return Told(None)
    if wanted is None:
        wanted = int(next(iter(table)))
    entry = table[str(wanted)]
    return Told(entry["logprob"], wanted, entry["decoded_token"])


def _echoed(value: Any, name: int | str) -> Told:
    return Told(value, id=name) if isinstance(name, int) else Told(value, text=name)
