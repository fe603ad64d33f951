"""Who does what when: every chain for itself, or all chains of a question in step.

Both engines take the steps of the same chains through the same session, so equal plans give equal transcripts; they
differ in what waits for what. On a virtual clock (`simulation`) they are the same two again.
"""

import asyncio
from collections.abc import Iterable, Iterator

from pyquiet.scaling.calls import together
from pyquiet.scaling.chain import Chain, Step
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.records import Record, uniform
from pyquiet.scaling.session import Grade, Session, Stopped, chunk_of


async def run_async(session: Session, panels: Iterable[Panel]) -> None:
    """Every chain for itself: none waits for another but for slots, at most `pools.inflight` of them under way.

    Chains are made as there is room for them, so their number costs no memory. Returns early if the session is asked
    to stop. Raises what a backend cannot recover from, after the other chains have been cancelled.
    """
    tickets = ((panel, number) for panel in panels for number in panel.numbers)
    try:
        await together(_work(session, tickets) for _ in range(session.plan.pools.inflight))
    finally:
        await session.settle()


async def run_sync(session: Session, panels: Iterable[Panel]) -> None:
    """The reference: a question at a time, its chains in step, each stage of a turn begun when the last one is over."""
    if session.plan.chain_seconds is not None or session.plan.early_majority:
        raise ValueError("chain_seconds and early_majority have no meaning where chains go in step; leave them out")
    try:
        for panel in panels:
            chains = [session.chain(panel, number) for number in panel.numbers]
            await session.prepare(panel.question)
            while running := [chain for chain in chains if chain.outcome is None]:
                await _turn(session, panel, running)
            for chain in chains:
                session.close(panel, chain)
    except Stopped:
        return
    finally:
        await session.settle()


async def _work(session: Session, tickets: Iterator[tuple[Panel, int]]) -> None:
    for panel, number in tickets:
        try:
            await _run(session, panel, number)
        except Stopped:
            return


async def _run(session: Session, panel: Panel, number: int) -> None:
    chain = session.chain(panel, number)
    task = asyncio.current_task()
    assert task is not None
    panel.tasks.add(task)
    try:
        if panel.decided and not session.ended(chain):
            chain.end("cancelled")
        async with asyncio.timeout(session.plan.chain_seconds):
            await session.prepare(panel.question)
            while (step := chain.step()) is not None:
                await session.advance(chain, step, session.rank(panel, chain))
    except TimeoutError:
        chain.end("deadline")
    except asyncio.CancelledError:
        if not panel.decided or task.uncancel():
            raise
        chain.end("cancelled")
    finally:
        panel.tasks.discard(task)
    session.close(panel, chain)


async def _turn(session: Session, panel: Panel, chains: list[Chain]) -> None:
    """One turn of all chains; those whose draft is thrown away go through its stages again."""
    turn = chains[0].turn
    while any(chain.outcome is None and chain.turn == turn for chain in chains):
        for stage in ("draft", "score", "target"):
            steps = [(chain, chain.step()) for chain in chains if chain.turn == turn]
            group = [(chain, step) for chain, step in steps if step is not None and step.key.stage == stage]
            if stage == "score" and session.setting.policy.together:
                await _judge_together(session, panel, group)
            else:
                await together(session.advance(chain, step, session.rank(panel, chain)) for chain, step in group)


async def _judge_together(session: Session, panel: Panel, group: list[tuple[Chain, Step]]) -> None:
    """Scores all chunks, then decides on them at once; those decided before an interruption count with the rest."""
    filed = {chain: record for chain, step in group if (record := session.on_file(chain, step)) is not None}
    fresh = [(chain, step) for chain, step in group if chain not in filed]
    found: dict[Chain, Grade] = {}  # scores that came back and wait for their decision

    async def find(chain: Chain) -> None:
        if (grade := await session.grade(chain, session.rank(panel, chain))) is not None:
            found[chain] = grade

    try:
        await together(find(chain) for chain, _ in fresh)
        _decide(session, panel, filed, [(chain, step) for chain, step in fresh if chain in found], found)
    except BaseException:  # an error of one of them, or Ctrl-C: the others will not be judged, but were paid for
        for chain, step in fresh:
            if chain in found:
                session.drop(step, found[chain], panel.question)
        raise


def _decide(
    session: Session,
    panel: Panel,
    filed: dict[Chain, Record],
    graded: list[tuple[Chain, Step]],
    found: dict[Chain, Grade],
) -> None:
    """Decides on all chunks of a turn, and takes each new one's score out of `found` as it is committed."""
    records = [record for record in filed.values() if record.key.stage == "score"]
    records += [session.scored(step, found[chain]) for chain, step in graded]
    chunks = [chunk_of(record, panel.question) for record in records]
    decisions = session.setting.policy.decide_all(chunks, [uniform(record.seed) for record in records])
    for chain, record in filed.items():
        chain.apply(record)
    for (chain, step), decision in zip(graded, decisions[len(decisions) - len(graded) :], strict=True):
        record = session.judged(chain, step, found.pop(chain), decision)
        session.commit(record, panel.question)
        chain.apply(record)
