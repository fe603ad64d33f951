"""BSVRB against what is known of it: its fixed point, its limits, its trackers and its speed-ups."""

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from pyquiet.bilevel import BSVRB, Problem
from pyquiet.bilevel.bsvrb import _gamma
from pyquiet.bilevel.method import at_least

from .quadratics import L, Noise, Quadratics, Replicas


def start(problem: Quadratics, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(problem.solution), generator=g, dtype=torch.float64)


def settled(problem: Quadratics, **kwargs: Any) -> BSVRB:
    """At the solution, all trackers at what they track."""
    y = problem.best_y(problem.solution)
    v = torch.linalg.solve(problem.A, (y - problem.t)[..., None])[..., 0]
    known = {"v": v} if kwargs.get("variant") == "v2" else {"H": problem.A}
    return BSVRB(problem, problem.solution.clone(), y=y, **known, **kwargs)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_without_noise_and_with_all_blocks_it_ends_at_the_solution(variant: str) -> None:
    problem = Quadratics(6, 5, 4)
    options = {"alpha": 1.0, "beta": 1.0, "tau": 0.2, "tau_v": 0.2, "eta": 0.2}
    method = BSVRB(problem, start(problem), blocks_per_step=6, samples_per_block=1, variant=variant, **options)
    for _ in range(1000):
        method.step()
    assert float((method.x - problem.solution).norm()) <= 1e-12


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_the_solution_is_a_fixed_point(variant: str) -> None:
    problem = Quadratics(6, 5, 4)
    method = settled(problem, blocks_per_step=6, samples_per_block=1, variant=variant, tau=0.2, tau_v=0.2, eta=0.2)
    for _ in range(5):
        method.step()
    assert float((method.x - problem.solution).norm()) <= 1e-14
    assert float((method.flush() - problem.best_y(problem.solution)).norm()) <= 1e-14


def test_v2_is_v1_one_step_late_where_curvature_is_one_number() -> None:
    problem = Quadratics(4, 3, 4)
    problem.A = 2.0 * torch.eye(4, dtype=torch.float64).expand(4, 4, 4)
    options = {"blocks_per_step": 4, "samples_per_block": 1, "alpha": 1.0, "beta": 1.0, "tau": 0.1, "eta": 0.0}
    one = BSVRB(problem, start(problem), variant="v1", H=problem.A, **options)
    two = BSVRB(problem, start(problem), variant="v2", tau_v=0.5, **options)
    ones, twos = [], []
    for _ in range(10):
        one.step(), two.step()
        ones.append(one._z)
        twos.append(two._z)
    torch.testing.assert_close(torch.stack(twos[1:]), torch.stack(ones[:-1]), rtol=0, atol=1e-14)


class Finite(Quadratics):
    """Three samples a block, one of which is the batch that `pick` says: for enumerations."""

    pick: tuple[int, ...] = ()

    def sample(self, idx: torch.Tensor, samples: int | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(3)
        E = 0.2 * torch.randn(self.m, 3, self.dim_y, self.dim_y, generator=g, dtype=torch.float64)
        b = torch.randn(self.m, 3, self.dim_y, generator=g, dtype=torch.float64)
        E, b = (E + E.mT) / 2, b
        if samples is None:
            chosen = [x.mean(1)[idx] for x in (E, b)]
        else:
            numbers = torch.tensor(self.pick)[: len(idx)]
            chosen = [x[idx, numbers] for x in (E, b)]
        return {"A": chosen[0], "b": chosen[1], "t": torch.zeros_like(chosen[1])}

    def sample_upper(self, idx: torch.Tensor, samples: int | None, generator: torch.Generator) -> Any:
        return {name: torch.zeros_like(x) for name, x in self.sample(idx, None, generator).items()}


def test_matrices_become_the_nearest_ones_that_can_be_inverted() -> None:
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    low, high = (basis @ torch.diag(torch.tensor(v).double()) @ basis.T for v in ([-1, 0.005, 2.0], [0.02, 0.5, 2]))
    skew = torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]], dtype=torch.float64)
    found, share = at_least(torch.stack([low, high + skew]), 0.01)
    nearest = basis @ torch.diag(torch.tensor([0.01, 0.01, 2.0]).double()) @ basis.T
    torch.testing.assert_close(found, torch.stack([nearest, high]))
    assert share == 0.5


