"""Turn a trained denoiser or energy into a folder with float16 weights and its tokenizer.

python recipes/tiny_denoiser/export.py TRAINED_FOLDER MODEL_FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from pyquiet.diffusion import NCEEnergyConfig

LENGTH = 128  # tokens of the texts that they learned from
SIZE_LIMIT = 4_000_000  # bytes of a folder's model and tokenizer


def export(trained: Path, folder: Path) -> None:
    energy = isinstance(AutoConfig.from_pretrained(trained), NCEEnergyConfig)
    model = (AutoModel if energy else AutoModelForMaskedLM).from_pretrained(trained).half()
    if energy:
        model.config.base_config._name_or_path = ""  # where the denoiser lay when the energy was begun
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, but packages are for everyone
    size = sum(file.stat().st_size for file in folder.glob("*") if file.suffix in (".safetensors", ".json"))
    if size > SIZE_LIMIT:
        raise ValueError(f"{folder} takes {size} bytes, more than {SIZE_LIMIT}")
    print(f"{folder}: {size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("trained", type=Path, help="the --output of pyquiet train diffusion or energy")
    parser.add_argument("model", type=Path, help="folder to write")
    args = parser.parse_args()
    export(args.trained, args.model)


if __name__ == "__main__":
    main()
