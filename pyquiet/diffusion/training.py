"""What denoisers and energies learn from.

Denoisers learn from texts in part masked, weighed so that the loss bounds their NLL (arXiv 2406.07524); energies, to
tell texts from the denoiser's completions of them (noise-contrastive estimation, arXiv 2410.21357).

Words: B texts, T positions, V vocabulary, d width, n masked positions. All losses are in nats.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyquiet.checks import check_count, check_fraction, check_word
from pyquiet.diffusion.inputs import check_clean, read_schedule
from pyquiet.diffusion.modeling import as_denoiser, native_head
from pyquiet.diffusion.padding import places_of, where_real
from pyquiet.diffusion.schedule import Schedule
from pyquiet.kernels.importance_resampling import draw_candidates
from pyquiet.losses import LOGITS, token_nlls
from pyquiet.randomness import Purpose, Stream, check_sequence_ids, uniforms

OBJECTIVES = ("low_variance", "continuous")
MIN_TIME = 1e-3  # the smallest time that a text is noised to
_PLACES = 0  # the index, in a stream, of which positions are masked


class Masks(NamedTuple):
    """What is masked in texts, bool [B, T], how a loss weighs its tokens [B], and the times that this is of [B]."""

    masked: Tensor
    weight: Tensor
    time: Tensor


class Nelbo(NamedTuple):
    """The bound in nats a token, [], and its parts: for each text, an estimate of a bound of -log p in nats, [B]."""

    loss: Tensor
    text: Tensor


def random_masks(
    level: Tensor,
    input_ids: Tensor,
    *,
    seed: int,
    sequence_ids: Tensor,
    attention_mask: Tensor | None = None,
    objective: str = "low_variance",
    schedule: Schedule | None = None,
    min_time: float = MIN_TIME,
) -> Masks:
    """Masks of texts int64 [B, T] whose noise is as high as `level` says, in [0, 1); padding is never masked.

    "continuous": each token is masked by itself at time min_time + (1 - min_time) level, and weighs -alpha' / (1 -
    alpha). "low_variance": 1 + floor(level T) of a text's T tokens are, all sets being equally likely, and weigh T / n.
    Over uniform levels both have the same mean, but for times below min_time, which the first leaves out: that of the
    NELBO. What is masked depends on the seed, the text's id [B] and its level alone. On the CPU.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong shape.
    """
    schedule = read_schedule(schedule)
    _check(level, input_ids, sequence_ids, objective, min_time)
    level, real = level.cpu().double(), where_real(input_ids, attention_mask).cpu()
    places = places_of(real)
    sequences = sequence_ids.cpu()[:, None].expand_as(places)
    stream = Stream(seed, Purpose.REVEAL, sequences.flatten(), places.flatten(), index=_PLACES)
    u = uniforms(stream, places.numel()).view(places.shape)
    if objective == "continuous":
        time = min_time + (1 - min_time) * level
        return Masks((u >= schedule.alpha(time)[:, None]) & real, schedule.weight(time), time)
    total = real.sum(1)
    count = (1 + (level * total).floor()).clamp(max=total)
    masked = u.masked_fill(~real, 2).argsort(1).argsort(1) < count[:, None]
    return Masks(masked & real, total / count.clamp(min=1), schedule.time(1 - count / total.clamp(min=1)))


def nelbo(
    denoiser: Any,
    input_ids: Tensor,
    *,
    masked: Tensor,
    weight: Tensor,
    attention_mask: Tensor | None = None,
    token_count: Tensor | None = None,
) -> Nelbo:
    """The weighted NLL of masked tokens: an estimate of a bound of the texts' NLL (NELBO), without bias.

    The LM head sees the masked positions alone, and no more logits exist at a time than take 32 MB.

    Args:
        denoiser: as `as_denoiser` takes it.
        input_ids: the clean texts, int64 [B, T].
        masked, weight: as `random_masks` gives them, bool [B, T] and [B].
        attention_mask: [B, T], 0 at padding.
        token_count: [], tokens of the joint batch that this one is a part of; the parts' losses then add up to its own.

    Raises:
        ValueError: shapes do not fit, or a text holds the mask token or what is no token.
    """
    denoiser = as_denoiser(denoiser)
    masked, weight = masked.to(input_ids.device), weight.to(input_ids.device)
    if masked.shape != input_ids.shape or weight.shape != input_ids.shape[:1]:
        raise ValueError(
            f"masked must be [B, T] = {list(input_ids.shape)} and weight [B], got {list(masked.shape)} and "
            f"{list(weight.shape)}"
        )
    real = where_real(input_ids, attention_mask)
    check_clean(denoiser, input_ids[real])
    hidden = denoiser.hidden(input_ids.masked_fill(masked, denoiser.mask_id), attention_mask)
    nlls = token_nlls(denoiser.head, hidden[masked], input_ids[masked], denoiser.vocab_size)
    row = masked.nonzero()[:, 0]
    text = nlls.new_zeros(len(input_ids)).index_add_(0, row, nlls * weight.to(nlls.dtype)[row])
    count = real.sum() if token_count is None else token_count
    return Nelbo(text.sum() / count, text)


class DenoiserLearner(nn.Module):
    """The loss as the forward of a module around the model, so that all that wraps a module wraps it: DDP, autocast."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, **batch: Any) -> Nelbo:
        return nelbo(self.denoiser, **batch)


