"""Weights that other code saved, as tensors by name."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote, read with `weights_only=True`.

    They share no memory with the file, which may then be replaced.

    Raises:
        ValueError: it cannot be read, or holds more than tensors by name; the message names it.
    """
    try:
        if file.suffix == ".safetensors":
            return {name: value.clone() for name, value in load_file(file).items()}
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: no weights can be read from it ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{file} must hold tensors by name, the state dict alone; save model.state_dict()")
    return weights
