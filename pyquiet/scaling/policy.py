"""Policies: what becomes of a draft's chunk."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from pyquiet.checks import check_count, check_fraction, check_number, check_word
from pyquiet.scaling.calibration import Calibrator, keep
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.conformal import NEAR, Bank, Label, PValue, Rule, check_bank
from pyquiet.scaling.drift import DriftMonitor
from pyquiet.scaling.learning import Adaptive
from pyquiet.scaling.plan import OnScoreFailure, OnTakeover, check_resamples
from pyquiet.scaling.records import TAKEOVERS, Action, Decision, Key

Takeover = Literal["continue", "replace"]
OnCold = Literal["takeover", "accept"]
_LEARNED = ("p", "discard", "cold", "forced")  # reasons of decisions whose scores calibrators see


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk that waits for its decision: its score, or None and why: "short", "empty", "failed" or "unscored"."""

    key: Key
    cell: Cell
    score: float | None
    reason: str = ""


class Policy(Protocol):
    """Decides about chunks.

    Attributes:
        together: whether it needs all chunks of a question's turn at once; only the sync engine can then use it.

    If it has an attribute `scored` that is False, no chunk is scored for it (the reason is then "unscored"). If it has
    one `fail_unscored` that is True, a chain whose scoring failed for good ends there. One `identity`, its settings as
    JSON values, is kept in journals, which are then refused under others. A method `keep` of one that learns gives what
    takes it back to what it knows now; it is called after a run that did not finish, whose journal teaches it again.
    """

    together: bool

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        """What becomes of a chunk; `uniform` in (0, 1) is the chunk's own."""

    def decide_all(self, chunks: Sequence[Chunk], uniforms: Sequence[float]) -> list[Decision]:
        """The same for all chunks of a turn."""

    def observe(self, chunk: Chunk, decision: Decision) -> None:
        """Sees a decision that has been made."""


class _Alone:
    """A policy that decides about each chunk alone and learns nothing."""

    together = False

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        raise NotImplementedError

    def decide_all(self, chunks: Sequence[Chunk], uniforms: Sequence[float]) -> list[Decision]:
        """Each for itself."""
        return [self.decide(chunk, uniform) for chunk, uniform in zip(chunks, uniforms, strict=True)]

    def observe(self, chunk: Chunk, decision: Decision) -> None: ...


class AcceptAll(_Alone):
    """Keeps every draft: the draft model alone. The target is asked for scores only if they are wanted for votes."""

    def __init__(self, *, scored: bool = False) -> None:
        self.scored = scored
        self.identity = {"scored": scored}

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        return Decision("accept", "all")


