"""The door of `diffuse`: what texts and options it takes, and what is wrong with others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyquiet.checks import check_count, check_fraction, check_number, check_word
from pyquiet.diffusion.energy import Energy, as_energy
from pyquiet.diffusion.modeling import Denoiser
from pyquiet.diffusion.padding import places_of, where_real
from pyquiet.diffusion.schedule import Schedule
from pyquiet.kernels.importance_resampling import SCHEMES
from pyquiet.randomness import process_logits, resolve_sequence_ids

SAMPLERS = ("schedule_first", "ancestral", "cached", "first_hitting", "semi_autoregressive")
MODES = ("standard", "reveal_set")


@dataclass(frozen=True)
class Texts:
    """B texts of T columns to be filled. All but the tokens is bookkeeping and on the CPU.

    Attributes:
        tokens: int64 [B, T], mask_id where they are to be filled.
        fill: bool [B, T], the positions to fill.
        real: bool [B, T], False at padding.
        places: int64 [B, T], the position of each column in its text, padding not counted.
        sequences: int64 [B], the ids that name their noise.
    """

    tokens: Tensor
    fill: Tensor
    real: Tensor
    places: Tensor
    sequences: Tensor


@dataclass(frozen=True)
class Options:
    """How a step chooses its tokens; the words are those of `diffuse`."""

    energy: Energy | None
    candidates: int
    window: float
    energy_temperature: float
    proposal: dict[str, Any]
    correct: bool
    mode: str
    ess_target: float | None
    max_candidates: int
    scheme: str
    seed: int
    energy_microbatch: int | None

    @property
    def processed(self) -> bool:
        """Whether candidates come from another law than the denoiser's; what is banned is taken out of both."""
        p = self.proposal
        return bool(p["temperature"] != 1 or p["top_k"] is not None or p["top_p"] not in (None, 1))

    @property
    def weighs(self) -> bool:
        """Whether there is an energy and more than one candidate to weigh by it."""
        return self.energy is not None and max(self.candidates, self.ess_target or 1) > 1

    def truncates(self, vocab_size: int) -> bool:
        """Whether some tokens of the denoiser can never be drawn."""
        p = self.proposal
        fewer = (p["top_k"] or vocab_size) < vocab_size or (p["top_p"] or 1) < 1 or p["temperature"] == 0
        return bool(fewer or (p["banned"] is not None and p["banned"].any()))


def read_texts(
    denoiser: Denoiser,
    input_ids: Tensor | None,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    length: int | None,
    num_samples: int,
    sequence_ids: Tensor | None,
) -> Texts:
    """The texts of a call, checked.

    Raises:
        TypeError, ValueError: an argument does not fit the others; a given token is outside of the vocabulary or masked
            itself; the denoiser is in training mode.
    """
    if denoiser.training or getattr(getattr(denoiser, "model", None), "training", False):
        raise ValueError("denoiser is in training mode, where dropout changes its law; call denoiser.eval()")
    check_count("num_samples", num_samples, least=1)
    for name, value in (("input_ids", input_ids), ("mask", mask), ("attention_mask", attention_mask)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if input_ids is None:
        tokens = _empty(denoiser, length, num_samples, mask, attention_mask)
    else:
        tokens = _given(denoiser, input_ids, length)
    real = where_real(tokens, attention_mask)
    fill = tokens == denoiser.mask_id if mask is None else mask
    for name, value in (("mask", fill), ("attention_mask", real)):
        if value.dtype != torch.bool or value.shape != tokens.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {list(tokens.shape)}"
                f"{', and be bool' if name == 'mask' else ''}, got {value.dtype} {list(value.shape)}"
            )
    if attention_mask is not None and (other := attention_mask[(attention_mask != 0) & (attention_mask != 1)]).numel():
        raise ValueError(f"attention_mask must hold 1, and 0 at padding, got {other[0].item()}")
    real, fill = real.cpu(), fill.cpu()
    if not real.any(1).all():
        raise ValueError(f"attention_mask hides all of text {int((~real.any(1)).nonzero()[0])}; leave it out")
    fill = fill & real
    tokens = _checked_tokens(denoiser, tokens, fill, real)
    if num_samples > 1 and input_ids is not None:
        if len(tokens) > 1:
            raise ValueError(f"num_samples={num_samples} goes with one text, got {len(tokens)} in input_ids")
        tokens, fill, real = (x.repeat(num_samples, 1) for x in (tokens, fill, real))
    return Texts(tokens, fill, real, places_of(real), resolve_sequence_ids(sequence_ids, len(tokens)))


def check_clean(denoiser: Denoiser, tokens: Tensor, where: str = "") -> None:
    """Raises ValueError, which says where, unless clean tokens int64 [n] are the denoiser's, and none its mask."""
    wrong = tokens[(tokens == denoiser.mask_id) | (tokens < 0) | (tokens >= denoiser.vocab_size)]
    if len(wrong):
        raise ValueError(
            f"input_ids hold {int(wrong[0])}{where}; give clean texts of ids in 0..{denoiser.vocab_size - 1} other "
            f"than the mask's, {denoiser.mask_id}"
        )


def check_context(denoiser: Denoiser, columns: int) -> None:
    """Raises ValueError for texts of more columns than the denoiser was made for, where it says."""
    most = getattr(denoiser, "context", None)
    if most is not None and columns > most:
        raise ValueError(
            f"input_ids: texts of {columns} columns are longer than the {most} that the denoiser was made for; shorten "
            f"them, or let diffuse slide over them (sampler='semi_autoregressive', context={most})"
        )