@pytest.mark.parametrize("fresh", [False, True])
def test_the_direction_is_unbiased_over_all_blocks_and_samples(fresh: bool) -> None:
    """v1 with a tracker that does not hold the current samples; with one that does, the mean is off."""
    problem = Finite(4, 3, 2)
    y = problem.best_y(problem.solution) + 0.5
    x = problem.solution + 0.3
    tracker = problem.A * 1.3
    total, count = torch.zeros(3, dtype=torch.float64), 0
    for pair in itertools.combinations(range(4), 2):
        for pick in itertools.product(range(3), repeat=2):
            problem.pick = pick
            H = tracker.clone()
            if fresh:
                H[list(pair)] = problem.A[list(pair)] + problem.sample(torch.tensor(pair), 1, torch.Generator())["A"]
            method = BSVRB(problem, x.clone(), blocks_per_step=2, samples_per_block=1, variant="v1", y=y, H=H, eta=0.0)
            method.sampler.draw = lambda *_, pair=pair: (torch.tensor(pair), torch.full((2,), 0.5).double())  # type: ignore[method-assign]
            method.step()
            total, count = total + method._z, count + 1
    H = problem.A + problem.sample(torch.arange(4), None, torch.Generator())["A"] if fresh else tracker
    # grad_x f - J^T H^{-1} grad_y f with J = -C, at this y; mean over blocks
    v = torch.linalg.solve(H, (y - problem.t)[..., None])
    expected = problem.rho * x + (problem.C.mT @ v)[..., 0].mean(0)
    error = float((total / count - expected).abs().max())
    assert (error > 1e-3) if fresh else (error <= 1e-14)


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_gamma_cancels_the_drift_of_blocks_that_are_not_sampled(blocks: int) -> None:
    """The coefficient of <error, drift> in the next error, over all subsets: 0 for msvr alone."""
    m, alpha = 6, 0.3
    gamma = float(_gamma("msvr", alpha, torch.tensor([blocks / m], dtype=torch.float64)))
    generator = torch.Generator().manual_seed(0)
    error, drift = (torch.randn(m, generator=generator, dtype=torch.float64) for _ in range(2))
    cross = {}
    for name, factor in (("msvr", gamma), ("storm", 1 - alpha), ("drift", m / blocks - alpha)):
        terms = []
        for subset in itertools.combinations(range(m), blocks):
            inside = torch.zeros(m, dtype=torch.bool)
            inside[list(subset)] = True
            # the error after the step: what is tracked less what it should be, the target having moved by `drift`
            kept = torch.where(inside, 1 - alpha, 1.0)
            moved = torch.where(inside, alpha + factor - 1, -1.0)
            terms.append(2 * (kept * moved * error * drift).sum())
        cross[name] = float(torch.stack(terms).mean() / (error * drift).sum())
    assert abs(cross["msvr"]) <= 1e-12
    if blocks < m:
        assert abs(cross["storm"]) > 0.1
        assert abs(cross["drift"]) > 0.01


class Dense(BSVRB):
    """Brings every row up to date in every step, as the algorithm is written."""

    def step(self) -> dict[str, float]:
        self.flush()
        return super().step()


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_lazy_rows_are_those_of_the_dense_algorithm(variant: str) -> None:
    problem = Quadratics(12, 5, 4, noise=Noise(0.3, 1, 1))
    options = {"blocks_per_step": 3, "samples_per_block": 2, "variant": variant, "eta": 0.02}
    rates = {"tau": lambda t: 0.02 / (1 + t / 100), "tau_v": lambda t: 0.02}  # a schedule, too
    lazy, dense = (kind(problem, start(problem), **options, **rates) for kind in (BSVRB, Dense))
    for _ in range(400):
        lazy.step(), dense.step()
    for one, other in ((lazy.x, dense.x), (lazy.flush(), dense.flush())):
        assert float((one - other).norm() / other.norm()) <= 1e-13


class Watched(BSVRB):
    """Keeps a step's own estimate of the hypergradient, beside z, which averages them."""

    single: torch.Tensor

    def _look(self, *given: Any) -> Any:
        found = super()._look(*given)
        self.single = found[0][0]
        return found


