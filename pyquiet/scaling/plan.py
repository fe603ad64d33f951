"""The settings of a run, as plain values that a journal can keep."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pyquiet.checks import check_count, check_number, check_word
from pyquiet.randomness import check_temperature

OnTakeover = Literal["continue", "replace", "resample"]
OnScoreFailure = Literal["takeover", "accept", "fail"]
Order = Literal["fifo", "oldest", "deepest"]


def check_resamples(resamples: int, on_takeover: OnTakeover) -> int:
    """The drafts of a turn that may be thrown away; ValueError where "resample" could then draft none again."""
    if check_count("resamples", resamples, least=0) == 0 and on_takeover == "resample":
        raise ValueError('resamples must be at least 1 with on_takeover="resample", got 0: no chunk would be replaced')
    return resamples


@dataclass(frozen=True)
class Pools:
    """How many requests of a kind may be on the wire at once, chains that may be under way, and who goes first.

    Attributes:
        draft, score, target: slots for drafting, for scoring and for continuing. inflight: chains at once.
        order: of those that wait for a slot: first come, the question that was asked first, or the chain that has most
            turns behind it, which frees caches early.
    """

    draft: int = 16
    score: int = 8
    target: int = 4
    inflight: int = 64
    order: Order = "fifo"

    def __post_init__(self) -> None:
        for name in ("draft", "score", "target", "inflight"):
            check_count(f"pools.{name}", getattr(self, name), least=1)
        check_word("pools.order", self.order, Order)


@dataclass(frozen=True)
class Sampling:
    """How a model writes a chunk: tokens at most, temperature, top-p (1: all tokens), top-k (None: all tokens)."""

    tokens: int = 500
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens, least=1)
        check_temperature("temperature", self.temperature)
        check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None:
            check_count("top_k", self.top_k, least=1)


@dataclass(frozen=True)
class Plan:
    """What every chain does. Equal plans, seeds, models and banks give equal transcripts.

    Attributes:
        chains, turns: m chains of at most T turns a question. draft, target: how each of the two writes.
        stop: strings that end a chunk. chain_tokens: tokens a chain may write in all, None for no limit.
        answer_from_rejected: whether an answer counts that stands in a chunk the target was called for. If not, a
            chunk that already holds one, or the end of the text, is replaced, since nothing could continue it.
        closing_cue: text put before the last turn of a chain that has no answer yet.
        chain_seconds: after which a chain ends without an answer, None for no limit. Slow chunks then go unjudged more
            often than others, so that nothing is promised.
        early_majority: whether a question's chains are cancelled once no vote can change the winner, even before their
            first decision. Questions whose chains agree are then judged less often than others, so that nothing is
            promised.
    """

    chains: int = 16
    turns: int = 15
    draft: Sampling = field(default_factory=Sampling)
    target: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    chain_tokens: int | None = None
    answer_from_rejected: bool = False
    closing_cue: str | None = None
    chain_seconds: float | None = None
    early_majority: bool = False
    pools: Pools = field(default_factory=Pools)
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("chains", self.chains, least=1)
        check_count("turns", self.turns, least=1)
        if self.chain_tokens is not None:
            check_count("chain_tokens", self.chain_tokens, least=1)
        if self.chain_seconds is not None:
            check_number("chain_seconds", self.chain_seconds)
            if not self.chain_seconds > 0:
                raise ValueError(f"chain_seconds must be above 0, got {self.chain_seconds}; None is no limit")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a tuple of strings that are not empty, got {self.stop!r}")
        kinds = {"draft": Sampling, "target": Sampling, "pools": Pools, "seed": int}
        kinds |= {} if self.closing_cue is None else {"closing_cue": str}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")

    @property
    def no_promise(self) -> str:
        """Why no rate can be promised under this plan; empty if one can."""
        if self.early_majority:
            return "early_majority: which chunks are judged depends on the answers of the question's other chains"
        return "" if self.chain_seconds is None else "chain_seconds: which chunks are judged depends on the clock"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; without a top_k that is None, as in journals and banks made before there was one."""
        values = asdict(self) | {"stop": list(self.stop)}
        for role in ("draft", "target"):
            if values[role]["top_k"] is None:
                del values[role]["top_k"]
        return values
