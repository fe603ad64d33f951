"""What a process knows of the others that were started with it."""

from types import SimpleNamespace

import pytest

from pyquiet.cli.options import usable_device
from pyquiet.prompts import Ranks, answer_prompts

from .runs import HEADER, PROMPTS, answer


@pytest.fixture
def third(monkeypatch):
    for name, value in (("RANK", "6"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)


def test_ranks_are_those_of_the_environment(third):
    assert Ranks.current() == Ranks(6, 8, 2)


def test_one_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.current() == Ranks(0, 1, 0)
    assert Ranks.current().device("cuda") == "cuda"
    assert Ranks.current().everyones(3) == [3]


def test_each_process_has_a_cuda_device_of_its_own(third, monkeypatch):
    monkeypatch.setattr("torch.empty", lambda size, device: SimpleNamespace(device=device))
    assert usable_device("cuda") == "cuda:2"
    assert usable_device("cuda:1") == "cuda:1"
    assert usable_device("cpu") == "cpu"


class Two(Ranks):
    """The first of two, the second of which says something else."""

    def join(self):
        pass

    def everyones(self, value):
        header, seen = value
        return [value, (header | {"temperature": 0.9}, seen)]


def test_ranks_that_were_started_otherwise_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rank 1 was started with another temperature: 0.9, now 0.8; start all"):
        answer_prompts(PROMPTS, answer, tmp_path / "out.jsonl", HEADER, ranks=Two(0, 2))
    assert not list(tmp_path.iterdir())


class Second(Ranks):
    """The second of two, whose first found another run's file."""

    def join(self):
        pass

    def everyones(self, value):
        return [(value[0], ValueError("out.jsonl exists")), value]


def test_what_the_first_finds_ends_all(tmp_path):
    with pytest.raises(ValueError, match="exists"):
        answer_prompts(PROMPTS, answer, tmp_path / "out.jsonl", HEADER, ranks=Second(1, 2))
    assert not list(tmp_path.iterdir())
