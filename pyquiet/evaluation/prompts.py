"""Texts and prompts as token ids, and batches of prompts continued with or without thoughts."""

from collections.abc import Sequence
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Think = Literal["always", "never"]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text alone, nothing put before or behind it, however long it is."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before a text: BOS for most, for some none."""
    text, full = token_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    starts = (i for i in range(len(full)) if full[i : i + len(text)] == text)
    return full[: next(starts, 0)]


def continuation_ids(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Ids of `text` as it is written right behind `before`; ValueError where a token spans both."""
    head, whole = token_ids(tokenizer, before), token_ids(tokenizer, before + text)
    if whole[: len(head)] != head:
        raise ValueError(f"tokenizer: {before!r} and {text!r} share a token, so that the text cannot be told apart")
    return whole[len(head) :]


def padded(rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [B, T], of rows of ids padded with 0 on that side."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_side=side
    )
    length = torch.tensor([len(row) for row in rows])
    column = torch.arange(ids.shape[1])
    mask = column < length[:, None] if side == "right" else column >= ids.shape[1] - length[:, None]
    return ids, mask.long()


def can_think(model: PreTrainedModel) -> bool:
    """Whether it is a thinking model and no plain one."""
    return hasattr(model, "think_at_every_token")


def check_think(model: PreTrainedModel, think: str) -> None:
    """Raises ValueError for another word than "always" and "never", or for thoughts of a plain model."""
    if think not in ("always", "never"):
        raise ValueError(f'think must be "always" or "never", got {think!r}')
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