def around_the_solution(
    blocks: int, samples: int, *, beta: float = 0.05, eta: float = 0.02, steps: int
) -> tuple[float, float, float]:
    """Of runs that began at the solution, behind their first third: the mean squares of the hypergradient, and of the
    errors of z and of a single step's estimate."""
    problem = Replicas(16, 32, 5, 4, noise=Noise(0.3, 1, 1))
    tau = 0.3 / ((32 / blocks - 0.05) * L)
    y, v = problem.settled()
    method = Watched(
        problem, problem.solution.clone(), y=y, v=v, blocks_per_step=blocks, samples_per_block=samples, variant="v2",
        alpha=0.05, beta=beta, tau=tau, tau_v=tau, eta=eta,
    )  # fmt: skip
    sums = torch.zeros(3, dtype=torch.float64)
    for t in range(steps):
        there = problem.gradient(method.x)
        method.step()
        if t >= steps // 3:
            errors = (problem._runs(estimate) - there for estimate in (method._z, method.single))
            sums += torch.stack([part.square().sum() for part in (problem.gradient(method.x), *errors)])
    plateau, z, single = (sums / (steps - steps // 3) / problem.count).tolist()
    return plateau, z, single


def test_more_samples_lower_the_plateau_in_proportion() -> None:
    one, eight, many = (around_the_solution(32, samples, steps=300)[0] for samples in (1, 8, 64))
    assert one / eight == pytest.approx(8, rel=0.15)
    assert eight / many == pytest.approx(8, rel=0.15)


def test_more_blocks_lower_the_plateau() -> None:
    found = [around_the_solution(blocks, 64, steps=400)[0] for blocks in (2, 4, 8, 16, 32)]
    assert all(few >= 1.6 * more for few, more in itertools.pairwise(found)), found


@pytest.mark.parametrize(
    ("beta", "share", "steps", "within"), [(0.2, 0.115, 600, 0.15), (0.05, 0.029, 600, 0.15), (0.01, 0.008, 1200, 0.3)]
)
def test_the_tracker_of_the_hypergradient_averages_its_noise(
    beta: float, share: float, steps: int, within: float
) -> None:
    """To about beta / (2 - beta), and some more: the blocks' own trackers err for some 20 steps in the same way."""
    _, z, single = around_the_solution(16, 8, beta=beta, eta=0.005, steps=steps)
    assert z / single == pytest.approx(share, rel=within)


def test_a_tracker_of_noise_has_the_variance_of_its_average() -> None:
    """s of blocks at rest: alpha / (2 - alpha) of a gradient's variance."""
    problem = Quadratics(4, 5, 64, noise=Noise(0, 1, 0))
    alpha, samples = 0.2, 4
    method = settled(
        problem, blocks_per_step=4, samples_per_block=samples, variant="v2", alpha=alpha, tau=0.0, tau_v=0.0, eta=0.0
    )
    seen = []
    for t in range(600):
        method.step()
        if t > 50:
            seen.append(method.table.fields["s"].square().mean())
    assert float(torch.stack(seen).mean()) == pytest.approx(alpha / (2 - alpha) / samples, rel=0.05)


def extrapolating(product: float) -> tuple[Quadratics, BSVRB]:
    """A run whose gamma tau L is `product`."""
    problem = Quadratics(20, 5, 4)
    tau = product / ((20 / 4 - 0.05) * L)
    options = {"blocks_per_step": 4, "samples_per_block": 1, "variant": "v2", "alpha": 0.05, "eta": 0.0}
    return problem, BSVRB(problem, start(problem), tau=tau, tau_v=0.001, **options)


@pytest.mark.parametrize("product", [0.5, 1.5])
def test_steps_that_do_not_extrapolate_too_far_converge(product: float) -> None:
    problem, method = extrapolating(product)
    with pytest.warns(UserWarning, match="unstable") if product > 1 else nullcontext():
        method.step()
    for _ in range(600):
        method.step()
    assert float((method.flush() - problem.best_y(method.x)).norm(dim=1).max()) < 0.05


def test_steps_that_extrapolate_too_far_are_refused() -> None:
    _, method = extrapolating(2.2)
    with pytest.raises(ValueError, match=r"tau=.* is too large: gamma tau L = 2\.\d+"):
        method.step()
    assert method.steps == 0
    assert not method.table.visited.any()


def test_they_would_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyquiet.bilevel.bsvrb.guard", lambda *_: 0.0)
    _, method = extrapolating(2.2)
    for _ in range(600):
        method.step()
    assert float(method.flush().norm()) > 1e6


@pytest.mark.parametrize("gamma", ["drift", "msvr"])
def test_with_all_blocks_gamma_is_that_of_storm(gamma: str) -> None:
    assert float(_gamma(gamma, 0.3, torch.ones(1, dtype=torch.float64))) == pytest.approx(0.7, abs=1e-15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "v3"}, "variant must be one of"),
        ({"gamma": "storm"}, "gamma must be 'drift', 'msvr' or a number, got 'storm'"),
        ({"gamma": "msvr", "alpha": 0.9}, "gamma='msvr' needs an alpha of at most 0.5"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"blocks_per_step": 0}, "blocks_per_step must be at least 1, got 0"),
        ({"samples_per_block": 0}, "samples_per_block must be at least 1, got 0"),
        ({"sampler": "cyclic"}, "sampler must be one of"),
    ],
)
def test_bad_options_are_told_by_name(options: dict[str, Any], words: str) -> None:
    problem: Problem = Quadratics(4, 3, 2)
    with pytest.raises(ValueError, match=words):
        BSVRB(problem, torch.zeros(3).double(), **{"blocks_per_step": 2, "samples_per_block": 1} | options)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        BSVRB(Quadratics(4, 3, 2), torch.zeros(3, dtype=torch.bfloat16), blocks_per_step=2, samples_per_block=1)

    class Half(Quadratics):
        def lower(self, x: Any, Y: torch.Tensor, idx: torch.Tensor, batch: Any) -> torch.Tensor:
            return super().lower(x, Y, idx, batch).bfloat16()

    method = BSVRB(Half(4, 3, 2), torch.zeros(3).double(), blocks_per_step=2, samples_per_block=1)
    with pytest.raises(ValueError, match=r"lower's loss is torch\.bfloat16"):
        method.step()
