"""What a server is found to do when it is opened, and log-probs that cannot be trusted."""

import asyncio
import warnings
from typing import Any

import pytest

from pyquiet.scaling.backends.base import Generate, GoneError, Prompt, RefusedError, Score
from pyquiet.scaling.backends.openai import OpenAIBackend
from pyquiet.scaling.backends.probe import Capabilities
from pyquiet.scaling.backends.prompt_log_probs import NativeLogProbs, scored, spans

from .loopback import Loopback
from .toy_language import EOS, ToyCodec

CODEC = ToyCodec()


def found(*dialect: str, codec: Any = CODEC, knobs: dict[str, Any] | None = None, **options: Any) -> Capabilities:
    async def run() -> Capabilities:
        async with Loopback(*dialect, **knobs or {}) as server:
            backend = OpenAIBackend(server.url, tokenizer=codec, **options)
            await backend.open()
            await backend.close()
            return backend.capabilities

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("dialect", "score"), [("vllm", "prompt_logprobs"), ("sglang", "generate"), ("openai", "echo")]
)
@pytest.mark.parametrize("codec", [CODEC, None])
def test_the_dialect_is_found_out(dialect: str, score: str, codec: Any):
    seen = found(dialect, codec=codec)
    assert (seen.dialect, seen.score, seen.model, seen.root) == (dialect, score, "toy", "toy-weights")
    assert (seen.context, seen.law, seen.prompt) == (4096, True, "ids" if codec else "text")
    assert set(seen.routes.values()) == {"ok"}
    assert found(dialect, codec=codec, dialect=dialect) == seen
    assert seen.to_dict()["routes"] == seen.routes


def test_a_dialect_that_is_not_spoken_is_refused_by_name():
    with pytest.raises(RefusedError, match=r"sglang: .*status 404"):
        found("vllm", dialect="sglang")
    with pytest.raises(RefusedError, match="vllm: "):
        found("openai", dialect="vllm")


def test_a_vllm_that_names_ids_only_in_log_probs_tells_them_too():
    async def run() -> None:
        async with Loopback(without=("token_ids",)) as server:
            backend = OpenAIBackend(server.url, tokenizer=CODEC)
            await backend.open()
            assert backend.capabilities.dialect == "vllm"
            for seed in range(20):
                new = await backend.generate(Generate("c", Prompt((5, 6)), 30, 1.0, 1.0, seed))
                wanted = server.model.write((5, 6), 30, seed)
                assert new.ids == tuple(i for i in wanted if i != EOS)
            await backend.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("dialect", "route", "other"),
    [("vllm", "echo", "prompt_logprobs"), ("vllm", "prompt_logprobs", "echo"), ("sglang", "generate", "echo")],
)
def test_a_list_that_is_off_by_one_is_found_and_the_other_route_taken(dialect: str, route: str, other: str):
    seen = found(dialect, knobs={"wrong": {route: lambda values: [None, *values[2:], -1.0]}})
    assert "last token" in seen.routes[route] or "from token 12" in seen.routes[route]
    assert (seen.routes[other], seen.score) == ("ok", other)


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
def test_a_list_that_is_off_by_one_is_found_where_nothing_stands_beside_it(dialect: str):
    shifted = {"wrong": {"echo": lambda values: [None, *values[2:], -1.0]}, "without": ("prompt_logprobs",)}
    seen = found(dialect, knobs=shifted)
    assert seen.score is None
    assert "last token" in seen.routes["echo"]


def test_log_probs_that_are_off_only_where_they_begin_late_are_found():
    asked: list[int] = []

    def late(values: list[Any]) -> list[Any]:
        asked.append(len(values))  # of the law, from the start, from the middle
        return values if len(asked) <= 2 else [None, *values[2:], -1.0]

    seen = found("sglang", knobs={"wrong": {"generate": late}})
    assert "asked from token 12 on" in seen.routes["generate"]
    assert seen.score == "echo"


def test_log_probs_of_other_tokens_are_no_scores():
    told = [[None, 5, None], [-1.0, 6, None], [-2.0, 8, None]]
    answer = {"meta_info": {"input_token_logprobs": told, "prompt_tokens": 3, "completion_tokens": 0}}
    assert scored(NativeLogProbs(), answer, Prompt((5, 6, 8)), 1).log_probs == (-1.0, -2.0)
    with pytest.raises(ValueError, match="other tokens"):
        scored(NativeLogProbs(), answer, Prompt((5, 6, 7)), 1)


def test_routes_that_disagree_are_both_refused_by_name_and_a_score_says_so():
    def stale(values: list[Any]) -> list[Any]:
        return [None, *(v + 0.01 for v in values[1:9]), *values[9:]]  # as from a cache of another batch

    async def run() -> None:
        async with Loopback(wrong={"prompt_logprobs": stale}) as server:
            backend = OpenAIBackend(server.url, tokenizer=CODEC)
            await backend.open()
            assert backend.capabilities.score is None
            assert backend.identity["score"] == "none"
            with pytest.raises(RefusedError, match=r"prompt_logprobs and echo disagree.*JudgeGrade"):
                await backend.score(Score("c", Prompt((5, 6, 7)), 1))
            await backend.generate(Generate("c", Prompt((5, 6)), 30, 1.0, 1.0, 0))  # a draft needs no scores
            await backend.close()

    asyncio.run(run())
    assert found(knobs={"wrong": {"prompt_logprobs": stale}}, tolerance=0.02).score == "prompt_logprobs"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda values: values[:-1], "19 log-probs for 20 tokens"),
        (lambda values: [-0.5, *values[1:]], "nothing stands"),
        (lambda values: [*values[:7], None, *values[8:]], "NoneType"),
        (lambda values: [*values[:7], 0.5, *values[8:]], "no log-probability"),
        (lambda values: [*values[:7], float("-inf"), *values[8:]], "no log-probability"),
    ],
)
def test_lists_with_holes_or_too_few_or_impossible_numbers_are_refused(spoil: Any, words: str):
    seen = found(knobs={"wrong": {"prompt_logprobs": spoil}})
    assert words in seen.routes["prompt_logprobs"]
    assert seen.score == "echo"


