"""The embedded tiny models: small enough to ship, trained by the recipes of this repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyquiet.checks import check_word

__all__ = ["available", "folder", "held_out", "load"]

_FOLDER = Path(__file__).parent


def available() -> list[str]:
    """The names that `load` takes, sorted."""
    return sorted(config.parent.name for config in _FOLDER.glob("*/config.json"))


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model called `name`, in float32 and evaluation mode, and its tokenizer.

    Reads the files that came with the package: no network, no cache folder. Each call gives new objects. All but
    `tiny-puzzler` have one tokenizer, to which the two of diffusion add `<mask>`. Five know English prose in the manner
    of their training books, and a small generated world of stories: `tiny-causal`, a Llama of 1.9 million parameters;
    `tiny-thinker`, the same taught to think; `tiny-any-subset`, an XLNet of 2.3 million that fills in any part of a
    text; `tiny-denoiser`, a ModernBERT of 1.8 million for masked diffusion, and `tiny-energy`, an `NCEEnergy` of as
    many that corrects it. `tiny-draft` and `tiny-target`, Llamas of 0.3 and 1.7 million, write out solutions of
    arithmetic word problems; the draft gets half of them right. `tiny-puzzler`, of 0.1 million, learned to think from
    REINFORCE alone, on one puzzle. The limits of each are in the README.md of its folder.

    Raises ValueError for an unknown name.

    >>> model, tokenizer = load("tiny-causal")
    >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
    >>> text = tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
    """
    where = folder(name)
    model = _kind(where).from_pretrained(where, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
    return model.eval(), tokenizer


def folder(name: str) -> Path:
    """Where the files of the embedded model called `name` lie.

    Raises ValueError for an unknown name.
    """
    if name not in available():
        raise ValueError(f"name={name!r} is no embedded model; available: {', '.join(available())}")
    return _FOLDER / name


def check_known(option: str, name: str, *, file: bool = False) -> None:
    """ValueError, before anything is loaded, for what is neither an embedded model's name nor a model's folder.

    Args:
        option: what the name was given by, for the error.
        file: a file of weights will do as well.
    """
    found = name in available() or os.path.isfile(os.path.join(name, "config.json"))
    if not found and not (file and os.path.isfile(name)):
        what = f"no model folder (a folder with a config.json){', no file of weights' if file else ''}"
        raise ValueError(f"{option} {name}: {what} and no embedded model ({', '.join(available())})")


def held_out(kind: Literal["stories", "passages"]) -> list[dict[str, str]]:
    """Texts that no embedded model was trained on, each with its `text` and its `kind`: of story, or the book's name.

    "stories" are 180 of a small generated world, a third each "letters", "journeys" and "sums", whose conclusions are
    given at once; "passages" are 240 of some sentences each from the ends of the books.

    Raises ValueError for another kind.
    """
    check_word("kind", kind, ("stories", "passages"))
    lines = (_FOLDER / "texts" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _kind(where: Path) -> Any:
    """The Auto class of a folder's model."""
    (architecture,) = AutoConfig.from_pretrained(where, local_files_only=True).architectures
    if architecture.endswith("ForMaskedLM"):
        return AutoModelForMaskedLM
    return AutoModel if architecture == "NCEEnergy" else AutoModelForCausalLM
