"""What a run did, from the header and the records of its journal alone (test-time scaling, arXiv 2509.15148)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pyquiet.scaling import figures
from pyquiet.scaling.conformal import NEAR
from pyquiet.scaling.figures import Cost, Drift, Share, Turn
from pyquiet.scaling.records import Record
from pyquiet.scaling.slots import POOLS, barrier_seconds, peak_tokens, service_seconds
from pyquiet.scaling.spent import Spent
from pyquiet.scaling.table import DISCARD, Names, Rows, Table


@dataclass(frozen=True)
class Report:
    """All figures of a run. Seconds are the run's own clock; what calibration took is told apart and never left out.

    Attributes:
        takeovers, turns, questions: overall, by turn, and the rate of each question.
        discards: drafts that were thrown away for another one, second ones too. drift: what a monitor saw, by turn; a
            turn with an alarm counts no decision as guaranteed.
        reasons, outcomes: how decisions came about (p, cold, forced, failed, ...) and how chains ended.
        accuracy: "pass@1", "maj@m", "weighted@m", "pass@k": over questions whose answer is known.
        cost, calibration_cost: by stage. target_share: of the tokens written, the target's.
        latency: 50 % and 95 % points for chains and questions.
        spent_before: what had been spent on a bank that was there already, as a bank tells that knows; part of no other
            figure here.
        wall, calibration: seconds; a speed-up is of their sum. throughput: chains with an answer a minute, and tokens
            written a second.
        peak_target_tokens: the most tokens that the target's writing requests held at once; kv_bytes_peak: bytes of
            their keys and values, None where the backend tells no size of one (servers).
        utilisation: by pool. service, barrier: T_c and T_s; intensity: r = T_c / T_s, None without barriers.
    """

    engine: str
    takeovers: Turn
    turns: dict[int, Turn]
    questions: dict[str, float]
    discards: int
    drift: dict[int, Drift]
    reasons: dict[str, int]
    outcomes: dict[str, int]
    accuracy: dict[str, Share]
    cost: dict[str, Cost]
    calibration_cost: dict[str, Cost]
    target_share: float | None
    latency: dict[str, tuple[float, float]]
    wall: float
    calibration: float
    throughput: dict[str, float]
    utilisation: dict[str, float]
    service: float
    barrier: float
    peak_target_tokens: int
    kv_bytes_peak: int | None
    spent_before: Spent | None = None
    intensity: float | None = field(init=False)
    barrier_share: float | None = field(init=False)

    def __post_init__(self) -> None:
        total = self.service + self.barrier
        object.__setattr__(self, "intensity", self.service / self.barrier if self.barrier else None)
        object.__setattr__(self, "barrier_share", self.barrier / total if total else None)

    @classmethod
    def of(
        cls, header: Mapping[str, Any], records: Iterable[Record], *, calibration: Iterable[Record] = (), seed: int = 0
    ) -> "Report":
        """The report of a journal.

        Args:
            calibration: records of the journal of `calibrate`, if there was one; chunks that were drafted first
                within the run itself are found in `records`. seed: of the bootstrap.
        """
        return cls._of(header, Table(records), seed).calibrated(Table(calibration))

    @classmethod
    def _of(cls, header: Mapping[str, Any], table: Table, seed: int = 0) -> "Report":
        everything = table.rows()
        in_run = everything["phase"] == table.phases.number("run")
        run, before = everything.where(in_run), everything.where(~in_run)
        cost, wall = figures.cost(run), figures.span(everything)  # what was drafted first within the run is part of it
        config, sizes = header.get("config", {}), _pools(header, run)
        drift = figures.drift(_drift_settings(config), table, run)
        turns = {turn: figures.turn(config, run.where(run["turn"] == turn), seed) for turn in _turns(run)}
        broken = [turn for turn, watch in drift.items() if watch.alarm is not None]
        turns |= {turn: replace(turns[turn], guaranteed=0) for turn in broken}
        takeovers = figures.turn(config, run, seed)
        takeovers = replace(takeovers, guaranteed=sum(row.guaranteed for row in turns.values()))
        written = sum(cost[stage].completion_tokens for stage in ("draft", "target"))
        peak = peak_tokens(run.stage("target"))
        token_bytes = header.get("kv_bytes_per_token", {}).get("target")
        ends = run.stage("end")
        answered = int((ends["answer"] >= 0).sum())
        gold = {q["id"]: q["answer"] for q in header.get("questions", []) if q.get("answer") is not None}
        return cls(
            engine=str(header.get("engine", "")),
            takeovers=takeovers,
            turns=turns,
            questions=_rates(table.questions, run.first_decisions),
            discards=int((run["action"] == DISCARD).sum()),
            drift=drift,
            reasons=_counts(table.reasons, run.where(run["action"] >= 0)["reason"]),
            outcomes=_counts(table.outcomes, ends["outcome"]),
            accuracy=figures.accuracy(gold, table, ends, run, seed),
            cost=cost,
            calibration_cost=figures.cost(before),
            target_share=cost["target"].completion_tokens / written if written else None,
            latency=figures.latency(run),
            wall=wall,
            calibration=0.0,
            throughput={
                "answers_per_minute": 60 * answered / wall if wall else 0.0,
                "tokens_per_second": written / wall if wall else 0.0,
            },
            utilisation={
                pool: service_seconds(everything.stage(pool)) / (sizes[pool] * wall) if wall else 0.0 for pool in POOLS
            },
            service=service_seconds(run),
            barrier=barrier_seconds(run, sizes) if header.get("engine") == "sync" else 0.0,
            peak_target_tokens=peak,
            kv_bytes_peak=None if token_bytes is None else peak * int(token_bytes),
        )

    def calibrated(self, calibration: Table) -> "Report":
        """This report with a calibration before the run counted, from the records of that."""
        more = figures.cost(calibration.rows())
        return replace(
            self,
            calibration=self.calibration + figures.calibration_span(calibration),
            calibration_cost={stage: cost + more[stage] for stage, cost in self.calibration_cost.items()},
        )

    def kv_bytes(self, bytes_per_token: int) -> int:
        """Bytes of keys and values at the peak of the target's requests: 2 x layers x key heads x head size x width
        a token."""
        return self.peak_target_tokens * bytes_per_token

    def speedup(self, baseline: "Report", name: str) -> dict[str, Any]:
        """Wall time of a named baseline over this run's, calibration of both included."""
        return {"baseline": name, "speedup": (baseline.wall + baseline.calibration) / (self.wall + self.calibration)}

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {
            name: {str(turn): asdict(row) for turn, row in getattr(self, name).items()} for name in ("turns", "drift")
        }

    def __str__(self) -> str:
        accuracy = (f"{name}: {share}" for name, share in self.accuracy.items())
        return "\n".join((*self._rates(), *accuracy, *self._costs(), *self._times(), *self._notes()))

    def _rates(self) -> Iterator[str]:
        head = f"{'rate [95 % interval]':<26}{'promised':>9}  {'band':<22}"
        yield f"{'turn':>5}{'decisions':>11}{'takeovers':>11}  {head}KS of p (1 % point)"
        for name, row in [*self.turns.items(), ("all", self.takeovers)]:
            promised = "-" if row.promised is None else f"{row.promised:.1%}"
            band = "-" if row.band is None else f"{row.band[0]} to {row.band[1]} of {row.judged}"
            law = "-" if row.ks is None else f"{row.ks:.3f} ({row.critical:.3f})"
            counts = f"{name:>5}{row.decisions:>11}{row.taken:>11}"
            yield f"{counts}  {row.rate!s:<26}{promised:>9}  {band:<22}{law}"
        if any(row.band is not None for row in self.turns.values()):
            yield "band: 5 to 95 % for independent chains; chains of one question are alike and leave it more often"

    def _costs(self) -> Iterator[str]:
        for stage, cost in self.cost.items():
            yield (
                f"{stage}: {cost.requests} requests, {cost.completion_tokens} tokens written, "
                f"{cost.prompt_tokens} read ({cost.cached_tokens} cached), {self.utilisation[stage]:.0%} of slots busy"
            )
        if (before := sum(self.calibration_cost.values(), Cost())).sent:
            yield (
                f"to calibrate besides: {before.requests} requests, {before.completion_tokens} tokens written, "
                f"{before.prompt_tokens} read ({before.cached_tokens} cached)"
            )
        if self.target_share:
            yield f"the target wrote {self.target_share:.1%} of the tokens"
        if self.peak_target_tokens:
            size = "" if self.kv_bytes_peak is None else f", {self.kv_bytes_peak / 2**20:.1f} MiB of keys and values"
            yield f"at most {self.peak_target_tokens} tokens in the requests that the target wrote for at once{size}"
        if lost := {stage: cost for stage, cost in self.cost.items() if cost.lost}:
            told = ", ".join(f"{cost.lost} {stage}" for stage, cost in lost.items())
            yield f"requests that nothing came of, their tokens counted where they were told: {told}"

    def _times(self) -> Iterator[str]:
        before = f"and {self.calibration:.1f} s to calibrate before" if self.calibration else "no calibration counted"
        yield f"{self.wall:.1f} s, {before}"
        if self.spent_before is not None:
            yield f"the bank was there already: {self.spent_before} had been spent on it, which is not counted here"
        answers, tokens = self.throughput["answers_per_minute"], self.throughput["tokens_per_second"]
        yield f"throughput: {answers:.1f} chains with an answer a minute, {tokens:.1f} tokens written a second"
        spans = [f"a {name} {half:.1f} and {most:.1f} s" for name, (half, most) in self.latency.items()]
        if spans:
            yield f"50 and 95 % points of the time for {', for '.join(spans)}"
        if self.intensity is not None:
            yield f"r = T_c / T_s = {self.intensity:.2f}, barriers {self.barrier_share:.0%}"
        else:
            yield f"no barriers: T_s = 0 s, T_c = {self.service:.1f} s"

    def _notes(self) -> Iterator[str]:
        counted = " ".join(f"{name} {n}" for name, n in self.reasons.items())
        ended = " ".join(f"{name} {n}" for name, n in self.outcomes.items())
        yield f"decided by: {counted or '-'}; chains ended by: {ended or '-'}"
        if self.discards:
            yield f"{self.discards} drafts thrown away for another one, {self.takeovers.discarded} of them first"
        yield from (str(watch.alarm) for watch in self.drift.values() if watch.alarm is not None)
        if self.drift:
            told = ", ".join(f"turn {turn} {watch.e_value:.3g} ({watch.watched})" for turn, watch in self.drift.items())
            yield f"drift, e-values (of so many p-values): {told}"
        if self.takeovers.near_ties:
            yield f"{self.takeovers.near_ties} decisions within {NEAR:.0e} of a cut"


