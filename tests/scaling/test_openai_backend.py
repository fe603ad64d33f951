"""A model behind a server: what is asked, what is made of the answers, and of answers that never come."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from pyquiet.scaling.backends.base import (
    Choose,
    ContextOverflowError,
    Generate,
    GoneError,
    Prompt,
    RefusedError,
    Score,
    TransientError,
)
from pyquiet.scaling.backends.openai import OpenAIBackend
from pyquiet.scaling.backends.wire import retry_after

from .loopback import Loopback
from .toy_language import ANSWERS, EOS, NUMBERS, WORDS, ToyCodec

CODEC = ToyCodec()
TEXT = "Q: how many are left?\nA: so take"
PROMPT = Prompt(CODEC.encode(TEXT).ids)
DIALECTS = ["vllm", "sglang", "openai"]
KEY = "sk-a-secret-that-nobody-sees"
Use = Callable[[OpenAIBackend, Loopback], Awaitable[None]]


@asynccontextmanager
async def connected(server: Loopback, **options: Any):
    backend = OpenAIBackend(server.url, **{"tokenizer": CODEC} | options)
    await backend.open()
    server.reset()
    try:
        yield backend
    finally:
        await backend.close()


def against(use: Use, *dialect: str, knobs: dict[str, Any] | None = None, **options: Any) -> None:
    """Runs a use of a backend and its server."""

    async def run() -> None:
        async with Loopback(*dialect, **knobs or {}) as server, connected(server, **options) as backend:
            await use(backend, server)

    asyncio.run(run())


def writing(**changes: Any) -> Generate:
    return Generate(
        **{"chain": "c", "prompt": PROMPT, "max_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 7} | changes
    )


def in_text(prompt: Prompt) -> Prompt:
    return Prompt(None, CODEC.decode(prompt.ids or ()))


def expected(server: Loopback, tokens: int, seed: int) -> list[int]:
    return server.model.write(PROMPT.ids or (), tokens, seed)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("codec", [CODEC, None])
def test_it_writes_what_the_model_writes_and_pays_what_it_costs(dialect: str, codec: ToyCodec | None):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        ends = set()
        for seed in range(40):
            new = await backend.generate(writing(prompt=PROMPT if codec else Prompt(None, TEXT), seed=seed))
            wanted = expected(server, 40, seed)
            ended = wanted[-1] == EOS
            assert new.text == CODEC.decode(wanted)
            assert new.ids == (tuple(wanted[:-1] if ended else wanted) if codec and dialect != "openai" else None)
            assert new.finish == ("eos" if ended else "length")
            assert (new.usage.prompt_tokens, new.usage.completion_tokens) == (len(PROMPT.ids or ()), len(wanted))
            ends.add(new.finish)
        assert ends == {"eos", "length"}
        assert server.account.good("generate") == 40

    against(use, dialect, tokenizer=codec)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stop_string_ends_the_text_and_is_part_of_it(dialect: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        wanted = CODEC.decode(expected(server, 40, 7))
        stop = wanted[9:12]  # within tokens
        new = await backend.generate(writing(stop=("nowhere", wanted[10:22], stop)))
        assert new.text == wanted[: wanted.index(stop) + 3]
        assert new.finish == "stop"
        if new.ids is not None:
            assert CODEC.decode(new.ids).startswith(new.text)
            assert len(CODEC.decode(new.ids[:-1])) < len(new.text)

    against(use, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_requests_say_everything_that_decides_over_the_draws(dialect: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        await backend.generate(writing(max_tokens=5, temperature=0.6, top_p=0.9, seed=2**62 + 1, stop=("x", "y")))
        _, body = server.bodies[-1]
        sampling = body.get("sampling_params", body)
        native = dialect == "sglang"
        assert sampling["n"] == 1
        assert sampling["max_new_tokens" if native else "max_tokens"] == 5
        assert sampling["sampling_seed" if native else "seed"] == 2**62 + 1
        assert (sampling["temperature"], sampling["top_p"]) == (0.6, 0.9)
        if dialect != "openai":
            assert sampling["stop"] == ["x", "y"]
            assert (sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (-1, 0.0, 1.0)
        assert ("top_k" in sampling) == (dialect != "openai")  # no field of OpenAI's
        assert body["input_ids" if native else "prompt"] == list(PROMPT.ids or ())
        if dialect == "openai":
            with pytest.raises(RefusedError, match="top_k"):
                await backend.generate(writing(max_tokens=5, top_k=4))
            return
        await backend.generate(writing(max_tokens=5, top_k=4))
        _, body = server.bodies[-1]
        assert body.get("sampling_params", body)["top_k"] == 4

    against(use, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_scores_are_the_models_from_the_first_token_of_the_chunk_on(dialect: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        ids = (*(PROMPT.ids or ()), *expected(server, 30, 3))
        exact = server.model.score(ids)
        for start in (1, 2, len(PROMPT.ids or ()), len(ids) - 1):
            got = await backend.score(Score("c", Prompt(ids), start))
            assert got.log_probs == pytest.approx(exact[start - 1 :], abs=1e-12)
            assert got.usage.prompt_tokens == len(ids)

    against(use, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("bos", [False, True])
def test_scores_of_text_count_every_token_that_overlaps_the_chunk(dialect: str, bos: bool):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        text = TEXT + " gives é so \\boxed{4}"
        encoded = CODEC.encode(text)
        exact = server.model.score((1,) * bos + encoded.ids)
        for start in (len(TEXT), len(TEXT) + 3, len(text) - 1):
            counted = sum(end > start for _, end in encoded.offsets)
            got = await backend.score(Score("c", Prompt(None, text), start))
            assert got.log_probs == pytest.approx(exact[-counted:], abs=1e-12)

    against(use, dialect, knobs={"bos": bos}, tokenizer=None)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("codec", [CODEC, None])
def test_options_have_the_log_probs_of_what_follows(dialect: str, codec: ToyCodec | None):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        ids = PROMPT.ids or ()
        law = server.model.law(ids)
        likely = WORDS[max(range(len(law)), key=law.__getitem__)]
        options = (likely, "~", "7 ~")
        server.reset()
        chosen = await backend.choose(Choose("c", PROMPT if codec else Prompt(None, TEXT), options))
        exact = [sum(server.model.score((*ids, *CODEC.encode(o).ids))[len(ids) - 1 :]) for o in options]
        assert chosen.log_probs == pytest.approx(exact, abs=1e-12)
        assert server.account.good("choose") == 1
        assert server.account.good("score") == 2
        cost = chosen.usage
        assert (cost.prompt_tokens, cost.completion_tokens) == (
            server.account.prompt_tokens,
            server.account.completion_tokens,
        )
        assert cost.completion_tokens >= 1

    against(use, dialect, tokenizer=codec)


def test_without_scores_unlikely_options_are_impossible_and_no_likely_one_is_an_error():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        law = server.model.law(PROMPT.ids or ())
        likely = WORDS[max(range(len(law)), key=law.__getitem__)]
        chosen = await backend.choose(Choose("c", PROMPT, (likely, "~")))
        assert chosen.log_probs == (pytest.approx(max(law)), -math.inf)
        assert chosen.usage.completion_tokens == 1
        with pytest.raises(RefusedError, match="none of"):
            await backend.choose(Choose("c", PROMPT, ("~", "^")))

    against(use, "openai", knobs={"without": ("echo",)})


def test_entropies_are_refused_with_a_remedy():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        with pytest.raises(RefusedError, match="MeanNLL"):
            await backend.score(Score("c", PROMPT, 1, entropy=True))
        assert not server.account.requests

    against(use)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["generate", "score"])
@pytest.mark.parametrize(
    "fault", ["500", "408", "409", "425", "429", "503", "reset", "cut", "garbage", "empty", "null"]
)
def test_what_may_pass_is_transient_and_sent_once(dialect: str, kind: str, fault: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        server.inject(fault, kind=kind)
        send = ask(backend, kind)
        with pytest.raises(TransientError):
            await send()
        assert server.account.requests == {(kind, fault): 1}
        await send()
        assert server.account.good(kind) == 1

    against(use, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", ["nan", "short"])
def test_log_probs_that_are_none_or_too_few_are_no_score(dialect: str, fault: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        server.inject(fault)
        with pytest.raises(TransientError, match="makes no sense"):
            await ask(backend, "score")()

    against(use, dialect)


def answering(backend: OpenAIBackend, body: str) -> None:
    """From now on every request is answered so."""

    async def request(*args: Any, **options: Any) -> httpx.Response:
        return httpx.Response(200, content=body)

    backend._client.request = request  # type: ignore[union-attr, method-assign]


CHOICE = '"text": "so take", "finish_reason": "length", "stop_reason": null, "token_ids": [1, 2]'
USAGE = '"usage": {"prompt_tokens": 3, "completion_tokens": 2}'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("generate", "[" * 100_000),
        ("generate", f'{{"choices": [{{{CHOICE}}}], "usage": {{"prompt_tokens": 1e999, "completion_tokens": 2}}}}'),
        ("score", f'{{"choices": [{{"prompt_logprobs": [null, {{}}]}}], {USAGE}}}'),
    ],
)
def test_whatever_an_answer_holds_it_is_that_requests_failure_alone(kind: str, body: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        answering(backend, body)
        with pytest.raises(TransientError, match="makes no sense"):
            await (backend.score(Score("c", Prompt(None, "so"), 1)) if kind == "score" else ask(backend, kind)())

    against(use, "vllm", tokenizer=None)


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
def test_halves_of_characters_are_replaced(dialect: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        answering(backend, f'{{"choices": [{{{CHOICE}}}], {USAGE}}}'.replace("so take", r"a \ud83d\ude00 b \ud83d"))
        new = await backend.generate(writing(prompt=Prompt(None, TEXT)))
        assert new.text == "a \U0001f600 b \ufffd"

    against(use, dialect, tokenizer=None)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_ids_that_are_fewer_than_paid_for_are_no_text(dialect: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        server.inject("short")
        with pytest.raises(TransientError, match="ids for"):
            await ask(backend, "generate")()

    against(use, dialect)


@pytest.mark.parametrize("wrong", [-1, 150])
def test_ids_that_the_tokenizer_does_not_know_are_no_text(wrong: int):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        answering(backend, f'{{"choices": [{{{CHOICE}}}], {USAGE}}}'.replace("[1, 2]", f"[2, {wrong}]"))
        with pytest.raises(TransientError, match=f"{wrong} is no token of the tokenizer"):
            await ask(backend, "generate")()

    against(use, "vllm")


def ask(backend: OpenAIBackend, kind: str) -> Callable[[], Awaitable[Any]]:
    if kind == "generate":
        return lambda: backend.generate(writing(seed=3))
    return lambda: backend.score(Score("c", PROMPT, 4))


def test_a_server_that_hangs_is_left_after_the_time_agreed():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        for kind in ("generate", "score"):
            server.inject("hang", kind=kind)
            with pytest.raises(TransientError, match=r"no answer in 0\.05 s"):
                await ask(backend, kind)()
        await until(lambda: server.account.in_flight == 0)
        assert server.account.requests == {("generate", "cancelled"): 1, ("score", "cancelled"): 1}

    async def run() -> None:
        async with Loopback() as server, connected(server) as backend:
            backend._generate_timeout = backend._score_timeout = 0.05  # open() took its time before
            await use(backend, server)

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("status", ["400", "403", "404", "422", "307"])
def test_what_will_not_pass_is_refused(status: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        server.inject(status)
        with pytest.raises(RefusedError, match=f"status {status}"):
            await ask(backend, "generate")()

    against(use)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_text_beyond_the_context_is_named_so(dialect: str):
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        with pytest.raises(ContextOverflowError):
            await backend.generate(writing(max_tokens=200))
        with pytest.raises(ContextOverflowError):
            await backend.score(Score("c", Prompt((PROMPT.ids or ()) * 10), 5))

    against(use, dialect, knobs={"context": 100})


def test_retry_after_is_handed_on():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        server.inject("429", 2.5)
        server.inject("503", 7)
        server.inject("429")
        waits = []
        for _ in range(3):
            with pytest.raises(TransientError) as caught:
                await ask(backend, "generate")()
            waits.append(caught.value.retry_after)
        assert waits == [None, 7.0, None]  # 2.5 is no form of the header

    against(use)


def test_retry_after_in_both_forms():
    assert retry_after("120") == 120.0
    assert retry_after(None) is None
    assert retry_after("soon") is None
    now = datetime.now(UTC)
    assert retry_after(format_datetime(now + timedelta(seconds=90), usegmt=True)) == pytest.approx(90, abs=5)
    assert retry_after(format_datetime(now - timedelta(seconds=90), usegmt=True)) == 0.0


def test_cancelling_frees_the_servers_slot():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        server.inject("hang", times=8)
        tasks = [asyncio.ensure_future(ask(backend, "generate")()) for _ in range(8)]
        await until(lambda: server.account.in_flight == 8)
        for task in tasks[:5]:
            task.cancel()
        await until(lambda: server.account.in_flight == 3)
        assert server.account.requests == {("generate", "cancelled"): 5}
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
        await ask(backend, "generate")()

    against(use)


def test_the_key_comes_from_the_environment_and_appears_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setenv("TOY_KEY", KEY + "\n")
    caplog.set_level(0)
    seen: list[str] = []

    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        await ask(backend, "generate")()
        for fault in ("500", "404", "403", "reset", "cut", "garbage"):
            server.inject(fault)
            with pytest.raises((TransientError, RefusedError)) as caught:
                await ask(backend, "score")()
            error: BaseException | None = caught.value
            while error is not None:
                seen.append(f"{error!r}{error.__dict__}")
                error = error.__cause__
        seen.extend([repr(backend), repr(backend.identity), repr(backend.capabilities), caplog.text])

    against(use, knobs={"key": KEY}, api_key_env="TOY_KEY")
    assert any("***" in words for words in seen)  # the server did repeat it
    assert not any(KEY in words for words in seen)


def test_a_wrong_key_is_refused_and_the_variable_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")

    async def run() -> None:
        async with Loopback(key=KEY) as server:
            with pytest.raises(RefusedError, match="environment variable"):
                await OpenAIBackend(server.url).open()

    asyncio.run(run())


def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "seçret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        asyncio.run(OpenAIBackend("http://127.0.0.1:1").open())
    assert "seçret" not in str(caught.value)


def test_a_lost_server_parks_its_callers_and_they_go_on_when_it_is_back():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        await server.die()
        for _ in range(5):
            await backend.ready()
            with pytest.raises(TransientError):
                await ask(backend, "generate")()
        parked = [asyncio.ensure_future(backend.ready()) for _ in range(4)]
        await asyncio.sleep(0.03)
        assert not any(task.done() for task in parked)
        with pytest.raises(TransientError, match="nothing is sent"):
            await ask(backend, "generate")()
        await server.start()
        await asyncio.wait_for(asyncio.gather(*parked), 5)
        await ask(backend, "generate")()
        assert server.account.requests == {("other", "good"): 1, ("generate", "good"): 1}

    against(use, probe_every=0.01)


def test_statuses_of_a_server_that_lives_open_no_circuit():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        server.inject("500", times=12)
        for _ in range(12):
            with pytest.raises(TransientError, match="status 500"):
                await ask(backend, "generate")()
        await asyncio.wait_for(backend.ready(), 1)

    against(use, probe_every=60.0)


def test_connections_that_break_now_and_then_open_no_circuit():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        for fault in ["reset"] * 4 + ["400"] + ["reset"] * 4:
            server.inject(fault)
            with pytest.raises((TransientError, RefusedError)):
                await ask(backend, "generate")()
        await ask(backend, "generate")()

    against(use, probe_every=60.0)


async def lose(backend: OpenAIBackend, server: Loopback) -> None:
    """The server dies, and so many requests fail that it counts as lost."""
    await server.die()
    for _ in range(5):
        with pytest.raises(TransientError):
            await ask(backend, "score")()


def test_a_server_that_stays_away_is_gone():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        await lose(backend, server)
        with pytest.raises(GoneError, match="resume"):
            await backend.ready()

    against(use, probe_every=0.005, give_up_s=0.05)


def test_closing_ends_the_probes_of_a_lost_server():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        await lose(backend, server)
        await backend.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    against(use, probe_every=60.0)


def test_a_server_that_comes_back_with_another_model_does_not_count():
    async def use(backend: OpenAIBackend, server: Loopback) -> None:
        await lose(backend, server)
        server.root = "other-weights"
        await server.start()
        with pytest.raises(GoneError, match="came back as 'other-weights'"):
            await backend.ready()

    against(use, probe_every=0.005, give_up_s=0.1)


def test_chains_stay_with_their_replica_and_leave_a_dead_one():
    async def run() -> None:
        async with Loopback() as one, Loopback() as two:
            backend = OpenAIBackend([one.url, two.url], tokenizer=CODEC, probe_every=60.0)
            await backend.open()
            for server in (one, two):
                server.reset()
            for turn in range(3):
                for chain in ("a", "b", "c", "d"):
                    await backend.generate(writing(chain=chain, seed=turn))
            assert one.account.good() == two.account.good() == 6
            await two.die()
            for _ in range(5):
                with pytest.raises(TransientError):
                    await backend.generate(writing(chain="b"))
            await asyncio.wait_for(backend.ready(), 1)
            for chain in ("a", "b", "c", "d"):
                await backend.generate(writing(chain=chain))
            assert one.account.good() == 10
            await backend.close()

    asyncio.run(run())


def test_a_replica_that_is_dead_at_the_start_joins_when_it_serves_the_same():
    async def run() -> None:
        async with Loopback() as one, Loopback(root="other-weights") as two:
            await two.die()
            backend = OpenAIBackend([two.url, one.url], tokenizer=CODEC, probe_every=0.005)
            await backend.open()
            one.reset()
            for chain in ("a", "b"):
                await backend.generate(writing(chain=chain))
            assert one.account.good("generate") == 2
            lost = backend._servers.members[0]
            await two.start()
            await until(lambda: "no replicas: root is 'other-weights'" in lost.trouble)
            assert not lost.circuit.closed
            two.root = one.root
            await until(lambda: lost.circuit.closed)
            two.reset()
            await backend.generate(writing(chain="c"))
            assert (one.account.good("generate"), two.account.good("generate")) == (2, 1)
            await backend.close()
            for server in (one, two):
                await server.die()
            with pytest.raises(GoneError, match=rf"{one.port}.*is the server up.*{two.port}.*is the server up"):
                await OpenAIBackend([one.url, two.url]).open()

    asyncio.run(run())


def test_requests_that_are_over_count_no_more():
    async def run() -> None:
        async with Loopback() as one, Loopback() as two:
            backend = OpenAIBackend([one.url, two.url], tokenizer=CODEC)
            await backend.open()
            for server in (one, two):
                server.reset()
            for _ in range(3):
                await backend.generate(writing(chain="a"))
            backend.forget("a")
            await backend.generate(writing(chain="b"))
            assert (one.account.good(), two.account.good()) == (4, 0)
            await backend.close()

    asyncio.run(run())


def test_servers_of_different_models_are_no_replicas():
    async def run() -> None:
        async with Loopback() as one, Loopback(root="other-weights") as two:
            with pytest.raises(RefusedError, match="no replicas: root"):
                await OpenAIBackend([one.url, two.url]).open()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base_url": []}, "at least one"),
        ({"base_url": ["http://a", "http://a/v1/"]}, "none twice"),
        ({"base_url": "localhost:8000"}, "look like"),
        ({"base_url": "http://user:secret@host/v1"}, "no user and password"),
        ({"base_url": "http://host", "dialect": "llama"}, "dialect"),
        ({"base_url": "http://host", "give_up_s": 0}, "give_up_s"),
        ({"base_url": "http://host", "score_timeout": float("nan")}, "score_timeout"),
    ],
)
def test_wrong_arguments_are_named_at_the_door(arguments: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words) as caught:
        OpenAIBackend(**arguments)
    assert "secret" not in str(caught.value)


def test_nothing_is_asked_before_it_is_open():
    with pytest.raises(RuntimeError, match="open"):
        asyncio.run(OpenAIBackend("http://host").generate(writing()))


def test_answers_of_the_toy_have_answers():
    assert {NUMBERS[a] for a in ANSWERS} & {i for seed in range(50) for i in Loopback().model.write((5,), 50, seed)}
