"""ATTS: draft and target scale thinking at test time, and the share of drafts that the target takes over is promised.

Asynchronous test-time scaling (arXiv 2509.15148): every chain decides about its own chunk by the rank of its score in
a bank of earlier scores, a conformal p-value, so that no chain waits for another.
"""

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Literal

from pyquiet.checks import check_word
from pyquiet.scaling import answers, votes
from pyquiet.scaling.arguments import check_kinds, check_together
from pyquiet.scaling.backends.connect import Model, connect
from pyquiet.scaling.calibrating import Filling
from pyquiet.scaling.calibration import Calibrator, Kind, PerQuestion
from pyquiet.scaling.calibration_files import check_taxonomy, load_calibrator, save_calibrator
from pyquiet.scaling.calls import Retry
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.cold import ColdStart, is_warm, presampled, spent_on
from pyquiet.scaling.conformal import Rule, Tail
from pyquiet.scaling.drift import DriftMonitor
from pyquiet.scaling.engine import run_async, run_sync
from pyquiet.scaling.identity import header, made_with, taxonomy
from pyquiet.scaling.journal import Journal
from pyquiet.scaling.limits import TakeoverLimit
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.plan import OnScoreFailure, OnTakeover, Plan, check_resamples
from pyquiet.scaling.policy import AcceptAll, ConformalPolicy, Policy
from pyquiet.scaling.questions import Asked, as_questions
from pyquiet.scaling.records import Question, Record
from pyquiet.scaling.report import Report, Tally
from pyquiet.scaling.result import ATTSResult, Promises, QuestionResult
from pyquiet.scaling.running import blocking, interruptible, journalled
from pyquiet.scaling.score import MeanNLL, ScoreFn
from pyquiet.scaling.session import Degrade, Session, Setting
from pyquiet.scaling.table import Table
from pyquiet.scaling.views import Template, Views

Engine = Literal["async", "sync"]
OnRecord = Callable[[Record], None]
Select = Literal["majority", "weighted", "first"]
OnCold = Literal["takeover", "accept", "presample"]


