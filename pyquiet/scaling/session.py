"""What a run holds while it lasts, and how one stage of a chain becomes a committed record."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from pyquiet.scaling.backends.base import Backend, ContextOverflowError, Generate, GoneError, Prompt, TransientError
from pyquiet.scaling.calls import Caller, Pool, Rank, Retry, together
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.chain import Chain, Extract, Step
from pyquiet.scaling.journal import Journal
from pyquiet.scaling.limits import TakeoverLimit
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.plan import Plan
from pyquiet.scaling.policy import Chunk, Policy
from pyquiet.scaling.records import TAKEOVERS, Decision, Key, Outcome, Question, Record, Timing, uniform
from pyquiet.scaling.score import ChunkView, Graded, ScoreFn
from pyquiet.scaling.views import Views

T = TypeVar("T")
Degrade = Literal["stop", "draft_only"]


class Stopped(Exception):  # noqa: N818  no error: the run was asked to end
    """No new stage is begun."""


@dataclass
class Setting:
    """The parts a run is made of; an engine only says which chain does what when.

    Attributes:
        views: makes a question's text as draft and target are to see it. extract, final: find the answer, see `Chain`.
        presample: chunks that are drafted and scored for a question before its first decision, 0 for none. has_bank:
            whether a question, by its `Cell`, needs none. take_presampled: gets its name in banks and their scores.
        limit: a cap on takeovers.
        degrade: what happens when the target stays away: the run stops and can be resumed, or all further drafts are
            accepted.
        on_record: is told every record that is committed. on_panel: every question that is done.
    """

    plan: Plan
    draft: Backend
    target: Backend
    score: ScoreFn
    policy: Policy
    views: Callable[[Question], Views]
    extract: Extract
    final: Extract | None = None
    retry: Retry = field(default_factory=Retry)
    presample: int = 0
    has_bank: Callable[[Cell], bool] = lambda cell: False
    take_presampled: Callable[[str, Sequence[float]], None] = lambda name, scores: None
    limit: TakeoverLimit | None = None
    degrade: Degrade = "stop"
    on_record: Callable[[Record], None] | None = None
    on_panel: Callable[[Panel], None] | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    """A score on its way to a decision; `timing` is None where nobody was asked."""

    graded: Graded
    prompt: str
    timing: Timing | None


class Session:
    """A setting at work in the running event loop.

    Args:
        done: records of an interrupted run, in the order of its journal; their stages are not executed again.
    """

    def __init__(self, setting: Setting, journal: Journal | None = None, done: Iterable[Record] = ()) -> None:
        self.setting, self.plan = setting, setting.plan
        self.stopping = False
        self._journal = journal
        filed = list(done)
        self._done = {record.key: record for record in filed if record.key.stage != "lost"}
        self._lost = Counter(replace(record.key, attempt=0) for record in filed if record.key.stage == "lost")
        self._prepared: dict[str, asyncio.Task[None]] = {}
        self._limit = None if setting.limit is None else setting.limit.fresh(filed)
        self._target_gone = False
        before = max((r.timing.ended for r in filed if r.timing is not None), default=0.0)
        self._began = asyncio.get_running_loop().time() - before  # the run's clock goes on where it stood
        pools = self.plan.pools
        self._draft = self._caller(setting.draft, pools.draft)
        self._score = self._caller(setting.target, pools.score)
        self._target = self._caller(setting.target, pools.target)

    def rank(self, panel: Panel, chain: Chain) -> Rank:
        """The chain's place among those that wait for a slot."""
        order = self.plan.pools.order
        return () if order == "fifo" else (panel.index,) if order == "oldest" else (-chain.turn,)

    def chain(self, panel: Panel, number: int) -> Chain:
        """A new chain of a question."""
        return self._chain(panel.question, number, panel.phase, panel.last_score)

    def recall(self, questions: Iterable[Question]) -> None:
        """Shows the policy the decisions on these questions that are on file already, in their order."""
        known = {question.id: question for question in questions}
        for record in self._done.values():
            if record.decision is not None and record.key.phase == "run" and record.key.question in known:
                self.setting.policy.observe(chunk_of(record, known[record.key.question]), record.decision)

    async def prepare(self, question: Question) -> None:
        """Drafts and scores what the question's own bank is made of: once, whoever asks first."""
        cell = Cell.of(question)
        if not self.setting.presample or self.setting.has_bank(cell):
            return
        task = self._prepared.get(cell.name)
        if task is None:
            task = self._prepared[cell.name] = asyncio.ensure_future(self._presample(question))
        await asyncio.shield(task)

    async def advance(self, chain: Chain, step: Step, rank: Rank = ()) -> None:
        """Takes the step that the chain needs: from the file if it is there, else by asking a model, and commits it.

        A request that fails for good, or does not fit into the context, ends the chain.

        Raises Stopped, GoneError or RefusedError where the run cannot go on.
        """
        record = self.on_file(chain, step)
        if record is None:
            if step.request is None:
                grade = await self.grade(chain, rank)
                record = None if grade is None else self.judged(chain, step, grade)
            else:
                record = await self._or_ends(chain, self._write(chain, step, step.request, rank))
            if record is None:
                return
            self.commit(record, chain.question)
        chain.apply(record)

    def on_file(self, chain: Chain, step: Step) -> Record | None:
        """The record of a step, or of the chain's end in its stead, if an interrupted run left one.

        Raises Stopped if there is none and the run is asked to end.
        """
        record = None
        if self._done:
            record = self._done.pop(step.key, None) or self._done.get(chain.key("end"))
        if record is None and self.stopping:
            raise Stopped
        return record

    async def grade(self, chain: Chain, rank: Rank) -> Grade | None:
        """The score of the chain's chunk, without a value and with a reason where there is none; None where that ended
        the chain."""
        prompt, start = chain.chunk_prompt()
        if not (getattr(self.setting.policy, "scored", True) or chain.calibrates):
            return Grade(Graded(None, "unscored"), _hash(prompt), None)
        view = ChunkView(chain.name, chain.question, prompt, start, chain.chunk.text)
        return await self._or_ends(chain, self._grade(chain.key("score"), view, _hash(prompt), rank))

    async def _grade(self, key: Key, view: ChunkView, prompt: str, rank: Rank) -> Grade:
        reason, send = "gone", lambda: self.setting.score(view, self.setting.target)
        try:
            if not self._target_gone:
                graded, timing = await self._score.call(send, rank, self._loss(key, view.question, prompt))
                return Grade(graded, prompt, timing if graded.asked else None)
        except TransientError:
            if getattr(self.setting.policy, "fail_unscored", False):
                raise
            reason = "failed"
        except GoneError:
            self._do_without_target()
        return Grade(Graded(None, reason), prompt, None)

    def _loss(self, key: Key, question: Question, prompt: str) -> Callable[[Timing, BaseException], None]:
        """Puts a request on file that never came back, so that accounts add up; no chain needs the record."""

        def lose(timing: Timing, error: BaseException) -> None:
            outcome: Outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
            self._lose(Record(key, prompt=prompt, timing=timing, outcome=outcome), question)

        return lose

    def drop(self, step: Step, grade: Grade, question: Question) -> None:
        """Puts a score on file that came back and that nothing will be decided on: it was paid for."""
        if grade.timing is not None:
            score = Record(step.key, prompt=grade.prompt, usage=grade.graded.usage, timing=grade.timing)
            self._lose(replace(score, outcome="cancelled"), question)

    def _lose(self, record: Record, question: Question) -> None:
        first = replace(record.key, stage="lost", attempt=0)
        name = replace(first, attempt=self._lost[first])
        self._lost[first] += 1
        self.commit(replace(record, key=name, reason=record.key.stage), question)

    @staticmethod
    async def _or_ends(chain: Chain, work: Awaitable[T]) -> T | None:
        """What the work brings; None if it failed for good, or did not fit into the context, and so ended the chain."""
        try:
            return await work
        except ContextOverflowError:
            chain.end("context")
        except TransientError:
            chain.end("failed")
        return None

    def judged(self, chain: Chain, step: Step, grade: Grade, decision: Decision | None = None) -> Record:
        """The record of a score and its decision, which is the policy's if none is given."""
        return self.scored(step, grade, self._decision(chain, step, grade, decision))

    def _decision(self, chain: Chain, step: Step, grade: Grade, decision: Decision | None) -> Decision:
        graded, question = grade.graded, chain.question
        if chain.calibrates:
            return Decision("accept", "calibration")
        if graded.reason == "gone":
            return Decision("accept", "forced")
        if decision is None:
            chunk = Chunk(step.key, Cell.of(question, step.key.turn), graded.score, graded.reason)
            decision = self.setting.policy.decide(chunk, uniform(step.seed))
        if decision.guaranteed and (why := self.plan.no_promise):
            decision = replace(decision, guaranteed=False, why=why)
        if decision.action in TAKEOVERS and not (self._limit is None or self._limit.take(question.id)):
            why = "a takeover beyond the limit"
            decision = replace(decision, action="accept", reason="forced", guaranteed=False, why=why, near_tie=False)
        return decision

    @staticmethod
    def scored(step: Step, grade: Grade, decision: Decision | None = None) -> Record:
        """The record of a score, with its decision if there is one yet."""
        graded = grade.graded
        return Record(
            step.key, step.seed, grade.prompt, usage=graded.usage, timing=grade.timing, score=graded.score,
            reason=graded.reason, decision=decision,
        )  # fmt: skip

    def ended(self, chain: Chain) -> bool:
        """Whether the chain's end is on file."""
        return chain.key("end") in self._done

    def commit(self, record: Record, question: Question) -> None:
        """Puts a new record on file, then lets the policy and others see it."""
        if self._journal is not None:
            self._journal.commit(record)
        if record.decision is not None and record.key.phase == "run":
            self.setting.policy.observe(chunk_of(record, question), record.decision)
        if self.setting.on_record is not None:
            self.setting.on_record(record)

    def close(self, panel: Panel, chain: Chain) -> None:
        """Puts the chain's end on file, counts its vote, and tells of the question when it was its last chain."""
        key = chain.key("end")
        if self._done.pop(key, None) is None:
            self.commit(Record(key, outcome=chain.outcome, answer=chain.answer), chain.question)
        for backend in {self.setting.draft, self.setting.target}:
            backend.forget(chain.name)
        panel.take(chain)
        if panel.complete:
            self._forget(Cell.of(panel.question).name)
            if self.setting.on_panel is not None:
                self.setting.on_panel(panel)

    def _forget(self, name: str) -> None:
        """Lets go of a bank that was filled; one that still is, after a deadline, may be another question's too."""
        if name in self._prepared and self._prepared[name].done():
            del self._prepared[name]

    async def settle(self) -> None:
        """Ends what was begun for questions whose chains are gone."""
        tasks = list(self._prepared.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _caller(self, backend: Backend, slots: int) -> Caller:
        return Caller(backend, Pool(slots), self.setting.retry, self._began)

    def _chain(self, question: Question, number: int, phase: str, last_score: int | None) -> Chain:
        views, extract = self.setting.views(question), self.setting.extract
        return Chain(
            question, number, self.plan, views, extract, final=self.setting.final, phase=phase, last_score=last_score
        )

    async def _presample(self, question: Question) -> None:
        chains = [self._chain(question, i, "presample", 0) for i in range(self.setting.presample)]
        scores = [score for score in await together(map(self._first_score, chains)) if score is not None]
        if self.stopping and not all(chain.outcome for chain in chains):
            raise Stopped
        self.setting.take_presampled(Cell.of(question).name, scores)

    async def _first_score(self, chain: Chain) -> float | None:
        try:
            while (step := chain.step()) is not None:
                await self.advance(chain, step)
        except Stopped:  # the others' requests are let to end
            return None
        if chain.outcome in ("failed", "context") and not self.ended(chain):
            self.commit(Record(chain.key("end"), outcome=chain.outcome), chain.question)
        return chain.mean_score if chain.scores else None

    async def _write(self, chain: Chain, step: Step, request: Generate, rank: Rank) -> Record:
        role, prompt = step.key.stage, _hash(request.prompt)
        if role == "target" and self._limit is not None:
            await self._limit.wait()
        try:
            caller = self._draft if role == "draft" else self._target
            if role == "target" and self._target_gone:
                return _nothing(step)
            loss = self._loss(step.key, chain.question, prompt)
            text, timing = await caller.call(lambda: caller.backend.generate(request), rank, loss)
        except GoneError:
            if role == "draft":
                raise
            self._do_without_target()
            return _nothing(step)
        return Record(step.key, step.seed, prompt, text.ids, text.text, text.finish, text.usage, timing)

    def _do_without_target(self) -> None:
        """Called where GoneError was caught: raises it again unless drafts may go on alone."""
        if self.setting.degrade == "stop":
            raise
        self._target_gone = True


def _nothing(step: Step) -> Record:
    """What a target writes that is not there."""
    return Record(step.key, step.seed, ids=(), finish="length")


def chunk_of(record: Record, question: Question) -> Chunk:
    """What a policy sees of a score's record."""
    return Chunk(record.key, Cell.of(question, record.key.turn), record.score, record.reason)


def _hash(prompt: Prompt) -> str:
    content = prompt.text if prompt.ids is None else repr(prompt.ids)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
