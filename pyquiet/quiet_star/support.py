"""Which bases can think: what is refused of a whole model, and of a layer when thoughts come to it."""

import inspect
import math
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


def check_supported(base: PreTrainedModel) -> None:
    """Raises NotImplementedError if the base is known not to be able to think, naming its class and why."""
    config = base.config.get_text_config()
    reason = None
    others = set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYERS
    if base.config.is_encoder_decoder or not base.can_generate() or base.get_output_embeddings() is None:
        reason = "it is not a causal decoder with a language-model head"
    elif not base._can_set_attn_implementation():
        reason = "it does not follow the transformers attention interface"
    elif not _takes_positions(base.base_model):
        reason = "it counts positions itself: its forward takes no position_ids"
    elif getattr(config, "kv_lora_rank", None):
        reason = "it uses latent attention (MLA)"
    elif getattr(config, "alibi", False):
        reason = "it uses ALiBi"
    elif getattr(config, "use_bidirectional_attention", None) is True:
        reason = "its attention is not causal (use_bidirectional_attention)"
    elif others:
        reason = f"it has layers of type {', '.join(sorted(others))}"
    elif any(hasattr(module, "sinks") for module in base.modules()):
        reason = "it uses attention sinks"
    if reason is not None:
        raise NotImplementedError(f"{type(base).__name__} cannot think: {reason}")


def _takes_positions(network: nn.Module) -> bool:
    """Whether a network's forward takes `position_ids`; of a wrapper that takes anything, its decoder's."""
    parameters = inspect.signature(type(network).forward).parameters
    if "args" in parameters:
        decoder = getattr(network, "decoder", None)
        return decoder is None or _takes_positions(decoder)
    return "position_ids" in parameters


def check_layer(
    module: nn.Module, query: Tensor, value: Tensor, own_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raises NotImplementedError for a layer whose attention is more than the kernel computes for path rows.

    query [B, H, rows, D], value [B, G, S, D]; `own_mask` is the mask that path rows came with.
    """
    reason = None
    if own_mask is not None:  # the base's mask function has made none
        reason = "a mask or bias of its own"
    elif kwargs.get("s_aux") is not None:
        reason = "attention sinks"
    elif kwargs.get("position_bias") is not None:
        reason = "a position bias in the attention (ALiBi or relative)"
    elif value.shape[-1] != query.shape[-1]:
        reason = "keys and values of different sizes (latent attention)"
    elif query.shape[-1] > 256:
        reason = f"a head size of {query.shape[-1]}, above 256"
    elif kwargs.get("sliding_window") is None and _slides(module, getattr(module, "config", None)):
        reason = "a sliding layer that does not tell its window to the attention function"
    if reason is not None:
        raise NotImplementedError(f"thoughts cannot pass {type(module).__name__}: it uses {reason}")


def _slides(module: Any, config: Any) -> bool:
    """Whether a layer's configuration says that it has a window, and one that a text can outgrow."""
    if types := getattr(config, "layer_types", None):
        return bool(types[module.layer_idx] == "sliding_attention")
    window = getattr(config, "sliding_window", None)
    return window is not None and window < getattr(config, "max_position_embeddings", math.inf)
