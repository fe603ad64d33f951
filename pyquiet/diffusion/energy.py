"""Energies: how a completion of a noisy text is judged beside the denoiser's own law (arXiv 2410.21357).

With mu the denoiser's law of the masked positions, each on its own, the corrected law of a clean text is
mu(x0 | x) exp(-E(x0, x, t)) / Z(x, t). A low energy is good.

Letters: B texts, k candidates of each, T positions.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyquiet.diffusion.padding import where_real


class Energy(ABC):
    """An energy E(x0, x, t); give its class `__call__`, and set what of the flags holds.

    Beyond one step the sampler's law is exact only if mu exp(-E) / Z is the posterior of one joint law at every x.
    """

    needs_log_mu: bool = False
    """It reads `log_mu`; else zeros may stand there."""
    self_normalized: bool = False
    """Z is 1, whatever the text and the time."""
    time_free: bool = False
    """It does not read `time`."""

    @abstractmethod
    def __call__(
        self,
        candidates: Tensor,
        input_ids: Tensor,
        time: Tensor,
        log_mu: Tensor,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The energies of k completions of each text, float32 [B, k] (float64 of a float64 model), in nats.

        Args:
            candidates: int64 [B, k, T], complete texts that agree with input_ids where these are not masked.
            input_ids: int64 [B, T], the mask id where a token is masked.
            time: float64 [B], from 1 (all is noise) to 0.
            log_mu: float [B, k], the sum over masked positions of the log-probability of the candidate's token under
                the denoiser's own law: never that of a proposal with temperature, top-k or top-p.
            attention_mask: [B, T], 0 at padding, on either side; what stands there has no say.
        """

    def check(self, input_ids: Tensor, masked: Tensor, attention_mask: Tensor | None = None) -> None:
        """Raises ValueError for texts that it will not take; a caller asks before it computes anything.

        input_ids: int64 [B, T], the mask id at `masked`, bool [B, T]; attention_mask: as above.
        """
        return


class _Function(Energy):
    needs_log_mu = True

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        call = function.forward if isinstance(function, nn.Module) else function
        try:
            self._masks = "attention_mask" in inspect.signature(call).parameters
        except ValueError:  # some built-in functions do not tell
            self._masks = False

    def __call__(
        self,
        candidates: Tensor,
        input_ids: Tensor,
        time: Tensor,
        log_mu: Tensor,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        more = {}
        if self._masks:
            more["attention_mask"] = where_real(input_ids, attention_mask)
        energies = self.function(candidates, input_ids, time, log_mu, **more)
        found = list(energies.shape) if isinstance(energies, Tensor) else type(energies).__name__
        if isinstance(energies, Tensor) and energies.is_complex():
            raise ValueError(f"energy must return real numbers, got {energies.dtype}")
        if found != (expected := list(candidates.shape[:2])):
            raise ValueError(f"energy must return a tensor [B, k] = {expected}, one number a candidate, got {found}")
        return energies if energies.dtype in (torch.float32, torch.float64) else energies.float()


def as_energy(energy: Any) -> Energy:
    """The energy itself, or one made of any function(candidates, input_ids, time, log_mu) -> [B, k].

    The function gets the tensors that `Energy.__call__` describes, in this order; a reward is one with its sign turned.
    One that names a parameter `attention_mask` gets that by its name too, always bool [B, T]. One that does not sees in
    the candidates of a ragged batch whatever stands in the padding.

    Raises:
        TypeError: it is neither. ValueError: from the energy, when the function returns another shape.
    """
    if isinstance(energy, Energy):
        return energy
    if not callable(energy) or isinstance(energy, PreTrainedModel):
        what = "; a causal language model becomes one by AREnergy(model)" if isinstance(energy, PreTrainedModel) else ""
        raise TypeError(
            "energy must be a pyquiet.diffusion.Energy or a function of (candidates, input_ids, time, log_mu), got "
            f"{type(energy).__name__}{what}"
        )
    return _Function(energy)


def check_candidates(candidates: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where the texts are no padding, bool [B, T]; ValueError where the shapes of the three do not fit."""
    if input_ids.ndim != 2 or candidates.ndim != 3 or candidates[:, 0].shape != input_ids.shape:
        raise ValueError(
            "candidates must be [B, k, T] and input_ids [B, T] with the same B and T, got "
            f"{list(candidates.shape)} and {list(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}"
        )
    return where_real(input_ids, attention_mask)


def check_mask_id(mask_id: int, input_ids: Tensor, masked: Tensor) -> None:
    """Raises ValueError where what stands at `masked`, bool [B, T], is not an energy's mask token."""
    other = input_ids[masked & (input_ids != mask_id)]
    if len(other):
        raise ValueError(f"energy: its mask_id is {mask_id}, but the denoiser's is {int(other[0])}; build it with that")
