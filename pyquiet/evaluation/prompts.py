"""Batches of prompts continued with or without thoughts."""

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyquiet.checks import can_think, check_word
from pyquiet.quiet_star.thinking import Think
from pyquiet.tokens import padded


def check_think(model: PreTrainedModel, think: str) -> None:
    """Raises ValueError for another word than "always" and "never", or for thoughts of a plain model."""
    check_word("think", think, Think)
    if think == "always" and not can_think(model):
        raise ValueError(
            f'think="always" needs a thinking model, got {type(model).__name__}: wrap it with '
            'QuietStarForCausalLM.from_base, or ask for think="never"'
        )


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    think: Think,
    seed: int,
    sequence_ids: Sequence[int],
    thoughts_per_token: int | None = None,
    **generation: Any,
) -> Any:
    """What `model.generate` returns as a dict for prompts padded on the left, on the model's device.

    With think="always" a row's draws depend on (seed, sequence id) alone. A model without thoughts draws from torch's
    generator, which is seeded by (seed, first sequence id, longest prompt) for the call and put back: there the batch
    matters.
    """
    ids, mask = (x.to(model.device) for x in padded(prompts, "left"))
    options = {"attention_mask": mask, "return_dict_in_generate": True, "pad_token_id": 0, **generation}
    if think == "always":
        numbers = torch.tensor(sequence_ids, device=model.device)
        options |= {"seed": seed, "sequence_ids": numbers, "thoughts_per_token": thoughts_per_token}
        return model.generate(ids, think="always", **options)
    if can_think(model):
        options["think"] = "never"
    with torch.random.fork_rng():
        torch.manual_seed(Random(f"{seed} {sequence_ids[0]} {ids.shape[1]}").getrandbits(63))
        return model.generate(ids, **options)


def until_the_end(model: PreTrainedModel, tokens: Tensor) -> list[list[int]]:
    """The rows of generated tokens [B, new], each without its end of text and what follows that."""
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    return [row[: next((i for i, t in enumerate(row) if t in ends), None)] for row in tokens.tolist()]
