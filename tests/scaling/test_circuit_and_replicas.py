"""Servers that are lost and come back, and which of several a chain is sent to."""

import asyncio
from dataclasses import dataclass, field

import pytest

from pyquiet.scaling.backends.base import GoneError, TransientError
from pyquiet.scaling.backends.circuit import Circuit
from pyquiet.scaling.backends.replicas import Replicas


class Health:
    """Says "ill" so many times, then "well"; notes how many ask at once."""

    def __init__(self, ill: int) -> None:
        self.ill, self.asked, self.at_once, self.peak = ill, 0, 0, 0

    async def __call__(self) -> bool:
        self.at_once += 1
        self.peak = max(self.peak, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        self.asked += 1
        return self.asked > self.ill


def test_five_failures_in_a_row_open_a_circuit_and_four_do_not():
    async def run() -> None:
        changes: list[bool] = []
        circuit = Circuit(Health(ill=10**9), every=0.001, changed=lambda: changes.append(circuit.closed))
        for _ in range(4):
            circuit.failed()
        circuit.succeeded()
        for _ in range(4):
            circuit.failed()
        assert circuit.closed
        assert changes == []
        circuit.failed()
        assert not circuit.closed
        assert changes == [False]
        await circuit.close()

    asyncio.run(run())


def test_one_probe_at_a_time_until_the_server_is_well_and_then_the_count_begins_anew():
    async def run() -> None:
        health, closed = Health(ill=3), asyncio.Event()
        circuit = Circuit(health, every=0.001, changed=lambda: circuit.closed and closed.set())
        for _ in range(50):
            circuit.failed()  # requests that were on the wire when the server was lost
        await asyncio.wait_for(closed.wait(), 5)
        assert (health.asked, health.peak) == (4, 1)
        for _ in range(4):
            circuit.failed()
        assert circuit.closed

    asyncio.run(run())


def test_a_circuit_that_is_ended_probes_no_more():
    async def run() -> int:
        health = Health(ill=10**9)
        circuit = Circuit(health, every=0.0)
        for _ in range(5):
            circuit.failed()
        await asyncio.sleep(0.01)
        await circuit.close()
        asked = health.asked
        await asyncio.sleep(0.01)
        assert health.asked == asked
        return asked

    assert asyncio.run(run()) > 0


@dataclass(eq=False)
class Server:
    url: str
    health: Health = field(default_factory=lambda: Health(10**9))
    outstanding: int = 0
    trouble: str = "refused"

    def attach(self, replicas: list[Replicas]) -> None:
        self.circuit = Circuit(self.health, every=0.001, changed=lambda: replicas[0].changed())

    def lose(self) -> None:
        for _ in range(5):
            self.circuit.failed()


def group(*servers: Server, give_up_s: float = 30.0) -> Replicas:
    box: list[Replicas] = []
    for server in servers:
        server.attach(box)
    box.append(Replicas(servers, give_up_s=give_up_s))
    return box[0]


def test_a_new_chain_goes_where_least_is_on_the_wire_and_stays():
    a, b, c = Server("a", outstanding=2), Server("b", outstanding=1), Server("c", outstanding=1)
    replicas = group(a, b, c)
    assert replicas.pick("1") is b
    assert replicas.pick("2") is c  # as few on the wire as at b, and fewer chains
    b.outstanding = 9
    assert replicas.pick("1") is b
    assert replicas.pick("3") is c
    replicas.forget("1")
    assert replicas.pick("1") is c


def test_chains_that_ended_weigh_nothing():
    a, b = Server("a"), Server("b")
    replicas = group(a, b)
    assert [replicas.pick(str(i)).url for i in range(4)] == ["a", "b", "a", "b"]
    for chain in ("1", "3", "unknown"):
        replicas.forget(chain)
    assert [replicas.pick(str(i)).url for i in range(4, 7)] == ["b", "b", "a"]


def test_chains_of_a_lost_server_move_and_stay_where_they_went():
    async def run() -> None:
        a, b = Server("a", Health(ill=2)), Server("b")
        replicas = group(a, b)
        assert replicas.pick("1") is a
        a.lose()
        assert replicas.pick("1") is b
        await asyncio.wait_for(replicas.ready(), 5)
        while not a.circuit.closed:
            await asyncio.sleep(0.001)
        assert replicas.pick("1") is b
        assert replicas.pick("2") is a

    asyncio.run(run())


def test_chains_that_moved_weigh_where_they_went():
    async def run() -> None:
        a, b = Server("a"), Server("b", Health(ill=2))
        replicas = group(a, b)
        assert [replicas.pick(chain).url for chain in ("1", "2")] == ["a", "b"]
        b.lose()
        assert replicas.pick("2") is a
        while not b.circuit.closed:
            await asyncio.sleep(0.001)
        assert [replicas.pick(chain).url for chain in ("3", "4", "5")] == ["b", "b", "a"]

    asyncio.run(run())


def test_all_lost_parks_callers_until_one_is_back():
    async def run() -> None:
        a, b = Server("a", Health(ill=5)), Server("b")
        replicas = group(a, b)
        a.lose()
        b.lose()
        with pytest.raises(TransientError, match="nothing is sent") as caught:
            replicas.pick("1")
        assert caught.value.retry_after == 0.0
        parked = [asyncio.ensure_future(replicas.ready()) for _ in range(20)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in parked)
        await asyncio.wait_for(asyncio.gather(*parked), 5)
        assert replicas.pick("1") is a
        await b.circuit.close()

    asyncio.run(run())


def test_nobody_waits_longer_than_agreed_and_the_error_says_why():
    async def run() -> None:
        a, b = Server("a"), Server("b", trouble="came back as another")
        replicas = group(a, b, give_up_s=0.02)
        a.lose()
        b.lose()
        first = asyncio.ensure_future(replicas.ready())
        with pytest.raises(GoneError, match=r"no server for 0.02 s.*a: refused; b: came back as another"):
            await first
        with pytest.raises(GoneError):
            await replicas.ready()  # the time began when the last was lost, not now
        for server in (a, b):
            await server.circuit.close()

    asyncio.run(run())
