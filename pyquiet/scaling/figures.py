"""The figures of a report, from the rows of a run."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyquiet.scaling import votes
from pyquiet.scaling.answers import equal
from pyquiet.scaling.conformal import Floats, Rule, band, total_law
from pyquiet.scaling.drift import Alarm, DriftMonitor, e_value
from pyquiet.scaling.slots import POOLS, extremes
from pyquiet.scaling.table import DISCARD, Rows, Table

RESAMPLES = 2000
_AT_ONCE = 2**20  # numbers drawn together


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
        near_ties: decisions that a change of the score by 1e-6 would have turned.
        discarded: of `taken`, those whose draft was thrown away for another one.
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
    near_ties: int = 0
    discarded: int = 0


@dataclass(frozen=True)
class Drift:
    """A turn whose p-values were watched: how many, the capital of the game against them, and its alarm if any.

    The capital stays below 1 / level with probability 1 - level where nothing drifts.
    """

    watched: int
    e_value: float
    alarm: Alarm | None = None


@dataclass(frozen=True)
class Cost:
    """Requests of one stage and their tokens: read (`cached` of them not anew) and written.

    Requests that were used, and those that were `lost`: given up, cancelled, or back too late for a decision. Their
    tokens count where somebody told them, which is so where they came back. `retries` of both are sendings after their
    first one, so that the sum of the three is what was sent.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    lost: int = 0

    @property
    def sent(self) -> int:
        """Sendings in all."""
        return self.requests + self.retries + self.lost

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def bootstrap(parts: NDArray[Any], totals: NDArray[Any], seed: int, resamples: int = RESAMPLES) -> Share:
    """sum(parts) / sum(totals) of clusters [Q], and its 95 % percentile interval when clusters are drawn anew.

    The same for the same clusters, whatever their order.
    """
    if not totals.sum():
        return Share(None, None, None)
    order = np.lexsort((parts, totals))
    parts, totals = parts[order], totals[order]
    count, rng = len(parts), np.random.default_rng(seed)
    evenly, ratios = np.full(count, 1 / count), []
    for start in range(0, resamples, step := 1 + _AT_ONCE // count):
        drawn = rng.multinomial(count, evenly, size=min(step, resamples - start))
        bottom = drawn @ totals
        ratios.append((drawn @ parts)[bottom > 0] / bottom[bottom > 0])
    low, high = np.percentile(np.concatenate(ratios), (2.5, 97.5))
    return Share(float(parts.sum() / totals.sum()), float(low), float(high))


def ks_distance(p: NDArray[Any]) -> float:
    """Largest distance between the law of some numbers and the uniform one on [0, 1]."""
    ordered, n = np.sort(p), len(p)
    return float(max((np.arange(1, n + 1) / n - ordered).max(), (ordered - np.arange(n) / n).max()))


def turn(config: Mapping[str, Any], rows: Rows, seed: int) -> Turn:
    """What was decided in some rows, by the config of their run's header."""
    decided = rows.first_decisions
    taken, question = decided.taken, decided.groups("question")
    rate = bootstrap(np.bincount(question, taken), np.bincount(question), seed)
    judged = decided.where(~np.isnan(decided["p"]))
    discarded = int((decided["action"] == DISCARD).sum())
    sure = int(judged["guaranteed"].sum())
    found = Turn(len(decided), int(taken.sum()), rate, len(judged), sure, discarded=discarded)
    if not len(judged):
        return found
    ks, critical = ks_distance(judged["p"]), 1.628 / len(judged) ** 0.5
    found = replace(found, ks=ks, critical=critical, near_ties=int(judged["near_tie"].sum()))
    if config.get("takeover_rate") is None:
        return found
    rule = Rule(config["takeover_rate"], config.get("tail", "budget"))
    promised, law = _promise(rule, judged)
    return replace(found, promised=promised, band=band(law))


def drift(settings: Mapping[str, Any] | None, table: Table, run: Rows) -> dict[int, Drift]:
    """What a monitor of these settings saw, by turn, from the p-values that it was shown, in their order."""
    if settings is None:
        return {}
    monitor, shown, names = DriftMonitor(**settings), run.where(~np.isnan(run["watched"])), table.versions.all
    for turn, p, n, version in zip(*(shown[c].tolist() for c in ("turn", "watched", "n", "version")), strict=True):
        monitor.see(p, n=n, bank=names[version], turn=turn)
    return {
        turn: Drift(count, e_value(monitor.log_capital(turn)), monitor.alarms.get(turn))
        for turn, count in sorted(monitor.seen.items())
    }


def _promise(rule: Rule, judged: Rows) -> tuple[float, Floats]:
    """The mean rate that was promised, and the law of the count of takeovers; every bank judges for itself."""
    _, first, counts = np.unique(judged.groups("n", "version"), return_index=True, return_counts=True)
    alike = Counter(zip(judged["n"][first].tolist(), counts.tolist(), strict=True))
    law = total_law([(rule.takeover_law(n, count), copies) for (n, count), copies in alike.items()])
    mean = sum(copies * count * rule.promise(n) for (n, count), copies in alike.items())
    return mean / len(judged), law


def accuracy(gold: Mapping[str, str], table: Table, ends: Rows, run: Rows, seed: int) -> dict[str, Share]:
    """By the right answers of questions. Chains that were cancelled count for votes alone, where they have none."""
    marked: dict[str, list[float]] = {}
    names, answered, outcomes = table.questions.all, table.answers.all, table.outcomes.all
    known = np.isin(ends["question"], [i for i, name in enumerate(names) if name in gold])
    for chains, scores in _ballots(ends.where(known), run):
        right = gold[names[chains["question"][0]]]
        ballot = [
            votes.Vote(answered[answer] if answer >= 0 else None, score, chain)
            for answer, score, chain in zip(chains["answer"], scores.tolist(), chains["chain"].tolist(), strict=True)
        ]
        cancelled = [outcomes[number] == "cancelled" for number in chains["outcome"]]
        for name, value in _marks(ballot, cancelled, right).items():
            marked.setdefault(name, []).append(value)
    if np.isnan(run["score"]).all():  # nothing to weigh votes by
        marked = {name: values for name, values in marked.items() if not name.startswith("weighted")}
    return {name: bootstrap(np.array(values), np.ones(len(values)), seed) for name, values in marked.items()}


def _ballots(ends: Rows, run: Rows) -> "list[tuple[Rows, Floats]]":
    """The ends of each question's chains, and the mean score of each, infinite without any."""
    width = 1 + int(run["chain"].max(initial=0))
    scored = run.where(~np.isnan(run["score"]))
    known, place = np.unique(scored["question"].astype(np.int64) * width + scored["chain"], return_inverse=True)
    means = np.append(np.bincount(place, scored["score"]) / np.maximum(np.bincount(place), 1), np.inf)
    found = []
    for chains in ends.split("question"):
        wanted = chains["question"].astype(np.int64) * width + chains["chain"]
        place = np.searchsorted(known, wanted)
        here = np.append(known, -1)[place] == wanted
        found.append((chains, means[np.where(here, place, -1)]))
    return found


def _marks(ballot: list[votes.Vote], cancelled: list[bool], gold: str) -> dict[str, float]:
    """pass@k of a question's chains, and whether votes find the right answer."""
    right = [vote.answer is not None and equal(vote.answer, gold) for vote in ballot]
    counted = [mark for mark, gone in zip(right, cancelled, strict=True) if not gone]
    n, correct = len(counted), sum(counted)
    marks = {f"pass@{k}": votes.pass_at_k(n, correct, k) for k in (2**i for i in range(n.bit_length()))}
    for name, winner in (("maj", votes.majority(ballot)), ("weighted", votes.weighted(ballot))):
        marks[f"{name}@{len(ballot)}"] = float(winner is not None and equal(winner, gold))
    if n & (n - 1):
        marks[f"pass@{n}"] = float(correct > 0)
    return marks


def cost(rows: Rows) -> dict[str, Cost]:
    """Of each stage that asks a model."""
    costs = {}
    for stage in POOLS:
        mine = rows.stage(stage).timed
        read, cached, written = (
            int(mine[name].sum(dtype=np.int64)) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
        )
        lost = int(mine["lost"].sum())
        costs[stage] = Cost(len(mine) - lost, read, cached, written, int((mine["tries"] - 1).sum()), lost)
    return costs


def span(rows: Rows) -> float:
    """Seconds from the first request to the end of the last one."""
    timed = rows.timed
    return float(timed["ended"].max() - timed["queued"].min()) if len(timed) else 0.0


def calibration_span(table: Table) -> float:
    """Seconds that `calibrate` took: turns are calibrated one after the other, each by its own questions and chains."""
    rows = table.rows()
    _, question = np.unique(rows["question"], return_inverse=True)
    first = np.full(len(rows), np.iinfo(np.int64).max)  # of the question's own chains, which tells its turn
    own = rows["phase"] == table.phases.number("calibrate")  # not those that were drafted for it beforehand
    np.minimum.at(first, question[own], rows["chain"][own])
    return sum(span(rows.where(first[question] == turn)) for turn in np.unique(first[question]))


def latency(run: Rows) -> dict[str, tuple[float, float]]:
    """50 % and 95 % points of the spans of chains and of questions."""
    found = {}
    for name, columns in (("chain", ("question", "chain")), ("question", ("question",))):
        groups, timed = run.groups(*columns), run["slot"] >= 0
        queued, ended = np.where(timed, run["queued"], np.inf), np.where(timed, run["ended"], -np.inf)
        begin, end = extremes(groups, queued, ended)
        spans = np.where(np.isfinite(begin), end, 0.0) - np.where(np.isfinite(begin), begin, 0.0)
        if len(spans):
            found[name] = (float(np.percentile(spans, 50)), float(np.percentile(spans, 95)))
    return found
