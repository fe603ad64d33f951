"""The models and tokenizers that options name: embedded ones by their names, others by their folders."""

import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pyquiet import AREnergy, MaskedDenoiser, NCEEnergy, QuietStarForCausalLM, zoo
from pyquiet.any_subset import as_engine, load_released
from pyquiet.diffusion import check_tokenizers

THINKER, FILLER, DENOISER, CAUSAL = "tiny-thinker", "tiny-any-subset", "tiny-denoiser", "tiny-causal"


def _load(
    option: str, name: str, read: Callable[[str], Any], *, file: bool = False
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The embedded model of that name and its tokenizer, or what `read` makes of a folder, and None."""
    zoo.check_known(option, name, file=file)
    try:
        return zoo.load(name) if name in zoo.available() else (read(name), None)
    except SafetensorError as error:
        raise ValueError(f"{option} {name}: its weights cannot be read ({error}); copy the model anew") from None


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an embedded model or in a folder; ValueError names the option if there is none."""
    if name in zoo.available():
        return AutoTokenizer.from_pretrained(zoo.folder(name), local_files_only=True)
    files = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
    if not any(os.path.isfile(os.path.join(name, file)) for file in files):
        raise ValueError(
            f"{option} {name}: no tokenizer there ({', '.join(files)}); save it there, or name another's by "
            "--tokenizer, where a command has that option"
        )
    return AutoTokenizer.from_pretrained(name)


def _tokenizer(own: PreTrainedTokenizerBase | None, model: str, other: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that `--tokenizer` names, or else the model's own, loaded with it or in its folder."""
    if other not in (None, model):
        return load_tokenizer("--tokenizer", other)
    return own if own is not None else load_tokenizer("--model", model)


def load_for_training(option: str, name: str, kind: Any) -> Any:
    """The model, its weights in float32: in half precision small steps would be lost.

    Args:
        kind: the class whose `from_pretrained` reads it from a folder.
    """
    return _load(option, name, lambda folder: kind.from_pretrained(folder).float())[0]


def load_thinker(name: str, thought_tokens: int | None) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]:
    """The thinking model, or a plain causal LM wrapped, and its tokenizer; ValueError says what is wrong.

    Args:
        thought_tokens: of what is wrapped; a model that thinks brings its own.
    """

    how: dict[str, Any] = {} if thought_tokens is None else {"thought_tokens": thought_tokens}

    def read(folder: str) -> Any:
        thinks = AutoConfig.from_pretrained(folder).model_type == "quiet_star"
        return QuietStarForCausalLM.from_pretrained(folder) if thinks else QuietStarForCausalLM.from_base(folder, **how)

    model, own = _load("--model", name, read)
    tokenizer = _tokenizer(own, name, None)
    if not isinstance(model, QuietStarForCausalLM):
        model = QuietStarForCausalLM.from_base(model, tokenizer=tokenizer, **how)
    if thought_tokens not in (None, model.config.thought_tokens):
        raise ValueError(
            f"--thought-tokens {thought_tokens}: this model learned thoughts of {model.config.thought_tokens} tokens; "
            "leave the option out"
        )
    return model.eval(), tokenizer


def load_filler(name: str, tokenizer: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The XLNet of that name, folder or file, and its tokenizer or that of another; ValueError says what is wrong."""
    model, own = _load("--model", name, lambda where: load_released(where, dtype=torch.float32), file=True)
    as_engine(model)  # refuses what is no XLNet
    return model, _tokenizer(own, name, tokenizer)


def load_denoiser(name: str, tokenizer: str | None) -> tuple[MaskedDenoiser, PreTrainedTokenizerBase]:
    """The masked LM of that name or folder, and its tokenizer or that of another; ValueError says what is wrong."""

    def read(folder: str) -> Any:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise ValueError(f"--model {name}: a model of type {kind!r} is no masked language model")
        return AutoModelForMaskedLM.from_pretrained(folder).eval()

    model, own = _load("--model", name, read)
    words = _tokenizer(own, name, tokenizer)
    if words.mask_token_id is None:
        raise ValueError(f"the tokenizer of --model {name} has no mask token; name another by --tokenizer")
    return MaskedDenoiser(model, words.mask_token_id), words


def load_causal(option: str, name: str, kind: Any = AutoModelForCausalLM) -> tuple[Any, PreTrainedTokenizerBase]:
    """The causal LM of that name or folder, and its tokenizer; ValueError names the option."""
    model, own = _load(option, name, lambda folder: kind.from_pretrained(folder).eval())
    return model, load_tokenizer(option, name) if own is None else own


def load_energy(
    name: str, denoiser: MaskedDenoiser, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
) -> Any:
    """The energy of that name: none, ar, a trained one or a causal LM, on the denoiser's device."""
    if name == "none":
        return None
    name = CAUSAL if name == "ar" else name
    zoo.check_known("--energy", name)
    is_folder = name not in zoo.available()
    trained = is_folder and AutoConfig.from_pretrained(name).model_type == "pyquiet_energy"
    model, words = load_causal("--energy", name, AutoModel if trained else AutoModelForCausalLM)
    model = model.to(denoiser.device, dtype)
    try:
        check_tokenizers(tokenizer, words)
        if not isinstance(model, NCEEnergy):
            return AREnergy(model, bos_id=words.bos_token_id, mask_id=denoiser.mask_id)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--energy {name}: {error}") from None
    if model.mask_id != denoiser.mask_id:
        raise ValueError(f"--energy {name}: its mask has the id {model.mask_id}, the denoiser's {denoiser.mask_id}")
    return model


def network(energy: Any) -> Any:
    """The module in which the weights of an energy are; None of none."""
    return getattr(energy, "lm", energy)
