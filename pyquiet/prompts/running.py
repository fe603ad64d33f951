"""The run: which prompts are whose, batch by batch, and what is left to do of a run that was stopped."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from pyquiet.checks import check_count
from pyquiet.files import check_target
from pyquiet.prompts.answers import Cost, Header, Part, Row, answered, finished, merge, remove_parts
from pyquiet.prompts.fingerprint import check_same
from pyquiet.prompts.ranks import Ranks
from pyquiet.prompts.reading import Prompt

Answer = Callable[[Sequence[Prompt]], tuple[list[list[Row]], Cost]]


def answer_prompts(
    prompts: Sequence[Prompt],
    answer: Answer,
    output: str | os.PathLike[str],
    header: Header,
    *,
    batch_size: int = 8,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Cost | None:
    """Writes the answers to all prompts, as JSON lines in their order, to `output`; what is there already is kept.

    Batches go to the ranks in turn. Each rank keeps what it has answered in a file of its own beside the output, so a
    run that was killed goes on where it was, with any number of ranks and any batch size. A finished output is left as
    it is. What made it stands beside it, in a file that ends in .run.json.

    Args:
        prompts: numbered from 0 on.
        answer: the rows of each of some prompts, and sums of what they cost. What becomes of a prompt must not depend
            on the others of its batch.
        header: what must be the same for the run to go on, as JSON values.
        ranks: None asks the environment.

    Returns:
        What all answers cost, also those of earlier runs; None on all ranks but the first.

    Raises:
        ValueError: the output or what was begun of it is that of another run, or ranks have different headers.
        BlockingIOError: another run writes it. OSError: no file can be there.
    """
    check_count("batch_size", batch_size, least=1)
    target, ranks = check_target(output), ranks or Ranks.current()
    ranks.join()
    # One rank looks at the disk, since others may see it later, and before any of them writes.
    views = ranks.everyones((dict(header), _seen(target, header) if ranks.rank == 0 else None))
    for rank, (other, _) in enumerate(views):
        check_same(other, header, f"rank {rank} was started with", "start all ranks alike")
    if isinstance(seen := views[0][1], Exception):
        raise seen
    cost, done = seen
    if cost is None:
        batches = _batches(prompts, done, batch_size)[ranks.rank :: ranks.size]
        shown = None if progress and ranks.rank == 0 else True
        bar = tqdm(total=sum(map(len, batches)), disable=shown, unit="prompt", desc=_title(ranks))
        with Part(target, ranks.rank, header) as part, bar:
            for batch in batches:
                rows, took = answer(batch)
                part.append(zip((prompt.index for prompt in batch), rows, strict=True), took)
                bar.update(len(batch))
            ranks.wait()
            cost = merge(target, header, len(prompts)) if ranks.rank == 0 else None
    elif ranks.rank == 0:
        remove_parts(target)  # of a run that was killed before it could
    return cost if ranks.rank == 0 else None


def _seen(target: Path, header: Header) -> tuple[Cost | None, set[int]] | Exception:
    """What a finished run cost and which prompts have answers, or what is wrong with what is there, for all to know."""
    try:
        return finished(target, header), answered(target, header)
    except (ValueError, OSError) as error:
        return error


def _batches(prompts: Sequence[Prompt], done: set[int], size: int) -> list[Sequence[Prompt]]:
    left = [prompt for prompt in prompts if prompt.index not in done]
    return [left[start : start + size] for start in range(0, len(left), size)]


def _title(ranks: Ranks) -> str:
    return f"rank 0 of {ranks.size}" if ranks.size > 1 else "prompts"
