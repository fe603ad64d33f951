"""What the methods of `pyquiet train` share: options, data, where to go on, and the lines that they print."""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

# Options that are training arguments by another name: option -> (argument, default, help).
Options = dict[str, tuple[str, Any, str]]
SHARED: Options = {
    "--steps": ("max_steps", None, "optimiser steps (default: --epochs)"),
    "--epochs": ("num_train_epochs", 1, "passes over the data"),
    "--batch-size": ("per_device_train_batch_size", 8, "texts a micro-batch and process"),
    "--accumulate": ("gradient_accumulation_steps", 1, "micro-batches a step"),
    "--schedule": ("lr_scheduler_type", "cosine", "of the learning rates, as transformers names it"),
    "--warmup-steps": ("warmup_steps", 20, "of the learning rates"),
    "--log-every": ("logging_steps", 10, "steps"),
    "--eval-every": ("eval_steps", 100, "steps; needs --eval-text or --eval-dataset"),
    "--save-every": ("save_steps", 100, "steps; the last two checkpoints are kept"),
}


def add_options(parser: argparse.ArgumentParser, options: Options) -> None:
    """Adds the options of data, output and machine, and these."""
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", nargs="+", metavar="FILE", help="plain text, one document a file")
    data.add_argument("--dataset", metavar="NAME", help="of the datasets library, or a json, csv, parquet or txt file")
    parser.add_argument("--dataset-column", default="text", metavar="NAME", help="that holds the documents")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--eval-text", nargs="+", metavar="FILE", help="plain text to evaluate on")
    held_out.add_argument("--eval-dataset", metavar="NAME", help="to evaluate on, as --dataset")
    parser.add_argument("--output", required=True, metavar="DIR", help="for checkpoints and the trained model")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 over float32 weights")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further training arguments")
    for option, (_, default, what) in options.items():
        parser.add_argument(option, default=default, metavar="X", help=what)


def training_arguments(args: argparse.Namespace, kind: type, options: Options, *words: str, **more: Any) -> Any:
    """The training arguments of this kind that the options say; ValueError names what transformers does not take."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise ValueError(message)

    evaluates = args.eval_text or args.eval_dataset
    values = {name: vars(args)[option[2:].replace("-", "_")] for option, (name, _, _) in options.items()}
    values |= {"output_dir": args.output, "save_total_limit": 2, "report_to": "none", "bf16": args.bf16}
    values |= {"use_cpu": args.cpu, "eval_strategy": "steps" if evaluates else "no", "disable_tqdm": args.quiet}
    values |= more | dict(pair.split("=", 1) if "=" in pair else (pair, "true") for pair in args.set)
    given = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    (training,) = Parser(kind).parse_args_into_dataclasses([*given, *words])
    return training


def read_data(args: argparse.Namespace) -> tuple[Iterable[str], Iterable[str] | None]:
    """The documents to learn from and those to evaluate on; OSError if the output could not be written."""
    from pyquiet.datasets import read_dataset
    from pyquiet.files import read_texts

    def read(files: list[str] | None, name: str | None) -> Iterable[str] | None:
        if name:
            return read_dataset(name, args.dataset_column)
        return read_texts(files) if files else None

    os.makedirs(args.output, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output).close()  # an output that cannot be written is known before the training
    return read(args.text, args.dataset) or [], read(args.eval_text, args.eval_dataset)


def tokenizer(source: str) -> Any:
    """Of an embedded model's name or a model's folder; ValueError if there is none."""
    from transformers import AutoTokenizer

    from pyquiet.zoo import available, load

    if source in available():
        return load(source)[1]
    check_folder(source)
    return AutoTokenizer.from_pretrained(source)


def check_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise ValueError(f"there is no model folder {folder!r}")


def train(trainer: Any, in_words: Callable[[int, dict[str, float]], str]) -> int:
    """Runs the trainer from its last checkpoint on, if there is one, and saves the model."""
    from pyquiet.trainers import last_checkpoint

    show_lines(trainer, in_words)
    checkpoint = last_checkpoint(trainer.args.output_dir)
    if checkpoint and trainer.is_world_process_zero():
        print(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return 0


def show_lines(trainer: Any, in_words: Callable[[int, dict[str, float]], str]) -> None:
    """Has the trainer print a line a log, beside its progress bar, instead of all that it logs."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

    class Lines(ProgressCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            if logs and state.is_world_process_zero and (line := in_words(state.global_step, logs)):
                print(line, flush=True) if self.training_bar is None else self.training_bar.write(line)

    class Plain(PrinterCallback):
        on_log = Lines.on_log
        training_bar = None

    trainer.add_callback(Plain if trainer.args.disable_tqdm else Lines)
