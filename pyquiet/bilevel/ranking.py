"""Top-K NDCG as a bilevel problem: each query's K-th largest score is a lower problem of one number (arXiv 2305.18730).

lambda_q, the threshold above which K of a query's documents lie, is the minimiser of a smoothed quantile loss; the
upper loss is the smoothed NDCG of the documents above it. x are the weights of the scores, or a network's parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from pyquiet.bilevel.problem import Problem, Variables
from pyquiet.checks import check_count, check_positive


class TopKNDCG(Problem):
    """Scores for the documents of m queries, x . features or a network's; blocks are queries.

    g_q(lambda) = (K + 1/2) / n lambda + mean_j t softplus((s_j - lambda) / t) + ridge / 2 lambda^2, minimal near the
    (K + 1)-th largest score, above which K documents lie. f_q = -1 / Z sum over relevant j of sigmoid((s_j - lambda) /
    t) (2^rel_j - 1) / log2(1 + rank_j), with rank_j = 1/2 + sum_k sigmoid((s_k - s_j) / t) and Z the best DCG at K.

    Args:
        features: [m, n, d]. relevance: [m, n], 0 and up.
        K: documents that count. smoothing: t, in units of scores. ridge: above 0.
        scorer: a network that makes features [..., d] scores [..., 1], x being its parameters: give it as x, too.
            None: x [d] are the weights of linear scores.

    Raises:
        TypeError: features or relevance are no tensors, or K is no int.
        ValueError: shapes do not fit, or K, smoothing or ridge are out of range.
    """

    def __init__(
        self,
        features: Tensor,
        relevance: Tensor,
        *,
        K: int,
        smoothing: float = 0.1,
        ridge: float = 1e-2,
        scorer: nn.Module | None = None,
    ) -> None:
        check_count("K", K, least=1)
        for name, value in (("features", features), ("relevance", relevance)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if features.ndim != 3 or relevance.shape != features.shape[:2] or not 1 <= K < features.shape[1]:
            raise ValueError(
                f"features must be [m, n, d], relevance [m, n] and K in 1 .. n - 1, got {list(features.shape)}, "
                f"{list(relevance.shape)} and K={K}"
            )
        self.m, self.dim_y, self.features, self.relevance = len(features), 1, features, relevance
        self.K, self.scorer = K, scorer
        self.smoothing, self.ridge = check_positive("smoothing", smoothing), check_positive("ridge", ridge)
        self.best = dcg(relevance, relevance, K).clamp_min(1e-9)

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Tensor:
        """Documents int64 [I, B], drawn with replacement; all of them for None."""
        n = self.features.shape[1]
        if samples is None:
            return torch.arange(n).expand(len(idx), n)
        return torch.randint(n, (len(idx), samples), generator=generator)

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Tensor) -> Tensor:
        scores = self.scores(x, self.features[idx[:, None], batch])
        share = (self.K + 0.5) / self.features.shape[1]
        above: Tensor = self.smoothing * softplus((scores - Y) / self.smoothing)
        cost: Tensor = share * Y[:, 0] + above.mean(1) + self.ridge / 2 * Y[:, 0].square()
        return cost

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Tensor) -> Tensor:
        every = self.scores(x, self.features[idx])
        scores = every.gather(1, batch)
        rank = 0.5 + ((every[:, None] - scores[..., None]) / self.smoothing).sigmoid().sum(-1)
        gain = (2 ** self.relevance[idx[:, None], batch] - 1) / torch.log2(1 + rank)
        inside = ((scores - Y) / self.smoothing).sigmoid()
        found: Tensor = (inside * gain).mean(1) * self.features.shape[1] / self.best[idx]
        return -found

    def scores(self, x: Any, features: Tensor) -> Tensor:
        """The scores [...] of documents [..., d]."""
        found: Tensor = (
            features @ x if self.scorer is None else functional_call(self.scorer, x, (features,)).squeeze(-1)
        )
        return found

    @torch.no_grad()
    def ndcg(self, x: Variables) -> float:
        """The NDCG at K itself, the mean over queries."""
        return float((dcg(self.scores(x, self.features), self.relevance, self.K) / self.best).mean())


def dcg(scores: Tensor, relevance: Tensor, K: int) -> Tensor:
    """The discounted cumulative gain of the K documents with the largest scores, [m]."""
    top = scores.topk(K, dim=1).indices
    gain = 2 ** relevance.gather(1, top) - 1
    return (gain / torch.log2(torch.arange(2, K + 2, dtype=gain.dtype))).sum(1)
