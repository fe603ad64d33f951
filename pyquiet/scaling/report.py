"""What a run did, from the header and the records of its journal alone (test-time scaling, arXiv 2509.15148)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pyquiet.scaling import answers
from pyquiet.scaling.conformal import Rule, band
from pyquiet.scaling.records import Record
from pyquiet.scaling.slots import POOLS, barrier_seconds, peak_tokens, service_seconds, slots

RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A mean, and the 95 % interval when questions are drawn anew (percentiles); None where nothing was counted."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class Turn:
    """Decisions on first drafts in one turn, or in all.

    Attributes:
        decisions: how many, and `taken` of them called for the target (or for another draft, where that is what a
            takeover means). judged: those that a p-value decided; `guaranteed` of them as promised.
        promised: the rate that a bank of that size gives scores that are exchangeable with it, None without a rule.
        band: the 5 % and 95 % points of `taken` among those that were judged, if so (beta-binomial: one bank judges
            many). It takes scores of one turn to be independent given the bank, which chains of one question are not.
        ks, critical: largest distance of the p-values' law from the uniform one, and its 1 % point for as many
            independent ones.
    """

    decisions: int
    taken: int
    rate: Share
    judged: int = 0
    guaranteed: int = 0
    promised: float | None = None
    band: tuple[int, int] | None = None
    ks: float | None = None
    critical: float | None = None


@dataclass(frozen=True)
class Cost:
    """Requests of one stage and their tokens: read (`cached` of them not anew) and written; sendings that failed."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Report:
    """All figures of a run. Seconds are the run's own clock; what calibration took is told apart and never left out.

    Attributes:
        takeovers, turns, questions: overall, by turn, and the rate of each question.
        reasons, outcomes: how decisions came about (p, cold, forced, failed, ...) and how chains ended.
        accuracy: "pass@1", "maj@m", "weighted@m", "pass@k": over questions whose answer is known.
        cost, calibration_cost: by stage. target_share: of the tokens written, the target's.
        latency: 50 % and 95 % points for chains and questions.
        wall, calibration: seconds; a speed-up is of their sum. throughput: chains with an answer a minute, and tokens
            written a second.
        utilisation: by pool. service, barrier: T_c and T_s; intensity: r = T_c / T_s, None without barriers.
    """

    engine: str
    takeovers: Turn
    turns: dict[int, Turn]
    questions: dict[str, float]
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
        everything = list(records)
        run = [record for record in everything if record.key.phase == "run"]
        before = [record for record in everything if record.key.phase != "run"]
        apart = list(calibration)
        held, cost = slots(run), _cost(run)
        wall = _span(everything)  # what was drafted first within the run is part of it
        sizes = {
            pool: int(_pools(header).get(pool, 1 + max((h.slot for h in held[pool]), default=0))) for pool in POOLS
        }
        in_step = header.get("engine") == "sync"
        written = sum(cost[stage].completion_tokens for stage in ("draft", "target"))
        ends = [record for record in run if record.key.stage == "end"]
        answered = sum(record.answer is not None for record in ends)
        busy = slots(everything)
        return cls(
            engine=str(header.get("engine", "")),
            takeovers=_turn(header, run, seed),
            turns={turn: _turn(header, rows, seed) for turn, rows in sorted(_by(run, "turn").items()) if _first(rows)},
            questions={q: float(np.mean(_taken(rows))) for q, rows in _by(run, "question").items() if _first(rows)},
            reasons=dict(Counter(_reason(record) for record in run if record.decision is not None)),
            outcomes=dict(Counter(str(record.outcome) for record in ends)),
            accuracy=_accuracy(header, ends, run, seed),
            cost=cost,
            calibration_cost=_cost([*before, *apart]),
            target_share=cost["target"].completion_tokens / written if written else None,
            latency=_latency(run),
            wall=wall,
            calibration=_span(apart),
            throughput={
                "answers_per_minute": 60 * answered / wall if wall else 0.0,
                "tokens_per_second": written / wall if wall else 0.0,
            },
            utilisation={pool: service_seconds(busy[pool]) / (sizes[pool] * wall) if wall else 0.0 for pool in POOLS},
            service=sum(service_seconds(held[pool]) for pool in POOLS),
            barrier=barrier_seconds(held, sizes) if in_step else 0.0,
            peak_target_tokens=peak_tokens(run, "target"),
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
        return asdict(self) | {"turns": {str(turn): asdict(row) for turn, row in self.turns.items()}}

    def __str__(self) -> str:
        lines = [f"{'turn':>5}{'decisions':>11}{'takeovers':>11}  {'rate [95 % interval]':<26}{'promised':>9}  band"]
        for name, row in [*self.turns.items(), ("all", self.takeovers)]:
            promised = "-" if row.promised is None else f"{row.promised:.1%}"
            band = "-" if row.band is None else f"{row.band[0]} to {row.band[1]} of {row.judged}"
            lines.append(f"{name:>5}{row.decisions:>11}{row.taken:>11}  {row.rate!s:<26}{promised:>9}  {band}")
        lines += [f"{name}: {share}" for name, share in self.accuracy.items()]
        for stage, cost in self.cost.items():
            lines.append(
                f"{stage}: {cost.requests} requests, {cost.completion_tokens} tokens written, "
                f"{cost.prompt_tokens} read ({cost.cached_tokens} cached), {self.utilisation[stage]:.0%} of slots busy"
            )
        lines.append(f"{self.wall:.1f} s, and {self.calibration:.1f} s to calibrate before")
        counted = " ".join(f"{name} {n}" for name, n in self.reasons.items())
        ended = " ".join(f"{name} {n}" for name, n in self.outcomes.items())
        lines.append(f"decided by: {counted or '-'}; chains ended by: {ended or '-'}")
        if self.intensity is not None:
            lines.append(f"r = T_c / T_s = {self.intensity:.2f}, barriers {self.barrier_share:.0%}")
        return "\n".join(lines)


class Tally:
    """A report that grows with the records of a run; texts and token ids are not kept."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._header, self._records = header, list[Record]()

    def add(self, record: Record) -> None:
        """A record that was committed."""
        self._records.append(replace(record, ids=None, text="", prompt=""))

    def report(self) -> Report:
        """Of all records so far."""
        return Report.of(self._header, self._records)


def bootstrap(parts: np.ndarray, totals: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Share:
    """sum(parts) / sum(totals) of clusters [Q], and its 95 % percentile interval when clusters are drawn anew."""
    if not totals.sum():
        return Share(None, None, None)
    count = len(parts)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    bottom = drawn @ totals
    ratios = (drawn @ parts)[bottom > 0] / bottom[bottom > 0]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Share(float(parts.sum() / totals.sum()), float(low), float(high))


def ks_distance(p: Sequence[float]) -> float:
    """Largest distance between the law of some numbers and the uniform one on [0, 1]."""
    ordered, n = np.sort(p), len(p)
    return float(max((np.arange(1, n + 1) / n - ordered).max(), (ordered - np.arange(n) / n).max()))


def _pools(header: Mapping[str, Any]) -> Mapping[str, Any]:
    config = header.get("config", {})
    pools: Mapping[str, Any] = config.get("pools") or config.get("plan", {}).get("pools") or {}
    return pools


def _by(records: Iterable[Record], name: str) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[getattr(record.key, name)].append(record)
    return groups


def _first(records: Iterable[Record]) -> list[Record]:
    """The decisions on first drafts: those that a rate is promised for."""
    return [record for record in records if record.decision is not None and record.key.attempt == 0]


def _taken(records: Iterable[Record]) -> list[bool]:
    return [record.decision is not None and record.decision.action != "accept" for record in _first(records)]


def _reason(record: Record) -> str:
    assert record.decision is not None
    return record.decision.reason


def _turn(header: Mapping[str, Any], records: Iterable[Record], seed: int) -> Turn:
    decided = _first(records)
    questions = [_taken(rows) for rows in _by(decided, "question").values()]
    rate = bootstrap(np.array([sum(q) for q in questions]), np.array([len(q) for q in questions]), seed)
    judged = [r.decision for r in decided if r.decision is not None and r.decision.p is not None]
    turn = Turn(len(decided), sum(map(sum, questions)), rate, len(judged), sum(d.guaranteed for d in judged))
    if not judged:
        return turn
    ks = ks_distance([d.p for d in judged if d.p is not None])
    turn = replace(turn, ks=ks, critical=1.628 / len(judged) ** 0.5)
    config = header.get("config", {})
    if config.get("takeover_rate") is None:
        return turn
    rule = Rule(config["takeover_rate"], config.get("tail", "budget"))
    law, mean = np.ones(1), 0.0
    for (n, _), count in sorted(Counter((d.n, d.version) for d in judged).items()):
        law, mean = np.convolve(law, rule.takeover_law(n, count)), mean + count * rule.promise(n)
    return replace(turn, promised=mean / len(judged), band=band(law))


def _accuracy(header: Mapping[str, Any], ends: Sequence[Record], run: Sequence[Record], seed: int) -> dict[str, Share]:
    """Chains that were cancelled count for votes alone, where they have none."""
    gold = {q["id"]: q["answer"] for q in header.get("questions", []) if q.get("answer") is not None}
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in run:
        if record.score is not None:
            scores[record.key.question, record.key.chain].append(record.score)
    rows: dict[str, list[float]] = defaultdict(list)
    for question, chains in _by([r for r in ends if r.key.question in gold], "question").items():
        ballot = []
        for record in chains:
            mine = scores.get((question, record.key.chain))
            ballot.append(answers.Vote(record.answer, float(np.mean(mine)) if mine else float("inf"), record.key.chain))
        right = {vote.chain: vote.answer is not None and answers.equal(vote.answer, gold[question]) for vote in ballot}
        counted = [r for r in chains if r.outcome != "cancelled"]
        n, correct = len(counted), sum(right[r.key.chain] for r in counted)
        for k in (2**i for i in range(n.bit_length())):
            rows[f"pass@{k}"].append(answers.pass_at_k(n, correct, k))
        for name, winner in (("maj", answers.majority(ballot)), ("weighted", answers.weighted(ballot))):
            rows[f"{name}@{len(ballot)}"].append(float(winner is not None and answers.equal(winner, gold[question])))
        if n and n & (n - 1):
            rows[f"pass@{n}"].append(float(correct > 0))
    return {name: bootstrap(np.array(values), np.ones(len(values)), seed) for name, values in rows.items()}


def _cost(records: Sequence[Record]) -> dict[str, Cost]:
    costs = {}
    for stage in POOLS:
        mine = [r for r in records if r.key.stage == stage and r.timing is not None]
        usage = [(r.usage.prompt_tokens, r.usage.cached_tokens, r.usage.completion_tokens) for r in mine]
        read, cached, written = (sum(column) for column in zip((0, 0, 0), *usage, strict=True))
        tries = sum(r.timing.tries - 1 for r in mine if r.timing is not None)
        costs[stage] = Cost(len(mine), read, cached, written, tries)
    return costs


def _span(records: Iterable[Record]) -> float:
    """Seconds from the first request to the end of the last one."""
    timings = [record.timing for record in records if record.timing is not None]
    return max(t.ended for t in timings) - min(t.queued for t in timings) if timings else 0.0


def _latency(run: Sequence[Record]) -> dict[str, tuple[float, float]]:
    chains: dict[Any, list[Record]] = defaultdict(list)
    for record in run:
        chains[record.key.question, record.key.chain].append(record)
    found = {}
    for name, groups in (("chain", chains), ("question", _by(run, "question"))):
        spans = [_span(rows) for rows in groups.values()]
        if spans:
            found[name] = (float(np.percentile(spans, 50)), float(np.percentile(spans, 95)))
    return found
