"""Checkpoints of the released Quiet-STaR (arXiv 2403.09629) and Fast Quiet-STaR (arXiv 2505.17746) code as our models.

Both are copies of a base's own class, so that a state dict holds the base's keys and, beside them,

    talk_head.0.{0, 2, 4}           the mixing head's three linear layers; its output is the weight of the thought
    start_embedding, end_embedding  [2, d]: the embedding divided by 100, and the log standard deviation of a noise that
                                    the code leaves off; the second row is dropped

The last two rows of the vocabulary are the tokens <|startthought|> and <|endthought|>.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from pyquiet.checks import some_of
from pyquiet.quiet_star.configuration import QuietStarConfig
from pyquiet.quiet_star.modeling import QuietStarForCausalLM
from pyquiet.weights import read_weights

_BASES = ("mistral", "qwen2")
# The released code has more settings than it has checkpoints: the model is the same under these alone.
_SETTINGS = {
    "merged_talk_heads": True,
    "merged_lm_and_talk_heads": False,
    "use_concat_talk_head": True,
    "use_complex_talk_head": True,
    "use_weighted_talk_head": True,
    "use_shallow_talk": False,
    "use_reparam_for_thought_embeddings": False,
}
_WITHOUT_EFFECT = (
    *("max_thoughts", "n_ahead", "n_ahead_talk", "n_passes"),
    *("merged_lm_and_think_heads", "use_shallow_think", "use_complex_think_head"),
    *("architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype"),
)
_META_TOKENS = ("start_embedding", "end_embedding")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_released(
    folder: str | os.PathLike[str], *, n_ahead: int | None = None, dtype: torch.dtype | None = None, **options: Any
) -> QuietStarForCausalLM:
    """A thinking model from the folder of a released checkpoint: config.json and weights, in one file or in shards.

    Safetensors are taken before pytorch_model.bin, which is read with `weights_only=True`. The weights are in memory
    once. Arguments, result and errors are those of `convert_released`.

    Raises:
        FileNotFoundError: config.json or the weights are not there. ValueError: a file of weights cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder {folder} has no config.json: give the folder of a downloaded checkpoint")
    config = json.loads((folder / "config.json").read_text())
    model = convert_released(_read_weights(folder), config, n_ahead=n_ahead, dtype=dtype, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def convert_released(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | PreTrainedConfig,
    *,
    n_ahead: int | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> QuietStarForCausalLM:
    """A thinking model with `official=True` from a state dict and configuration of the released code.

    Args:
        state_dict: left as it is. The model shares the memory of what it need not cast.
        config: the released configuration, or the dict of its config.json. Its model_type, "mistral" or "qwen2", names
            the base's class.
        n_ahead: as in the released code: base pass, START, n_ahead - 3 thought tokens, END. None takes the
            configuration's, where it is stored.
        dtype: of the base; None is that of the stored embeddings. START, END and the head are in float32 at least.
        options: further arguments of `from_pretrained`, such as device_map or attn_implementation.

    Returns:
        The model in eval mode; `save_pretrained` writes it as any thinking model.

    Raises:
        ValueError: n_ahead is neither given nor stored, or below 3; a setting or base is not supported; keys are
            missing or unknown; a shape is wrong. The message names it, and nothing has been loaded.
    """
    settings = dict(config.to_dict() if isinstance(config, PreTrainedConfig) else config)
    thinking = _configuration(settings, n_ahead)
    _check_weights(state_dict, thinking)
    stored = state_dict["model.embed_tokens.weight"].dtype
    weights = {_our_name(key): value[0].clone() if key in _META_TOKENS else value for key, value in state_dict.items()}
    model: QuietStarForCausalLM = QuietStarForCausalLM.from_pretrained(
        None, config=thinking, state_dict=weights, dtype=dtype or stored, **options
    )
    return model


def _configuration(settings: dict[str, Any], n_ahead: int | None) -> QuietStarConfig:
    """Our configuration from the released one; takes the fields that the base does not know out of `settings`."""
    if (kind := settings.get("model_type")) not in _BASES:
        raise ValueError(f"config: model_type {kind!r} is not supported; released models are {' or '.join(_BASES)}")
    for name, value in _SETTINGS.items():
        if (found := settings.pop(name, value)) != value:
            raise ValueError(f"config: {name}={found} is not supported, only {name}={value}, as in the released models")
    others = {name: settings.pop(name, None) for name in _WITHOUT_EFFECT}
    if (n_ahead := others["n_ahead"] if n_ahead is None else n_ahead) is None:
        raise ValueError(
            "n_ahead must be given, as the configuration does not store it: 8 for a model called 8-ahead "
            f"(max_thoughts={others['max_thoughts']} is n_ahead + n_ahead_talk + 1 in the released scripts)"
        )
    return QuietStarConfig.from_official(n_ahead, base_config=AutoConfig.for_model(**settings), official=True)


def _check_weights(state_dict: Mapping[str, Tensor], config: QuietStarConfig) -> None:
    with torch.device("meta"):
        model = QuietStarForCausalLM(config)
    expected = {_released_name(key): tuple(value.shape) for key, value in model.state_dict().items()}
    expected |= {key: (2, *expected[key]) for key in _META_TOKENS}
    if model.config.tie_word_embeddings and "lm_head.weight" not in state_dict:
        del expected["lm_head.weight"]
    if missing := sorted(expected.keys() - state_dict.keys()):
        raise ValueError(f"state_dict lacks {some_of(missing)}: this is no checkpoint of the released Quiet-STaR code")
    if unknown := sorted(state_dict.keys() - expected.keys()):
        raise ValueError(
            f"state_dict has unknown keys, {some_of(unknown)}: beside the base's, only talk_head.0.{{0,2,4}} (one "
            "mixing head of three layers), start_embedding and end_embedding are supported"
        )
    for key, shape in expected.items():
        if tuple(state_dict[key].shape) != shape:
            raise ValueError(
                f"state_dict: {key} has shape {list(state_dict[key].shape)}, not {list(shape)} as config says"
            )


def _our_name(key: str) -> str:
    if key in _META_TOKENS:
        return key
    return key.replace("talk_head.0.", "mixing_head.", 1) if key.startswith("talk_head.") else f"base.{key}"


def _released_name(key: str) -> str:
    return key.removeprefix("base.").replace("mixing_head.", "talk_head.0.")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / name).is_file():
            files = [name]
        else:
            continue
        return {key: value for file in files for key, value in read_weights(folder / file).items()}
    raise FileNotFoundError(f"folder {folder} has no weights: neither {' nor '.join(_WEIGHTS)}, whole or in shards")
