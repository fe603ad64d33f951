"""The Quiet-STaR loss, its terms and options, from log-probabilities with gradients (arXiv 2403.09629, section 4.4).

Letters: B batch, C = T - 1 positions with a next token, N thoughts, m thought tokens, A predicted tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyquiet.checks import check_count, check_positive, check_weight, check_word
from pyquiet.datasets import IGNORED
from pyquiet.quiet_star.inputs import check_no_nan, real_tokens

Baseline = Literal["leave_one_out", "mean"]
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class QuietStarObjective:
    """What a thinking model is trained on: base_weight * base + mixed_weight * mixed + policy_weight * policy.

    base is the mean NLL of the next token without a thought, mixed that with a thought, averaged over the A tokens that
    follow it. policy is REINFORCE, -advantage * log p(thought), averaged over thoughts at positions that A tokens
    follow; the reward of a thought is the sum over these of base NLL minus mixed NLL.

    Args:
        thoughts_per_token: N. lookahead: A, the tokens that are predicted after a thought (`n_ahead_talk`).
        base_weight, mixed_weight, policy_weight: of the terms. A policy weight of 0 spares the policy's LM head.
        baseline: what an advantage is the reward's excess over: the mean of the other thoughts of the position, or of
            all of them, itself included. A single thought has the base alone for a baseline.
        relu: only thoughts with a positive advantage count.
        over_steps: the m log-probabilities of a thought are summed, or averaged.
        policy_temperature: of the law whose log-probabilities are taken; thoughts are always drawn at 1.
        official: the released code's loss, number for number. The five options above are then its own (1e6, "mean",
            True, "mean", 3) unless given; means are over entries that are not exactly zero; targets equal to the pad
            token count for nothing; the policy term is a plain mean, padding included, over one position fewer.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    thoughts_per_token: int = 2
    lookahead: int = 4
    base_weight: float = 0.5
    mixed_weight: float = 0.5
    # None, for these five, is what `official` says.
    policy_weight: float = None  # type: ignore[assignment]
    baseline: Baseline = None  # type: ignore[assignment]
    relu: bool = None  # type: ignore[assignment]
    over_steps: Reduction = None  # type: ignore[assignment]
    policy_temperature: float = None  # type: ignore[assignment]
    official: bool = False

    def __post_init__(self) -> None:
        for name, ours, released in (
            ("policy_weight", 1.0, 1e6),
            ("baseline", "leave_one_out", "mean"),
            ("relu", False, True),
            ("over_steps", "sum", "mean"),
            ("policy_temperature", 1.0, 3.0),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, released if self.official else ours)
        check_count("thoughts_per_token", self.thoughts_per_token, least=1)
        check_count("lookahead", self.lookahead, least=1)
        for name in ("base_weight", "mixed_weight", "policy_weight"):
            check_weight(name, getattr(self, name))
        check_positive("policy_temperature", self.policy_temperature)
        check_word("baseline", self.baseline, Baseline)
        check_word("over_steps", self.over_steps, Reduction)

    def target_counts(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """int64 [A + 1]: at how many positions of texts [B, T] the s-th token after the next is to be predicted, s < A.

        The last entry counts the positions whose thoughts are rewarded. These are what the means divide by: counts of
        several batches add up, so that their losses, each given the sum, do too.
        """
        return _counts(*self.targets(real_tokens(input_ids, attention_mask), labels))

    def targets(self, real: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """bool [B, C, A]: the s-th token after the next is to be predicted; bool [B, C]: the thought is rewarded.

        `real` is bool [B, T], false at padding.
        """
        A = self.lookahead
        inside = real[:, :-1, None] & after(real, A)
        targets = inside if labels is None else inside & after(labels != IGNORED, A)
        return targets, inside[..., -1] & targets.any(-1)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages [..., N] of the thoughts of a position from their rewards [..., N]."""
        N = rewards.shape[-1]
        if N > 1:
            rewards = rewards - rewards.mean(-1, keepdim=True)
            if self.baseline == "leave_one_out":  # r - mean of the others = (r - mean of all) N / (N - 1)
                rewards = rewards * (N / (N - 1))
        return rewards.clamp_min(0) if self.relu else rewards

    def policy_losses(self, rewards: Tensor, thought_log_probs: Tensor) -> Tensor:
        """REINFORCE [..., N] from rewards [..., N], taken as constants, and thoughts' log-probabilities [..., N, m]."""
        if thought_log_probs.shape[-1] == 0:
            return torch.zeros_like(rewards)
        steps = thought_log_probs.sum(-1) if self.over_steps == "sum" else thought_log_probs.mean(-1)
        return -self.advantages(rewards.detach()) * steps


@dataclass
class LogProbs:
    """What one pass over text and thoughts says, with gradients."""

    base: Tensor  # [B, C] of the next token without a thought
    mixed: Tensor  # [B, C, N, A] of the tokens after the thought
    weight: Tensor  # [B, C, N, A] w, the weight of the thought in each of these
    thoughts: Tensor | None  # [B, C, N, m] of the thought's tokens, at the policy temperature


@dataclass
class ThinkingLoss:
    """A training loss and what went into it. Only `loss` has a gradient; where nothing is to be predicted, all is 0.

    Means are over what the terms average over; the policy term is without its weight, and 0 where that is 0.
    """

    loss: Tensor  # []
    base_nll: Tensor  # []
    mixed_nll: Tensor  # [] over all A tokens
    policy: Tensor  # []
    reward: Tensor  # [] mean over thoughts
    weight_mean: Tensor  # [] of w, over tokens after thoughts
    weight_std: Tensor  # []
    thought_entropy: Tensor  # [] nats a thought token, estimated by the drawn tokens
    tokens: Tensor  # int64 [B, C, N, m]
    base_nlls: Tensor  # [B, C]
    mixed_nlls: Tensor  # [B, C, N, A]
    rewards: Tensor  # [B, C, N]


def combine(
    objective: QuietStarObjective,
    log_probs: LogProbs,
    input_ids: Tensor,
    mask: Tensor | None,
    *,
    tokens: Tensor,
    drawn_log_probs: Tensor,
    labels: Tensor | None = None,
    pad_token_id: int | None = None,
    target_counts: Tensor | None = None,
) -> ThinkingLoss:
    """The loss of texts [B, T] with the bool padding mask [B, T] and thoughts `tokens` [B, C, N, m].

    Raises:
        ValueError: a log-probability is NaN; the row is named.
    """
    A, N = objective.lookahead, tokens.shape[2]
    real = real_tokens(input_ids, mask)
    targets, complete = objective.targets(real, labels)
    target_counts = (_counts(targets, complete) if target_counts is None else target_counts).to(targets.device)
    if objective.official:
        targets, complete, target_counts = _released_targets(targets, input_ids, real, target_counts, pad_token_id)
    counts, windows = target_counts[:A], target_counts[A]

    thinking = targets[:, :, None].expand_as(log_probs.mixed)  # [B, C, N, A]
    base = (-log_probs.base).masked_fill(~targets[..., 0], 0)
    mixed = (-log_probs.mixed).masked_fill(~thinking, 0)
    check_no_nan(base, mixed)
    here = after(torch.cat([base.new_zeros(len(base), 1), base.detach()], 1), A)  # base NLL of the same tokens
    rewards = (here[:, :, None] - mixed.detach()).masked_fill(~thinking, 0).sum(-1)  # [B, C, N]
    if objective.official:
        base_nll = base.sum() / (base != 0).sum().clamp_min(1)
        mixed_nll = (mixed.sum((0, 1, 2)) / (mixed != 0).sum((0, 1, 2)).clamp_min(1)).mean()
    else:
        base_nll = base.sum() / counts[0].clamp_min(1)
        mixed_nll = (mixed.sum((0, 1, 2)) / (N * counts).clamp_min(1)).mean()
    graded = (N * windows).clamp_min(1)
    policy = torch.zeros_like(base_nll)
    if log_probs.thoughts is not None:
        losses = objective.policy_losses(rewards, log_probs.thoughts.masked_fill(~complete[..., None, None], 0))
        policy = losses.masked_fill(~complete[..., None], 0).sum() / graded
    loss = objective.base_weight * base_nll + objective.mixed_weight * mixed_nll + objective.policy_weight * policy

    weights = log_probs.weight.detach()
    weight_mean, weight_square = (masked_mean(x, thinking) for x in (weights, weights.square()))
    thought = real[:, :-1, None, None].expand_as(tokens)
    return ThinkingLoss(
        loss, base_nll.detach(), mixed_nll.detach(), policy.detach(), base_nlls=base.detach(),
        mixed_nlls=mixed.detach(), rewards=rewards, tokens=tokens.masked_fill(~thought, -1),
        reward=rewards.masked_fill(~complete[..., None], 0).sum() / graded, weight_mean=weight_mean,
        weight_std=(weight_square - weight_mean.square()).clamp_min(0).sqrt(),
        thought_entropy=masked_mean(-drawn_log_probs, thought),
    )  # fmt: skip


def _released_targets(
    targets: Tensor, input_ids: Tensor, real: Tensor, target_counts: Tensor, pad_token_id: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The released code's tokens to predict, rewarded positions and counts, from what `targets` and `_counts` say.

    It leaves out one position more than it must, and averages over the padding, which earns nothing.
    """
    A = targets.shape[2]
    if pad_token_id is not None:
        targets = targets & (after(input_ids, A) != pad_token_id)
    places = max(0, real.shape[1] - 1 - A)
    complete = real[:, :-1] & (real[:, :-1].cumsum(1) <= places)
    return targets, complete, torch.cat([target_counts[:A], target_counts.new_tensor([places * len(real)])])


def next_token_targets(input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """bool [B, C]: there is a next token, and it is to be predicted."""
    real = real_tokens(input_ids, attention_mask)
    targets = real[:, 1:] & real[:, :-1]
    return targets if labels is None else targets & (labels[:, 1:] != IGNORED)


def _counts(targets: Tensor, rewarded: Tensor) -> Tensor:
    """int64 [A + 1] of `QuietStarObjective.targets`."""
    return torch.cat([targets.sum((0, 1)), rewarded.sum()[None]])


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean [] of the values where the mask is true; 0 where it never is."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)


def after(rows: Tensor, A: int) -> Tensor:
    """[B, C, A, ...]: the A entries of `rows` [B, C + 1, ...] that follow each of the first C; zeros past the end."""
    C = rows.shape[1] - 1
    rows = torch.cat([rows, rows.new_zeros((len(rows), A, *rows.shape[2:]))], 1)
    return torch.stack([rows[:, 1 + s : 1 + s + C] for s in range(A)], 2)
