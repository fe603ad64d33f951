"""What happens in a run, as data: questions, the keys of stages, and the records that a journal keeps of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pyquiet.scaling.backends.base import NO_USAGE, Usage

Stage = Literal["draft", "score", "target", "lost", "end"]
Action = Literal["accept", "continue", "replace", "resample"]
TAKEOVERS = ("continue", "replace")  # actions that call for the target
Outcome = Literal["answer", "eos", "turns", "tokens", "context", "deadline", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question to be answered.

    Attributes:
        id: names it in journals and seeds; unique in a run. group: the data set or kind it belongs to; scores of
            different groups are never compared with each other unless the calibrator says so.
    """

    id: str
    text: str
    answer: str | None = None
    group: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Names one stage of one chain; it is committed at most once.

    `phase` is "run", or "calibrate" and "presample" for chains whose scores fill banks. `attempt` counts the drafts of
    a turn. "lost" is no stage of a chain, but a request for one that never came back; `attempt` then counts those of a
    turn.
    """

    phase: str
    question: str
    chain: int
    turn: int
    stage: Stage
    attempt: int = 0

    def seed(self, run_seed: int) -> int:
        """The seed of this stage's draws, in [0, 2^63)."""
        words = [run_seed, self.phase, self.question, self.chain, self.turn, self.stage, self.attempt]
        return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big") >> 1


def uniform(seed: int) -> float:
    """A uniform number in (0, 1) of a seed."""
    return ((seed >> 11) + 0.5) * 2.0**-52


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a chunk and why.

    Attributes:
        action: what happens now. p: the p-value that decided, None if none did. n: size of the bank.
        version: of the bank. guaranteed: whether the promised rate holds exactly for this decision, and why.
        reason: one or a few words: "p", "cold", "no score", "rank", "forced", ...
        near_tie: whether a change of the score by 1e-6 would have made another decision.
        watched: the smoothed p-value that a drift monitor is shown, None where it is shown none.
    """

    action: Action
    reason: str
    p: float | None = None
    n: int = 0
    version: str = ""
    guaranteed: bool = False
    why: str = ""
    near_tie: bool = False
    watched: float | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request waited, was sent and came back, in seconds since the run began, and the slot that it held."""

    queued: float
    started: float
    ended: float
    slot: int
    tries: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One committed stage.

    Attributes:
        seed: of the draws (draft, target) or of the decision's uniform (score).
        prompt: hash of what the model read. ids, text, finish: what it wrote (draft, target).
        score: the nonconformity score, None where there is none; `reason` tells why: "short", "empty", "failed".
        reason, outcome: of a request that was lost, its stage, and "failed" or "cancelled".
        outcome, answer: how the chain ended (end).
    """

    key: Key
    seed: int = 0
    prompt: str = ""
    ids: tuple[int, ...] | None = None
    text: str = ""
    finish: str = ""
    usage: Usage = NO_USAGE
    timing: Timing | None = None
    score: float | None = None
    reason: str = ""
    decision: Decision | None = None
    outcome: Outcome | None = None
    answer: str | None = None

    @property
    def stage(self) -> str:
        """The stage that it tells of; of a lost request the one that it was sent for."""
        return self.reason if self.key.stage == "lost" else self.key.stage

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is at its default is left out."""
        values = [(name, getattr(self, name), default) for name, default in _DEFAULTS]
        return {name: _plain(value) for name, value, default in values if value != default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """The record of `to_dict`; TypeError or KeyError for anything else."""
        read = {k: _KINDS[k](**v) if k in _KINDS and v is not None else v for k, v in values.items()}
        if read.get("ids") is not None:
            read["ids"] = tuple(read["ids"])
        return cls(**read)


_DEFAULTS = [(f.name, f.default) for f in fields(Record)]
_KINDS: dict[str, Any] = {"key": Key, "usage": Usage, "timing": Timing, "decision": Decision}
_NAMES = {kind: [f.name for f in fields(kind)] for kind in _KINDS.values()}


def _plain(value: Any) -> Any:
    # Much faster than dataclasses.asdict, which copies every value.
    names = _NAMES.get(type(value))
    return value if names is None else {name: getattr(value, name) for name in names}
