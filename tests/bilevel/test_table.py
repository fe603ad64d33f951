"""The rows of blocks, which blocks a step takes, and states: of one process and of several."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pyquiet.bilevel import BSVRB, RSVRB, BlockSOBA
from pyquiet.bilevel.samplers import BlockSampler, distinct
from pyquiet.bilevel.table import BlockTable

from .quadratics import Noise, Quadratics
from .ranks import in_ranks, method_of, states_of


def table() -> BlockTable:
    made = BlockTable(6, {"y": (2,), "s": (2,)}, {"y": "s"}, dtype=torch.float64)
    made.scatter(torch.tensor([1, 4]), {"y": 2.0}, {"y": torch.ones(2, 2), "s": torch.tensor([[1.0, 0], [0, 3.0]])})
    return made


def test_rows_move_by_their_velocity_between_visits() -> None:
    found = table().gather(torch.tensor([4, 0, 1]), {"y": 2.5})
    assert found["y"].tolist() == [[1.0, -0.5], [0.0, 0.0], [0.5, 1.0]]
    flushed = table()
    flushed.flush({"y": 2.5})
    assert flushed.fields["y"][[4, 0, 1]].tolist() == found["y"].tolist()
    assert flushed.gather(torch.tensor([4]), {"y": 2.5})["y"].tolist() == [[1.0, -0.5]]


def test_a_block_that_comes_twice_is_told() -> None:
    some, idx = table(), torch.tensor([1, 4, 1])
    with pytest.raises(ValueError, match=r"idx holds a block twice: \[1, 4, 1\]"):
        some.scatter(idx, {"y": 3.0}, {"y": torch.zeros(3, 2), "s": torch.zeros(3, 2)})
    assert some.gather(torch.tensor([4]), {"y": 2.5})["y"].tolist() == [[1.0, -0.5]]  # nothing was written


def test_every_set_of_blocks_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(tuple(sorted(distinct(5, 2, generator).tolist())) for _ in range(10_000))
    assert len(counts) == 10
    assert all(abs(count - 1000) < 4 * 30 for count in counts.values())


@pytest.mark.parametrize("kind", ["iid", "reshuffle", "stratified"])
def test_blocks_come_as_often_as_their_chance_says(kind: str) -> None:
    sampler, seen = BlockSampler(10, 4, kind), torch.zeros(10, dtype=torch.float64)
    expected = torch.zeros(10, dtype=torch.float64)
    steps = 3000
    for step in range(steps):
        idx, chance = sampler.draw(step, 5, torch.Generator().manual_seed(step))
        assert len(idx.unique()) == len(idx)
        seen[idx] += 1 / chance  # unbiased: every block's is 1 a step
        expected += 1
    assert float((seen / expected - 1).abs().max()) < 0.12
    if kind == "reshuffle":
        epoch = torch.cat([sampler.draw(step, 5, torch.Generator())[0] for step in range(3)])
        assert epoch.sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("kind", ["v1", "v2", "rsvrb", "soba"])
@pytest.mark.parametrize("sampler", ["iid", "reshuffle"])
def test_a_run_goes_on_bit_by_bit(kind: str, sampler: str, tmp_path: Path) -> None:
    problem = Quadratics(9, 4, 3, noise=Noise(0.1, 1, 1))
    options = {"blocks_per_step": 2, "samples_per_block": 2, "eta": 0.02, "sampler": sampler}

    def make():
        x = torch.ones(4, dtype=torch.float64)
        if kind == "rsvrb":
            return RSVRB(problem, x, tau=0.01, **options)
        if kind == "soba":
            return BlockSOBA(problem, x, tau=0.05, tau_v=0.05, **options)
        return BSVRB(problem, x, variant=kind, **options)

    whole, first, second = make(), make(), make()
    for _ in range(30):
        whole.step()
    for _ in range(17):
        first.step()
    first.save(tmp_path)
    second.load(tmp_path)
    for _ in range(13):
        second.step()
    assert torch.equal(second.x, whole.x)
    assert torch.equal(second.flush(), whole.flush())


def test_a_folder_without_all_files_is_told(tmp_path: Path) -> None:
    method = method_of(0, 1)
    with pytest.raises(FileNotFoundError, match="holds 0 of the files"):
        method.load(tmp_path)
    with pytest.raises(ValueError, match=r"none of 1 has the blocks \[0"):
        method.load_state_dict({**method.state_dict(), "owned": method.owned + 100})


def alike(folder: Path, expected: list[dict[str, Tensor]]) -> None:
    """The files of a folder are these states of all processes, to rounding."""
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(expected)
    for file, state in zip(files, expected, strict=True):
        found = load_file(file)
        assert found.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_processes_share_the_blocks_and_go_on_in_other_numbers(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unequal shares (of four, one has none), as by one process that plays all parts; loaded by another number of
    processes, they go on as that one does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # where processes find what they are to call
    first, second = tmp_path / "first", tmp_path / "second"
    in_ranks(before, tmp_path / "store", 20, first)
    alone = states_of(before, 20)
    alike(first, alone)
    in_ranks(after, tmp_path / "other_store", 6, second, first)
    alike(second, states_of(after, 6, alone))
