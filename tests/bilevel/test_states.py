"""States that other processes, seeds, variants and optimizers left, and what is refused before anything changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

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


def test_what_losses_draw_is_neither_what_chose_blocks_nor_samples() -> None:
    """Both of a step come of its seed, and so do permutations of blocks; at both points losses draw the same."""
    drawn: dict[str, list[torch.Tensor]] = {"sample": [], "loss": []}

    class Drawing(Quadratics):
        def sample(self, idx: torch.Tensor, samples: int | None, generator: torch.Generator) -> Any:
            again = torch.Generator()
            again.set_state(generator.get_state())
            drawn["sample"].append(torch.rand(3, generator=again))
            return super().sample(idx, samples, generator)

        def lower(self, *given: Any) -> torch.Tensor:
            drawn["loss"].append(torch.rand(3))
            return super().lower(*given)

    method = BSVRB(Drawing(6, 4, 3), torch.ones(4).double(), sampler="reshuffle", tau=0.02, tau_v=0.02, **SIZES)
    method.step(), method.step()
    first, now, before = drawn["loss"]
    assert torch.equal(now, before)
    assert not torch.equal(first, now)
    assert not torch.equal(drawn["sample"][0], first)
    permutation = torch.randperm(6, generator=torch.Generator().manual_seed(method._seeds[0]))
    assert not torch.equal(permutation, method.sampler._permutation)


def test_a_step_size_that_grows_too_large_is_refused_in_its_step() -> None:
    method = made(variant="v2", eta=0.0, tau=lambda t: 0.01 if t < 5 else 1.0, tau_v=0.01)
    for _ in range(5):
        method.step()
    before = {name: field.clone() for name, field in method.table.fields.items()}
    with pytest.raises(ValueError, match=r"tau=1 is too large: gamma tau L"):
        method.step()
    assert method.steps == 5
    assert all(torch.equal(field, before[name]) for name, field in method.table.fields.items())
    with pytest.raises(ValueError, match=r"a step size must be a number of at least 0, got nan at step 0"):
        made(eta=lambda t: float("nan")).step()


@pytest.mark.parametrize("options", [{"alpha": 1.0, "blocks_per_step": 6}, {"gamma": 0.0}])
def test_where_nothing_is_extrapolated_tau_is_chosen_below_the_curvature(options: dict[str, Any]) -> None:
    method = made(variant="v2", eta=0.0, **options)
    for _ in range(400):
        method.step()
    assert 0.1 < method.clock["y"] / 400 < 1 / 3
    assert float((method.flush() - method.problem.best_y(method.x)).norm(dim=1).max()) < 10  # type: ignore[attr-defined]


def test_a_lower_problem_without_curvature_needs_a_tau() -> None:
    class Flat(Quadratics):
        def lower(self, x: Any, Y: torch.Tensor, idx: torch.Tensor, batch: Any) -> torch.Tensor:
            return Y.sum(1) * x.sum()

    with pytest.raises(ValueError, match="tau is chosen by the curvature of lower in y, which is 0; give tau"):
        BSVRB(Flat(6, 4, 3), torch.ones(4).double(), **SIZES).step()


def test_a_given_curvature_leaves_the_first_gradient_as_it_is_seen() -> None:
    """s starts at a block's first gradient, whether or not its H_i is known."""
    H = torch.eye(3).double().expand(6, 3, 3)
    known, unknown = made(variant="v1", H=H, eta=0.0, tau=0.01), made(variant="v1", eta=0.0, tau=0.01)
    known.step(), unknown.step()
    assert float(unknown.table.fields["s"].norm()) > 0
    assert torch.equal(known.table.fields["s"], unknown.table.fields["s"])
    visited = known.table.visited
    assert int(visited.sum()) == 2
    expected = 0.7 * H[visited] + 0.3 * unknown.table.fields["H"][visited]
    torch.testing.assert_close(known.table.fields["H"][visited], expected, rtol=1e-12, atol=0)
    assert torch.equal(known.table.fields["H"][~visited], H[~visited])


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_two_points_in_one_pass_are_those_of_two(variant: str) -> None:
    class Both(Quadratics):
        points = True

        def lower(self, x: Any, Y: torch.Tensor, idx: torch.Tensor, batch: Any) -> torch.Tensor:
            Ay = ((self.A[idx] + batch["A"]) @ Y[..., None])[..., 0]
            Cx = (self.C[idx] @ x[..., None, :, None])[..., 0]
            return (Y * (Ay / 2 - Cx - self.b[idx] - batch["b"])).sum(-1)

        def upper(self, x: Any, Y: torch.Tensor, idx: torch.Tensor, batch: Any) -> torch.Tensor:
            near = (Y - self.t[idx] - batch["t"]).square().sum(-1) / 2
            return near + self.rho / 2 * x.square().sum(-1, keepdim=True)

    one = made(variant=variant, tau=0.02, tau_v=0.02, eta=0.05, sampler="stratified")
    problem = Both(6, 4, 3, noise=Noise(0.1, 1, 1))
    two = BSVRB(
        problem, torch.ones(4).double(), variant=variant, tau=0.02, tau_v=0.02, eta=0.05, sampler="stratified", **SIZES
    )
    for _ in range(40):
        one.step(), two.step()
    torch.testing.assert_close(two.x, one.x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(two.flush(), one.flush(), rtol=1e-12, atol=1e-13)
    assert float((one.x - 1).norm()) > 0.05


def test_states_of_different_steps_are_told(tmp_path: Path) -> None:
    """As a save that was cut off leaves them; and files of two runs in a folder."""
    parts = [made(owned=torch.arange(3)), made(owned=torch.arange(3, 6))]
    parts[0].step()
    with pytest.raises(ValueError, match=r"states: of different steps, \[0, 1\]"):
        made().load_state_dict(*(part.state_dict() for part in parts))
    made().save(tmp_path)
    (tmp_path / "blocks-00000-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds files of runs of \[1, 2\] processes"):
        made().load(tmp_path)


def test_blocks_that_no_process_has_are_told() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"owned: blocks \[2, 5\] belong to no process or to several"):
            made(group=dist.group.WORLD, owned=torch.tensor([0, 1, 3, 4]))
        made(group=dist.group.WORLD).step()
    finally:
        dist.destroy_process_group()


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
    with pytest.raises(RuntimeError, match="step 0: the estimate of the hypergradient or of grad_y g is not finite"):
        method.step()
    assert not method.table.visited.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": -0.1}, "eta must be a number of at least 0, got -0.1"),
        ({"tau": float("nan")}, "tau must be a number of at least 0, got nan"),
        ({"gamma": -1.0}, r"gamma must be a number of at least 0, got -1\.0"),
        ({"radius": 0.0}, r"radius must be a finite number above 0, got 0\.0"),
        ({"floor": -1.0}, r"floor must be a finite number above 0, got -1\.0"),
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
    with pytest.raises(TypeError, match="floor must be a number, got str 'low'"):
        made(floor="low")


def test_losses_under_autocast_or_detached_are_refused() -> None:
    method = made()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"under torch\.autocast"):
        method.step()

    class Detached(Quadratics):
        def lower(self, x: Any, Y: torch.Tensor, idx: torch.Tensor, batch: Any) -> torch.Tensor:
            return super().lower(x, Y, idx, batch).detach()

    with pytest.raises(ValueError, match="depend on neither x nor Y"):
        BlockSOBA(Detached(6, 4, 3), torch.ones(4).double(), tau=0.1, tau_v=0.1, eta=0.1, **SIZES).step()