class ConformalPolicy(_Alone):
    """Takes over by the p-value of a chunk's score, at the rate that the rule promises.

    Args:
        on_takeover: the target continues behind the chunk, or replaces it, or the draft tries again up to `resamples`
            times and the chunk of the lowest score stays. A chunk that the rule discards is drafted again in any case;
            when the tries are used up the target continues or replaces it.
        on_cold: what to do with a score that there is no bank for. on_score_failure: with a chunk whose scoring failed
            for good ("fail" ends its chain). on_short: with one too short to be scored. None of these decisions has a
            p-value.
        drift: watches the p-values of guaranteed decisions, and of first turns in a bank that grows, on each question's
            first chain; the policy warns when they stop being uniform, and the monitor may freeze the calibrator. It
            begins anew with every run of `ATTS`.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        rule: Rule,
        on_takeover: OnTakeover = "continue",
        *,
        resamples: int = 2,
        on_cold: OnCold = "takeover",
        on_score_failure: OnScoreFailure = "takeover",
        on_short: OnCold = "accept",
        drift: DriftMonitor | None = None,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a Rule(takeover_rate, ...), got {rule!r}")
        if drift is not None:
            check_watched(calibrator)
        self.calibrator, self.rule = calibrator, rule
        self.on_takeover = check_word("on_takeover", on_takeover, OnTakeover)
        self.on_cold = check_word("on_cold", on_cold, OnCold)
        self.on_score_failure = check_word("on_score_failure", on_score_failure, OnScoreFailure)
        self.fail_unscored = on_score_failure == "fail"
        self.resamples, self.drift = check_resamples(resamples, on_takeover), drift
        for n in getattr(calibrator, "sizes", ()):
            rule.warn_if_idle(n)
        check_word("on_short", on_short, OnCold)
        self._without = {"cold": on_cold, "failed": on_score_failure, "short": on_short, "empty": on_short}

    @property
    def identity(self) -> dict[str, Any]:
        """Its settings, and the bank as it is now."""
        settings = {"resamples": self.resamples, "on_takeover": self.on_takeover, "without": self._without}
        drift = None if self.drift is None else self.drift.settings
        return asdict(self.rule) | settings | {"bank": self.calibrator.version, "drift": drift}

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        if chunk.score is None:
            return self._blind(chunk.reason)
        p = self.calibrator.p_value(chunk.score, chunk.cell, uniform)
        if p is None:
            return self._blind("cold")
        label = self._label(p)
        action, reason = self._action(label, chunk.key.attempt)
        sure, why = p.guaranteed, p.why
        if chunk.key.attempt:
            sure, why = False, "a draft after one that was thrown away"
        elif self.rule.tail == "smoothed" and not p.uniform:
            sure, why = False, "smoothed p-values are exact only where a question has one score in the bank"
        # One chain of a question, since those of one question are alike.
        shown = self.drift is not None and (p.guaranteed or p.watch) and not chunk.key.attempt and not chunk.key.chain
        around = (self.calibrator.p_value(chunk.score + step, chunk.cell, uniform) for step in (-NEAR, NEAR))
        near = any(other is None or self._label(other) != label for other in around)
        watched = p.smoothed if shown else None
        return Decision(action, reason, self.rule.p(p), p.n, p.version, sure, why, near, watched)

    def observe(self, chunk: Chunk, decision: Decision) -> None:
        """Shows the monitor a p-value, and the calibrator the score of a first draft that was judged or met no bank.

        Neither depends on what was decided: a bank without the scores that a limit let pass would hold good ones only.
        Such a one counts as taken over, by the rule. Warns (UserWarning) at an alarm.
        """
        if self.drift is not None and decision.watched is not None:
            turn = chunk.cell.turn
            alarm = self.drift.see(decision.watched, n=decision.n, bank=decision.version, turn=turn)
            if alarm is not None:
                warnings.warn(str(alarm), stacklevel=2)
        if chunk.score is not None and not chunk.key.attempt and decision.reason in _LEARNED and not self._frozen:
            fired = decision.action in (*TAKEOVERS, "resample") or decision.reason == "forced"
            self.calibrator.observe(chunk.score, chunk.cell, fired)

    def begin(self) -> None:
        """A run begins."""
        if self.drift is not None:
            self.drift.begin()

    def advance(self) -> None:
        """A batch of questions has ended: the calibrator may take in what it has seen."""
        if not self._frozen:
            self.calibrator.advance()

    def warn_if_blind(self) -> None:
        """Warns (UserWarning) where the monitor was shown nothing, since nothing was promised."""
        if self.drift is not None and not self.drift.seen:
            warnings.warn(
                f"drift: {type(self.calibrator).__name__} promised nothing here, so no p-value was watched and none "
                "could alarm; use a bank that holds for these questions, or leave drift out",
                stacklevel=3,
            )

    def keep(self) -> Callable[[], None]:
        """What takes the calibrator and the monitor back to what they know now."""
        undo = [keep(self.calibrator), *([self.drift.keep()] if self.drift is not None else [])]

        def take_back() -> None:
            for back in undo:
                back()

        return take_back

    @property
    def _frozen(self) -> bool:
        return self.drift is not None and self.drift.frozen

    def _label(self, p: PValue) -> Label:
        return self.rule.label(p, self.calibrator.rate(self.rule.takeover_rate))

    def _action(self, label: str, attempt: int) -> tuple[Action, str]:
        if label == "accept":
            return "accept", "p"
        if (label == "discard" or self.on_takeover == "resample") and attempt < self.resamples:
            return "resample", "discard" if label == "discard" else "p"
        if self.on_takeover == "resample":
            return "accept", "resampled"
        return self.on_takeover, "p"

    def _blind(self, reason: str) -> Decision:
        if self._without[reason] == "accept":
            return Decision("accept", reason)
        return Decision("continue" if self.on_takeover == "resample" else self.on_takeover, reason)


class OfficialPolicy(_Alone):
    """The rule of the released code: takeover iff #{U_i < u} / n >= threshold, without the + 1 of a p-value.

    Its mean rate is (n + 1 - ceil(threshold n)) / (n + 1), which is neither a bound from above nor from below on
    1 - threshold. Later turns use the bank of the first.
    """

    def __init__(self, bank: Bank, *, threshold: float = 0.6, on_takeover: Takeover = "continue") -> None:
        if not check_bank(bank).size:
            raise ValueError("bank must hold at least one score, got none")
        self.bank, self.threshold = bank, check_fraction("threshold", threshold)
        self.on_takeover = check_word("on_takeover", on_takeover, Takeover)
        self.identity = {"bank": bank.version, "threshold": threshold, "on_takeover": on_takeover}

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        if chunk.score is None:
            return Decision("accept", chunk.reason)
        below, _ = self.bank.counts(chunk.score)
        share = below / self.bank.size
        return Decision(
            _over(share >= self.threshold, self.on_takeover), "rank in bank", share, self.bank.size, self.bank.version
        )


class RankPolicy:
    """The classic way: of all chains of a question the target takes over the `takeovers` worst of each turn.

    Chunks without a score are kept. Needs every score of the turn, so it waits for the slowest chain.
    """

    together = True

    def __init__(self, takeovers: int, *, on_takeover: Takeover = "continue") -> None:
        self.takeovers = check_count("takeovers", takeovers, least=0)
        self.on_takeover = check_word("on_takeover", on_takeover, Takeover)
        self.identity = {"takeovers": takeovers, "on_takeover": on_takeover}

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        """Not to be had: TypeError."""
        raise TypeError("RankPolicy compares all chunks of a turn; use decide_all, that is the sync engine")

    def decide_all(self, chunks: Sequence[Chunk], uniforms: Sequence[float]) -> list[Decision]:
        scored = [(-chunk.score, chunk.key.chain, i) for i, chunk in enumerate(chunks) if chunk.score is not None]
        worst = {i for _, _, i in sorted(scored)[: self.takeovers]}
        return [Decision(_over(i in worst, self.on_takeover), "rank") for i in range(len(chunks))]

    def observe(self, chunk: Chunk, decision: Decision) -> None: ...


class SpecReasonPolicy(_Alone):
    """SpecReason (arXiv 2504.07891): keeps a step whose grade by the target is at least `threshold`, else rewrites it.

    To be used with `JudgeGrade`, whose score is the grade negated.
    """

    def __init__(self, threshold: float = 7.0) -> None:
        self.threshold = check_number("threshold", threshold)
        self.identity = {"threshold": threshold}

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        if chunk.score is None:
            return Decision("replace", chunk.reason)
        return Decision(_over(-chunk.score < self.threshold, "replace"), "grade")


class RSDPolicy(_Alone):
    """Reward-guided speculative decoding (arXiv 2501.19324): keeps a step by a weight of its reward, else rewrites it.

    To be used with `Reward`, whose score is the reward negated.

    Args:
        threshold: a step of at least this reward has weight 1. soft: below it the weight is 0, or if `soft` the reward
            itself held to [0, 1], the probability of keeping the step.
    """

    def __init__(self, threshold: float = 0.7, *, soft: bool = False) -> None:
        self.threshold, self.soft = check_number("threshold", threshold), soft
        self.identity = {"threshold": threshold, "soft": soft}

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        if chunk.score is None:
            return Decision("replace", chunk.reason)
        reward = -chunk.score
        weight = 1.0 if reward >= self.threshold else min(max(reward, 0.0), 1.0) if self.soft else 0.0
        return Decision(_over(uniform >= weight, "replace"), "reward")


def check_watched(calibrator: object) -> None:
    """Raises ValueError for a calibrator none of whose p-values a drift monitor would ever be shown."""
    base = getattr(calibrator, "base", None)
    if isinstance(calibrator, Adaptive) or isinstance(base, Adaptive):
        raise ValueError(
            "drift has nothing to watch with Adaptive, which keeps its rate in the long run whatever drifts: leave "
            "drift out, or use the calibrator inside alone"
        )


def _over(taken: bool, action: Takeover) -> Action:
    return action if taken else "accept"