def nce_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """The loss [B] of the energies of texts [B] and of nu completions of each by the proposal mu [B, nu].

    softplus(E + log nu) of the text plus the sum of softplus(-E - log nu) of the completions: least at
    E = log mu - log p, p the law of the texts, whatever nu is. As softplus, its gradient is right for any energy.

    Raises:
        ValueError: shapes do not fit, or there is no negative.
    """
    if positive.ndim != 1 or negative.ndim != 2 or len(positive) != len(negative) or not negative.shape[1]:
        raise ValueError(
            f"positive must be [B] and negative [B, nu] with nu >= 1, got {list(positive.shape)} and "
            f"{list(negative.shape)}"
        )
    log_nu = math.log(negative.shape[1])
    return softplus(positive + log_nu) + softplus(-negative - log_nu).sum(1)


@torch.no_grad()
def completions(
    denoiser: Any,
    input_ids: Tensor,
    *,
    masked: Tensor,
    count: int,
    seed: int,
    sequence_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Draws int64 [B, count, T] from the denoiser's law of the masked ones of clean texts int64 [B, T].

    The denoiser is in evaluation mode as it proposes, whatever mode it is in. Completion j of position i is that of
    candidate j in a sampler's step 0 for this seed and text's id, so batches and padding have no say.

    Raises:
        ValueError, TypeError: a text holds the mask token or what is no token; another argument does not fit.
    """
    denoiser, count = as_denoiser(denoiser), check_count("count", count, least=1)
    if masked.shape != input_ids.shape:
        raise ValueError(f"masked must be [B, T] = {list(input_ids.shape)}, got {list(masked.shape)}")
    check_sequence_ids(sequence_ids, len(input_ids))
    real = where_real(input_ids, attention_mask)
    check_clean(denoiser, input_ids[real])
    masked = masked.to(input_ids.device)
    row, column = masked.nonzero(as_tuple=True)
    position = places_of(real)[row, column]
    sequence = sequence_ids.to(input_ids.device)[row]
    with _evaluating(denoiser):
        hidden = denoiser.hidden(input_ids.masked_fill(masked, denoiser.mask_id), attention_mask)[row, column]
        drawn, head = [input_ids.new_empty(0, count)], native_head(denoiser, hidden.dtype)
        for part in torch.arange(len(row), device=row.device).split(max(1, LOGITS // denoiser.vocab_size)):
            stream = Stream(seed, Purpose.CANDIDATE, sequence[part], position[part])
            drawn.append(draw_candidates(head(hidden[part]), count, stream=stream).tokens)
    out = input_ids[:, None].repeat(1, count, 1)
    out[row, :, column] = torch.cat(drawn)
    return out


@contextmanager
def _evaluating(denoiser: Any) -> Iterator[None]:
    """The denoiser in evaluation mode; modules of a denoiser that is none have no mode."""
    modules = list(denoiser.modules()) if isinstance(denoiser, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _check(level: Tensor, input_ids: Tensor, sequence_ids: Tensor, objective: str, min_time: float) -> None:
    for name, value in (("level", level), ("input_ids", input_ids)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be int64 [B, T] with tokens, got {input_ids.dtype} {list(input_ids.shape)}")
    check_sequence_ids(sequence_ids, len(input_ids))
    if level.shape != input_ids.shape[:1] or not bool(((level >= 0) & (level <= 1)).all()):
        raise ValueError(f"level must be [B] = [{len(input_ids)}] numbers in [0, 1], got {level.tolist()}")
    check_word("objective", objective, OBJECTIVES)
    check_fraction("min_time", min_time)
