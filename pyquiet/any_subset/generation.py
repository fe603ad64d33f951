"""Filling in through `model.generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyquiet.any_subset.sampling import infill


def generate(*, known: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Callable[..., Tensor]:
    """A decoding method for `model.generate(input_ids, custom_generate=...)`: fills the positions that are not `known`.

    `generate` then returns the filled texts, int64 [B, N]: their length is that of the input. What to fill and how is
    said here, not in the generation config. Without a length in its generation config, an XLNet's `generate` asks for
    one, as its configuration knows none; any will do, `max_new_tokens=1` say.

    Args:
        known: bool [B, N], the given positions.
        attention_mask: [B, N], 0 at padding.
        options: those of `infill`, but for `mask`.

    >>> from pyquiet import load
    >>> model, tokenizer = load("tiny-any-subset")
    >>> ids = tokenizer("The king said nothing.", return_tensors="pt").input_ids
    >>> known = torch.arange(ids.shape[1])[None] < 3
    >>> filled = model.generate(ids, custom_generate=generate(known=known, seed=0), max_new_tokens=1)
    >>> bool((filled == ids)[known].all())
    True

    Raises (from `model.generate`):
        ValueError: besides what `infill` raises, logits processors, which do not apply, or an attention mask with
            padding that was not given here.
    """

    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        raise TypeError(f"known must be a bool tensor [B, N], got {getattr(known, 'dtype', type(known).__name__)}")

    def decode(model: Any, input_ids: Tensor, logits_processor: Any = None, **kwargs: Any) -> Tensor:
        if logits_processor:
            names = ", ".join(type(processor).__name__ for processor in logits_processor)
            raise ValueError(
                f"logits_processor: {names} would not be applied; give temperature, top_k, top_p and banned to "
                "pyquiet.any_subset.generate"
            )
        inferred = kwargs.get("attention_mask")
        if attention_mask is None and inferred is not None and not inferred.all():
            raise ValueError(
                "attention_mask hides positions (transformers infers one where ids hold the pad token); give it, or "
                "all ones, to pyquiet.any_subset.generate"
            )
        return infill(model, input_ids, mask=~known, attention_mask=attention_mask, **options).tokens

    return decode
