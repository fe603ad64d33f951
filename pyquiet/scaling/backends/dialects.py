"""How servers are asked to write, and how their answers are read: vLLM, SGLang, and OpenAI's fields alone.

Readers raise KeyError, TypeError, ValueError and the like for answers that make no sense; who calls them turns these
into TransientError.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pyquiet.scaling.backends.base import (
    ContextOverflowError,
    Finish,
    Generate,
    Generated,
    Prompt,
    RefusedError,
    Usage,
)
from pyquiet.scaling.backends.wire import OVERFLOW

IdsBy = Literal["fields", "log-probs"]  # ids of new tokens: in a field of their own, or as the names of log-probs
Law = dict[int | str, float]  # log-probs of likely next tokens by id, by text where the server tells no ids
# What a server would else take from the model's generation_config.json, unseen.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
GREATEST_LOG_PROB = 1e-3  # rounding of a log-softmax; beyond it a number is no log-probability


@dataclass(frozen=True)
class Call:
    """A request: where to and what."""

    path: str
    body: dict[str, Any]


class Dialect(Protocol):
    """A way to ask for text and for the law of the next token. `top`: tokens of that law that a server tells.

    `cost`: of an answer to `next`.
    """

    name: str
    top: int

    def write(self, request: Generate) -> Call: ...

    def wrote(self, answer: Any, request: Generate) -> Generated: ...

    def next(self, prompt: Prompt) -> Call: ...

    def law(self, answer: Any) -> Law: ...

    def cost(self, answer: Any) -> Usage: ...


class Completions:
    """/v1/completions. With `ids_by` the fields are vLLM's, without it OpenAI's alone.

    OpenAI's answers do not tell a stop string from the end of the text and leave the string out. There the text is cut
    on this side: the server is not told of stop strings, and what it writes behind one is paid for and lost.
    """

    def __init__(self, name: str, model: str, ids_by: IdsBy | None, top: int) -> None:
        self.name, self.top = name, top
        self._model, self._ids_by = model, ids_by

    def write(self, request: Generate) -> Call:
        body = self._body(request.prompt, request.max_tokens, request.temperature)
        body |= {"top_p": request.top_p, "seed": request.seed}
        if self._ids_by:
            body |= PLAIN | {"stop": list(request.stop), "include_stop_str_in_output": True} | self._wanted_ids()
        if request.top_k is not None:  # no field of OpenAI's; a server that does not know it says so
            body |= {"top_k": request.top_k}
        return Call("/v1/completions", body)

    def wrote(self, answer: Any, request: Generate) -> Generated:
        choice = answer["choices"][0]
        reason = choice["finish_reason"]
        if not self._ids_by:
            return _cut(choice["text"], request.stop, reason, usage(answer))
        ids, matched, cost = self._ids(choice), choice["stop_reason"], usage(answer)
        if len(ids) != cost.completion_tokens:
            raise ValueError(f"{len(ids)} ids for {cost.completion_tokens} tokens")
        if reason == "stop" and not isinstance(matched, str) and ids:
            ids = ids[:-1]  # the end-of-text token, or one of them
        return Generated(ids, _through(choice["text"], matched), _finish(reason, matched), cost)

    def next(self, prompt: Prompt) -> Call:
        body = self._body(prompt, 1, 1.0) | {"logprobs": self.top}
        if self._ids_by:
            body |= PLAIN | {"return_tokens_as_token_ids": prompt.ids is not None}
        return Call("/v1/completions", body)

    def law(self, answer: Any) -> Law:
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return {named(name): log_prob(value) for name, value in top.items()}

    def cost(self, answer: Any) -> Usage:
        return usage(answer)

    def _body(self, prompt: Prompt, max_tokens: int, temperature: float) -> dict[str, Any]:
        asked = {"max_tokens": max_tokens, "temperature": temperature}
        return {"model": self._model, "prompt": shown(prompt), "n": 1} | asked

    def _wanted_ids(self) -> dict[str, Any]:
        if self._ids_by == "fields":
            return {"return_token_ids": True}
        return {"logprobs": 0, "return_tokens_as_token_ids": True}

    def _ids(self, choice: Any) -> tuple[int, ...]:
        names = choice["token_ids"] if self._ids_by == "fields" else map(named, choice["logprobs"]["tokens"])
        return tuple(map(int, names))


class Native:
    """SGLang's own /generate."""

    name = "sglang"
    top = 20

    def write(self, request: Generate) -> Call:
        sampling = PLAIN | {
            "n": 1,
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": PLAIN["top_k"] if request.top_k is None else request.top_k,
            "sampling_seed": request.seed,
            "stop": list(request.stop),
            "no_stop_trim": True,
        }
        return Call("/generate", native_prompt(request.prompt) | {"sampling_params": sampling})

    def wrote(self, answer: Any, request: Generate) -> Generated:
        meta = answer["meta_info"]
        end, ids = meta["finish_reason"], tuple(map(int, answer["output_ids"]))
        if end["type"] == "abort":
            raise aborted(end)
        if len(ids) != meta["completion_tokens"]:
            raise ValueError(f"{len(ids)} ids for {meta['completion_tokens']} tokens")
        matched = end.get("matched")
        if ids and ids[-1] == matched:
            ids = ids[:-1]
        return Generated(ids, _through(answer["text"], matched), _finish(end["type"], matched), native_usage(meta))

    def next(self, prompt: Prompt) -> Call:
        sampling = PLAIN | {"n": 1, "max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        wanted = {"return_logprob": True, "top_logprobs_num": self.top, "return_text_in_logprobs": prompt.ids is None}
        return Call("/generate", native_prompt(prompt) | wanted | {"sampling_params": sampling})

    def law(self, answer: Any) -> Law:
        top = answer["meta_info"]["output_top_logprobs"][0]
        return {entry[1]: log_prob(entry[0]) for entry in top} | {
            entry[2]: log_prob(entry[0]) for entry in top if entry[2] is not None
        }

    def cost(self, answer: Any) -> Usage:
        return native_usage(answer["meta_info"])


def shown(prompt: Prompt) -> list[int] | str:
    """A prompt in JSON."""
    return prompt.text if prompt.ids is None else list(prompt.ids)


def native_prompt(prompt: Prompt) -> dict[str, Any]:
    """A prompt in the fields of /generate."""
    return {"text": prompt.text} if prompt.ids is None else {"input_ids": list(prompt.ids)}


def usage(answer: Any) -> Usage:
    """What a completion cost; zeros where the server does not tell."""
    told = answer.get("usage") or {}
    cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(int(told.get("prompt_tokens", 0)), int(cached), int(told.get("completion_tokens", 0)))


def native_usage(meta: Any) -> Usage:
    """What a request to /generate cost."""
    return Usage(int(meta["prompt_tokens"]), int(meta.get("cached_tokens") or 0), int(meta["completion_tokens"]))


def log_prob(value: Any) -> float:
    """The number, if it can be a log-probability; TypeError or ValueError for null, NaN, infinities and others."""
    number = float(value)
    if not -float("inf") < number <= GREATEST_LOG_PROB:
        raise ValueError(f"{number} is no log-probability")
    return number


def aborted(end: Any) -> Exception:
    """What a request that SGLang broke off has to raise."""
    message = f"broken off by the server: {end.get('message')}"
    if OVERFLOW.search(message):
        return ContextOverflowError(message)
    return RefusedError(message) if end.get("status_code") == 400 else ValueError(message)


def named(name: str) -> int | str:
    """The id in the name of a token, if it was asked for and is there."""
    return int(name.removeprefix("token_id:")) if name.startswith("token_id:") else name


def _finish(reason: str, matched: Any) -> Finish:
    if reason == "length":
        return "length"
    if reason != "stop":
        raise ValueError(f"a text that ended by {reason!r}")
    return "stop" if isinstance(matched, str) else "eos"


def _through(text: str, matched: Any) -> str:
    """The text up to the end of the stop string, which some servers leave out and others write past.

    Halves of a character, which JSON can hold and UTF-8 cannot, become the sign of a character that is none.
    """
    if not isinstance(text, str):
        raise TypeError(f"{text!r} where a text should be")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not isinstance(matched, str):
        return text
    before, _, _ = text.partition(matched)
    return before + matched


def _cut(text: str, stop: tuple[str, ...], reason: str, cost: Usage) -> Generated:
    text = _through(text, None)
    ends = [text.index(s) + len(s) for s in stop if s in text]
    if ends:
        return Generated(None, text[: min(ends)], "stop", cost)
    return Generated(None, text, _finish(reason, None), cost)
