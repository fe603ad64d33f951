"""Turn a trained model into a folder with float16 weights and its tokenizer, as it is shipped.

python recipes/export.py TRAINED_FOLDER MODEL_FOLDER [--max-length N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

import pyquiet

SIZE_LIMIT = 5_000_000  # bytes of a folder's model and tokenizer


def trained_model(folder: Path) -> Any:
    """The model, of the class that its configuration names."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return (getattr(pyquiet, name, None) or getattr(transformers, name)).from_pretrained(folder)


def export(trained: Path, folder: Path, max_length: int | None) -> None:
    model = trained_model(trained).half()
    model.config.use_cache = True  # which training turned off
    if model.can_generate() and model.config.model_type == "xlnet":
        model.generation_config.max_length = 1024  # an XLNet's configuration knows none, and generate asks for one
    if hasattr(model.config, "base_config"):
        model.config.base_config._name_or_path = ""  # where the base lay when training was begun
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for where in ("is_local", "local_files_only"):  # how it was loaded here
        tokenizer.init_kwargs.pop(where, None)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)  # in less than half of the bytes
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, but packages are for everyone
    size = sum(file.stat().st_size for file in folder.glob("*") if file.suffix in (".safetensors", ".json"))
    if size > SIZE_LIMIT:
        raise ValueError(f"{folder} takes {size} bytes, more than {SIZE_LIMIT}")
    print(f"{folder}: {size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("trained", type=Path, help="a folder that training wrote")
    parser.add_argument("model", type=Path, help="folder to write")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of the texts it learned from")
    args = parser.parse_args()
    export(args.trained, args.model, args.max_length)


if __name__ == "__main__":
    main()
