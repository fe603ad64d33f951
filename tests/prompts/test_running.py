"""Runs over many prompts: one file whatever the batches, processes and kills were, and no run goes on as another."""

import fcntl
import json
import os
import signal

import pytest

from pyquiet.prompts import answer_prompts
from pyquiet.prompts.answers import merge

from ..processes import in_processes
from .runs import EXPECTED, HEADER, PROMPTS, Killed, answer

COST = {"tokens": 74, "seconds": 37 / 4}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def run(output, batch_size=8, do=answer, header=HEADER, **options):
    return answer_prompts(PROMPTS, do, output, header, batch_size=batch_size, **options)


def killed(output, batch, **options):
    """A run in a process of its own that is killed in the batch of that number."""
    child = os.fork()
    if not child:
        try:
            run(output, do=Killed(batch), **options)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def left(output):
    """Names of the files in the output's folder."""
    return sorted(path.name for path in output.parent.iterdir())


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_the_file_is_the_same_for_any_batch_size(output, batch_size):
    sizes = []

    def do(batch):
        sizes.append(len(batch))
        return answer(batch)

    assert run(output, batch_size, do) == COST
    assert output.read_text() == EXPECTED
    assert max(sizes) == min(batch_size, 37)
    assert left(output) == ["out.jsonl", "out.jsonl.run.json"]
    assert json.loads((output.parent / "out.jsonl.run.json").read_text()) == HEADER | {"cost": COST}


def test_what_is_finished_is_not_done_again(output):
    run(output)
    assert run(output, do=None) == COST
    assert output.read_text() == EXPECTED


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_run_that_was_killed_goes_on_where_it_was(output, batch):
    killed(output, batch, batch_size=5)
    assert not output.exists()
    seen = []

    def do(prompts):
        seen.extend(prompt.index for prompt in prompts)
        return answer(prompts)

    assert run(output, 4, do) == COST
    assert seen == list(range(5 * batch, 37))
    assert output.read_text() == EXPECTED


def test_a_line_that_was_cut_off_is_dropped_and_its_batch_done_again(output):
    killed(output, 3, batch_size=5)
    part = output.with_name("out.jsonl.rank0")
    whole = part.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in (1, 5, ends[0], ends[0] + 1, ends[1] - 1, ends[1], ends[2] + 40, ends[3] - 1):
        part.write_bytes(whole[:size])
        batches = max(sum(end <= size for end in ends) - 1, 0)
        killed(output, 1, batch_size=3)  # goes on behind the cut, and is stopped again
        seen = []

        def do(prompts):
            seen.extend(prompt.index for prompt in prompts)  # noqa: B023
            return answer(prompts)

        assert run(output, 5, do) == COST
        assert seen == list(range(5 * batches + 3, 37))
        assert output.read_text() == EXPECTED
        output.unlink()


def test_a_kill_between_the_output_and_the_end_is_made_good(output, monkeypatch):
    killed(output, 3, batch_size=5)
    part = output.with_name("out.jsonl.rank0").read_bytes()
    run(output)
    output.with_name("out.jsonl.rank0").write_bytes(part)  # as if the ranks' files had not been removed
    assert run(output, do=None) == COST
    assert left(output) == ["out.jsonl", "out.jsonl.run.json"]
    replace = os.replace
    for name in ("out.jsonl.run.json", "out.jsonl"):
        output.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(
                "os.replace",
                lambda *p: os.kill(os.getpid(), 9) if p[1].name == name else replace(*p),  # noqa: B023
            )
            killed(output, 99)
        assert not output.exists()
        assert run(output, do=None) == COST  # all answers were there
        assert output.read_text() == EXPECTED


def test_another_run_is_refused_and_what_differs_is_named(output):
    other = HEADER | {"temperature": 0.5, "seed": 1}
    killed(output, 2)
    before = output.with_name("out.jsonl.rank0").read_bytes()
    named = r"rank0 was begun with another temperature: 0.8, now 0.5 \(and another seed\); resume with"
    with pytest.raises(ValueError, match=named):
        run(output, header=other)
    assert output.with_name("out.jsonl.rank0").read_bytes() == before
    run(output)
    with pytest.raises(ValueError, match=r"out.jsonl was made with another temperature: 0.8, now 0.5"):
        run(output, header=other)
    assert output.read_text() == EXPECTED


def test_a_run_without_any_answer_stands_in_nobodys_way(output):
    killed(output, 0)
    assert run(output, header=HEADER | {"temperature": 0.5}) == COST

    def fail(batch):
        raise ValueError("top_k")

    output.unlink()
    with pytest.raises(ValueError, match="top_k"):
        run(output, do=fail)
    assert left(output) == ["out.jsonl.run.json"]


def test_files_of_others_are_not_touched(output):
    output.write_text("mine")
    with pytest.raises(ValueError, match="nothing tells that this command wrote it"):
        run(output)
    assert output.read_text() == "mine"
    output.unlink()
    for text in ("mine", "mine\n", '{"header": {}}\nmine\nmine\n'):
        part = output.with_name("out.jsonl.rank0")
        part.write_text(text)
        with pytest.raises(ValueError, match="broken, or no file of a run"):
            run(output)
        assert part.read_text() == text
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(output.parent / "none" / "out.jsonl")


def test_two_runs_at_once_are_refused(output):
    with output.with_name("out.jsonl.rank0").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another run"):
            run(output)
    assert run(output) == COST


def test_answers_that_are_missing_are_named(output):
    killed(output, 3, batch_size=5)
    with pytest.raises(ValueError, match=r"22 prompts have no answer \(15, 16, 17 and 19 more\)"):
        merge(output, HEADER, 37)
    assert not output.exists()


def test_batch_size_is_checked(output):
    with pytest.raises(ValueError, match="batch_size"):
        run(output, 0)


@pytest.mark.slow
def test_four_processes_write_the_same_file_and_one_goes_on_for_them(output):
    in_processes(4, "prompts.runs", "fake", output.parent, "3", "-1")
    assert output.read_text() == EXPECTED
    assert left(output) == ["out.jsonl", "out.jsonl.run.json"]
    output.unlink()
    with pytest.raises(AssertionError):  # one of them is killed, and so they all end
        in_processes(4, "prompts.runs", "fake", output.parent, "3", "1")
    parts = [path for path in left(output) if ".rank" in path]
    assert "out.jsonl.rank2" in parts
    assert not output.exists()
    seen = []

    def do(prompts):
        seen.extend(prompt.index for prompt in prompts)
        return answer(prompts)

    assert run(output, 2, do) == COST
    assert seen
    assert not set(seen) & {6, 7, 8}  # the first batch of the third rank
    assert output.read_text() == EXPECTED
