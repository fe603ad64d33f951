"""Checkpoints of the released any-subset models (arXiv 2504.20456).

They are plain weights of transformers' XLNetLMHeadModel, whose head is tied to the embeddings.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import XLNetConfig, XLNetLMHeadModel

from pyquiet.checks import some_of
from pyquiet.weights import read_weights

_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile and wrappers
_EMBEDDING = "transformer.word_embedding.weight"


def load_released(
    path: str | os.PathLike[str],
    config: XLNetConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> XLNetLMHeadModel:
    """An XLNetLMHeadModel, in eval mode, from a Hugging Face folder or from a file of its state dict.

    Args:
        path: a folder with config.json and weights; or a .safetensors, .bin or .pt file of tensors by name, read with
            `weights_only=True`, whose names may begin with "module.", "_orig_mod." or "model.".
        config: of a file; None takes the config.json beside it or, without one, the sizes that the tensors have and
            XLNet's defaults for what they do not tell: GELU, no clamp_len, layer_norm_eps 1e-12.
        dtype: None is that of the weights.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: keys are missing or unexpected, a shape is wrong, or it is another model; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"path {path} has no config.json: give a model's folder, or the file of its weights"
            )
        return _loaded(path, path, config=_config(path / "config.json"), dtype=dtype or "auto")
    if not path.is_file():
        raise FileNotFoundError(f"path {path}: there is neither a model's folder nor a file of weights")
    weights = {_bare(key): value for key, value in read_weights(path).items()}
    beside = path.with_name("config.json")
    if config is None:
        config = _config(beside) if beside.is_file() else _inferred(weights, path)
    return _loaded(None, path, config=config, dtype=dtype or weights[_EMBEDDING].dtype, state_dict=weights)


def _loaded(folder: Path | None, path: Path, **options: Any) -> XLNetLMHeadModel:
    options |= {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = XLNetLMHeadModel.from_pretrained(folder, **options)
    except SafetensorError as error:
        raise ValueError(f"path {path}: its weights cannot be read ({error}); copy the model anew") from None
    wrong = [f"{key} of shape {list(found)}, not {list(told)}," for key, found, told in info["mismatched_keys"]]
    _check_names("lacks", info["missing_keys"], path)
    _check_names("has unexpected keys,", info["unexpected_keys"], path)
    _check_names("has", wrong, path)
    # Some of XLNet's parameters are made in float32 whatever is asked for.
    released: XLNetLMHeadModel = model.to(model.transformer.word_embedding.weight.dtype)
    return released.eval()


def _bare(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return _bare(key.removeprefix(prefix))
    return key


def _config(file: Path) -> XLNetConfig:
    config = json.loads(file.read_text())
    if (kind := config.get("model_type")) != "xlnet":
        raise ValueError(f"{file}: the model is of type {kind!r}; to fill in any order it must be an XLNet")
    return XLNetConfig(**config)


def _inferred(weights: Mapping[str, Tensor], path: Path) -> XLNetConfig:
    """The sizes of the tensors: embedding [V, d], queries [d, H, d / H], MLP [d_inner, d]."""
    query, inner = "transformer.layer.0.rel_attn.q", "transformer.layer.0.ff.layer_1.weight"
    _check_names("lacks", [key for key in (_EMBEDDING, query, inner) if key not in weights], path)
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.layer.")}
    vocabulary, width = weights[_EMBEDDING].shape
    heads, d_inner = weights[query].shape[1], weights[inner].shape[0]
    return XLNetConfig(vocab_size=vocabulary, d_model=width, n_layer=len(layers), n_head=heads, d_inner=d_inner)


def _check_names(what: str, names: Iterable[str], path: Path) -> None:
    if names := sorted(names):
        raise ValueError(f"path {path} {what} {some_of(names)}: it is no whole state dict of this XLNetLMHeadModel")
