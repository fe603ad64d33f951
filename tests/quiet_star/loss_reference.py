"""The Quiet-STaR loss the slow and obvious way: one explicit sequence for each thought, loops and lists for the rest.

Differentiable, so that its gradients are a reference too. Rows are padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .architectures import explicit_logits
from .sequential_reference import EMBEDDING_SCALE, mixing_weight


@dataclass
class Reference:
    """The loss, its terms, and (b, i, n) -> reward, (b, i, n, s) -> mixed NLL, (b, j) -> base NLL."""

    loss: Tensor
    base: Tensor
    mixed: Tensor
    policy: Tensor
    rewards: dict[tuple[int, ...], float] = field(default_factory=dict)
    mixed_nlls: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    base_nlls: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


def read(base: Any, embeds: Tensor) -> Tensor:
    """Final hidden states [S, d] of one sequence of embeddings [S, d]."""
    positions = torch.arange(len(embeds))
    return base.base_model(inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False).last_hidden_state[
        0
    ]


def nll(logits: Tensor, target: int) -> Tensor:
    return -logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[target]


def loss_of(
    model: Any,
    texts: list[Tensor],
    tokens: Tensor,
    objective: Any,
    pad: int | None = None,
    width: int | None = None,
    labels: list[Tensor] | None = None,
) -> Reference:
    """The loss of texts of several lengths, with the thoughts `tokens` [B, C, N, m] in right-padded columns."""
    N, A, m = objective.thoughts_per_token, objective.lookahead, tokens.shape[3]
    width = width or max(map(len, texts))
    base, embed = model.base, model.base.get_input_embeddings()
    start, end = EMBEDDING_SCALE * model.start_embedding[None], EMBEDDING_SCALE * model.end_embedding[None]
    out = Reference(*torch.zeros(4, dtype=torch.float64))
    log_probs: dict[tuple[int, ...], list[Tensor]] = {}
    for b, text in enumerate(texts):
        hidden = read(base, embed(text))
        scored = [True] * len(text) if labels is None else (labels[b] != -100).tolist()
        for j in range(len(text) - 1):
            if not scored[j + 1]:
                continue
            out.base_nlls[b, j] = nll(explicit_logits(base, hidden[j]), text[j + 1])
        for i in range(len(text) - 1):
            for n in range(N):
                thought = tokens[b, i, n]
                path = [embed(text[: i + 1]), start, embed(thought), end, embed(text[i + 1 : i + A])]
                states = read(base, torch.cat(path))[i + 1 :]
                for k in range(m):
                    logits = explicit_logits(base, states[k]) / objective.policy_temperature
                    if model.config.official:
                        logits = torch.cat([logits[:-2], torch.full((2,), -1e10)])
                    log_probs.setdefault((b, i, n), []).append(-nll(logits, thought[k]))
                for s in range(min(A, len(text) - 1 - i)):
                    if not scored[i + 1 + s]:
                        continue
                    w = mixing_weight(model, hidden[i + s], states[m + 1 + s])
                    state = (1 - w) * hidden[i + s] + w * states[m + 1 + s]
                    out.mixed_nlls[b, i, n, s] = nll(explicit_logits(base, state), text[i + 1 + s])
    if objective.official:  # a target that looks like padding is padding
        for key in out.base_nlls:
            if texts[key[0]][key[1] + 1] == pad:
                out.base_nlls[key] = 0 * out.base_nlls[key]
        for key in out.mixed_nlls:
            if texts[key[0]][key[1] + 1 + key[3]] == pad:
                out.mixed_nlls[key] = 0 * out.mixed_nlls[key]
    out.base = mean(out.base_nlls.values(), objective.official)
    by_step = [mean([v for k, v in out.mixed_nlls.items() if k[3] == s], objective.official) for s in range(A)]
    out.mixed = sum(by_step) / A
    out.policy = policy(out, objective, [len(text) for text in texts], width, log_probs)
    out.loss = objective.base_weight * out.base + objective.mixed_weight * out.mixed
    if objective.policy_weight:
        out.loss = out.loss + objective.policy_weight * out.policy
    return out


def mean(values: Any, nonzero_only: bool) -> Tensor:
    kept = [v for v in values if not nonzero_only or v != 0]
    return sum(kept) / len(kept)


def policy(out: Reference, objective: Any, lengths: list[int], width: int, log_probs: dict[Any, Any]) -> Tensor:
    """The REINFORCE term; also fills in the rewards."""
    N, A = objective.thoughts_per_token, objective.lookahead
    total, places = torch.zeros((), dtype=torch.float64), 0
    for b, length in enumerate(lengths):
        for i in range(width - 1 - A if objective.official else length - A):
            steps = [s for s in range(A) if (b, i, 0, s) in out.mixed_nlls]
            if not steps and not objective.official:
                continue  # nothing to be rewarded for
            places += 1
            if i >= length - 1:
                continue  # padding: no target, no reward
            rewards = []
            for n in range(N):
                reward = sum(float(out.base_nlls[b, i + s] - out.mixed_nlls[b, i, n, s]) for s in steps)
                out.rewards[b, i, n] = reward
                rewards.append(reward)
            for n in range(N):
                others = rewards if objective.baseline == "mean" else rewards[:n] + rewards[n + 1 :]
                advantage = rewards[n] - (sum(others) / len(others) if N > 1 else 0)
                if objective.relu:
                    advantage = max(advantage, 0)
                logs = log_probs.get((b, i, n), [torch.zeros(())])
                grade = sum(logs) if objective.over_steps == "sum" else sum(logs) / len(logs)
                total = total - advantage * grade
    return total / (N * places)
