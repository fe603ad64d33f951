"""Backends by what users call their models."""

import os
from typing import Any, cast

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pyquiet.scaling.backends.base import Backend
from pyquiet.scaling.backends.huggingface import HFBackend
from pyquiet.zoo import available, check_known, load

Model = Backend | tuple[PreTrainedModel, PreTrainedTokenizerBase] | str | os.PathLike[str]


def connect(name: str, model: Model) -> Backend:
    """The backend of a model.

    Args:
        name: of the argument, for errors.
        model: a backend; a model and its tokenizer; the name of an embedded model; the folder of a Hugging Face model,
            or its name on the hub, "owner/name", from where it is fetched unless it was before; or the address of an
            OpenAI-compatible server, as "http://host:port/v1" or, where it serves several models,
            "http://host:port/v1#model".

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(model, tuple):
        if len(model) != 2:
            raise ValueError(f"{name} must be (model, tokenizer), got a tuple of {len(model)}")
        return HFBackend(*model)
    if hasattr(model, "generate") and hasattr(model, "score") and hasattr(model, "ready"):
        return cast(Backend, model)
    if isinstance(model, PreTrainedModel):
        raise TypeError(f"{name} needs its tokenizer: pass ({name}, tokenizer)")
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"{name} must be a backend, (model, tokenizer), a name or an address, got {model!r}")
    text = os.fspath(model)
    if text.startswith(("http://", "https://")):
        from pyquiet.scaling.backends.openai import OpenAIBackend

        address, _, served = text.partition("#")
        return OpenAIBackend(address, served or None)
    return HFBackend(*(load(text) if text in available() else _pretrained(_folder(name, text))))


def _folder(name: str, path: str) -> str:
    """The folder itself, or where the model of that name lies that was fetched before; else the name as the hub has it.

    Only `owner/name` is asked for over the net, as transformers does it.
    """
    try:
        check_known(name, path)
    except ValueError as error:
        try:
            return str(snapshot_download(path, local_files_only=True))
        except (OSError, ValueError):  # no model's name at all, or one that was not fetched
            if path.count("/") == 1 and not path.startswith(("/", "./", "~")):
                return path
            raise ValueError(
                f"{error}, and not fetched from the Hugging Face hub before (hf download {path}); the address of a "
                "server begins with http:// or https://"
            ) from None
    return path


def _pretrained(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
