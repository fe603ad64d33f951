"""A server on 127.0.0.1 that speaks vLLM's and SGLang's dialects, with a toy model behind it and faults at will.

    async with Loopback("vllm") as server:              # or "sglang", or "openai": OpenAI's fields alone
        backend = OpenAIBackend(server.url, tokenizer=ToyCodec())
        server.inject("429", 2.5, times=2, kind="score")   # the next two such requests; 2.5: Retry-After
        server.mix({"500": 0.05, "reset": 0.02}, seed=1)   # a share of all requests, probes excepted
        await server.die(); await server.start()           # gone, and back on the same port

    with serving("sglang", latency=0.01) as server: ...    # in a thread with a loop of its own

Knobs: `salt` of the model; `context` in tokens; `latency` in seconds, or a function of the kind of a request; `key`
that is asked for; `bos` put before prompts of text; `root` that the model is said to come from; `without`: names of
routes that are refused ("prompt_logprobs", "echo", "generate", "law"), or "token_ids" for a vLLM that tells ids only
as names of log-probs; `wrong`: by route, what is done to its list of log-probs.

Kinds of requests: "generate", "score", "choose", "probe" (those by which a backend finds out what the server can do)
and "other" (lists of models and the like). Faults: a status such as "500" or "429"; "hang"; "reset" of the connection;
"cut" in the middle of the answer; "garbage" (half of the JSON); "empty" (nothing chosen); "null", "nan" and "short" in
the log-probs, or in the text or the ids where none are asked for; "slow" (seconds more); "die" (seconds until it is
back).

`account` counts requests by kind and outcome ("good", the fault's name, "refused", or "cancelled" by the client),
tokens of good answers, and requests in flight; `reset` sets it to zero. `bodies` keeps what was asked last.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pyquiet.scaling.backends.probe import TEXT, TOKENS

from .toy_language import BOS, EOS, WORDS, ToyCodec, ToyModel

Wrong = Callable[[list[Any]], list[Any]]
MODEL = "toy"


@dataclass
class Account:
    """What a server has done so far."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    peak: int = 0

    def good(self, *kinds: str) -> int:
        """Good answers of these kinds, by default of those that a run asks for."""
        return sum(self.requests[kind, "good"] for kind in kinds or ("generate", "score", "choose"))

    def faulty(self) -> int:
        """Requests of a run that met a fault."""
        ours = ("generate", "score", "choose")
        return sum(n for (kind, end), n in self.requests.items() if kind in ours and end not in ("good", "cancelled"))


