"""What a request to a server costs on this side: the backend against bare httpx, the same bodies, the same answers."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyquiet.scaling.backends.base import Encoded, Generate, Prompt, Score
from pyquiet.scaling.backends.openai import OpenAIBackend

from .timing import best_seconds

PROMPT, CHUNK = 1000, 200
IDS = tuple(range(2, PROMPT + 2))
GENERATE = Generate("c", Prompt(IDS), CHUNK, 0.8, 1.0, 7)
SCORE = Score("c", Prompt(IDS), PROMPT - CHUNK)


class Numbers:
    """A tokenizer for which the server's word is taken."""

    fingerprint, opening, has_template = "numbers", (), False

    def render(self, question: str, system: str | None) -> str:
        return question

    def encode(self, text: str) -> Encoded:
        return Encoded(tuple(map(ord, text)), tuple((i, i + 1) for i in range(len(text))))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Canned:
    """vLLM's answers, made once for each kind and length of a request, by a server in the same loop."""

    def __init__(self) -> None:
        self._answers: dict[Any, bytes] = {}

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.partition("content-length:")[2].split("\r\n")[0]
                writer.write(self._answer(head.split()[1], await reader.readexactly(int(length or 0))))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _answer(self, path: str, body: bytes) -> bytes:
        kind = (path, len(body), b"prompt_logprobs" in body)
        if kind not in self._answers:
            answer = _listing() if path == "/v1/models" else _completion(json.loads(body)) if "compl" in path else None
            packed = json.dumps(answer).encode()
            status = "200 OK" if answer else "404 X"
            self._answers[kind] = f"HTTP/1.1 {status}\r\ncontent-length: {len(packed)}\r\n\r\n".encode() + packed
        return self._answers[kind]


def _listing() -> dict[str, Any]:
    return {"data": [{"id": "m"}]}


def _completion(body: dict[str, Any]) -> dict[str, Any] | None:
    if body.get("echo"):
        return None
    new = body["max_tokens"]
    choice: dict[str, Any] = {"text": "x" * new, "finish_reason": "length", "stop_reason": None}
    choice["token_ids"] = [5] * new
    choice["logprobs"] = {"top_logprobs": [{"token_id:5": -1.0}]} if body.get("logprobs") else None
    tables = [{str(i): {"logprob": -1.0, "rank": 1, "decoded_token": "x"}} for i in body["prompt"]]
    choice["prompt_logprobs"] = [None, *tables[1:]] if "prompt_logprobs" in body else None
    return {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": new}}


measured: dict[tuple[str, str], float] = {}


@pytest.mark.parametrize("method", ["bare httpx", "pyquiet"])
@pytest.mark.parametrize("kind", ["generate", "score"])
def test_a_request(benchmark: BenchmarkFixture, kind: str, method: str) -> None:
    """A prompt of 1,000 ids; 200 ids come back, or the log-probs of the prompt, of which the last 200 count."""
    loop = asyncio.new_event_loop()
    server = Canned()
    url = loop.run_until_complete(server.start())
    backend = OpenAIBackend(url, tokenizer=Numbers(), dialect="vllm")
    loop.run_until_complete(backend.open())
    send, check = (_bare if method == "bare httpx" else _ours)(backend, kind)
    assert check(loop.run_until_complete(send())) == CHUNK

    seconds = best_seconds(benchmark, lambda: loop.run_until_complete(send()))
    loop.run_until_complete(backend.close())
    server.server.close()
    loop.close()
    measured[kind, method] = seconds
    benchmark.extra_info.update(
        table=f"a request with {PROMPT} ids, one after the other, the server in the same loop",
        shape=kind,
        method=method,
        seconds=seconds,
    )
    if method == "pyquiet" and (kind, "bare httpx") in measured:
        benchmark.extra_info["own_microseconds"] = (seconds - measured[kind, "bare httpx"]) * 1e6


Sending = tuple[Callable[[], Awaitable[Any]], Callable[[Any], int]]


def _ours(backend: OpenAIBackend, kind: str) -> Sending:
    if kind == "generate":
        return lambda: backend.generate(GENERATE), lambda new: len(new.ids)
    return lambda: backend.score(SCORE), lambda scored: len(scored.log_probs)


def _bare(backend: OpenAIBackend, kind: str) -> Sending:
    """The same client sends the same body and reads the JSON; nothing is looked at."""
    found, client, url = backend._negotiated, backend._client, backend._urls[0]
    assert found.route is not None
    assert client is not None
    call = found.dialect.write(GENERATE) if kind == "generate" else found.route.call(SCORE.prompt, SCORE.start)

    async def send() -> Any:
        return (await client.post(url + call.path, json=call.body)).json()["choices"][0]

    if kind == "generate":
        return send, lambda choice: len(choice["token_ids"])
    return send, lambda choice: len(choice["prompt_logprobs"][SCORE.start :])