class Tally:
    """A report that grows with the records of a run; texts and token ids are not kept."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._header, self._table = header, Table()

    def add(self, record: Record) -> None:
        """A record that was committed."""
        self._table.add(record)

    def report(self) -> Report:
        """Of all records so far."""
        return Report._of(self._header, self._table)


def _pools(header: Mapping[str, Any], run: Rows) -> dict[str, int]:
    """Slots of each pool; where no header tells, as many as were used."""
    config = header.get("config", {})
    told = config.get("pools") or config.get("plan", {}).get("pools") or {}
    return {pool: int(told.get(pool, 1 + run.stage(pool)["slot"].max(initial=0))) for pool in POOLS}


def _drift_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return config.get("drift") or (config.get("policy_settings") or {}).get("drift")


def _turns(run: Rows) -> list[int]:
    return [int(turn) for turn in np.unique(run.first_decisions["turn"])]


def _rates(questions: Names, decided: Rows) -> dict[str, float]:
    numbers, place = np.unique(decided["question"], return_inverse=True)
    rates = np.bincount(place, decided.taken) / np.bincount(place)
    names = questions.all
    return {names[number]: float(rate) for number, rate in zip(numbers, rates, strict=True)}


def _counts(names: Names, numbers: "np.ndarray[Any, Any]") -> dict[str, int]:
    """How often each name comes, in the order in which they first do."""
    found, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    return {names[found[i]]: int(counts[i]) for i in np.argsort(first)}