@dataclass
class Request:
    """What came in: `kind` as above, `ids` of the prompt."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    kind: str = "other"
    ids: tuple[int, ...] = ()
    text: str | None = None


@dataclass
class Fault:
    kind: str
    value: float | None = None
    only: str | None = None


class Refusal(Exception):  # noqa: N818  an answer, no mistake
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Loopback:
    """The server; `url` ends in "/v1"."""

    def __init__(
        self,
        dialect: str = "vllm",
        *,
        salt: int = 0,
        context: int = 4096,
        latency: float | Callable[[str], float] = 0.0,
        key: str | None = None,
        bos: bool = False,
        root: str = "toy-weights",
        without: tuple[str, ...] = (),
        wrong: Mapping[str, Wrong] | None = None,
    ) -> None:
        self.dialect, self.context, self.key, self.root = dialect, context, key, root
        self.codec, self.model = ToyCodec(), ToyModel(salt)
        self.account = Account()
        self.bodies: deque[tuple[str, dict[str, Any]]] = deque(maxlen=100)
        self.port = 0
        self._latency, self._bos, self._without, self._wrong = latency, bos, without, wrong or {}
        self._faults: deque[Fault] = deque()
        self._mix: Mapping[str, float] = {}
        self._dice = random.Random(0)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._revival: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> Loopback:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._revival is not None:
            self._revival.cancel()
        await self.die()

    async def start(self) -> None:
        """Listens, on the port it had if it was there before; in the loop that is kept as `loop`."""
        self.loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Breaks off everything and listens no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    def inject(self, fault: str, value: float | None = None, *, times: int = 1, kind: str | None = None) -> None:
        """The next `times` requests (of this kind) meet a fault."""
        self._faults.extend(Fault(fault, value, kind) for _ in range(times))

    def mix(self, shares: Mapping[str, float], seed: int = 0) -> None:
        """From now on requests of a run meet these faults by chance."""
        self._mix, self._dice = dict(shares), random.Random(seed)

    def reset(self) -> None:
        """A new account; requests in flight are still counted."""
        self.account = Account(in_flight=self.account.in_flight, peak=self.account.in_flight)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while (request := await self._read(reader)) is not None and await self._serve(request, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(first.split()[1], json.loads(body) if body else {}, headers)
        self._classify(request)
        return request

    def _classify(self, request: Request) -> None:
        body = request.body
        prompt = body.get("prompt", body.get("input_ids", body.get("text")))
        if request.path not in ("/v1/completions", "/generate") or prompt is None:
            return
        if isinstance(prompt, str):
            request.text = prompt
            request.ids = (BOS,) * self._bos + self.codec.encode(prompt).ids
        else:
            request.ids = tuple(prompt)
        probe = self.codec.encode(TEXT).ids[: TOKENS - 1]
        if probe in (request.ids[: TOKENS - 1], request.ids[1:TOKENS]) and len(request.ids) <= len(TEXT) + 1:
            request.kind = "probe"
        elif body.get("echo") or "prompt_logprobs" in body or "logprob_start_len" in body:
            request.kind = "score"
        else:
            law = body.get("logprobs") or body.get("top_logprobs_num")
            request.kind = "choose" if law else "generate"
        self.bodies.append((request.kind, body))

    async def _serve(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers, unless the client goes; whether the connection is kept."""
        fault = self._fault(request)
        account, outcome = self.account, fault.kind if fault else "good"
        account.in_flight += 1
        account.peak = max(account.peak, account.in_flight)
        job = asyncio.ensure_future(self._answer(request, fault))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                outcome = "cancelled"
                return False
            status, answer = job.result()
            outcome = "refused" if status >= 300 and fault is None else outcome
            if fault and fault.kind in ("reset", "die"):
                writer.transport.abort()
                return False
            if writer.transport.is_closing():  # the server died in the tick in which the answer was ready
                outcome = "cancelled"
                return False
            writer.write(self._packed(status, answer, fault))
            await writer.drain()
            return not (fault and fault.kind == "cut")
        finally:
            for task in (job, gone):
                task.cancel()
            await asyncio.gather(job, gone, return_exceptions=True)
            self.account.in_flight -= 1
            account.requests[request.kind, outcome] += 1
            if outcome == "good" and request.kind != "other":
                self._charge(account, job.result()[1])

    def _charge(self, account: Account, answer: Any) -> None:
        told = answer.get("usage") or answer.get("meta_info")
        account.prompt_tokens += told["prompt_tokens"]
        account.completion_tokens += told["completion_tokens"]

    def _fault(self, request: Request) -> Fault | None:
        for fault in self._faults:
            if fault.only in (None, request.kind):
                self._faults.remove(fault)
                return fault
        if request.kind not in ("probe", "other"):
            drawn = self._dice.random()
            for kind, share in self._mix.items():
                drawn -= share
                if drawn < 0:
                    return Fault(kind)
        return None

    async def _answer(self, request: Request, fault: Fault | None) -> tuple[int, Any]:
        kind = fault.kind if fault else ""
        if kind == "hang":
            await asyncio.Event().wait()
        if kind == "die":
            self._revival = asyncio.ensure_future(self._die_for(fault.value or 0.0 if fault else 0.0))
        if request.kind != "other":
            seconds = self._latency(request.kind) if callable(self._latency) else self._latency
            await asyncio.sleep(seconds + (fault.value or 0.0 if fault and kind == "slow" else 0.0))
        if kind.isdigit():
            return int(kind), {"error": {"message": f"injected; you sent {request.headers.get('authorization')}"}}
        try:
            answer = self._routed(request)
        except Refusal as refusal:
            return refusal.status, {"error": {"message": str(refusal), "code": refusal.status}}
        return 200, _spoilt(answer, kind)

    async def _die_for(self, seconds: float) -> None:
        await self.die()
        await asyncio.sleep(seconds)
        await self.start()

    def _packed(self, status: int, answer: Any, fault: Fault | None) -> bytes:
        body = json.dumps(answer).encode()
        if fault and fault.kind == "garbage":
            body = body[: len(body) // 2]
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if fault and fault.kind.isdigit() and fault.value is not None:
            head += f"Retry-After: {fault.value:g}\r\n"
        packed = head.encode() + b"\r\n" + body
        return packed[: -len(body) // 2] if fault and fault.kind == "cut" else packed

    def _routed(self, request: Request) -> Any:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refusal(401, f"wrong key: {request.headers.get('authorization')}")
        path = request.path
        if path == "/v1/models":
            return {"data": [{"id": MODEL, "root": self.root, "max_model_len": self.context}]}
        if path == "/v1/completions":
            return self._completion(request)
        if path == "/generate" and self.dialect == "sglang" and "generate" not in self._without:
            return self._native(request)
        if path == "/tokenize" and self.dialect != "openai":
            return {"tokens": self.codec.encode(request.body["prompt"]).ids}
        if path in ("/version", "/get_server_info") and self.dialect != "openai":
            return {"version": "0.toy"}
        raise Refusal(404, "not found")

    def _completion(self, request: Request) -> Any:
        body, extended = request.body, self.dialect == "vllm"
        self._refuse_unknown(body)
        if len(request.ids) + body["max_tokens"] > self.context:
            raise Refusal(400, f"This model's maximum context length is {self.context} tokens. However, ...")
        new = self.model.write(request.ids, body["max_tokens"], body.get("seed", 0), body["temperature"])
        new, text, reason, matched = self._stopped(new, body.get("stop") or [], keep=extended)
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        if extended:
            choice["stop_reason"] = matched if isinstance(matched, str) else None
            if body.get("return_token_ids") and "token_ids" not in self._without:
                choice["token_ids"] = new
        if body.get("logprobs") is not None:
            choice["logprobs"] = self._listed(request, new, body)
        if body.get("prompt_logprobs") is not None:
            told = [_table(token, value) for token, value in self._scored(request, "prompt_logprobs")]
            choice["prompt_logprobs"] = told
        return {"choices": [choice], "usage": {"prompt_tokens": len(request.ids), "completion_tokens": len(new)}}

    def _refuse_unknown(self, body: dict[str, Any]) -> None:
        ours = {"top_k", "min_p", "repetition_penalty", "include_stop_str_in_output", "return_token_ids"}
        ours |= {"prompt_logprobs", "return_tokens_as_token_ids"}
        if self.dialect == "openai" and ours & set(body):
            raise Refusal(400, f"unrecognised fields {sorted(ours & set(body))}")
        if self.dialect == "openai" and (body.get("logprobs") or 0) > 5:
            raise Refusal(400, "logprobs must be at most 5")
        for name in ("prompt_logprobs", "echo"):
            if name in body and name in self._without:
                raise Refusal(400, f"{name} is not served")
        if "law" in self._without and body.get("logprobs") and not body.get("echo"):
            raise Refusal(400, "logprobs are not served")
        if body["model"] != MODEL:
            raise Refusal(404, f"the model {body['model']} does not exist")

    def _listed(self, request: Request, new: list[int], body: dict[str, Any]) -> dict[str, Any]:
        def name(token: int) -> str:
            return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else WORDS[token]

        pairs = self._scored(request, "echo") if body.get("echo") else []
        whole = [*request.ids, *new]
        laws = [self.model.law(whole[:i]) for i in range(len(request.ids), len(whole))]
        pairs += [(token, law[token]) for token, law in zip(new, laws, strict=True)]
        return {
            "tokens": [name(token) for token, _ in pairs],
            "token_logprobs": [value for _, value in pairs],
            "top_logprobs": [{name(i): law[i] for i in _top(law, body["logprobs"])} for law in laws],
        }

    def _native(self, request: Request) -> Any:
        body, sampling = request.body, request.body["sampling_params"]
        if len(request.ids) + sampling["max_new_tokens"] > self.context:
            raise Refusal(400, f"The input ({len(request.ids)} tokens) is longer than the model's context length")
        new = self.model.write(
            request.ids, sampling["max_new_tokens"], sampling.get("sampling_seed", 0), sampling["temperature"]
        )
        law = self.model.law(request.ids)
        new, text, reason, matched = self._stopped(new, sampling.get("stop") or [], keep=sampling.get("no_stop_trim"))
        meta: dict[str, Any] = {
            "prompt_tokens": len(request.ids),
            "completion_tokens": len(new),
            "finish_reason": {"type": reason, "matched": matched},
        }
        if body.get("return_logprob"):
            if "law" in self._without and body.get("top_logprobs_num"):
                raise Refusal(400, "logprobs are not served")
            start = body.get("logprob_start_len", len(request.ids))
            pairs = self._scored(request, "generate")[start:]
            texts = body.get("return_text_in_logprobs")
            told = [[value, token, WORDS[token] if texts else None] for token, value in pairs]
            if told:
                told[0][0] = None
            meta["input_token_logprobs"] = told
            top = _top(law, body.get("top_logprobs_num", 0))
            meta["output_top_logprobs"] = [[[law[i], i, WORDS[i] if texts else None] for i in top]]
        return {"text": text, "output_ids": new, "meta_info": meta}

    def _scored(self, request: Request, route: str) -> list[tuple[int, float | None]]:
        values: list[float | None] = [None, *self.model.score(request.ids)]
        if route in self._wrong:
            values = self._wrong[route](values)
        return list(zip(request.ids, values, strict=False))

    def _stopped(self, new: list[int], stop: list[str], *, keep: bool) -> tuple[list[int], str, str, str | int | None]:
        """Tokens, text, reason and what was found: a stop string, which may end within a token, or EOS."""
        for end in range(1, len(new) + 1):
            text = self.codec.decode(new[:end])
            for string in stop:
                if string in text:
                    cut = text.index(string) + len(string) * bool(keep)
                    return new[:end], text[:cut], "stop", string
        if new and new[-1] == EOS:
            return new, self.codec.decode(new), "stop", EOS
        return new, self.codec.decode(new), "length", None


def _top(law: list[float], count: int) -> list[int]:
    return sorted(range(len(law)), key=law.__getitem__, reverse=True)[:count]


def _table(token: int, value: float | None) -> dict[str, Any] | None:
    return None if value is None else {str(token): {"logprob": value, "rank": 1, "decoded_token": WORDS[token]}}


def _spoilt(answer: Any, fault: str) -> Any:
    """The answer with what the fault does to it."""
    if fault == "empty":
        return {**answer, "choices": []} if "choices" in answer else {"text": ""}
    if fault not in ("null", "nan", "short"):
        return answer
    choice = answer["choices"][0] if "choices" in answer else answer
    lists = [
        choice.get("prompt_logprobs"),
        (choice.get("logprobs") or {}).get("token_logprobs"),
        choice.get("meta_info", {}).get("input_token_logprobs"),
    ]
    told = next((found for found in lists if found), None)
    if told is None:
        if fault == "short" and (ids := choice.get("token_ids", choice.get("output_ids"))):
            ids.pop()
        else:
            choice["text"] = None
    elif fault == "short":
        told.pop()
    else:
        last = -2 if told is lists[1] else -1  # echo tells a new token behind the prompt's
        told[last] = _with_value(told[last], None if fault == "null" else float("nan"))
    return answer


def _with_value(entry: Any, value: float | None) -> Any:
    if isinstance(entry, dict):
        return {token: {**told, "logprob": value} for token, told in entry.items()}
    return [value, *entry[1:]] if isinstance(entry, list) else value


@contextmanager
def serving(*args: Any, **knobs: Any) -> Iterator[Loopback]:
    """A server in a thread of its own, for programs that are no coroutines."""
    server, started, loop = Loopback(*args, **knobs), threading.Event(), asyncio.new_event_loop()

    def run() -> None:
        loop.run_until_complete(server.start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(server.__aexit__())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
