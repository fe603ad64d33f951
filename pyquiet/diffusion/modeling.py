"""The denoiser of masked diffusion around a masked language model as it is (arXiv 2406.07524).

Its law of a masked position is the softmax of the model's own logits without the mask token. Observed positions have no
law: a caller asks for the rows of masked positions alone, so the LM head sees no others.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from pyquiet.checks import check_count
from pyquiet.diffusion.padding import leftward, where_real
from pyquiet.heads import run_standing_in, stand_in
from pyquiet.kernels.registration import reads_natively

_LEFTWARD = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()} - {*MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()}
_ROPE_BASE = 1000.0  # in short texts a small model finds its neighbours sooner than by a large one


class Denoiser(Protocol):
    """What the samplers, losses and likelihoods need of a denoiser; any object that has it passes for one."""

    mask_id: int
    vocab_size: int

    @property
    def device(self) -> torch.device: ...

    @property
    def training(self) -> bool: ...

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """States [B, T, d] of texts int64 [B, T] with mask_id where they are masked; attention_mask is 0 at padding."""
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Logits [R, V] of states [R, d]; -inf for the mask token."""
        ...


class MaskedDenoiser(nn.Module):
    """A denoiser that is any Hugging Face masked language model, unmodified: its trunk, its head, its weights.

    It is not conditioned on time: what is masked tells it how much is left to do.

    Args:
        model: a `...ForMaskedLM`: BERT, RoBERTa, ModernBERT, ALBERT, DistilBERT, ELECTRA, ...
        mask_id: the id of the mask token; None takes `model.config.mask_token_id`.

    Raises:
        TypeError: the model is no masked language model. ValueError: mask_id is unknown or outside the vocabulary.
    """

    def __init__(self, model: PreTrainedModel, mask_id: int | None = None) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
            raise TypeError(
                "model must be a masked language model with its head, as BertForMaskedLM is, got "
                f"{type(model).__name__}"
            )
        if type(model).__name__ in _LEFTWARD or model.config.is_encoder_decoder:
            raise TypeError(f"model is a {type(model).__name__}, which reads to the left alone; give a masked LM")
        self.model = model
        self.training = model.training
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        found = getattr(model.config, "mask_token_id", None) if mask_id is None else mask_id
        if found is None:
            raise ValueError(
                "mask_id is None and model.config has no mask_token_id; give "
                "MaskedDenoiser(model, mask_id=tokenizer.mask_token_id)"
            )
        if not 0 <= found < self.vocab_size:
            raise ValueError(f"mask_id must be a token of the model, in 0..{self.vocab_size - 1}, got {found}")
        self.mask_id = int(found)
        self.context = longest_text(model)
        """The most positions that the model was made for; None where it does not say."""
        self._head = (_headed(model),)  # in a tuple, or its weights would be registered twice

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast(torch.device, self.model.device)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The trunk's last hidden states [B, T, d] of texts int64 [B, T] with mask_id where they are masked.

        attention_mask: [B, T], 0 at padding, on either side.
        """
        if attention_mask is None:
            return cast(Tensor, self.model.base_model(input_ids=input_ids).last_hidden_state)
        # With padding to the right, for BERT and its kin count positions from the first column.
        places = leftward(attention_mask != 0)
        ids, mask = input_ids.gather(1, places), attention_mask.gather(1, places)
        hidden: Tensor = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.take_along_dim(places.argsort(1)[..., None], 1)

    def head(self, rows: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, d], float32 (float64 of a float64 model); -inf for the mask token."""
        return widened(self.native_head(rows))

    def native_head(self, rows: Tensor) -> Tensor:
        """The same in the model's own dtype where kernels draw from it, so that no copy in float32 is made."""
        logits: Tensor = run_standing_in(self._head[0], inputs_embeds=rows[None]).logits[0]
        logits = logits if reads_natively(logits) else widened(logits)
        mask = torch.tensor([self.mask_id], device=logits.device)
        fill = logits.index_fill if logits.requires_grad else logits.index_fill_
        return fill(1, mask, -torch.inf)

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probabilities [n, V] of the n masked positions, row by row of the texts."""
        masked = masked_positions(input_ids, self.mask_id, attention_mask)
        return self.head(self.hidden(input_ids, attention_mask)[masked]).log_softmax(-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same as `log_probs`."""
        return self.log_probs(input_ids, attention_mask)


class _Given(nn.Module):
    """In the place of a trunk: hands on the hidden states that are given as its input."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def _headed(model: PreTrainedModel) -> PreTrainedModel:
    """The model's head alone, as its own forward applies it: a copy that shares all but the trunk."""
    return stand_in(model, {name: _Given() for name, part in model._modules.items() if part is model.base_model})


def longest_text(model: PreTrainedModel) -> int | None:
    """The most positions that a model was made for, if it says."""
    context: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, table in model.base_model.named_modules():
        # RoBERTa and its kin number positions from behind that of padding.
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            return int(table.num_embeddings) - int(table.padding_idx) - 1
    return context


def widened(logits: Tensor) -> Tensor:
    """Logits of half precision as float32, others as they are."""
    return logits.float() if logits.element_size() < 4 else logits


def native_head(denoiser: Denoiser, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The head whose logits are drawn from, of hidden states of a dtype: one that does not widen half precision."""
    return getattr(denoiser, "native_head", denoiser.head) if dtype.itemsize < 4 else denoiser.head


def as_denoiser(model: Any) -> Denoiser:
    """The denoiser itself, or that of a masked language model.

    Raises:
        TypeError, ValueError: it is neither; as `MaskedDenoiser`.
    """
    lacking = [
        name for name in ("mask_id", "vocab_size", "device", "training", "hidden", "head") if not hasattr(model, name)
    ]
    if not lacking:
        return cast(Denoiser, model)
    if hasattr(model, "hidden") and hasattr(model, "head"):
        raise TypeError(f"denoiser is a {type(model).__name__} that lacks {', '.join(lacking)}; see diffusion.Denoiser")
    return MaskedDenoiser(model)


def masked_positions(input_ids: Tensor, mask_id: int, attention_mask: Tensor | None = None) -> Tensor:
    """Where texts [B, T] are masked and no padding, bool [B, T]."""
    return where_real(input_ids, attention_mask) & (input_ids == mask_id)


def backbone(
    vocab_size: int,
    *,
    mask_token_id: int,
    hidden_size: int = 192,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 6,
    intermediate_size: int = 320,
    max_position_embeddings: int = 1024,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> ModernBertForMaskedLM:
    """A small bidirectional model with random weights, to train from: ModernBERT with rotary positions.

    All layers see the whole text, there is no dropout, and embeddings are tied.

    Raises:
        TypeError, ValueError: a size is no count, or the width cannot be shared by the heads.
    """
    sizes = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads, "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
    }  # fmt: skip
    for name, size in sizes.items():
        check_count(name, size, least=1)
    if hidden_size % (2 * num_attention_heads):
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of 2 num_attention_heads={num_attention_heads}")
    config = ModernBertConfig(
        **sizes,
        layer_types=["full_attention"] * num_hidden_layers,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": _ROPE_BASE}},
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        cls_token_id=None,
        sep_token_id=None,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,
    )
    config.mask_token_id = mask_token_id
    return ModernBertForMaskedLM(config)
