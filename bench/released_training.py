"""The training loss as the Quiet-STaR release computes it: P more passes over the text, a dense mask that grows.

Every text is repeated N times before anything is read. Pass 0 reads the text; passes 1 to P = m + 1 + A read, at every
position at once, START, m sampled tokens, END and A - 1 true tokens. All keys and values stay in a cache that is
concatenated anew in every layer of every pass, and the additive mask [R, 1, T, T (k + 1)] of pass k, R = B N, is that
of the pass before and a T x T diagonal. Every pass has two LM heads (its own logits and the mixed ones) and a cross
entropy, needed or not, and tokens of a path are embedded by a dense product of one-hot rows with the table.

`trimmed=True` is the same loop in its best form: only logits that the loss is made of, one mask for all passes (and,
without padding, all rows), tokens embedded by a look-up, and draws that form neither noise nor one-hot rows. The loss
is the same number; so are the gradients, but for the padding's row of the table, which only a look-up leaves out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

BASE_WEIGHT = MIXED_WEIGHT = 0.5
POLICY_TEMPERATURE = 3.0
BANNED = -1e10  # the logit of START and END where thoughts are drawn or graded
IGNORED = -100


@dataclass(frozen=True)
class ReleasedLoss:
    """The loss with its gradient, its unweighted terms, and the thoughts [B, T, N, m] it was computed with."""

    loss: Tensor
    base_nll: Tensor
    mixed_nll: Tensor
    policy: Tensor
    tokens: Tensor


def released_loss(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    thoughts: int = 2,
    lookahead: int = 4,
    policy_weight: float = 1e6,
    tokens: Tensor | None = None,
    trimmed: bool = False,
) -> ReleasedLoss:
    """The released loss of texts [B, T], padded on the right, with gradients for all weights of the model.

    Args:
        model: a `QuietStarForCausalLM` made with `official=True`, its base a plain transformers decoder.
        thoughts: N. lookahead: A.
        tokens: int64 [B, T, N, m], thoughts to use instead of drawing some (from torch's generator).
    """
    (B, T), N, m = input_ids.shape, thoughts, model.config.thought_tokens
    pad = model.config.eos_token_id if model.config.pad_token_id is None else model.config.pad_token_id
    ids = input_ids.repeat_interleave(N, 0)  # [R, T]
    labels = ids if pad is None else ids.masked_fill(ids == pad, IGNORED)
    head = model.base.get_output_embeddings()
    embed = model.embed if trimmed else lambda token: one_hot_product(token, model)
    passes = Passes(model, N, input_ids, attention_mask, m + 2 + lookahead, grow=not trimmed)

    text = passes.read(model.embed(ids))
    base = cross_entropy(head(text), following(labels, 1, IGNORED))  # [R, T]
    states = passes.read(model.start.expand_as(text))
    drawn, log_probs = [], []
    for k in range(m):
        logits = head(states).index_fill(-1, torch.tensor(model.config.reserved_ids), BANNED)
        token = draw(logits, trimmed) if tokens is None else tokens[..., k].transpose(1, 2).flatten(0, 1)
        drawn.append(token)
        log_probs.append(log_prob(logits / POLICY_TEMPERATURE, token))
        if not trimmed:
            cross_entropy(head(mix(model, text, states)), following(labels, 1, IGNORED))
        states = passes.read(embed(token))
    if not trimmed:
        head(states)
        cross_entropy(head(mix(model, text, states)), following(labels, 1, IGNORED))
    states = passes.read(model.end.expand_as(text))
    mixed = []
    for s in range(lookahead):
        if s:
            states = passes.read(embed(following(ids, s, 0)))
        if not trimmed:
            head(states)
        logits = head(mix(model, following(text, s, 0), states))
        mixed.append(cross_entropy(logits, following(labels, 1 + s, IGNORED)))

    base_nll = nonzero_mean(base)
    mixed_nll = torch.stack([nonzero_mean(losses) for losses in mixed]).mean()
    rewards = sum(following(base, s, 0) - losses for s, losses in enumerate(mixed))
    policy = policy_loss(rewards.detach()[:, : T - 1 - lookahead], log_probs, N)
    return ReleasedLoss(
        BASE_WEIGHT * base_nll + MIXED_WEIGHT * mixed_nll + policy_weight * policy,
        base_nll.detach(),
        mixed_nll.detach(),
        policy.detach(),
        torch.stack(drawn, -1).view(B, N, T, m).transpose(1, 2),
    )


class Passes:
    """The passes of T tokens, which see the text before them and, of all passes since, their own position."""

    def __init__(
        self, model: Any, copies: int, input_ids: Tensor, attention_mask: Tensor | None, passes: int, *, grow: bool
    ) -> None:
        self.network, self.cache = model.base.base_model, DynamicCache(config=model.base.config)
        dtype, T = model.base.dtype, input_ids.shape[1]
        self.positions = torch.arange(T)
        visible = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            visible = (visible & attention_mask.bool()[:, None, None]).repeat_interleave(copies, 0)
        elif grow:
            visible = visible.expand(len(input_ids) * copies, -1, -1, -1)
        self.masks = (growing_masks if grow else views_of_one_mask)(visible, passes, dtype)

    def read(self, embeds: Tensor) -> Tensor:
        """Final-norm hidden states [R, T, d] of the next pass over `embeds` [R, T, d]."""
        hidden: Tensor = self.network(
            inputs_embeds=embeds, attention_mask=next(self.masks), position_ids=self.positions[None],
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        self.positions = self.positions + 1
        return hidden


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def growing_masks(visible: Tensor, passes: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The mask of each pass, [R, 1, T, T (k + 1)], from what the text sees of itself, bool [R, 1, T, T]."""
    mask, own = additive(visible, dtype), additive(torch.eye(visible.shape[2], dtype=torch.bool), dtype)
    for _ in range(passes):
        yield mask
        mask = torch.cat([mask, own.expand_as(visible)], -1)


def views_of_one_mask(visible: Tensor, passes: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The same masks, each the left part of the last one."""
    T = visible.shape[2]
    own = torch.eye(T, dtype=torch.bool).repeat(1, passes - 1).expand(len(visible), 1, -1, -1)
    mask = additive(torch.cat([visible, own], -1), dtype)
    return (mask[..., : T * (k + 1)] for k in range(passes))


def one_hot_product(token: Tensor, model: Any) -> Tensor:
    """Embeddings [R, T, d] of tokens [R, T]."""
    table = model.base.get_input_embeddings().weight
    return functional.one_hot(token, len(table)).to(table.dtype) @ table


@torch.no_grad()
def draw(logits: Tensor, trimmed: bool) -> Tensor:
    """Tokens [R, T] from logits [R, T, V] at temperature 1."""
    if trimmed:
        return logits.softmax(-1).flatten(0, 1).multinomial(1).view(logits.shape[:2])
    return functional.gumbel_softmax(logits, tau=1, hard=True).argmax(-1)


def mix(model: Any, text: Tensor, states: Tensor) -> Tensor:
    """Mixed states [R, T, d]; the LM head is linear, so that this mixes the logits."""
    weight = model.mixing_head(torch.cat([text, states], -1))
    return (1 - weight) * text + weight * states


def following(rows: Tensor, s: int, fill: int) -> Tensor:
    """Row i + s of `rows` [R, T, ...] at i; `fill` past the end."""
    return torch.cat([rows[:, s:], torch.full_like(rows[:, :s], fill)], 1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [R, T], 0 where the label is ignored."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def log_prob(logits: Tensor, token: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]


def nonzero_mean(losses: Tensor) -> Tensor:
    return losses[losses != 0].mean()


def policy_loss(rewards: Tensor, log_probs: list[Tensor], N: int) -> Tensor:
    """REINFORCE from rewards [R, places] and log-probabilities [R, T] of each thought token; padding takes part."""
    if not log_probs:
        return rewards.new_zeros(())
    if N > 1:
        groups = rewards.unflatten(0, (-1, N))
        rewards = (groups - groups.mean(1, keepdim=True)).flatten(0, 1)
    gains = rewards.clamp_min(0)
    return torch.stack([(-gains * step[:, : gains.shape[1]]).mean() for step in log_probs]).mean()
