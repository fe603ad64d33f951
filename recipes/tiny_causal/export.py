"""Turn a finished training run into a Hugging Face folder with float16 weights.

python recipes/tiny_causal/export.py WORK_FOLDER MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from text_codec import SPECIALS
from tokenizers import Tokenizer
from train import model_config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SIZE_LIMIT = 4_000_000  # bytes of model.safetensors


def trained_model(checkpoint: Path) -> LlamaForCausalLM:
    """The float32 model of a training checkpoint."""
    with safe_open(checkpoint, framework="pt") as saved, torch.no_grad():
        settings = json.loads(saved.metadata()["settings"])
        model = LlamaForCausalLM(model_config(settings["intermediate_size"]))
        for name, parameter in model.named_parameters():
            parameter.copy_(saved.get_tensor(f"weight/{name}"))
    return model.eval()


def export(work: Path, folder: Path) -> None:
    model = trained_model(work / "checkpoint.safetensors").half()
    model.save_pretrained(folder)
    pad, bos, eos = SPECIALS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(work / "tokenizer.json")),
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=model.config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)  # written for the owner alone, but packages are for everyone
    size = weights.stat().st_size
    if size > SIZE_LIMIT:
        raise ValueError(f"model.safetensors takes {size} bytes, more than {SIZE_LIMIT}")
    print(f"{folder}: model.safetensors {size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("work", type=Path, help="work folder of train.py")
    parser.add_argument("model", type=Path, help="folder to write")
    args = parser.parse_args()
    export(args.work, args.model)


if __name__ == "__main__":
    main()
