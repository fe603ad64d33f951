"""Train the embedded model `tiny-causal` on a folder of plain text books, on a CPU.

    python recipes/tiny_causal/train.py DATA_FOLDER WORK_FOLDER [--steps N]

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import read_books
from evaluate import held_out_scores
from safetensors import safe_open
from safetensors.torch import save_file
from text_codec import BOS, EOS, PAD, SPECIALS, TokenStream, encode_sections, load_or_train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyquiet.files import replacing

sys.path.insert(0, str(Path(__file__).parent.parent / "story_world"))
from texts import story_rows


@dataclass(frozen=True)
class Settings:
    """What decides the weights, besides the books."""

    steps: int
    tokens_per_step: int = 4096
    peak_rate: float = 3e-3
    warm_up: int = 200
    weight_decay: float = 0.1
    seed: int = 0
    intermediate_size: int = 352
    leave_out: tuple[str, ...] = ()  # books that another model is to learn from
    base: str = ""  # folder of the model to go on from
    stories: float = 0.0  # share of the rows of `recipes/story_world`


# Most steps see short crops; the longer ones teach the positions up to the context of 1024.
CROP_LENGTHS = (256, 256, 256, 512, 256, 256, 256, 1024)
VALIDATE_EVERY = 500
SAVE_EVERY = 250


def model_config(intermediate_size: int = Settings.intermediate_size) -> LlamaConfig:
    """1.90 million parameters at the default size: 6 query heads share 2 key/value heads; embeddings are tied."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=intermediate_size,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a half cosine that ends at zero."""
    if step < settings.warm_up:
        return settings.peak_rate * (step + 1) / settings.warm_up
    done = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    return settings.peak_rate * 0.5 * (1 + math.cos(math.pi * done))


def batch_of(stream: TokenStream, tokenizer: Tokenizer, step: int, settings: Settings) -> Tensor:
    """int64 [B, T]: crops of the books and rows of stories.

    Drawn from (seed, step) alone, so a resumed run sees what an unbroken one would have seen.
    """
    ids = crops(stream, step, settings)
    stories = round(settings.stories * len(ids))
    if stories:
        rows = story_rows(
            settings.seed,
            step,
            stories,
            ids.shape[1],
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        )
        ids = torch.cat([rows, ids[stories:]])
    return ids


def crops(stream: TokenStream, step: int, settings: Settings) -> Tensor:
    """int64 [B, T]: half of the crops start at a paragraph, behind <bos>; the rest anywhere."""
    generator = np.random.default_rng((settings.seed, step))
    length = CROP_LENGTHS[step % len(CROP_LENGTHS)]
    rows = settings.tokens_per_step // length
    offsets = generator.integers(0, len(stream.ids) - length, size=rows)
    at_paragraph = generator.random(rows) < 0.5
    batch = np.empty((rows, length), dtype=np.int64)
    for row, (offset, snap) in enumerate(zip(offsets, at_paragraph, strict=True)):
        if snap:
            offset = stream.paragraph_before(offset)
            batch[row, 0] = BOS
            batch[row, 1:] = stream.ids[offset : offset + length - 1]
        else:
            batch[row] = stream.ids[offset : offset + length]
    return torch.from_numpy(batch)


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.95), fused=True)


