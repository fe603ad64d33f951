"""What an any-subset model learns from: the joint law of texts given random parts of them, and drafts of that law.

One differentiable pass has a query at each position for the joint law, which sees all earlier ranks, and one for
drafts, which sees the ranks before its block alone. The joint loss never asks for a position behind others that are
unknown, so it is the draft loss that teaches what a sampler drafts (arXiv 2504.20456). Words: B
sequences, N positions, V vocabulary, d width, n targets.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyquiet.any_subset.modeling import XLNetEngine
from pyquiet.any_subset.order import order_from_mask, ranks_of
from pyquiet.checks import check_fraction
from pyquiet.losses import LOGITS, token_nlls
from pyquiet.randomness import Purpose, Stream, uniforms

BLOCK_SIZES = (2, 6)  # of the drafts that are learned
_SUBSET, _SIZE, _OFFSET = 0, 2, 3  # indices in a stream; 1 is that of `pyquiet.trainers.stratified`


class AnySubsetLoss(NamedTuple):
    """The loss [] and its parts in nats a target, all []; a part of weight 0 is not computed and None."""

    loss: Tensor
    joint_nll: Tensor | None
    draft_nll: Tensor | None


class SubsetScores(NamedTuple):
    """Sums over the targets of each text: joint NLL in nats and targets [B]; of drafts +1 .. +k of an exact first one
    how likely they are to be accepted, and of how many that is the sum, [B, k]."""

    joint_nll: Tensor
    targets: Tensor
    acceptance: Tensor
    drafts: Tensor


def any_subset_loss(
    model: Any,
    input_ids: Tensor,
    *,
    order: Tensor,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    draft_weight: float = 0.0,
    block_size: Tensor | None = None,
    block_offset: Tensor | None = None,
    target_count: Tensor | None = None,
) -> AnySubsetLoss:
    """(1 - w) joint + w draft: mean NLLs of the tokens behind the prompt; the prompt itself is not learned.

    The joint part is -log p(token | prompt and all targets of lower rank), the draft part the same given the prompt and
    the targets before the token's block alone. All in one pass over clean tokens.

    Args:
        model: transformers' XLNetLMHeadModel, or its engine.
        input_ids: int64 [B, N].
        order, prompt: as `order_from_mask` or `random_order` give them, int64 [B, N] and [B].
        attention_mask: [B, N], 0 at padding.
        draft_weight: w in [0, 1].
        block_size, block_offset: int64 [B]; targets are cut into blocks of this size, the first one of `block_offset`
            targets where that is not 0. As `random_blocks` gives them.
        target_count: [], of the joint batch that this one is a part of; the parts' losses then add up to its own.

    Raises:
        ValueError, TypeError: an argument does not fit, or a token is outside the vocabulary.
    """
    engine = model if isinstance(model, XLNetEngine) else XLNetEngine(model)
    order, prompt = order.cpu(), prompt.cpu()  # as the engine wants them
    _check(engine, input_ids, order, prompt, attention_mask, draft_weight, block_size, block_offset)
    rank, target = _targets(order, prompt, attention_mask)
    sees = [rank] if draft_weight < 1 else []
    if block_size is not None and block_offset is not None and draft_weight > 0:
        sees.append(_block_start(rank, prompt[:, None], block_size.cpu()[:, None], block_offset.cpu()[:, None]))
    hidden = engine.whole(input_ids, order, prompt, torch.stack(sees, 1))  # [B, A, N, d]
    where = target.to(input_ids.device)
    nlls = token_nlls(engine.head, hidden.transpose(1, 2)[where], input_ids[where], engine.vocab_size)  # [n, A]
    count = nlls.new_tensor(max(1, len(nlls))) if target_count is None else target_count
    parts = list((nlls.sum(0) / count).unbind())
    joint = parts.pop(0) if draft_weight < 1 else None
    draft = parts.pop() if parts else None
    terms = [weight * part for weight, part in ((1 - draft_weight, joint), (draft_weight, draft)) if part is not None]
    return AnySubsetLoss(torch.stack(terms).sum(), joint, draft)


@torch.no_grad()
def subset_scores(
    model: Any,
    input_ids: Tensor,
    *,
    order: Tensor,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    reach: int = 3,
) -> SubsetScores:
    """The joint NLL of texts, and how good the model's drafts of them are.

    Draft +j is for the j-th rank behind one whose law is known exactly; given that all before it are the text's, it is
    accepted with probability sum_v min(p_v, q_v), p what the model says without and q with the j ranks before it.
    Arguments as for `any_subset_loss`.
    """
    engine = model if isinstance(model, XLNetEngine) else XLNetEngine(model)
    order, prompt = order.cpu(), prompt.cpu()
    rank, target = _targets(order, prompt, attention_mask)
    before = torch.arange(reach + 1)[:, None]
    sees = (rank[:, None] - before).maximum(prompt[:, None, None])  # [B, 1 + reach, N]
    drafted = (rank[:, None] - before[1:] >= prompt[:, None, None]).transpose(1, 2)[target].to(input_ids.device)
    hidden = engine.whole(input_ids, order, prompt, sees).transpose(1, 2)[target.to(input_ids.device)]
    nlls, accepted = [], []
    size = max(1, LOGITS // ((1 + reach) * engine.vocab_size))
    tokens = input_ids[target.to(input_ids.device)]
    for rows, token in zip(hidden.split(size), tokens.split(size), strict=True):
        law = engine.head(rows).log_softmax(-1)  # [n, 1 + reach, V]
        nlls.append(-law[:, 0].gather(-1, token[:, None]).squeeze(-1))
        accepted.append(law[:, :1].minimum(law[:, 1:]).exp().sum(-1))
    text = target.nonzero()[:, 0].to(input_ids.device)

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(len(input_ids), *values.shape[1:]).index_add_(0, text, values)

    acceptance = torch.cat(accepted).masked_fill(~drafted, 0)
    return SubsetScores(
        sums(torch.cat(nlls)), target.sum(1).to(input_ids.device), sums(acceptance), sums(drafted.to(acceptance.dtype))
    )


class SubsetLearner(nn.Module):
    """The loss as the forward of a module around the model, so that all that wraps a module wraps it: DDP, autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> AnySubsetLoss:
        return any_subset_loss(self.model, **batch)


