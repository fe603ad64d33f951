"""Hyper-cleaning shown on a data set: labels turned over by us, and found again."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyquiet.bilevel.logistic import Cleaned, clean_labels
from pyquiet.checks import check_count, check_fraction
from pyquiet.evaluation.estimates import finite


@dataclass(frozen=True)
class Shown:
    """What `demonstrate` found.

    `wrong` are the rows whose labels were turned over, bool [n]; `auc` says how well the weights tell them apart, nan
    where there is nothing to tell; accuracies are on rows held out, of a regression on the weighed rows, on all alike,
    on the `clean` rows alone, and on all with their right labels.
    """

    cleaned: Cleaned
    wrong: Tensor
    clean: int
    auc: float
    accuracy: float
    plain_accuracy: float
    clean_accuracy: float
    oracle_accuracy: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as JSON values; `auc` is None where there is nothing to tell."""
        names = ("auc", "accuracy", "plain_accuracy", "clean_accuracy", "oracle_accuracy", "seconds")
        counts = {"rows": len(self.wrong), "wrong": int(self.wrong.sum()), "steps": self.cleaned.steps[-1]}
        return counts | {"clean": self.clean} | {name: finite(getattr(self, name)) for name in names}


def demonstrate(
    features: Tensor,
    labels: Tensor,
    *,
    wrong: float = 0.3,
    rows: int = 4000,
    clean: int | None = None,
    variant: str = "v2",
    epochs: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> Shown:
    """Turns over a share of the labels of some rows, and weighs these by others that stay right.

    Args:
        features [n, d], labels [n] in {-1, 1}: two thirds of the rows at most are trained on, some weigh them, and the
            rest is held out.
        wrong: the share of labels to turn over. rows: training rows at most. clean: rows that weigh them; None: a
            quarter as many as are trained on, or half of the rest.
        variant, epochs, seed, progress: as `clean_labels`.
    """
    check_fraction("wrong", wrong)
    check_count("rows", rows, least=10)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=g)
    count = min(rows, 2 * len(order) // 3)
    half = max(1, (len(order) - count) // 2)
    clean = min(max(1, count // 4) if clean is None else check_count("clean", clean, least=1), half)
    train, valid, test = order[:count], order[count : count + clean], order[count + clean :]
    turned = torch.rand(count, generator=g) < wrong
    noisy = torch.where(turned, -labels[train], labels[train])
    began = time.perf_counter()
    found = clean_labels(
        features[train], noisy, features[valid], labels[valid], variant=variant, epochs=epochs, seed=seed,
        progress=progress,
    )  # fmt: skip
    seconds = time.perf_counter() - began

    def accuracy(where: Tensor, y: Tensor, weights: Tensor) -> float:
        w = _regression(features[where], y, weights)
        return float((features[test] @ w * labels[test] > 0).double().mean())

    even = torch.ones(count, dtype=features.dtype)
    return Shown(
        found,
        turned,
        clean,
        auc(found.weights, ~turned),
        accuracy(train, noisy, found.weights),
        accuracy(train, noisy, even),
        accuracy(valid, labels[valid], even[:clean]),
        accuracy(train, labels[train], even),
        seconds,
    )


def read_rows(source: str) -> tuple[Tensor, Tensor]:
    """Features [n, d] with a constant one, float32, and labels [n] in {-1, 1}: of a LIBSVM file, or of "digits", the
    images of scikit-learn, those above 4 against the others.

    Raises:
        ImportError: scikit-learn is missing. ValueError: the file has not two classes. OSError: it cannot be read.
    """
    try:
        from sklearn.datasets import load_digits, load_svmlight_file
    except ImportError:
        raise ImportError('reading this data needs scikit-learn: pip install "pyquiet[demo]"') from None
    if source == "digits":
        images, numbers = load_digits(return_X_y=True)
        features, labels = torch.tensor(images / 16), torch.tensor(numbers > 4)
    else:
        if not Path(source).is_file():
            raise ValueError(f"there is no file {source!r}; give one in LIBSVM's format, or digits")
        sparse, y = load_svmlight_file(source)
        kinds = sorted(set(y.tolist()))
        if len(kinds) != 2:
            raise ValueError(f"{source} must have two classes, got {kinds[:5]}")
        features, labels = torch.tensor(sparse.toarray()), torch.tensor(y == kinds[1])
    ones = torch.ones(len(features), 1, dtype=features.dtype)
    return torch.cat([features, ones], 1).float(), labels.float() * 2 - 1


def auc(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs of a positive and another row that the scores order right; nan where there is no pair.

    Args:
        scores: [n]. positive: bool [n].
    """
    _, group, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    rank = (last - (counts - 1) / 2)[group]  # equal scores share their mean rank
    p, n = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * n)) if p * n else math.nan


def _regression(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weights of a logistic regression on weighed rows, slightly regularised."""
    w = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    fit = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        fit.zero_grad()
        loss = (weights * softplus(-labels * (features @ w))).sum() / weights.sum() + 1e-4 * w.square().sum()
        loss.backward()
        return loss

    fit.step(closure)
    return w.detach()