def save_checkpoint(
    file: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, settings: Settings
) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach()
        tensors[f"exp_avg/{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
    metadata = {"step": str(step), "settings": json.dumps(asdict(settings))}
    with replacing(file) as partial:
        save_file(tensors, partial, metadata)


def load_checkpoint(file: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, settings: Settings) -> int:
    """The number of finished steps; ValueError when the checkpoint has other settings."""
    with safe_open(file, framework="pt") as saved:
        metadata = saved.metadata()
        if metadata["settings"] != json.dumps(asdict(settings)):
            raise ValueError(
                f"{file} was made with {metadata['settings']}, not {asdict(settings)}; "
                "give the same settings or another work folder"
            )
        step = int(metadata["step"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved.get_tensor(f"weight/{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": saved.get_tensor(f"exp_avg/{name}"),
                    "exp_avg_sq": saved.get_tensor(f"exp_avg_sq/{name}"),
                }
    return step


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a Hugging Face folder, of which `recipes/export.py` makes the one that is shipped."""
    model.save_pretrained(folder)
    pad, bos, eos = SPECIALS
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=model.config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    words.save_pretrained(folder)


def train_step(model: Module, optimizer: torch.optim.AdamW, ids: Tensor, rate: float, bf16: bool) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    labels = ids.masked_fill(ids == BOS, -100)  # <bos> is given, never predicted
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(data: Path, work: Path, settings: Settings, args: argparse.Namespace) -> None:
    work.mkdir(parents=True, exist_ok=True)
    books = read_books(data)
    if unknown := set(settings.leave_out) - {book.name for book in books}:
        raise ValueError(
            f"--leave-out {' '.join(sorted(unknown))}: no such book in {data}; give the file's name without .txt"
        )
    books = [book for book in books if book.name not in settings.leave_out]
    tokenizer = load_or_train_tokenizer(work / "tokenizer.json", books)
    stream = encode_sections(tokenizer, [section for book in books for section in book.train])
    torch.manual_seed(settings.seed)
    model = (
        LlamaForCausalLM.from_pretrained(settings.base, dtype=torch.float32)
        if settings.base
        else LlamaForCausalLM(model_config(settings.intermediate_size))
    )
    optimizer = make_optimizer(model, settings)
    checkpoint, log = work / "checkpoint.safetensors", work / "log.jsonl"
    first = load_checkpoint(checkpoint, model, optimizer, settings) if checkpoint.exists() else 0
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(stream.ids)} training tokens, from step {first}")
    # Compiled once for each crop length; it shares the weights with `model`.
    step_model = torch.compile(model, dynamic=False) if args.compile else model
    begin, losses = time.monotonic(), []
    for step in tqdm(range(first, settings.steps), disable=args.quiet, mininterval=5, unit="step"):
        rate = learning_rate(step, settings)
        ids = batch_of(stream, tokenizer, step, settings)
        losses.append(train_step(step_model, optimizer, ids, rate, not args.no_bf16))
        last = step + 1 == settings.steps
        if (step + 1) % SAVE_EVERY == 0 or last:
            save_checkpoint(checkpoint, model, optimizer, step + 1, settings)
        if (step + 1) % VALIDATE_EVERY == 0 or last:
            held_out = held_out_scores(model, tokenizer, books)["all"]
            speed = (step + 1 - first) * settings.tokens_per_step / (time.monotonic() - begin)
            record = {
                "step": step + 1,
                "train_loss": round(sum(losses) / len(losses), 4),
                "held_out_loss": round(held_out.loss, 4),
                "bits_per_character": round(held_out.bits_per_character, 4),
                "tokens_per_second": round(speed),
            }
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            tqdm.write(json.dumps(record))
            losses = []
    save_model(model, tokenizer, work / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder of the books, one .txt file each")
    parser.add_argument("work", type=Path, help="folder for the tokenizer, checkpoint, log and model")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--peak-rate", type=float, default=Settings.peak_rate)
    parser.add_argument("--intermediate-size", type=int, default=Settings.intermediate_size)
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="BOOK", help="names of books not to train on")
    parser.add_argument("--base", default="", metavar="FOLDER", help="model to go on from, of the same tokenizer")
    parser.add_argument("--stories", type=float, default=0.0, metavar="SHARE", help="of the rows from story_world")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-bf16", action="store_true", help="compute in float32 throughout")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a compiler")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(
        steps=args.steps,
        peak_rate=args.peak_rate,
        intermediate_size=args.intermediate_size,
        leave_out=tuple(args.leave_out),
        base=args.base,
        stories=args.stories,
    )
    train(args.data, args.work, settings, args)


if __name__ == "__main__":
    main()