@pytest.mark.parametrize(("dialect", "routes"), [("vllm", ("prompt_logprobs", "echo")), ("openai", ("echo",))])
def test_a_server_without_log_probs_of_prompts_can_still_write(dialect: str, routes: tuple[str, ...]):
    seen = found(dialect, knobs={"without": routes})
    assert seen.score is None
    assert all("not served" in seen.routes[route] for route in routes)


def test_a_server_without_any_log_probs_is_scored_without_a_witness():
    seen = found(knobs={"without": ("law",)})
    assert (seen.law, seen.score) == (False, "prompt_logprobs")


def test_another_tokenizer_than_the_servers_is_refused():
    class Other(ToyCodec):
        def encode(self, text: str) -> Any:
            whole = super().encode(text)
            return type(whole)(tuple(i + 1 for i in whole.ids), whole.offsets)

    with pytest.raises(RefusedError, match="other tokens"):
        found(codec=Other())


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(RefusedError, match="does not exist"):
        found(model="another")


def test_a_server_that_is_not_there_is_gone_and_one_that_is_busy_at_first_is_not():
    with pytest.raises(GoneError, match="is the server up"):
        asyncio.run(OpenAIBackend("http://127.0.0.1:9").open())

    async def run() -> None:
        async with Loopback() as server:
            server.inject("503", times=2)
            backend = OpenAIBackend(server.url)
            await backend.open()
            await backend.close()

    asyncio.run(run())


def test_a_backend_that_was_closed_can_be_opened_in_another_loop():
    async def once(backend: OpenAIBackend) -> str:
        await backend.open()
        new = await backend.generate(Generate("c", Prompt(None, "Q"), 9, 1.0, 1.0, 1))
        await backend.close()
        return new.text

    from .loopback import serving

    with serving() as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = OpenAIBackend(server.url)
        assert asyncio.run(once(backend)) == asyncio.run(once(backend))


@pytest.mark.parametrize(
    ("tokens", "text", "wanted"),
    [
        (["ab", " c", "d"], "ab cd", [(0, 2), (2, 4), (4, 5)]),
        (["<s>", "ab", " c"], "ab c", [(0, 0), (0, 2), (2, 4)]),
        (["ab", "c"], "ab c", [(0, 2), (2, 4)]),  # the space is told of by neither
        (["a", "\ufffd", "\ufffd", "b"], "aéb", [(0, 1), (1, 2), (1, 2), (2, 3)]),
        (["a", "\ufffd", "\ufffd"], "aé", [(0, 1), (1, 2), (1, 2)]),
        (["", "a"], "a", [(0, 0), (0, 1)]),
    ],
)
def test_characters_of_tokens(tokens: list[str], text: str, wanted: list[tuple[int, int]]):
    assert spans(tokens, text) == wanted


def test_tokens_of_another_text_are_refused():
    with pytest.raises(ValueError, match="another text"):
        spans(["ab"], "ab and a lot more")
    with pytest.raises(ValueError, match="another text"):
        spans(["xy", "z"], "a text that is long enough to see")


class Waiting(Loopback):
    """Says nothing before all servers that share the barrier were asked something."""

    def __init__(self, together: asyncio.Barrier) -> None:
        super().__init__()
        self.together: asyncio.Barrier | None = together

    async def _answer(self, *request: Any) -> tuple[int, Any]:
        together, self.together = self.together, None
        if together is not None:
            await together.wait()
        return await super()._answer(*request)


def test_replicas_are_asked_at_once_and_one_that_hangs_has_one_time_limit():
    async def run() -> None:
        met = asyncio.Barrier(2)
        async with Waiting(met) as one, Waiting(met) as other, Loopback() as hanging:
            hanging.inject("hang", times=100)
            addresses = [hanging.url, one.url, other.url]
            backend = OpenAIBackend(addresses, tokenizer=CODEC, score_timeout=1.0)
            await backend.open()
            try:
                assert [server.circuit.closed for server in backend._servers.members] == [False, True, True]
                assert "did not say what it can do in 1 s" in backend._servers.members[0].trouble
                assert sum(server.account.requests["probe", "good"] > 3 for server in (one, other)) == 2
            finally:
                await backend.close()

    asyncio.run(run())


def test_a_server_that_hangs_alone_is_gone():
    async def run() -> None:
        async with Loopback() as hanging:
            hanging.inject("hang", times=100)
            with pytest.raises(GoneError, match=r"did not say what it can do in 0\.05 s"):
                await OpenAIBackend(hanging.url, tokenizer=CODEC, score_timeout=0.05).open()
            while hanging.account.in_flight:
                await asyncio.sleep(0.001)
            assert sum(hanging.account.requests.values()) == 1  # not asked again and again

    asyncio.run(run())
