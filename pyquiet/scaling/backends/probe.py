"""What a server can do, found out by asking it: its dialect, its tokenizer, and which of its log-probs can be trusted.

A fixed prompt of 20 tokens is scored by every route. A route has to tell of every token but the first, and of the last
what the server said of it as the next token; two routes have to agree. So a list that is off by one is found even where
nothing stands beside it.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from pyquiet.scaling.backends.base import (
    Generate,
    Generated,
    GoneError,
    Prompt,
    RefusedError,
    TextCodec,
    TransientError,
)
from pyquiet.scaling.backends.dialects import Call, Completions, Dialect, Law, Native
from pyquiet.scaling.backends.prompt_log_probs import Echo, NativeLogProbs, PromptLogProbs, Route, scored
from pyquiet.scaling.backends.wire import Endpoint, MalformedError

T = TypeVar("T")
Name = Literal["auto", "vllm", "sglang", "openai"]
TEXT = "A train leaves at 9:40 and takes two hours and 35 minutes. When does it arrive?"
TOKENS, MIDDLE = 20, 12
TRIES = 4


@dataclass(frozen=True)
class Capabilities:
    """What a server was found to do.

    Attributes:
        root: what the server says its model was loaded from. context: its longest text in tokens, None if untold.
        prompt: "ids" or "text". tokenizer: whether the server's was seen to be ours. routes: by name "ok", or why not.
        score: the route that is taken. law: whether the server tells log-probs of the next token.
    """

    model: str
    root: str
    version: str
    context: int | None
    dialect: str
    prompt: str
    tokenizer: str
    routes: dict[str, str]
    score: str | None
    law: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Negotiated:
    """What was found, and how to speak accordingly."""

    capabilities: Capabilities
    dialect: Dialect
    route: Route | None


class Prober:
    """Asks one server.

    Args:
        codec: of the model, None if the server is sent text. tolerance: of log-probs that should be equal.
    """

    def __init__(self, server: Endpoint, codec: TextCodec | None, *, seconds: float, tolerance: float) -> None:
        self._server, self._codec = server, codec
        self._seconds, self._tolerance = seconds, tolerance

    async def negotiate(self, model: str | None, name: Name) -> Negotiated:
        """Finds out. Raises RefusedError for a server that cannot be used, GoneError for one that does not answer."""
        entry = await self._entry(model)
        dialect, routes = await self._dialect(entry["id"], name)
        tokenizer = await self._tokenizer(entry["id"])
        law = await self._law(dialect)
        prompt, said = self._witness(law or {})
        values = {route.name: await self._values(route, prompt, said) for route in routes}
        verdicts = self._verdicts(values)
        route = next((route for route in routes if verdicts[route.name] == "ok"), None)
        capabilities = Capabilities(
            model=entry["id"],
            root=str(entry.get("root") or ""),
            version=await self._version(dialect),
            context=entry.get("max_model_len"),
            dialect=dialect.name,
            prompt="text" if self._codec is None else "ids",
            tokenizer=tokenizer,
            routes=verdicts,
            score=route.name if route else None,
            law=law is not None,
        )
        return Negotiated(capabilities, dialect, route)

    async def entry(self, model: str) -> dict[str, Any]:
        """What the server lists of a model; asked once."""
        return await self._server.ask("/v1/models", None, self._seconds, lambda answer: _listed(answer, model))

    async def _entry(self, model: str | None) -> dict[str, Any]:
        try:
            return await self._ask("/v1/models", None, lambda answer: _listed(answer, model))
        except (RefusedError, MalformedError):
            if model is None:
                raise
            return {"id": model}

    async def _dialect(self, model: str, name: Name) -> tuple[Dialect, list[Route]]:
        ids = self._codec is not None
        whole: list[Route] = [PromptLogProbs(model, ids=ids), Echo(model, ids=ids)]
        known: list[tuple[Dialect, list[Route]]] = [
            (Native(), [NativeLogProbs(), Echo(model, ids=False)]),
            (Completions("vllm", model, "fields", 20), whole),
            (Completions("vllm", model, "log-probs", 20), whole),
            (Completions("openai", model, None, 5), [Echo(model, ids=False)]),
        ]
        words = []
        for dialect, routes in known:
            if name in ("auto", dialect.name):
                try:
                    await self._write(dialect)
                except (RefusedError, MalformedError) as error:
                    words.append(f"{dialect.name}: {error}")
                else:
                    return dialect, routes
        raise RefusedError(f"{self._server.url} speaks no dialect that dialect={name!r} allows: " + "; ".join(words))

    async def _write(self, dialect: Dialect) -> Generated:
        request = Generate("probe", self._prompt(TOKENS), 1, 1.0, 1.0, 0)
        call = dialect.write(request)
        return await self._ask(call.path, call.body, lambda answer: dialect.wrote(answer, request))

    async def _law(self, dialect: Dialect) -> Law | None:
        """What the server says of the token behind all but one of the prompt; None if it says nothing."""
        try:
            return await self._call(dialect.next(self._prompt(TOKENS - 1)), dialect.law)
        except (RefusedError, MalformedError):
            return None

    def _witness(self, law: Law) -> tuple[Prompt, float | None]:
        """The prompt for all routes, with the likeliest token last, and what the server says of that token."""
        known = [(value, token) for name, value in law.items() if (token := self._id(name)) is not None]
        ids = self._prompt(TOKENS - 1).ids
        if ids is None or not known:
            return self._prompt(TOKENS), None
        said, likely = max(known)
        return Prompt((*ids, likely)), said

    def _id(self, name: int | str) -> int | None:
        if isinstance(name, int) or self._codec is None:
            return name if isinstance(name, int) else None
        ids = self._codec.encode(name).ids
        return ids[0] if len(ids) == 1 and self._codec.decode(ids) == name else None

    async def _values(self, route: Route, prompt: Prompt, said: float | None) -> tuple[float, ...] | str:
        """The log-probs of all tokens but the first, or what is wrong with them."""

        def read(answer: Any) -> tuple[float, ...]:
            if route.told(answer, prompt)[0].value is not None:
                raise ValueError("a log-prob of the first token, before which nothing stands")
            return scored(route, answer, prompt, 1).log_probs

        try:
            values = await self._call(route.call(prompt, 1), read)
            if route.first(prompt, MIDDLE) > 0:
                end = await self._call(
                    route.call(prompt, MIDDLE), lambda answer: scored(route, answer, prompt, MIDDLE).log_probs
                )
                if self._apart(end, values[MIDDLE - 1 :]):
                    return f"asked from token {MIDDLE} on, it tells {end[0]:.4f}, and {values[MIDDLE - 1]:.4f} else"
        except (RefusedError, MalformedError) as error:
            return str(error)
        if said is not None and self._apart(values[-1:], (said,)):
            return f"it tells {values[-1]:.4f} of the last token, of which the server said {said:.4f} before"
        return values

    def _verdicts(self, values: dict[str, tuple[float, ...] | str]) -> dict[str, str]:
        verdicts = {name: value if isinstance(value, str) else "ok" for name, value in values.items()}
        for (one, a), (other, b) in itertools.combinations(values.items(), 2):
            if not isinstance(a, str) and not isinstance(b, str) and self._apart(a, b):
                verdicts[one] = verdicts[other] = f"{one} and {other} disagree about the same {len(a) + 1} tokens"
        return verdicts

    def _apart(self, a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return len(a) != len(b) or any(abs(x - y) > self._tolerance for x, y in zip(a, b, strict=True))

    async def _tokenizer(self, model: str) -> str:
        if self._codec is None:
            return "none"
        body = {"model": model, "prompt": TEXT, "add_special_tokens": False}
        try:
            ids = await self._ask("/tokenize", body, lambda answer: tuple(map(int, answer["tokens"])))
        except (RefusedError, MalformedError):
            return "unchecked"
        if ids != self._codec.encode(TEXT).ids:
            raise RefusedError(f"{self._server.url} reads texts as other tokens than `tokenizer`; give the model's own")
        return "ok"

    async def _version(self, dialect: Dialect) -> str:
        path = "/get_server_info" if dialect.name == "sglang" else "/version"
        try:
            return await self._ask(path, None, lambda answer: str(answer["version"]))
        except (RefusedError, MalformedError):
            return ""

    def _prompt(self, tokens: int) -> Prompt:
        if self._codec is None:
            return Prompt(None, TEXT)
        ids = self._codec.encode(TEXT).ids
        return Prompt((*self._codec.opening, *ids * (TOKENS // len(ids) + 1))[:tokens])

    async def _call(self, call: Call, read: Callable[[Any], T]) -> T:
        return await self._ask(call.path, call.body, read)

    async def _ask(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Asks up to TRIES times where the failure may pass; an answer that stays senseless is a MalformedError."""
        for tries in itertools.count(1):
            try:
                return await self._server.ask(path, body, self._seconds, read)
            except TransientError as error:
                if tries == TRIES:
                    if isinstance(error, MalformedError):
                        raise
                    raise GoneError(f"{error}; is the server up, and base_url right?") from None
                pause = 0.0 if isinstance(error, MalformedError) else 0.2
                await asyncio.sleep(min(error.retry_after or pause, 5.0))
        raise AssertionError


def _listed(answer: Any, model: str | None) -> dict[str, Any]:
    models = {entry["id"]: entry for entry in answer["data"]}
    if model is None and len(models) != 1:
        raise RefusedError(f"the server has {len(models)} models; give `model`, one of {', '.join(sorted(models))}")
    if model is None:
        return next(iter(models.values()))
    found: dict[str, Any] = models.get(model, {"id": model})
    return found
