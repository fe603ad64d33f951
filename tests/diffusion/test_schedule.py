"""The schedule: its ends, its derivative, its inverse, and that steps compose."""

import dataclasses
import math

import pytest
import torch

from pyquiet.diffusion.schedule import Schedule

KINDS = ("linear", "cosine", "cosine_squared", "geometric")
SCHEDULES = [Schedule(), *(Schedule(kind, eps) for kind in KINDS for eps in (0.0, 1e-3, 0.25))]
TIMES = torch.tensor([1e-6, 1e-3, *(i / 50 for i in range(1, 50)), 0.999, 1.0], dtype=torch.float64)


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s.kind} {s.eps}")
def schedule(request):
    return request.param


def test_the_ends_are_exact(schedule):
    ends = schedule.alpha(torch.tensor([0.0, 1.0]))
    assert ends.dtype == torch.float64
    assert ends.tolist() == [1.0, schedule.eps]


def test_noise_only_grows(schedule):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert (alpha.diff() < 0).all()
    assert ((alpha >= schedule.eps) & (alpha <= 1)).all()


def formula(schedule, t: float) -> float:
    e = schedule.eps
    clean = {
        "linear": lambda: 1 - t,
        "cosine": lambda: math.cos(math.pi * t / 2),
        "cosine_squared": lambda: math.cos(math.pi * t / 2) ** 2,
        "geometric": lambda: (math.exp(-1e-4 * (20 / 1e-4) ** t) - math.exp(-20)) / (math.exp(-1e-4) - math.exp(-20)),
    }[schedule.kind]()
    return e + (1 - e) * clean


def test_alpha_is_the_formula(schedule):
    expected = torch.tensor([formula(schedule, float(t)) for t in TIMES], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(TIMES), expected, atol=1e-12, rtol=1e-12)


def test_the_weight_is_the_derivative(schedule):
    """-alpha' / (1 - alpha) by autograd, and by finite differences of log(1 - alpha), whose derivative it is."""
    t = TIMES[1:-1].clone().requires_grad_()
    schedule.alpha(t).sum().backward()
    by_autograd = -t.grad / (1 - schedule.alpha(t.detach()))
    torch.testing.assert_close(schedule.weight(t.detach()), by_autograd, rtol=1e-8, atol=1e-12)
    h = 1e-6
    t = TIMES[2:-2]
    by_difference = ((1 - schedule.alpha(t + h)).log() - (1 - schedule.alpha(t - h)).log()) / (2 * h)
    torch.testing.assert_close(schedule.weight(t), by_difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
def test_the_weight_of_linear_and_log_linear_is_one_over_t(eps):
    torch.testing.assert_close(Schedule("linear", eps).weight(TIMES), 1 / TIMES, rtol=1e-12, atol=0)


def test_time_inverts_alpha(schedule):
    alpha = torch.linspace(schedule.eps, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(schedule.time(alpha)), alpha, rtol=0, atol=1e-12)
    t = TIMES[3:-3]
    torch.testing.assert_close(schedule.time(schedule.alpha(t)), t, rtol=1e-7, atol=1e-7)
    assert schedule.time(torch.tensor([1.0, schedule.eps], dtype=torch.float64)).tolist() == pytest.approx(
        [0, 1], abs=1e-7
    )


def test_the_grid_ends_at_exactly_zero(schedule):
    for steps in (1, 2, 7, 64, 1000):
        grid = schedule.grid(steps)
        assert (grid.shape, grid.dtype) == ((steps + 1,), torch.float64)
        assert (grid[0], grid[-1]) == (1, 0)
        torch.testing.assert_close(
            grid.diff(), torch.full((steps,), -1 / steps, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_reveals_are_the_posterior_and_the_last_one_opens_all(schedule):
    grid = schedule.grid(9)
    rho = schedule.reveal(grid[:-1], grid[1:])
    alpha = schedule.alpha(grid)
    torch.testing.assert_close(rho, (alpha[1:] - alpha[:-1]) / (1 - alpha[:-1]), rtol=1e-9, atol=1e-12)
    assert ((rho > 0) & (rho <= 1)).all()
    assert rho[-1] == 1  # nothing is left to a final argmax
    assert float(schedule.reveal(grid[3], grid[3])) == 0


def test_reveals_telescope(schedule):
    """What stays masked over all steps from t to s is what stays masked in one, and a finer grid changes nothing."""
    for steps in (3, 50):
        grid = schedule.grid(steps)
        stays = (1 - schedule.reveal(grid[:-2], grid[1:-1])).log().sum()
        whole = (1 - schedule.reveal(grid[0], grid[-2])).log()
        torch.testing.assert_close(stays, whole, rtol=1e-9, atol=1e-9)


def test_the_schedules_differ():
    """So a sampler or a loss that takes another one than it was given is seen by the tests that compare laws."""
    alphas = [float(Schedule(kind).alpha(torch.tensor(0.25))) for kind in KINDS]
    assert min(abs(a - b) for i, a in enumerate(alphas) for b in alphas[:i]) > 0.05


def test_shapes_and_dtypes_are_kept():
    t = torch.full((2, 3), 0.5, dtype=torch.float32)
    for method in ("alpha", "weight", "time"):
        out = getattr(Schedule("cosine"), method)(t)
        assert (out.shape, out.dtype) == ((2, 3), torch.float64)


def test_a_schedule_is_a_value():
    assert Schedule() == Schedule("linear", 0.0)
    assert Schedule("cosine") != Schedule("linear")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule().eps = 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule("sigmoid"), "sigmoid"),
        (lambda: Schedule(eps=1.0), "eps"),
        (lambda: Schedule(eps=-1e-3), "eps"),
        (lambda: Schedule(eps=math.nan), "eps"),
        (lambda: Schedule().grid(0), "steps"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="eps must be a number, got str 'small'"):
        Schedule(eps="small")
