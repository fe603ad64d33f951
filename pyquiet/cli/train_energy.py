"""`pyquiet train energy`: teach an energy to tell texts from what a denoiser makes of them."""

import argparse

from pyquiet.cli import training
from pyquiet.cli.loading import load_for_training, load_tokenizer
from pyquiet.cli.options import Whole
from pyquiet.cli.train_diffusion import NOISE, add_pieces
from pyquiet.cli.training import RATE, SEED
from pyquiet.zoo import check_known

OPTIONS: training.Options = (
    training.SHARED
    | NOISE
    | {
        "--learning-rate": ("learning_rate", RATE, 3e-4, "peak"),
        "--negatives": ("negatives", Whole(), 1, "completions by the denoiser beside each text"),
        "--seed": ("seed", SEED, 0, "same seed, same order, noise and completions"),
    }
)


def add_parser(methods: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "an energy that corrects masked diffusion: tell texts from completions"
    description = (
        "Train an energy by noise-contrastive estimation, beginning from the denoiser whose steps it is to correct."
    )
    train = training.add_method(methods, "energy", what, description)
    train.add_argument("--denoiser", required=True, metavar="DIR", help="its folder or an embedded one's name")
    train.add_argument("--model", metavar="DIR", help="an energy's folder or name to go on with (default: fresh)")
    train.add_argument("--pool", choices=("sum_masked", "mean"), default="sum_masked", help="of a fresh energy")
    add_pieces(train)
    training.add_options(train, OPTIONS)
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from transformers import set_seed

    from pyquiet.cli.train_diffusion import pieces, start_denoiser
    from pyquiet.diffusion.arguments import NCETrainingArguments
    from pyquiet.diffusion.nce_energy import NCEEnergy
    from pyquiet.diffusion.trainer import NCETrainer

    settings = training.training_arguments(args, NCETrainingArguments, OPTIONS)
    check_known("--denoiser", args.denoiser)
    if args.model:
        check_known("--model", args.model)
    tokenizer = load_tokenizer("--denoiser", args.denoiser)
    train_dataset, eval_dataset = pieces(args, tokenizer, settings.max_length)
    denoiser = start_denoiser(args, "--denoiser", tokenizer)
    set_seed(settings.seed)
    if args.model:
        energy = load_for_training("--model", args.model, NCEEnergy)
    else:
        energy = NCEEnergy.from_denoiser(denoiser, args.pool)
    trainer = NCETrainer(
        energy,
        settings,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        denoiser=denoiser,
        processing_class=tokenizer,
    )
    return training.train(trainer, in_words)


def in_words(step: int, logs: dict[str, float]) -> str:
    """A line on a step's training loss or evaluation; empty for other logs."""
    kind = "eval_" if "eval_accuracy" in logs else ""
    if f"{kind}accuracy" not in logs:
        return ""
    normalizers = [f"{x:.2f}" for name, x in logs.items() if name.startswith(f"{kind}log_z_")]
    found = f"nce {logs[f'{kind}loss']:.4f}  right {logs[f'{kind}accuracy']:.1%}  log Z {' '.join(normalizers)}"
    rest = "" if kind else f"  {logs['tokens_per_second']:.0f} tokens/s"
    return f"step {step:6d}  {'eval ' if kind else 'train'}  {found}{rest}"