def random_order(
    rate: Tensor, input_ids: Tensor, *, seed: int, sequence_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Order and prompt length of texts of which a uniformly drawn part, the share `rate` [B], is to be filled.

    At least one token is. What is drawn depends on the seed, the text's id [B] and its rate alone.
    """
    B, N = input_ids.shape
    if rate.shape != (B,) or not bool(((rate >= 0) & (rate <= 1)).all()):
        raise ValueError(f"rate must be [B] = [{B}] shares from 0 to 1, got {rate.tolist()}")
    real = torch.ones(B, N, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    stream = Stream(
        seed, Purpose.REVEAL, sequence_ids.cpu().repeat_interleave(N), torch.arange(N).repeat(B), index=_SUBSET
    )
    place = uniforms(stream, B * N).view(B, N).masked_fill(~real, 2).argsort(1).argsort(1)
    total = real.sum(1)
    targets = (rate.cpu().double() * total).round().clamp(min=1).minimum(total)
    order, prompt = order_from_mask(place >= targets[:, None], real)
    assert isinstance(prompt, Tensor)
    return order, prompt


def random_blocks(sequence_ids: Tensor, *, seed: int, sizes: tuple[int, int] = BLOCK_SIZES) -> tuple[Tensor, Tensor]:
    """Sizes [B], uniform in `sizes`, both included, and offsets [B] below them, by seed and text."""
    ids = sequence_ids.cpu()
    u = [uniforms(Stream(seed, Purpose.REVEAL, ids, index=index), len(ids)) for index in (_SIZE, _OFFSET)]
    size = sizes[0] + (u[0] * (sizes[1] - sizes[0] + 1)).long()
    return size, (u[1] * size).long()


def _targets(order: Tensor, prompt: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ranks of the positions and which are targets, [B, N]; padding keeps its rank, which nobody sees."""
    rank = ranks_of(order)
    target = rank >= prompt[:, None]
    if attention_mask is not None:
        target &= attention_mask.cpu() != 0
    return rank, target


def _block_start(rank: Tensor, prompt: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """How many ranks lie before the block of each rank [B, N]; in the prompt, where nothing is learned, m."""
    start = (rank - prompt - offset).div(size, rounding_mode="floor") * size + offset
    return prompt + start.clamp(min=0)


def _check(
    engine: XLNetEngine,
    input_ids: Tensor,
    order: Tensor,
    prompt: Tensor,
    attention_mask: Tensor | None,
    draft_weight: float,
    block_size: Tensor | None,
    block_offset: Tensor | None,
) -> None:
    check_fraction("draft_weight", draft_weight)
    if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be int64 [B, N] with tokens, got {input_ids.dtype} {list(input_ids.shape)}")
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < engine.vocab_size:
        found = f"{input_ids.min()} .. {input_ids.max()}"
        raise ValueError(f"input_ids must be in [0, {engine.vocab_size}), the model's vocabulary, got {found}")
    B, N = input_ids.shape
    if (
        order.dtype != torch.int64
        or order.shape != (B, N)
        or not torch.equal(order.sort(1).values, torch.arange(N).expand(B, N))
    ):
        raise ValueError(f"order must hold the positions 0 to {N - 1} of each of {B} texts, as order_from_mask does")
    if prompt.shape != (B,) or not bool(((prompt >= 0) & (prompt <= N)).all()):
        raise ValueError(f"prompt must be [B] = [{B}] lengths from 0 to {N}, got {prompt.tolist()}")
    if attention_mask is not None:
        real = attention_mask.cpu() != 0
        if real.shape != (B, N) or not bool((real.gather(1, order).long().diff() <= 0).all()):
            raise ValueError(f"attention_mask must be [{B}, {N}] and order put padding last, as order_from_mask does")
        if not bool((prompt <= real.sum(1)).all()):
            raise ValueError(f"prompt counts padding: {prompt.tolist()} of {real.sum(1).tolist()} tokens")
    if draft_weight > 0:
        for name, value in (("block_size", block_size), ("block_offset", block_offset)):
            if value is None or value.shape != (B,) or int(value.min()) < (name == "block_size"):
                raise ValueError(
                    f"{name} must be int64 [{B}] for a draft_weight of {draft_weight}, got {value}; see random_blocks"
                )
