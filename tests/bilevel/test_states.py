"""States that other processes, seeds, variants and optimizers left, and what is refused before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyquiet.bilevel import BSVRB, BlockSOBA
from pyquiet.bilevel.samplers import BlockSampler

from .quadratics import Noise, Quadratics

SIZES = {"blocks_per_step": 2, "samples_per_block": 2}


def made(m: int = 6, **options: Any) -> BSVRB:
    return BSVRB(Quadratics(m, 4, 3, noise=Noise(0.1, 1, 1)), torch.ones(4).double(), **SIZES | options)


def test_a_process_goes_on_by_its_own_clock_and_rows_of_others_are_brought_to_it() -> None:
    """Each process chooses tau by what it saw; their clocks differ."""
    parts = [made(owned=torch.arange(3)), made(owned=torch.arange(3, 6), gamma=4.0)]
    for part in parts:
        for _ in range(12):
            part.step()
    states = [part.state_dict() for part in parts]
    assert parts[0].clock != parts[1].clock
    again = made(owned=torch.arange(3, 6), gamma=4.0)
    again.load_state_dict(*states)
    assert again.clock == parts[1].clock
    whole = made()
    whole.load_state_dict(*states)
    torch.testing.assert_close(whole.flush(), torch.cat([part.flush() for part in parts]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_x_moves_by_torchs_optimizers_and_goes_on_bit_by_bit(optimizer: Any) -> None:
    whole, first, second, plain = (made(optimizer=o, eta=0.02) for o in (optimizer, optimizer, optimizer, None))
    for _ in range(20):
        whole.step(), plain.step()
    for _ in range(9):
        first.step()
    second.load_state_dict({name: x.clone() for name, x in first.state_dict().items()})
    for _ in range(11):
        second.step()
    assert torch.equal(second.x, whole.x)
    if optimizer is torch.optim.SGD:
        torch.testing.assert_close(whole.x, plain.x, rtol=1e-12, atol=0)
    else:
        first_move = made(optimizer=optimizer, eta=0.02)
        first_move.step()
        torch.testing.assert_close((first_move.x - 1).abs(), torch.full((4,), 0.02).double(), rtol=1e-4, atol=0)


def test_a_state_of_another_variant_is_told_and_changes_nothing() -> None:
    one, other = made(variant="v1"), made(variant="v2")
    other.step()
    with pytest.raises(ValueError, match="states: of another method, variant or problem"):
        one.load_state_dict(other.state_dict())
    assert one.steps == 0
    assert not one.table.visited.any()


def test_a_permutation_belongs_to_its_seed() -> None:
    sampler = BlockSampler(10, 4, "reshuffle")
    sampler.draw(0, 1, torch.Generator())
    found = sampler.draw(0, 2, torch.Generator())[0]
    assert torch.equal(found, BlockSampler(10, 4, "reshuffle").draw(0, 2, torch.Generator())[0])


def test_reshuffled_steps_are_even() -> None:
    sizes = [len(BlockSampler(10, 9, "reshuffle").draw(step, 0, torch.Generator())[0]) for step in range(2)]
    assert sizes == [5, 5]


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_process_without_blocks_steps_along(variant: str) -> None:
    method = made(owned=torch.arange(0), variant=variant)
    statistics = [method.step() for _ in range(2)][-1]
    assert statistics["z_norm"] == 0
    assert torch.equal(method.x, torch.ones(4).double())
    assert all(value == value for value in statistics.values())


def test_v_that_is_put_back_into_its_ball_is_counted() -> None:
    method = made(variant="v2", radius=1e-3, eta=0.0)
    assert max(method.step()["v_clip_frac"] for _ in range(30)) == 1


def test_auto_does_not_invert_what_would_fill_memory() -> None:
    class Wide(Quadratics):
        def __init__(self) -> None:
            self.m, self.dim_y = 100_000, 64

    assert not BSVRB(Wide(), torch.zeros(1), **SIZES).inverts


def test_a_hypergradient_that_is_not_finite_is_told_and_changes_nothing() -> None:
    class Broken(Quadratics):
        def upper(self, x: Any, Y: torch.Tensor, idx: torch.Tensor, batch: Any) -> torch.Tensor:
            return super().upper(x, Y, idx, batch) * torch.inf

    method = BSVRB(Broken(6, 4, 3), torch.ones(4).double(), **SIZES)
    with pytest.raises(RuntimeError, match="step 0: the estimate of the hypergradient is not finite"):
        method.step()
    assert not method.table.visited.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": -0.1}, "eta must be a number of at least 0, got -0.1"),
        ({"tau": float("nan")}, "tau must be a number of at least 0, got nan"),
        ({"gamma": -1.0}, r"gamma must be a number of at least 0, got -1\.0"),
        ({"radius": 0.0}, r"radius must be above 0, got 0\.0"),
        ({"floor": -1.0}, r"floor must be above 0, got -1\.0"),
        ({"y": torch.zeros(3)}, r"y must be \[6, 3\], got \[3\]"),
        ({"variant": "v1", "v": torch.zeros(6, 3)}, "v is given, but this method or variant keeps"),
        ({"owned": torch.tensor([1, 1])}, "owned must be distinct blocks"),
        ({"owned": torch.tensor([6])}, "owned must be distinct blocks"),
    ],
)
def test_what_does_not_fit_is_told_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(**options)
    with pytest.raises(TypeError, match="eta must be a number or a function of the step, got str"):
        made(eta="fast")


def test_losses_under_autocast_or_detached_are_refused() -> None:
    method = made()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"under torch\.autocast"):
        method.step()

    class Detached(Quadratics):
        def lower(self, x: Any, Y: torch.Tensor, idx: torch.Tensor, batch: Any) -> torch.Tensor:
            return super().lower(x, Y, idx, batch).detach()

    with pytest.raises(ValueError, match="depend on neither x nor Y"):
        BlockSOBA(Detached(6, 4, 3), torch.ones(4).double(), tau=0.1, tau_v=0.1, eta=0.1, **SIZES).step()
