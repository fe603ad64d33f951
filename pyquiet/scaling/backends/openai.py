"""Models behind OpenAI-compatible servers: vLLM, SGLang, and others as far as they go."""

import asyncio
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from pyquiet.checks import check_word
from pyquiet.scaling.backends.base import (
    NO_USAGE,
    BackendError,
    Choose,
    Generate,
    Generated,
    GoneError,
    Prompt,
    RefusedError,
    Score,
    Scored,
    TextCodec,
    Usage,
)
from pyquiet.scaling.backends.circuit import Circuit
from pyquiet.scaling.backends.dialects import Law
from pyquiet.scaling.backends.probe import Capabilities, Name, Negotiated, Prober
from pyquiet.scaling.backends.prompt_log_probs import scored
from pyquiet.scaling.backends.replicas import Replicas
from pyquiet.scaling.backends.wire import Endpoint, new_client
from pyquiet.scaling.calls import together

if TYPE_CHECKING:
    import httpx

HEALTH_SECONDS = 10.0


class OpenAIBackend:
    """One model on one server or on several replicas (ATTS, section 14 of its specification here).

    Token ids go both ways where `tokenizer` is given; else texts do, and the server tokenizes them by its own rules.

    Args:
        base_url: address up to or with "/v1"; several for replicas of the same model.
        model: name on the server, None if it serves one only.
        tokenizer: the model's: a `TextCodec`, a transformers tokenizer, or the name or folder of one.
        dialect: "vllm", "sglang", "openai" (no fields but OpenAI's own), or "auto" to find out.
        api_key_env: the environment variable that holds the key, if it is set; nothing else ever holds it.
        generate_timeout, score_timeout: seconds a request may take in all.
        give_up_s: seconds without any server after which `ready` raises GoneError.
        probe_every: seconds between two looks at a server that was lost.
        tolerance: what two ways to the same log-prob may differ by, in nats.

    Raises:
        ValueError, TypeError: an argument is wrong. ImportError: httpx is missing.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str | None = None,
        *,
        tokenizer: Any = None,
        dialect: Name = "auto",
        api_key_env: str = "OPENAI_API_KEY",
        generate_timeout: float = 600.0,
        score_timeout: float = 120.0,
        give_up_s: float = 600.0,
        probe_every: float = 5.0,
        tolerance: float = 1e-3,
    ) -> None:
        self._urls = [_address(url) for url in ([base_url] if isinstance(base_url, str) else base_url)]
        if not self._urls or len(set(self._urls)) < len(self._urls):
            raise ValueError(f"base_url must name at least one server and none twice, got {base_url!r}")
        check_word("dialect", dialect, Name)
        for name, seconds in (
            ("generate_timeout", generate_timeout),
            ("score_timeout", score_timeout),
            ("give_up_s", give_up_s),
            ("probe_every", probe_every),
            ("tolerance", tolerance),
        ):
            if not seconds > 0:
                raise ValueError(f"{name} must be above 0, got {seconds}")
        self.codec: TextCodec | None = _codec(tokenizer)
        self._model, self._name, self._api_key_env = model, dialect, api_key_env
        self._generate_timeout, self._score_timeout = generate_timeout, score_timeout
        self._give_up_s, self._probe_every, self._tolerance = give_up_s, probe_every, tolerance
        self._client: httpx.AsyncClient | None = None
        self._replicas: Replicas | None = None
        self._found: Negotiated | None = None
        self._unseen: set[Endpoint] = set()  # lost before it could be asked

    def __repr__(self) -> str:
        return f"OpenAIBackend({', '.join(self._urls)}, model={self._model!r}, dialect={self._name!r})"

    @property
    def capabilities(self) -> Capabilities:
        """What the server was found to do; RuntimeError before `open`."""
        return self._negotiated.capabilities

    @property
    def identity(self) -> dict[str, str]:
        """What decides over results; no address, since a server may come back elsewhere."""
        found = self.capabilities
        return {
            "backend": "openai",
            "model": found.model,
            "root": found.root,
            "dialect": found.dialect,
            "prompt": found.prompt,
            "score": found.score or "none",
            "tokenizer": self.codec.fingerprint if self.codec is not None else "",
        }

    async def open(self) -> None:
        """Asks every replica what it can do; they must serve the same in the same way.

        One that cannot be reached counts as lost, and joins when it is there and serves the same as the others.

        Raises GoneError if none can be reached, RefusedError if one cannot be used or another model is on it.
        """
        key = _key(self._api_key_env)
        self._client = new_client(key)
        endpoints = [self._endpoint(url, key) for url in self._urls]
        self._replicas = Replicas(endpoints, give_up_s=self._give_up_s)
        try:
            self._found = await self._negotiate(endpoints)
            for server in self._unseen:
                server.circuit.lose()
        except BaseException:
            await self.close()
            raise

    async def ready(self) -> None:
        """Returns when a server is there; GoneError if none was for `give_up_s`."""
        await self._servers.ready()

    async def generate(self, request: Generate) -> Generated:
        """New text, asked for once."""
        dialect = self._negotiated.dialect
        call = dialect.write(request)
        server = self._servers.pick(request.chain)
        return await server.ask(
            call.path, call.body, self._generate_timeout, lambda answer: self._known(dialect.wrote(answer, request))
        )

    async def score(self, request: Score) -> Scored:
        """Log-probs of the end of a prompt, asked for once.

        Raises RefusedError if the server tells no log-probs of prompts that could be trusted, or if entropies are
        wanted, which servers do not tell.
        """
        if request.entropy:
            raise RefusedError(
                "servers tell log-probs of tokens, not entropies: choose another score, such as MeanNLL, or run the "
                "target in this process"
            )
        route = self._negotiated.route
        if route is None:
            why = "; ".join(f"{name}: {word}" for name, word in self.capabilities.routes.items())
            raise RefusedError(
                f"{self._urls[0]} tells no log-probs of prompts that could be trusted ({why}): let the target judge "
                "chunks by a grade (score=JudgeGrade()), or serve it with vLLM or SGLang"
            )
        call = route.call(request.prompt, request.start)
        server = self._servers.pick(request.chain)
        return await server.ask(
            call.path,
            call.body,
            self._score_timeout,
            lambda answer: scored(route, answer, request.prompt, request.start),
        )

    async def choose(self, request: Choose) -> Scored:
        """Log-probs of the options, from the law of the next token where they are likely tokens, else by scoring them.

        Without scoring, an option that is not among the likely ones has log-prob -inf; RefusedError if none is.
        """
        tokens = [self._token(option) for option in request.options]
        law, cost = await self._law(request) if any(token is not None for token in tokens) else ({}, NO_USAGE)
        pairs = zip(request.options, tokens, strict=True)
        values = [None if token is None else law.get(token, law.get(option)) for option, token in pairs]
        if self._negotiated.route is None:
            if all(value is None for value in values):
                raise RefusedError(
                    f"none of {list(request.options)} is among the likely next tokens; word the prompt so"
                )
            return Scored(tuple(-math.inf if value is None else value for value in values), cost)
        for i, option in enumerate(request.options):
            if values[i] is None:
                answer = await self._continued(request, option)
                values[i], cost = math.fsum(answer.log_probs), cost + answer.usage
        return Scored(tuple(value for value in values if value is not None), cost)

    def forget(self, chain: str) -> None:
        """The chain needs no server any more."""
        self._servers.forget(chain)

    async def close(self) -> None:
        """Ends probes and connections."""
        if self._replicas is not None:
            for server in self._replicas.members:
                await server.circuit.close()
        if self._client is not None:
            await self._client.aclose()

    @property
    def _negotiated(self) -> Negotiated:
        if self._found is None:
            raise RuntimeError("open() the backend first")
        return self._found

    @property
    def _servers(self) -> Replicas:
        if self._replicas is None:
            raise RuntimeError("open() the backend first")
        return self._replicas

    def _endpoint(self, url: str, key: str | None) -> Endpoint:
        assert self._client is not None
        circuit = Circuit(lambda: self._well(server), every=self._probe_every, changed=lambda: self._servers.changed())
        server = Endpoint(url, self._client, circuit, key)
        return server

    async def _negotiate(self, endpoints: Sequence[Endpoint]) -> Negotiated:
        """Asks all at once, so that one that hangs costs no more time than it has alone."""
        answers = await together(self._meet(server) for server in endpoints)
        self._unseen = {server for server, found in zip(endpoints, answers, strict=True) if found is None}
        met = [(server, found) for server, found in zip(endpoints, answers, strict=True) if found is not None]
        if not met:
            raise GoneError("; ".join(server.trouble for server in endpoints))
        first, best = met[0]
        for server, found in met[1:]:
            _check_replicas(first.url, best.capabilities, server.url, found.capabilities)
        return best

    async def _meet(self, server: Endpoint) -> Negotiated | None:
        """What the server can do; None, and why, for one that cannot be reached in the time that a score may take."""
        try:
            async with asyncio.timeout(self._score_timeout):
                return await self._prober(server, self._score_timeout).negotiate(self._model, self._name)
        except TimeoutError:
            server.trouble = f"{server.url} did not say what it can do in {self._score_timeout:g} s; is it overloaded?"
        except GoneError as error:
            server.trouble = str(error)
        return None

    def _prober(self, server: Endpoint, seconds: float) -> Prober:
        return Prober(server, self.codec, seconds=seconds, tolerance=self._tolerance)

    async def _well(self, server: Endpoint) -> bool:
        """Whether a lost server is back, with the model that it had; one that was never seen, with that of the rest."""
        found, prober = self.capabilities, self._prober(server, HEALTH_SECONDS)
        if server in self._unseen:
            return await self._joins(server, prober)
        try:
            root = str((await prober.entry(found.model)).get("root") or "")
        except RefusedError:
            root = ""  # a server without a list of models
        except BackendError as error:
            server.trouble = str(error)
            return False
        if root != found.root:
            server.trouble = f"it was {found.root!r} of {found.model!r} and came back as {root!r}"
        return root == found.root

    async def _joins(self, server: Endpoint, prober: Prober) -> bool:
        try:
            found = await prober.negotiate(self._model, self._name)
            _check_replicas("the others", self.capabilities, server.url, found.capabilities)
        except BackendError as error:
            server.trouble = str(error)
            return False
        self._unseen.remove(server)
        return True

    def _known(self, new: Generated) -> Generated:
        """A text with ids only if there is a tokenizer; ValueError for one that it does not know: no model could read
        on behind it."""
        if self.codec is None:
            return replace(new, ids=None)
        size = getattr(self.codec, "size", 2**31)
        if (wrong := next((i for i in new.ids or () if not 0 <= i < size), None)) is not None:
            raise ValueError(f"{wrong} is no token of the tokenizer, whose ids are below {size}")
        return new

    async def _law(self, request: Choose) -> tuple[Law, Usage]:
        dialect = self._negotiated.dialect
        if not self.capabilities.law:
            return {}, NO_USAGE
        call = dialect.next(request.prompt)
        return await self._servers.pick(request.chain).ask(
            call.path, call.body, self._score_timeout, lambda answer: (dialect.law(answer), dialect.cost(answer))
        )

    async def _continued(self, request: Choose, option: str) -> Scored:
        prompt = request.prompt
        if prompt.ids is None or self.codec is None:
            longer, start = Prompt(None, prompt.text + option), len(prompt.text)
        else:
            longer, start = Prompt((*prompt.ids, *self.codec.encode(option).ids)), len(prompt.ids)
        return await self.score(Score(request.chain, longer, start))

    def _token(self, option: str) -> int | str | None:
        if self.codec is None:
            return option
        ids = self.codec.encode(option).ids
        return ids[0] if len(ids) == 1 else None


def _check_replicas(one: str, first: Capabilities, other: str, second: Capabilities) -> None:
    """RefusedError unless two servers serve the same in the same way."""
    for name in ("model", "root", "dialect", "score", "context"):
        a, b = getattr(first, name), getattr(second, name)
        if a != b:
            raise RefusedError(f"{other} and {one} are no replicas: {name} is {b!r} and {a!r}")


def _address(url: str) -> str:
    """The address before "/v1"."""
    if not isinstance(url, str):
        raise TypeError(f"base_url must be a string or several, got {url!r}")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"base_url must look like http://host:port/v1, got {url!r}")
    if "@" in parts.netloc:
        raise ValueError("base_url must hold no user and password: put the key into the variable api_key_env names")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _key(name: str) -> str | None:
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and (not key or key.isprintable())):
        raise ValueError(f"the environment variable {name} holds what no header can: only printable ASCII may be a key")
    return key or None


def _codec(tokenizer: Any) -> TextCodec | None:
    if tokenizer is None or hasattr(tokenizer, "fingerprint"):
        return cast(TextCodec | None, tokenizer)
    from pyquiet.scaling.backends.codec import HFCodec

    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return HFCodec(tokenizer)
