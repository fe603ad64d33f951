"""Logistic regressions at many temperatures that share what each training row counts (arXiv 2305.18730).

x holds a logit for each of n training rows, a block is a logistic regression at its own temperature on the rows so
weighed, and its upper loss is that of clean validation rows: so x learns which rows to trust (hyper-cleaning), and
which to leave out for the sake of the validation rows (optimisation of hyper-parameters).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, softplus
from tqdm import tqdm

from pyquiet.bilevel.bsvrb import BSVRB
from pyquiet.bilevel.problem import Problem, row_scores
from pyquiet.checks import check_count, check_positive


class WeightedLogistic(Problem):
    """m logistic regressions, d weights each; x [n] are the logits of the rows' weights.

    g_i = mean over rows of sigmoid(x_j) log(1 + exp(-label_j features_j . y / temperature_i)) + l2 / 2 |y|^2; f_i is
    the mean over validation rows of the same loss, all of weight 1.

    Args:
        features [n, d], labels [n] in {-1, 1}: training rows. validation_features, validation_labels: clean rows.
        temperatures: [m], above 0. l2: above 0, or g_i need not be strongly convex.

    Raises:
        TypeError: rows or labels are no tensors.
        ValueError: shapes do not fit, labels are others, or a temperature or l2 is not positive.
    """

    points = True

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        validation_features: Tensor,
        validation_labels: Tensor,
        *,
        temperatures: Tensor,
        l2: float = 1e-2,
    ) -> None:
        for name, X, y in (
            ("features", features, labels),
            ("validation_features", validation_features, validation_labels),
        ):
            if not isinstance(X, Tensor) or not isinstance(y, Tensor):
                raise TypeError(f"{name} and their labels must be tensors, got {type(X).__name__}, {type(y).__name__}")
            if X.ndim != 2 or y.shape != X.shape[:1] or X.shape[1] != features.shape[1]:
                raise ValueError(f"{name} must be [n, d] with one label a row, got {list(X.shape)} and {list(y.shape)}")
            if not bool(((y == 1) | (y == -1)).all()):
                raise ValueError(f"labels of {name} must be 1 or -1, got {y.unique().tolist()[:5]}")
        if not bool((temperatures > 0).all()):
            raise ValueError(f"temperatures must be above 0, got {temperatures.tolist()[:5]}")
        self.m, self.dim_y, self.l2 = len(temperatures), features.shape[1], check_positive("l2", l2)
        self.signed = features * labels[:, None].to(features)
        self.validation = validation_features * validation_labels[:, None].to(features)
        self.temperatures = temperatures.to(features)

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Tensor | None:
        """Rows int64 [I, B], drawn with replacement; None: all."""
        return None if samples is None else torch.randint(len(self.signed), (len(idx), samples), generator=generator)

    def sample_upper(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Tensor | None:
        """The same of the validation rows."""
        if samples is None:
            return None
        return torch.randint(len(self.validation), (len(idx), samples), generator=generator)

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Tensor | None) -> Tensor:
        losses = self._losses(self.signed, Y, idx, batch)
        weights: Tensor = (x[..., None, :] if batch is None else x[..., batch]).sigmoid()
        return (weights * losses).mean(-1) + self.l2 / 2 * Y.square().sum(-1)

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Tensor | None) -> Tensor:
        return self._losses(self.validation, Y, idx, batch).mean(-1)

    def _losses(self, signed: Tensor, Y: Tensor, idx: Tensor, batch: Tensor | None) -> Tensor:
        margins = Y @ signed.T if batch is None else row_scores(embedding(batch, signed), Y)  # [..., I, rows]
        return softplus(-margins / self.temperatures[idx, None])


@dataclass(frozen=True)
class Cleaned:
    """What hyper-cleaning found: the rows' `weights` [n] in (0, 1), and curves of it, one value a look: the numbers of
    `steps`, the mean upper `loss` on all validation rows, and the `hypergradient`'s norm as the method tracks it."""

    weights: Tensor
    steps: list[int]
    loss: list[float]
    hypergradient: list[float]


def clean_labels(
    features: Tensor,
    labels: Tensor,
    validation_features: Tensor,
    validation_labels: Tensor,
    *,
    blocks: int = 20,
    temperatures: tuple[float, float] = (0.5, 2.0),
    l2: float = 1e-2,
    epochs: int = 120,
    blocks_per_step: int = 5,
    samples_per_block: int = 32,
    variant: str = "v2",
    alpha: float = 0.3,
    beta: float = 0.2,
    tau: float | None = None,
    eta: float = 0.5,
    seed: int = 0,
    looks: int = 40,
    progress: bool = True,
) -> Cleaned:
    """Which training rows to trust, learned from a few that are known to be right (hyper-cleaning).

    Args:
        features, labels, validation_features, validation_labels, l2: as `WeightedLogistic`.
        blocks, temperatures: how many regressions, and the range of their temperatures.
        epochs: passes over the training rows, of blocks_per_step * samples_per_block rows a step.
        variant, alpha, beta: as `BSVRB`; tau: also its tau_v. eta: its step size in units of the n rows, as a row's
            share of a mean is 1 / n.
        looks: points of the curves.

    Raises:
        ValueError: as `WeightedLogistic` and `BSVRB`.
    """
    check_count("epochs", epochs, least=1)
    n = len(features)
    problem = WeightedLogistic(
        features,
        labels,
        validation_features,
        validation_labels,
        temperatures=torch.linspace(*temperatures, check_count("blocks", blocks, least=1), dtype=torch.float64),
        l2=l2,
    )
    method = BSVRB(
        problem, torch.zeros(n, dtype=features.dtype), blocks_per_step=blocks_per_step,
        samples_per_block=samples_per_block, variant=variant, alpha=alpha, beta=beta, tau=tau, tau_v=tau, eta=eta * n,
        seed=seed,
    )  # fmt: skip
    steps = max(1, epochs * n // (blocks_per_step * samples_per_block))
    looked, losses, norms = [], [], []
    for step in tqdm(range(1, steps + 1), "cleaned", disable=None if progress else True):
        found = method.step()
        if step % max(1, steps // looks) == 0 or step == steps:
            with torch.no_grad():
                every = torch.arange(problem.m)
                losses.append(float(problem.upper(method.x, method.flush(), every, None).mean()))
            looked.append(step)
            norms.append(found["z_norm"])
    assert isinstance(method.x, Tensor)
    return Cleaned(method.x.sigmoid(), looked, losses, norms)
