"""Checks of what a user hands in, made before anything is computed."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from pyquiet.datasets import IGNORED
from pyquiet.quiet_star.configuration import QuietStarConfig


def real_tokens(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """bool [B, T]: no padding; None stands for a mask of ones."""
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> None:
    """Raises TypeError or ValueError unless ids are int64 [B, T] in range and each row of the mask is one run."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 tensor of token ids, got {kind}")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids must be [B, T] with at least one token, got shape {list(input_ids.shape)}; an empty prompt has "
            "nothing to think about: start it with the BOS token"
        )
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"input_ids must lie in 0..{vocabulary - 1}, the model's vocabulary; got {low if low < 0 else high}"
        )
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must have the shape {list(input_ids.shape)} of input_ids, got {got}")
    mask = attention_mask.to(torch.int8)
    if ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError("attention_mask must hold 0 (padding) and 1 (token) only")
    runs = (mask.diff(dim=1, prepend=mask.new_zeros(len(mask), 1)) == 1).sum(1)
    for row, count in enumerate(runs.tolist()):
        if count != 1:
            what = "is all padding" if count == 0 else "has padding between tokens"
            raise ValueError(f"attention_mask row {row} {what}; each row must be one unbroken run of tokens")


def check_positions(positions: Tensor | None, input_ids: Tensor) -> Tensor:
    """int64 [B, K]: the columns after which to think, all of input_ids [B, T] for None; else TypeError, ValueError."""
    B, T = input_ids.shape
    if positions is None:
        return torch.arange(T, device=input_ids.device).expand(B, T)
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be an int64 tensor of columns, got {got}")
    if positions.ndim not in (1, 2) or positions.shape[:-1] not in ((), (B,)) or not positions.numel():
        raise ValueError(f"positions must be [K] or [{B}, K] with K of at least 1, got {list(positions.shape)}")
    if (positions < 0).any() or (positions >= T).any():
        found = f"{positions.min()}..{positions.max()}"
        raise ValueError(f"positions must lie in 0..{T - 1}, the columns of input_ids, got {found}")
    return positions.expand(B, -1)


def check_context(config: QuietStarConfig, length: int, thought_tokens: int | None = None) -> None:
    """Raises ValueError if a text of `length` tokens and the thought after its last pass the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    m = config.thought_tokens if thought_tokens is None else thought_tokens
    needed = length + m + 2
    if context is not None and needed > context:
        raise ValueError(
            f"input_ids too long: {length} tokens, with those to come, and a thought of {m} tokens with START and END "
            f"need {needed} positions, but the model's context (max_position_embeddings) is {context}; shorten the "
            "text, ask for fewer new tokens, or shorten thought_tokens"
        )


def check_way(config: GenerationConfig, assistant: Any, rows: int, vocabulary: int) -> None:
    """Raises ValueError for ways of generating that know no thoughts, outputs they lack, a pad token that is none."""
    way = config.get_generation_mode(assistant)
    if way not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        what = way.value.replace("_", " ")
        raise ValueError(f'generate with thoughts is greedy or samples; for {what} give think="never"')
    for name, usual in (("guidance_scale", 1), ("output_attentions", 0), ("output_hidden_states", 0)):
        if (value := getattr(config, name, None)) not in (None, usual):
            raise ValueError(f'generate with thoughts does not take {name}={value}: leave it out or give think="never"')
    pad, rows = config.pad_token_id, rows * (config.num_return_sequences or 1)
    if rows > 1 and config.eos_token_id is not None and pad is not None and not 0 <= pad < vocabulary:
        raise ValueError(
            f"pad_token_id must lie in 0..{vocabulary - 1}, the model's vocabulary, where rows may end before others; "
            f"got {pad}"
        )


def check_labels(labels: Tensor | None, input_ids: Tensor, *, some: bool) -> None:
    """Raises ValueError unless labels are None or, everywhere, -100 or the id, and not -100 alone where `some`."""
    if labels is None:
        return
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must have the shape {list(input_ids.shape)} of input_ids, got {list(labels.shape)}")
    if ((labels != input_ids) & (labels != IGNORED)).any():
        raise ValueError(
            "labels must equal input_ids, or be -100 where a token is not to be predicted: after a thought the text "
            "itself is read on; do not shift them"
        )
    if some and (labels[:, 1:] == IGNORED).all():
        raise ValueError("labels are -100 at all tokens but the first of each text, so there is nothing to predict")


def check_lookahead(lengths: Tensor, needed: int, lookahead: int) -> None:
    """Raises ValueError unless one of the texts is long enough to learn from: longer than `needed` tokens."""
    if (longest := int(lengths.max())) <= needed:
        raise ValueError(
            f"input_ids too short: the longest text has {longest} tokens, but with a lookahead of {lookahead} tokens "
            f"after each thought one of at least {needed + 1} is needed; give longer texts or a smaller lookahead"
        )


def to_left_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their padding moved to the left; each row's tokens are one run (`check_inputs`)."""
    T = input_ids.shape[1]
    mask = attention_mask.to(torch.bool)
    end = T - mask.flip(1).long().argmax(1)  # column after each row's last token
    source = (torch.arange(T, device=input_ids.device) + end[:, None]) % T
    return input_ids.gather(1, source), attention_mask.gather(1, source)


def check_no_nan(base: Tensor, mixed: Tensor) -> None:
    """Raises ValueError, naming the row, if log-probabilities [B, T-1] or [B, T-1, N] hold NaN."""
    bad = base.isnan().any(-1) | mixed.isnan().flatten(1).any(-1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"the model's logits for row {row} hold NaN; its weights or its dtype's range are broken")