class ATTS:
    """Draft, target, and what is promised about them.

    Each of m chains a question takes at most T turns. In a turn the draft writes a chunk, the target scores it, and
    the chunk is kept or the target takes over: at most (`tail="budget"`), at least ("coverage") or exactly
    ("smoothed") in a share `takeover_rate` of the chunks. That share is all that is guaranteed, and only where scores
    in the bank and scores that are judged are exchangeable; `ATTSResult.guaranteed` says where that is. Nothing is
    promised about the answers.

    Args:
        draft, target: a backend, a (model, tokenizer), an embedded model's name, a folder, or a server's address; see
            `backends.connect`.
        takeover_rate: rho, in (0, 1); the paper's alpha is 1 - rho, and a budget of B takeovers of m chains is B / m.
        discard_rate: in [0, takeover_rate]: the worst of the chunks that rho stands for, in this share of all, are
            thrown away and drafted again, up to `resamples` times in a turn; then the target takes over. The promise is
            that of rho for a turn's first draft: to be kept or not.
        chains, turns: m and T; None: those of `plan`.
        calibration: a calibrator, or the folder of one that was saved, made under the same settings. None: for every
            question as many chunks as it has chains are drafted and scored first, which is exact for its first turn
            alone; later turns are ranked among these first chunks, and may be taken over seldom or always.
        tail: which promise; None is "budget". on_takeover: what a takeover is: the target continues behind the draft's
            chunk, it replaces the chunk, or the draft tries again, up to `resamples` times, and the best of its chunks
            stays.
        on_cold: what becomes of a chunk that there is no bank for, since the calibrator holds fewer scores than its
            `n_min`: "takeover", "accept", or "presample", by which such a question gets a bank of its own first chunks
            before, as without any calibration.
        drift: watches a run for scores that leave the bank behind, and warns. A turn at which that happened is not
            guaranteed in `ATTSResult` and `Report`, and `Report.drift` tells when. Every run has a fresh one.
        on_score_failure: what becomes of a chunk that could not be scored: "takeover", "accept", or "fail", which ends
            its chain.
        preset: "paper" makes the released settings the defaults: `tail="coverage"`, answers from rejected chunks, and
            `calibrate` fills a pooled bank of first chunks. (`OfficialPolicy` is the released rule to the letter.)
        policy: decides in place of all these. score: larger is worse; None is the mean negative log-likelihood of the
            chunk under the target.
        plan: sampling, limits, pools, seed. template, system: how a question is shown, see `Views`.
        extract: finds the answer in a text, None if there is none yet. select: which of the chains' answers wins.
        retry, limit, degrade: requests that fail, a hard cap on takeovers, and a target that is lost; see `Setting`.

    Raises:
        ValueError, TypeError: an argument that makes no sense, by name, before any model is asked.

    >>> from pyquiet.scaling.plan import Sampling
    >>> plan = Plan(chains=4, turns=8, draft=Sampling(48), target=Sampling(48), stop=("\\n",))
    >>> atts = ATTS("tiny-draft", "tiny-target", on_takeover="replace", plan=plan)
    >>> result = atts.run(["Ann has 3 apples. Ann buys 4 more. How many apples does Ann have?"])
    >>> list(result.answers), result.finished
    (['0'], True)
    """

    def __init__(
        self,
        draft: Model,
        target: Model,
        *,
        takeover_rate: float = 0.4,
        chains: int | None = None,
        turns: int | None = None,
        calibration: Calibrator | str | os.PathLike[str] | None = None,
        tail: Tail | None = None,
        discard_rate: float = 0.0,
        on_takeover: OnTakeover = "continue",
        resamples: int = 2,
        on_cold: OnCold = "takeover",
        on_score_failure: OnScoreFailure = "takeover",
        preset: Literal["paper"] | None = None,
        policy: Policy | None = None,
        score: ScoreFn | None = None,
        plan: Plan | None = None,
        template: Template | None = None,
        system: str | None = None,
        extract: Callable[[str], str | None] = answers.extract,
        select: Select = "majority",
        retry: Retry | None = None,
        limit: TakeoverLimit | None = None,
        drift: DriftMonitor | None = None,
        degrade: Degrade = "stop",
    ) -> None:
        check_kinds({
            "calibration": calibration, "policy": policy, "score": score, "plan": plan, "template": template,
            "system": system, "extract": extract, "retry": retry, "limit": limit, "drift": drift,
        })  # fmt: skip
        check_word("select", select, Select)
        if select == "weighted" and not getattr(policy, "scored", True):
            raise ValueError('select="weighted" weighs votes by scores: use AcceptAll(scored=True)')
        check_word("on_takeover", on_takeover, OnTakeover)
        check_word("on_score_failure", on_score_failure, OnScoreFailure)
        check_word("on_cold", on_cold, OnCold)
        check_word("degrade", degrade, Degrade)
        if preset not in (None, "paper"):
            raise ValueError(f'preset must be "paper" or None, got {preset!r}')
        plan = plan or Plan()
        chains, turns = plan.chains if chains is None else chains, plan.turns if turns is None else turns
        self.plan = replace(plan, chains=chains, turns=turns)
        self.preset: Literal["paper"] | None = preset
        if preset == "paper":
            self.plan, tail = replace(self.plan, answer_from_rejected=True), tail or "coverage"
        check_together(self.plan, policy, calibration, drift)
        self.rule, self.on_takeover = Rule(takeover_rate, tail or "budget", discard_rate), on_takeover
        self.resamples = check_resamples(resamples, on_takeover)
        self.policy, self.on_score_failure = policy, on_score_failure
        self.on_cold, self.drift = on_cold, drift
        self._saved = calibration if isinstance(calibration, str | os.PathLike) else None
        self.calibrator = None if isinstance(calibration, str | os.PathLike) else calibration
        self._calibration = Table()  # what `calibrate` did, for reports of runs
        self.score, self.extract, self.select = score or MeanNLL(), extract, select
        self.template, self.system = template, system
        self._retry, self.limit, self._degrade = retry or Retry(), limit, degrade
        self.draft, self.target = connect("draft", draft), connect("target", target)

    def run(
        self,
        questions: Iterable[Asked],
        *,
        journal: str | os.PathLike[str] | None = None,
        engine: Engine = "async",
        on_record: OnRecord | None = None,
        grace: float = 30.0,
    ) -> ATTSResult:
        """Answers questions.

        Ctrl-C lets requests that are on the wire end for `grace` seconds, begins no other, and gives what there is.

        Args:
            questions: texts, dicts or `Question`s, see `as_questions`.
            journal: a file that keeps every step. If it exists already, the run goes on where it was interrupted.
            engine: "async", every chain for itself, or "sync", all chains of a question in step, the reference.
            on_record: is told every step as it is committed, after those of the journal.

        Raises:
            ValueError: bad questions, a journal of another run, a policy that needs the sync engine, a bank that was
                made under other settings.
            RefusedError, GoneError: a server that will not or does not answer; the journal resumes the run.
        """
        return blocking(self.arun(questions, journal=journal, engine=engine, on_record=on_record, grace=grace))

    async def arun(
        self,
        questions: Iterable[Asked],
        *,
        journal: str | os.PathLike[str] | None = None,
        engine: Engine = "async",
        on_record: OnRecord | None = None,
        grace: float = 30.0,
    ) -> ATTSResult:
        """`run` in a running event loop."""
        asked = as_questions(questions)
        drive = _ENGINES[check_word("engine", engine, _ENGINES)]
        if self.policy is not None and self.policy.together and engine != "sync":
            raise ValueError(f'{type(self.policy).__name__} compares the chains of a turn: use engine="sync"')
        done: dict[int, Panel] = {}  # votes are counted in the end: to compare answers may take seconds each
        promises = Promises()

        def take(panel: Panel) -> None:
            done[panel.index] = panel

        async with self._open():
            calibrator = PerQuestion() if self.calibrator is None else self.calibrator
            policy = self.policy or self._policy(calibrator, self.drift)
            self._check_bank(policy)
            self._warn_if_idle(policy)
            begin = header(self, asked, policy, engine)
            with journalled(journal, begin) as (file, records), _kept(policy, lambda: len(done) == len(asked)):
                tally = Tally(begin)
                listeners = [tally.add, promises.add, *([on_record] if on_record else [])]
                _tell(records, listeners)
                session = self._session(policy, file, records, listeners, take)
                with interruptible(session, grace):
                    for batch in _batches(asked, policy):
                        session.recall(q for _, q in batch)
                        await drive(session, (self._panel(i, q) for i, q in batch))
                        if isinstance(policy, ConformalPolicy):
                            policy.advance()
                if isinstance(policy, ConformalPolicy):
                    policy.warn_if_blind()
        results, report = tuple(self._result(done[i]) for i in sorted(done)), self._counted(tally.report(), policy)
        return ATTSResult(results, report, promises.by_turn(report.drift), len(done) == len(asked))

    def calibrate(
        self,
        questions: Iterable[Asked],
        *,
        kind: Kind | None = None,
        chains: int = 4,
        turns: int | None = None,
        n_min: int = 1,
        journal: str | os.PathLike[str] | None = None,
        on_record: OnRecord | None = None,
    ) -> Calibrator:
        """Fills a bank from questions like those that will be asked, but not these, and uses it from now on.

        The questions that calibrate a turn (every T-th) calibrate no other, so that their chains are judged at earlier
        turns by banks that do not hold their own scores, as those of new questions are; else the promise would break.
        What it took is counted in the reports of all further runs, and told apart in those of others that use the bank.

        Args:
            kind: "pooled" and "hierarchical" rank first chunks, the latter so that it holds for new questions;
                "per_turn" (the default) makes hierarchical banks for turns. chains: of each question, for each turn.
            turns: with "per_turn", so many turns get a bank each and with it a promise, from one T-th of the questions;
                later ones are ranked in the last bank without a promise. None: banks for turns 0, 1, 2-3, 4-7 and 8-,
                larger ones, of which those that turns share promise none of them its own rate.
            n_min: fewer scores of a turn (for hierarchical banks questions, each by the share of its chains that got so
                far) are no bank: a later turn is then ranked in the one before, without a promise; for a first turn see
                `on_cold`.

        Raises:
            ValueError: bad questions, or none of their chunks could be scored; a policy decides in place of banks.
        """
        work = self.acalibrate(
            questions, kind=kind, chains=chains, turns=turns, n_min=n_min, journal=journal, on_record=on_record
        )
        return blocking(work)

    async def acalibrate(
        self,
        questions: Iterable[Asked],
        *,
        kind: Kind | None = None,
        chains: int = 4,
        turns: int | None = None,
        n_min: int = 1,
        journal: str | os.PathLike[str] | None = None,
        on_record: OnRecord | None = None,
    ) -> Calibrator:
        """`calibrate` in a running event loop."""
        if self.policy is not None:
            raise ValueError(
                f"policy: {type(self.policy).__name__} decides, and would not use a bank that is filled here; leave it "
                "out to calibrate, and give it the bank, as in ConformalPolicy(bank, Rule())"
            )
        kind = kind or ("pooled" if self.preset == "paper" else "per_turn")
        longest = self.plan.turns
        filling = Filling(as_questions(questions), kind, chains=chains, turns=turns, n_min=n_min, longest=longest)
        listeners = [filling.add, *([on_record] if on_record else [])]
        async with self._open():
            begin = header(self, filling.questions, None, "async") | {"calibration": filling.made}
            with journalled(journal, begin) as (file, records):
                for turn in filling.turns:
                    _tell((record for record in records if record.key.turn == turn), listeners)
                    policy = AcceptAll() if filling.calibrator is None else self._policy(filling.calibrator)
                    filed = filling.filed(turn, records)  # its clock goes on from these
                    session = self._session(policy, file, filed, listeners, None)
                    await run_async(session, filling.panels(turn))
                    filling.fit()
        calibrator = filling.filled()
        calibrator.taxonomy = made_with(self, calibrator)
        self.calibrator, self._calibration = calibrator, filling.table
        return calibrator

    def save_calibration(self, folder: str | os.PathLike[str]) -> None:
        """Writes the bank to a folder, from which `calibration=` takes it, where what its scores depend on is the same:
        models, sampling, score and template, and for later turns the rule and what ends chains.

        Raises ValueError without one, TypeError for a calibrator of a foreign kind.
        """
        if self.calibrator is None:
            raise ValueError("there is no calibration to save: call calibrate first")
        kept = getattr(self.calibrator, "taxonomy", None) or made_with(self, self.calibrator)
        save_calibrator(self.calibrator, folder, kept)

    def taxonomy(self) -> dict[str, str]:
        """What scores depend on, and with it a bank, for `save_calibrator`; servers tell their part once opened."""
        return taxonomy(self)

    def _check_bank(self, policy: Policy) -> None:
        """ValueError where the bank that the policy uses was made under other settings."""
        if not isinstance(policy, ConformalPolicy):
            return
        bank = policy.calibrator.base if isinstance(policy.calibrator, ColdStart) else policy.calibrator
        filled = presampled(bank)
        if isinstance(filled, PerQuestion) and not filled.banks:  # by this run
            filled.taxonomy = made_with(self, filled)
        own = self.policy if isinstance(self.policy, ConformalPolicy) else None
        check_taxonomy(getattr(bank, "taxonomy", {}), taxonomy(self, own), "calibration")

    def _warn_if_idle(self, policy: Policy) -> None:
        """Warns where the banks that a run fills first, of a question's chains, let the target never be called."""
        if not isinstance(policy, ConformalPolicy):
            return
        bank = policy.calibrator
        cold = isinstance(bank, ColdStart) and not is_warm(bank.base, Cell("", "", 0))
        if cold or (isinstance(bank, PerQuestion) and not bank.banks):
            policy.rule.warn_if_idle(self.plan.chains)

    def _policy(self, calibrator: Calibrator, drift: DriftMonitor | None = None) -> ConformalPolicy:
        if self.on_cold == "presample" and not isinstance(calibrator, PerQuestion):
            calibrator = ColdStart(calibrator)
        return ConformalPolicy(
            calibrator,
            self.rule,
            self.on_takeover,
            resamples=self.resamples,
            on_cold="takeover" if self.on_cold == "presample" else self.on_cold,
            on_score_failure=self.on_score_failure,
            drift=None if drift is None else drift.fresh(),
        )

    def _counted(self, report: Report, policy: Policy) -> Report:
        """A report of a run with what its bank took: as part of it where it was filled here, else as spent before."""
        if isinstance(policy, ConformalPolicy) and not len(self._calibration.rows()):
            return replace(report, spent_before=spent_on(policy.calibrator))
        return report.calibrated(self._calibration)

    def _panel(self, index: int, question: Question) -> Panel:
        return Panel(question, index, range(self.plan.chains), self.plan.early_majority)

    def _session(
        self,
        policy: Policy,
        journal: Journal | None,
        done: Iterable[Record],
        listeners: Sequence[OnRecord],
        on_panel: Callable[[Panel], None] | None,
    ) -> Session:
        filled = presampled(policy.calibrator) if isinstance(policy, ConformalPolicy) else None
        setting = Setting(
            self.plan,
            self.draft,
            self.target,
            self.score,
            policy,
            lambda q: Views(self.draft, self.target, q, template=self.template, system=self.system),
            self._stops,
            self.extract,
            retry=self._retry,
            **({} if filled is None else _presampling(filled, self.plan.chains)),
            limit=self.limit,
            degrade=self._degrade,
            on_record=lambda record: _tell([record], listeners),
            on_panel=on_panel,
        )
        return Session(setting, journal, done)

    def _stops(self, text: str) -> str | None:
        """The answer that ends a chain: the user's, or a box; words may go on behind the end of a chunk."""
        return answers.extract(text, ()) if self.extract is answers.extract else self.extract(text)

    def _result(self, panel: Panel) -> QuestionResult:
        chains = tuple(sorted(panel.results, key=lambda chain: chain.number))
        ballot = [
            votes.Vote(c.answer, c.mean_score, c.number, ended) for c, ended in zip(panel.results, itertools.count())
        ]
        select = {"majority": votes.majority, "weighted": votes.weighted, "first": votes.first}[self.select]
        return QuestionResult(panel.question, select(ballot), chains)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        backends = [self.draft] if self.draft is self.target else [self.draft, self.target]
        async with AsyncExitStack() as stack:
            for backend in backends:
                stack.push_async_callback(backend.close)
                await backend.open()
            if self._saved is not None and self.calibrator is None:
                self.calibrator = load_calibrator(self._saved, self.taxonomy())
            yield


def _tell(records: Iterable[Record], listeners: Sequence[OnRecord]) -> None:
    for record in records:
        for listen in listeners:
            listen(record)


def _presampling(filled: PerQuestion | ColdStart, chains: int) -> dict[str, Any]:
    return {"presample": chains, "has_bank": filled.has_bank, "take_presampled": filled.set}


@contextmanager
def _kept(policy: Policy, finished: Callable[[], bool]) -> Iterator[None]:
    """Takes back what a policy has learned if the run does not finish: its journal teaches that again."""
    undo: Callable[[], None] = getattr(policy, "keep", lambda: lambda: None)()
    if isinstance(policy, ConformalPolicy):
        policy.begin()
    try:
        yield
    finally:
        if not finished():
            undo()


def _batches(asked: Sequence[Question], policy: Policy) -> Iterator[list[tuple[int, Question]]]:
    """Questions with their places, in the batches that the calibrator learns between; all at once for most."""
    learns = policy.calibrator if isinstance(policy, ConformalPolicy) else None
    size = getattr(learns, "batch", None) or len(asked)
    for start in range(0, len(asked), size):
        yield list(enumerate(asked))[start : start + size]


_ENGINES = {"async": run_async, "sync": run_sync}
