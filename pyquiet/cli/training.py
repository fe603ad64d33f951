"""What the methods of `pyquiet train` share: options, data, where to go on, and the lines that they print."""

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyquiet.cli.options import Number, Whole, add_quiet, usable_device
from pyquiet.zoo import check_known


def schedule(name: str) -> str:
    """The type of --schedule. Its names are read when one is given: they come with all of transformers' trainer."""
    from transformers import SchedulerType

    names = [str(kind.value) for kind in SchedulerType]
    if name not in names:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {name!r}")
    return name


# Options that are training arguments by another name: option -> (argument, its type or choices, default, help).
Options = dict[str, tuple[str, Callable[[str], Any] | tuple[str, ...], Any, str]]
SHARED: Options = {
    "--steps": ("max_steps", Whole(), None, "optimiser steps (default: --epochs)"),
    "--epochs": ("num_train_epochs", Number(0, open=True), 1, "passes over the data"),
    "--batch-size": ("per_device_train_batch_size", Whole(), 8, "texts at a time, in each process"),
    "--accumulate": ("gradient_accumulation_steps", Whole(), 1, "batches of a step"),
    "--schedule": ("lr_scheduler_type", schedule, "cosine", "of the learning rates, as transformers names it"),
    "--warmup-steps": ("warmup_steps", Whole(0), 20, "of the learning rates"),
    "--log-every": ("logging_steps", Whole(), 10, "steps"),
    "--eval-every": ("eval_steps", Whole(), 100, "steps; needs --eval-text or --eval-dataset"),
    "--save-every": ("save_steps", Whole(), 100, "steps; the last two checkpoints are kept"),
}
RATE, SEED, SHARE = Number(0), Whole(0, 2**32), Number(0, 1)  # types of options that only some methods have


def add_method(
    methods: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str, description: str
) -> argparse.ArgumentParser:
    """The parser of a method, which says what all of them can behind its own description."""
    goes_on = "Given again after it was stopped, the command goes on from the last checkpoint in --output."
    words = f"{description} {goes_on} Start it with torchrun for several processes."
    return methods.add_parser(name, help=what, description=words)


def add_size(parser: argparse.ArgumentParser, *, heads: int, inner: int) -> "argparse._ArgumentGroup":
    """Adds the sizes of a fresh model, for `check_start`."""
    size = parser.add_argument_group("a fresh model")
    size.add_argument("--layers", type=Whole(), default=4, help="number of layers")
    size.add_argument("--width", type=Whole(), default=192, help="size of the hidden states, a multiple of --heads")
    size.add_argument("--heads", type=Whole(), default=heads, help="attention heads")
    size.add_argument("--inner", type=Whole(), default=inner, help="width of the MLPs")
    return size


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
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU if there is one)")
    add_quiet(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further training arguments")
    for option, (_, kind, default, what) in options.items():
        how: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        how["metavar"] = getattr(kind, "metavar", "NAME")
        parser.add_argument(option, default=default, help=what, **how)


def training_arguments(args: argparse.Namespace, kind: Any, options: Options, *words: str, **more: Any) -> Any:
    """The training arguments of this kind that the options say; ValueError names what transformers does not take."""
    from transformers import HfArgumentParser

    if not find_spec("accelerate"):
        raise ImportError('training needs accelerate: pip install "pyquiet[train]"')

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise ValueError(message)

    values = {name: vars(args)[option[2:].replace("-", "_")] for option, (name, *_) in options.items()}
    values |= {"output_dir": args.output, "save_total_limit": 2, "report_to": "none", "bf16": args.bf16}
    values |= _machine(args.device) | {"disable_tqdm": args.quiet or not sys.stderr.isatty()}
    values["eval_strategy"] = "steps" if args.eval_text or args.eval_dataset else "no"
    further = dict(pair.split("=", 1) if "=" in pair else (pair, "true") for pair in args.set)
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := [name for name in further if name not in known]:
        raise ValueError(f"--set {unknown[0]}: {kind.__name__} has no such argument")
    values |= more | further
    given = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    try:
        (training,) = Parser(kind).parse_args_into_dataclasses([*given, *words])
    except ValueError as error:
        spelled = {name: option for option, (name, *_) in options.items()}
        raise ValueError(re.sub(r"^\w+", lambda name: spelled.get(name[0], name[0]), str(error))) from None
    return training


def _machine(device: str | None) -> dict[str, Any]:
    """The training arguments of where to run; ValueError for a device that cannot be used."""
    import torch

    if device is not None:
        usable_device(device)
    cpu = device == "cpu" or not torch.accelerator.is_available()
    return {"use_cpu": cpu, "dataloader_pin_memory": not cpu}


def read_data(args: argparse.Namespace) -> tuple[Iterable[str], Iterable[str] | None]:
    """The documents to learn from and those to evaluate on; OSError if the output could not be written."""
    from pyquiet.datasets import read_dataset
    from pyquiet.files import check_writable, read_texts

    def read(files: list[str] | None, name: str | None) -> Iterable[str] | None:
        if name:
            return read_dataset(name, args.dataset_column)
        return read_texts(files) if files else None

    check_writable(args.output, make=True)
    return read(args.text, args.dataset) or [], read(args.eval_text, args.eval_dataset)


def check_start(args: argparse.Namespace) -> None:
    """ValueError where no model is named and no tokenizer for a fresh one, for no model at all, or sizes that clash."""
    if not (args.model or args.tokenizer):
        raise ValueError("say which --model to train, or whose --tokenizer a fresh one is to have, e.g. tiny-causal")
    if not args.model and args.width % args.heads:
        raise ValueError(f"--width must be a multiple of --heads {args.heads}, got {args.width}")
    if args.model:
        check_known("--model", args.model)


def train(trainer: Any, in_words: Callable[[int, dict[str, float]], str]) -> int:
    """Runs the trainer from its last checkpoint on, if there is one, and saves the model."""
    from pyquiet.trainers import last_checkpoint

    show_lines(trainer, in_words)
    checkpoint = last_checkpoint(trainer.args.output_dir)
    done = checkpoint is not None and _is_last(checkpoint, trainer.args)
    if checkpoint and trainer.is_world_process_zero():
        print(f"{checkpoint} is of the last step: nothing to do" if done else f"going on from {checkpoint}")
    if done:  # the trainer would make one step more
        return 0
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"the trained model is in {trainer.args.output_dir}")
    return 0


def _is_last(checkpoint: str, args: Any) -> bool:
    """Whether training ended with this checkpoint, and the trained model was saved."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    steps = args.max_steps if args.max_steps > 0 else math.inf
    ended = state.global_step >= steps or (steps == math.inf and (state.epoch or 0) >= args.num_train_epochs)
    return ended and any(Path(args.output_dir).glob("*.safetensors"))


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
