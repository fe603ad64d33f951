"""What an engine and the models it asks say to each other.

A backend is one model: a Hugging Face model in this process, or one behind an OpenAI-compatible server. The engine
decides how many requests are on the wire, and tries again what fails; a backend tells one kind of failure from another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Finish = Literal["stop", "eos", "length"]  # a stop string, the end of the text, or all tokens that were allowed


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens: those read, how many of them came from a cache, and those written."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads: `ids` by its own tokenizer, or `text` where the backend has none on this side (ids None)."""

    ids: tuple[int, ...] | None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Generate:
    """A request for new text behind a prompt.

    Attributes:
        chain: names the chain, so that what a model remembers of it can be found again; it changes no result.
        seed: of the draws, in [0, 2^63). The same prompt, options and seed give the same tokens where a backend can
            promise that.
        stop: strings after which the text ends; the one that was found is part of the text.
        top_k: draw from that many tokens, the likeliest; None: from all.
    """

    chain: str
    prompt: Prompt
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    top_k: int | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """New text; `ids` are the tokens written, the end-of-text token left out, None where a server tells only text."""

    ids: tuple[int, ...] | None
    text: str
    finish: Finish
    usage: Usage


@dataclass(frozen=True, slots=True)
class Score:
    """A request for the log-probabilities of the end of a prompt: of its tokens from `start` on.

    Attributes:
        start: index of the first token that counts, at least 1; for a prompt of text that of its first character:
            every token that overlaps the text from there on counts.
        entropy: whether the entropy of the law at each of these tokens is wanted too.
    """

    chain: str
    prompt: Prompt
    start: int
    entropy: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """Natural log-probabilities of the tokens that count, at temperature 1, and entropies in nats if asked for."""

    log_probs: tuple[float, ...]
    usage: Usage
    entropies: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Choose:
    """A request for the log-probabilities of short continuations of a prompt, such as the grades a judge may give."""

    chain: str
    prompt: Prompt
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, and for each the characters [begin, end) that it stands for."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class TextCodec(Protocol):
    """A tokenizer as chains need it. Nothing is put before or behind a text but by `opening`.

    If it has an attribute `size`, which all ids are below, a server's answer with another one is sent for again.
    """

    @property
    def fingerprint(self) -> str:
        """The same for two tokenizers that agree on every text; chains of such models share token ids."""

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids that stand before a text, such as BOS; often none."""

    @property
    def has_template(self) -> bool:
        """Whether `render` knows a chat template."""

    def render(self, question: str, system: str | None) -> str:
        """The question as its chat template shows it, the answer about to begin (special tokens are spelled out)."""

    def encode(self, text: str) -> Encoded:
        """Ids of the text, special tokens that are spelled out in it read as such."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out, without the bytes of a last character that is not complete."""


class Backend(Protocol):
    """One model that drafts, scores or continues. It may be opened again after it was closed.

    If it has an attribute `kv_bytes_per_token`, what keys and values of a token take, reports tell a peak in bytes.
    """

    @property
    def codec(self) -> TextCodec | None:
        """Its tokenizer; None where it has none on this side."""

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same for a run to go on: model, weights' or server's hash, tokenizer's fingerprint, ..."""

    async def open(self) -> None:
        """Gets ready and finds out what it can do; called once, in the event loop that will use it."""

    async def ready(self) -> None:
        """Returns when requests may be sent: at once, or after a server that was lost is back.

        Raises GoneError if it stays away for longer than the backend was told to wait.
        """

    async def generate(self, request: Generate) -> Generated: ...

    async def score(self, request: Score) -> Scored: ...

    async def choose(self, request: Choose) -> Scored:
        """The log-probability of each option in the place of a token's, and what all of them cost together."""

    def forget(self, chain: str) -> None:
        """The chain has ended: what is kept for it may go."""

    async def close(self) -> None: ...


class BackendError(RuntimeError):
    """A request that brought nothing."""


class TransientError(BackendError):
    """May go well if sent again: a lost connection, a time-out, a busy server, an answer that makes no sense."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds, if the server said so


class ContextOverflowError(BackendError):
    """The prompt and what was asked for do not fit into the model's context."""


class RefusedError(BackendError):
    """Will not go well however often it is sent: bad request, no permission, a log-probability that is not served."""


class GoneError(BackendError):
    """The backend was away for too long; the run has to stop, and can be resumed."""