def check_energy(energy: Energy, texts: Texts, rows: Tensor, columns: Tensor) -> None:
    """Asks an energy whether it takes some of the texts, rows int64 [b], in their columns int64 [b, W]."""
    on_cpu, device = (rows[:, None], columns), texts.tokens.device
    real = texts.real[on_cpu].to(device)
    tokens = texts.tokens[tuple(x.to(device) for x in on_cpu)]
    energy.check(tokens, texts.fill[on_cpu].to(device), None if bool(real.all()) else real)


def read_schedule(schedule: Schedule | None) -> Schedule:
    """The schedule, the linear one for None; TypeError for anything else."""
    schedule = Schedule() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__} {schedule!r}")
    return schedule


def _empty(
    denoiser: Denoiser, length: int | None, num_samples: int, mask: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    if length is None:
        raise ValueError("input_ids and length are both None: give texts to fill, or the length of new ones")
    if mask is not None or attention_mask is not None:
        raise ValueError("mask and attention_mask go with input_ids, which is None")
    shape = (num_samples, check_count("length", length, least=1))
    return torch.full(shape, denoiser.mask_id, dtype=torch.int64, device=denoiser.device)


def _given(denoiser: Denoiser, input_ids: Tensor, length: int | None) -> Tensor:
    if length is not None:
        raise ValueError(f"length={length} goes with input_ids=None; append the mask id {denoiser.mask_id} to them")
    if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be int64 [B, T] with B and T at least 1, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if input_ids.device != denoiser.device:
        raise ValueError(f"input_ids must be on the denoiser's device, {denoiser.device}, not on {input_ids.device}")
    return input_ids


def _checked_tokens(denoiser: Denoiser, tokens: Tensor, fill: Tensor, real: Tensor) -> Tensor:
    fill, real = fill.to(tokens.device), real.to(tokens.device)
    given = tokens[~fill]
    wrong = given[(given < 0) | (given >= denoiser.vocab_size)]
    if len(wrong):
        raise ValueError(
            f"input_ids holds the token {int(wrong[0])}, which is outside of the vocabulary of {denoiser.vocab_size}"
        )
    kept = (tokens == denoiser.mask_id) & real & ~fill
    if kept.any():
        row, column = kept.nonzero()[0].tolist()
        raise ValueError(
            f"mask gives the token of text {row} at {column}, but input_ids holds the mask id {denoiser.mask_id} "
            "there; set mask there, or give a token"
        )
    return tokens.masked_fill(fill, denoiser.mask_id)


def read_energy(energy: Any) -> Energy | None:
    """The energy, or None for None; TypeError or ValueError where it is none, or in training mode."""
    if getattr(energy, "training", False):
        raise ValueError("energy is in training mode, where dropout changes it; call energy.eval()")
    return None if energy is None else as_energy(energy)


def read_options(denoiser: Denoiser, options: Options) -> Options:
    """The options of a call, with what is banned on the denoiser's device.

    Raises:
        TypeError, ValueError: one is out of range.
    """
    o, most = options, options.max_candidates
    check_count("candidates", o.candidates, least=1)
    check_fraction("window", o.window)
    if not 0 < check_number("energy_temperature", o.energy_temperature) < math.inf:
        raise ValueError(f"energy_temperature must be positive and finite, got {o.energy_temperature}")
    check_word("mode", o.mode, MODES)
    check_word("scheme", o.scheme, SCHEMES)
    check_count("max_candidates", most, least=1)
    if o.ess_target is not None and not 1 <= check_number("ess_target", o.ess_target) <= most:
        raise ValueError(f"ess_target must be in [1, max_candidates] = [1, {most}], got {o.ess_target}")
    if o.ess_target is not None and o.candidates > most:
        raise ValueError(f"candidates={o.candidates} must be at most max_candidates={most} with an ess_target")
    if o.energy_microbatch is not None:
        check_count("energy_microbatch", o.energy_microbatch, least=1)
    return replace(options, proposal=_checked_proposal(denoiser, **o.proposal))


def _checked_proposal(denoiser: Denoiser, banned: Tensor | None, **options: Any) -> dict[str, Any]:
    """The options of the proposal, tried on a row of zeros: what is wrong with them is known before any call."""
    if banned is not None and not isinstance(banned, Tensor):
        raise TypeError(f"banned must be a bool tensor [V] or None, got {type(banned).__name__}")
    banned = banned if banned is None else banned.to(denoiser.device)
    process_logits(torch.zeros(1, denoiser.vocab_size, device=denoiser.device), banned=banned, **options)
    if banned is not None:
        left = ~banned
        left[denoiser.mask_id] = False
        if not left.any():
            raise ValueError("banned leaves nothing but the mask token of the vocabulary")
    return {**options, "banned": banned}


def check_sampler(
    sampler: str,
    hooks: dict[str, Callable[..., Any] | None],
    energy: Energy | None,
    context: int | None,
    stride: int | None,
) -> None:
    """Raises TypeError or ValueError for a sampler, its windows or hooks that do not go together."""
    check_word("sampler", sampler, SAMPLERS)
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise TypeError(f"{name} must be callable or None, got {type(hook).__name__}")
        if hook is not None and name in ("order", "remask") and sampler != "schedule_first":
            raise ValueError(f"{name} decides itself what opens in a step, so sampler={sampler!r} cannot; leave it out")
    if hooks["tokens"] is not None and energy is not None:
        raise ValueError("tokens takes the place of the pick by energy; leave one of the two out")
    if sampler != "semi_autoregressive":
        if context is not None or stride is not None:
            raise ValueError(f"context and stride go with sampler='semi_autoregressive', got sampler={sampler!r}")
        return
    if context is None:
        raise ValueError("context is None: say how many tokens the denoiser sees at once")
    check_count("context", context, least=1)
    if stride is not None and check_count("stride", stride, least=1) > context:
        raise ValueError(f"stride={stride} must be at most context={context}, or positions would be left out")
