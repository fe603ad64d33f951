"""Requests on their way through a model in this process, and the thread that runs them in batches."""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pyquiet.scaling.backends.base import Finish, Generate, Generated, Score, TextCodec, Usage
from pyquiet.scaling.backends.codec import decode_after


class Job:
    """A request, the ids of its prompt and the future of its answer.

    Attributes:
        start: the first token that a score counts. paid: tokens that were read for it and for others just before.
    """

    def __init__(self, request: Generate | Score, ids: tuple[int, ...], start: int = 0) -> None:
        self.request, self.ids, self.start = request, ids, start
        self.paid = 0
        self.future: Future[Any] = Future()

    def settle(self, answer: Any) -> None:
        """Hands the answer, or an exception, to who waits for it, if anybody still does."""
        try:
            if isinstance(answer, BaseException):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)
        except InvalidStateError:
            pass  # cancelled


class Writing:
    """A text that is being written, token by token."""

    def __init__(self, job: Job, cached: int, codec: TextCodec, eos: frozenset[int]) -> None:
        assert isinstance(job.request, Generate)
        self.job, self.request, self.cached = job, job.request, cached
        self.new: list[int] = []  # without the token that ends the text
        self.finish: Finish | None = None
        self._codec, self._eos = codec, eos
        # A stop string ends in the newest token, and a token has a byte at least, but for special ones.
        self._tail = max((len(s.encode()) for s in self.request.stop), default=0) + 4

    def take(self, token: int) -> bool:
        """Adds a token; whether the text goes on."""
        if token in self._eos:
            self.finish = "eos"
            return False
        self.new.append(token)
        stop = self.request.stop
        if stop and _ends(self._codec.decode(self.new[-self._tail :]), stop) and self._stopped() is not None:
            self.finish = "stop"
        elif len(self.new) == self.request.max_tokens:
            self.finish = "length"
        return self.finish is None

    def _stopped(self) -> str | None:
        text = decode_after(self._codec, self.job.ids, self.new)
        end = _ends(text, self.request.stop)
        return text[:end] if end else None

    def settle(self) -> None:
        """Answers the request."""
        assert self.finish is not None
        text = self._stopped()
        finish = self.finish if text is None else "stop"
        usage = Usage(len(self.job.ids), self.cached, len(self.new) + (self.finish == "eos"))
        if text is None:
            text = decode_after(self._codec, self.job.ids, self.new)
        self.job.settle(Generated(tuple(self.new), text, finish, usage))


def _ends(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string that is found ends; 0 for none."""
    return min((text.index(s) + len(s) for s in stop if s in text), default=0)


class Runner(Protocol):
    """Runs jobs on a model. It settles them itself; what it raises is told to all that it has at hand."""

    def begin(self, jobs: Sequence[Job]) -> None:
        """Takes jobs in."""

    def step(self) -> None:
        """Writes a token more for each text that is being written."""

    def running(self) -> list[Job]:
        """The jobs that need further steps."""

    def drop(self) -> None:
        """Gives up all running jobs."""


class Worker(threading.Thread):
    """Feeds a runner: up to `max_batch` jobs at a time, joining between two tokens those that run.

    Reading a few tokens of one prompt takes about as long as reading them of several, so jobs wait for each other: an
    idle worker takes the first ones `max_wait` seconds after it saw one, a busy one after `max_steps` tokens of the
    texts that it writes, or when they are half as many as these.

    Args:
        turns: had while the runner works.
    """

    def __init__(
        self, runner: Runner, turns: AbstractContextManager[None], max_batch: int, max_wait: float, max_steps: int
    ) -> None:
        super().__init__(name="pyquiet-hf", daemon=True)
        self._runner, self._turns = runner, turns
        self._max_batch, self._max_wait, self._max_steps = max_batch, max_wait, max_steps
        self._waiting: deque[Job] = deque()
        self._waited = 0  # steps that the first of them has waited
        self._changed = threading.Condition()
        self._closing = False

    @property
    def started(self) -> bool:
        """Whether it was ever started."""
        return self.ident is not None

    def submit(self, job: Job) -> None:
        """Puts a job in the queue."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the token that is being written; open requests are cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        """The thread's work."""
        while self._wait():
            with self._turns:
                jobs = self._due()
                try:
                    if jobs:
                        self._runner.begin(jobs)
                    if self._runner.running():
                        self._runner.step()
                except BaseException as error:
                    lost = [*jobs, *self._runner.running()]
                    self._runner.drop()
                    for job in lost:
                        job.settle(error)
        for job in [*self._waiting, *self._runner.running()]:
            job.future.cancel()
        self._runner.drop()

    def _wait(self) -> bool:
        """Returns when there is something to do: False to end."""
        with self._changed:
            if not self._runner.running():
                self._changed.wait_for(lambda: self._waiting or self._closing)
                self._changed.wait_for(lambda: len(self._waiting) >= self._max_batch or self._closing, self._max_wait)
            return not self._closing

    def _due(self) -> list[Job]:
        """Jobs to begin now; none while few wait for the next step of those that run."""
        with self._changed:
            running = len(self._runner.running())
            if 2 * len(self._waiting) < running and self._waited < self._max_steps:
                self._waited += bool(self._waiting)
                return []
            self._waited = 0
            return self._admitted(self._max_batch - running)

    def _admitted(self, places: int) -> list[Job]:
        """Jobs from the queue in their order: up to `places` texts to write, and scores, which hold no place."""
        jobs: list[Job] = []
        later: deque[Job] = deque()
        while self._waiting and len(jobs) < self._max_batch:
            job = self._waiting.popleft()
            writes = isinstance(job.request, Generate)
            if writes and not places:
                later.append(job)
            elif not job.future.cancelled():
                jobs.append(job)
                places -= writes
        self._waiting.extendleft(reversed(later))
        return jobs
