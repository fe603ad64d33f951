"""Filling in through `model.generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyquiet.any_subset.sampling import infill


def generate(*, known: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Callable[..., Any]:
    """A decoding method for `model.generate(input_ids, custom_generate=...)`: fills the positions that are not `known`.

    `generate` then returns the filled texts, int64 [B, N]: their length is that of the input. What to fill and how is
    said here, not in the generation config, of which `return_dict_in_generate` applies, and `num_return_sequences` for
    so many fillings of each text (transformers asks for `do_sample=True, top_k=0` with it). Without a length in its
    generation config, an XLNet's `generate` asks for one, as its configuration knows none; any will do,
    `max_new_tokens=1` say.

    Args:
        known: bool [B, N], the given positions of each text, however many fillings it gets.
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
        ValueError: besides what `infill` raises, what does not apply (logits processors, beams), or an attention
            mask with padding that was not given here. A streamer gets the input alone.
    """

    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        raise TypeError(f"known must be a bool tensor [B, N], got {getattr(known, 'dtype', type(known).__name__)}")

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        if logits_processor:
            names = ", ".join(type(processor).__name__ for processor in logits_processor)
            raise ValueError(
                f"logits_processor: {names} would not be applied; give temperature, top_k, top_p and banned to "
                "pyquiet.any_subset.generate"
            )
        if (beams := getattr(generation_config, "num_beams", None) or 1) > 1:
            raise ValueError(f"num_beams={beams}: texts are drawn here, not searched for; leave it out")
        inferred = kwargs.get("attention_mask")
        if attention_mask is None and inferred is not None and not inferred.all():
            raise ValueError(
                "attention_mask hides positions (transformers infers one where ids hold the pad token); give it, or "
                "all ones, to pyquiet.any_subset.generate"
            )
        times = getattr(generation_config, "num_return_sequences", None) or 1
        if known.shape != (len(input_ids) // times, input_ids.shape[1]):
            raise ValueError(
                f"known must be {[len(input_ids) // times, input_ids.shape[1]]} as input_ids, got {list(known.shape)}"
            )
        given, real = (None if x is None else x.repeat_interleave(times, 0) for x in (known, attention_mask))
        assert given is not None
        tokens = infill(model, input_ids, mask=~given, attention_mask=real, **options).tokens
        if getattr(generation_config, "return_dict_in_generate", False):
            from transformers.generation import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=tokens)
        return tokens

    return decode
