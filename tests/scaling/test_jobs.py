"""The thread that runs requests in batches, and turns of several such threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from pyquiet.scaling.backends.base import Generate, Prompt, Score
from pyquiet.scaling.backends.jobs import Job, Worker
from pyquiet.scaling.backends.turns import Turns, turns_on


def writes(i: int = 0) -> Job:
    return Job(Generate(f"c{i}", Prompt((1,)), 9, 1.0, 1.0, i), (1,))


def scores(i: int = 0) -> Job:
    return Job(Score(f"c{i}", Prompt((1, 2)), 1), (1, 2), 1)


class Runner:
    """Takes jobs in and ends none."""

    def __init__(self, running: Sequence[Job] = ()) -> None:
        self._running = list(running)

    def begin(self, jobs: Sequence[Job]) -> None: ...
    def step(self) -> None: ...
    def drop(self) -> None: ...

    def running(self) -> list[Job]:
        return self._running


def worker(running: int, *, max_batch: int = 8, max_steps: int = 3) -> Worker:
    return Worker(Runner([writes(i) for i in range(running)]), nullcontext(), max_batch, 0.0, max_steps)


def test_a_few_jobs_wait_some_steps_for_others() -> None:
    busy = worker(6)
    one, two = scores(1), scores(2)
    busy.submit(one)
    assert busy._due() == busy._due() == []
    busy.submit(two)
    assert busy._due() == []
    assert busy._due() == [one, two]
    busy.submit(one)
    assert busy._due() == []  # and so again


def test_many_jobs_and_those_of_an_idle_model_do_not_wait() -> None:
    busy, idle = worker(6), worker(0)
    jobs = [scores(i) for i in range(3)]
    for job in jobs:
        busy.submit(job)
    assert busy._due() == jobs
    idle.submit(jobs[0])
    assert idle._due() == jobs[:1]
    assert worker(6, max_steps=0)._due() == []


def test_scores_hold_no_place_and_texts_wait_for_one() -> None:
    full = worker(7)
    jobs = [writes(1), scores(2), writes(3), scores(4)]
    for job in jobs:
        full.submit(job)
    jobs[1].future.cancel()
    assert full._due() == [jobs[0], jobs[3]]
    assert full._due() == []
    full._runner.running().pop()
    full._waited = full._max_steps
    assert full._due() == [jobs[2]]


def test_turns_go_to_who_came_first() -> None:
    turns, order = Turns(), []
    waits: dict[str, threading.Thread] = {}

    def take(name: str) -> None:
        with turns:
            order.append(name)

    with turns:
        for i, name in enumerate("abc"):
            waits[name] = threading.Thread(target=take, args=(name,))
            waits[name].start()
            while len(turns._waiting) == i:
                pass
        assert order == []
    for thread in waits.values():
        thread.join(10)
    assert order == ["a", "b", "c"]
    take("d")  # nobody has it any more
    assert order[-1] == "d"


def test_who_gives_a_turn_back_does_not_have_it_again_before_who_waits() -> None:
    turns, order = Turns(), []

    def loop(name: str, begin: threading.Event) -> None:
        begin.wait()
        for _ in range(50):
            with turns:
                order.append(name)

    began = threading.Event()
    threads = [threading.Thread(target=loop, args=(name, began)) for name in "ab"]
    for thread in threads:
        thread.start()
    with turns:
        began.set()
        while len(turns._waiting) < 2:
            pass
    for thread in threads:
        thread.join(10)
    runs = [order[i : i + 2] for i in range(0, 90, 2)]
    assert sum(a != b for a, b in runs) > 30  # a plain lock lets one thread run off with it


def test_models_on_a_device_share_their_turns() -> None:
    assert turns_on(torch.device("cpu")) is turns_on(torch.device("cpu"))
    assert turns_on(torch.device("cpu")) is not turns_on(torch.device("meta"))
