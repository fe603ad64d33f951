"""`pyquiet train`: teach a model to think."""

import argparse
import os
import tempfile
from typing import TYPE_CHECKING, Any

from pyquiet.cli.think import MODEL_HELP, load_thinker

if TYPE_CHECKING:
    from pyquiet import QuietStarTrainingArguments

# Options that are training arguments by another name: option -> (argument, default, help).
OPTIONS: dict[str, tuple[str, Any, str]] = {
    "--steps": ("max_steps", None, "optimiser steps (default: --epochs)"),
    "--epochs": ("num_train_epochs", 1, "passes over the data"),
    "--batch-size": ("per_device_train_batch_size", 8, "texts a micro-batch and process"),
    "--accumulate": ("gradient_accumulation_steps", 1, "micro-batches a step"),
    "--max-length": ("max_length", 256, "tokens of a text; longer ones are cropped at seeded places"),
    "--learning-rate": ("learning_rate", 1e-5, "peak, of the base"),
    "--head-learning-rate": ("head_learning_rate", None, "of the mixing head (default: as the base)"),
    "--meta-learning-rate": ("meta_learning_rate", None, "of START and END as stored (default: as the base)"),
    "--schedule": ("lr_scheduler_type", "cosine", "of the learning rates, as transformers names it"),
    "--warmup-steps": ("warmup_steps", 20, "of the learning rates"),
    "--weight-decay": ("weight_decay", 1e-3, "of AdamW"),
    "--thoughts-per-token": ("thoughts_per_token", 2, "N"),
    "--lookahead": ("lookahead", 4, "A, tokens predicted after a thought"),
    "--policy-weight": ("policy_weight", None, "of REINFORCE (default: 1)"),
    "--seed": ("seed", 0, "of crops, order and thoughts"),
    "--log-every": ("logging_steps", 10, "steps"),
    "--eval-every": ("eval_steps", 100, "steps; needs --eval-text"),
    "--save-every": ("save_steps", 100, "steps; the last two checkpoints are kept"),
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("train", help="teach a model to think", description="Teach a model to think.")
    methods = parser.add_subparsers(title="methods", metavar="METHOD", required=True)
    train = methods.add_parser(
        "quiet-star",
        help="Quiet-STaR: thoughts at every token, rewarded by what they foretell",
        description="Train a causal LM to think after every token (Quiet-STaR). Given again after it was stopped, the "
        "command goes on from the last checkpoint in --output. Start it with torchrun for several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("--model", metavar="DIR", help=MODEL_HELP)
    data = train.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", nargs="+", metavar="FILE", help="plain text, one document a file")
    data.add_argument("--dataset", metavar="NAME", help="of the datasets library, or a json, csv, parquet or txt file")
    train.add_argument("--dataset-column", default="text", metavar="NAME", help="that holds the documents")
    train.add_argument("--eval-text", nargs="+", default=[], metavar="FILE", help="plain text to evaluate on")
    train.add_argument("--output", required=True, metavar="DIR", help="for checkpoints and the trained model")
    train.add_argument("--thought-tokens", type=int, metavar="M", help="tokens of a thought (default: 5)")
    train.add_argument("--official", action="store_true", help="the released code's loss, number for number")
    train.add_argument("--curriculum", nargs="+", metavar="M,A:STEPS[:RATE]", help="stages, instead of --steps")
    train.add_argument("--bf16", action="store_true", help="compute in bfloat16 over float32 weights")
    train.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    train.add_argument("--cpu", action="store_true", help="do not use a GPU")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further training arguments")
    for option, (_, default, what) in OPTIONS.items():
        train.add_argument(option, default=default, metavar="X", help=what)
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from transformers import set_seed

    from pyquiet.files import read_texts
    from pyquiet.quiet_star import QuietStarTrainer
    from pyquiet.quiet_star.data import read_dataset, tokenize
    from pyquiet.quiet_star.seeded_trainer import last_checkpoint

    training = training_arguments(args)
    os.makedirs(args.output, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output).close()  # an output that cannot be written is known before the training
    texts = read_texts(args.text) if args.text else read_dataset(args.dataset, args.dataset_column)
    eval_texts = read_texts(args.eval_text)
    set_seed(training.seed)  # a fresh mixing head is random
    model, tokenizer = load_thinker(args.model, args.thought_tokens)
    trainer = QuietStarTrainer(
        model.float(),  # of weights in half precision, small steps would be lost
        training,
        train_dataset=tokenize(texts, tokenizer, training.max_length),
        eval_dataset=tokenize(eval_texts, tokenizer, training.max_length) if eval_texts else None,
        processing_class=tokenizer,
    )
    show_lines(trainer)
    checkpoint = last_checkpoint(args.output)
    if checkpoint and trainer.is_world_process_zero():
        print(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return 0


def training_arguments(args: argparse.Namespace) -> "QuietStarTrainingArguments":
    """The training arguments that the options say; ValueError names what transformers does not take."""
    from transformers import HfArgumentParser

    from pyquiet.quiet_star import QuietStarTrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise ValueError(message)

    values = {name: vars(args)[option[2:].replace("-", "_")] for option, (name, _, _) in OPTIONS.items()}
    values |= {"output_dir": args.output, "save_total_limit": 2, "report_to": "none", "official": args.official}
    values |= {"bf16": args.bf16, "gradient_checkpointing": args.gradient_checkpointing, "use_cpu": args.cpu}
    values |= {"eval_strategy": "steps" if args.eval_text else "no", "disable_tqdm": args.quiet}
    values |= dict(pair.split("=", 1) if "=" in pair else (pair, "true") for pair in args.set)
    words = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    if args.curriculum:
        words += ["--curriculum", *args.curriculum]
    training: QuietStarTrainingArguments
    (training,) = Parser(QuietStarTrainingArguments).parse_args_into_dataclasses(words)
    return training


def show_lines(trainer: Any) -> None:
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


def in_words(step: int, logs: dict[str, float]) -> str:
    """A line on a step's training loss or evaluation; empty for other logs."""
    for prefix, what in (("", "train"), ("eval_", "eval ")):
        if f"{prefix}gain" in logs:
            base, gain = logs[f"{prefix}base_nll"], logs[f"{prefix}gain"]
            hardest = logs.get(f"{prefix}gain_decile_10", float("nan"))
            line = f"step {step:6d}  {what}  base {base:.4f}  gain {gain:+.4f}  of the hardest tenth {hardest:+.4f}"
            if not prefix:
                line += f"  reward {logs['reward']:+.4f}  w {logs['weight_mean']:+.4f}"
                line += f"  {logs['tokens_per_second']:.0f} tokens/s"
            return line
    return ""
