"""`pyquiet train diffusion`: teach a model to fill in masked texts, as masked diffusion samples."""

import argparse
from typing import Any

from pyquiet.cli import training
from pyquiet.cli.loading import load_for_training, load_tokenizer
from pyquiet.cli.options import Number, Whole, add_tokenizer
from pyquiet.cli.training import RATE, SEED, SHARE
from pyquiet.diffusion.schedule import KINDS
from pyquiet.diffusion.training import OBJECTIVES

NOISE: training.Options = {
    "--max-length": ("max_length", Whole(2), 256, "tokens of a text; longer ones are cut into several"),
    "--weight-decay": ("weight_decay", RATE, 1e-2, "of AdamW"),
    "--noise-schedule": ("noise_schedule", KINDS, "linear", "linear, cosine, cosine_squared or geometric"),
    "--ema": (
        "ema_decay",
        Number(0, 1, below=True),
        0.999,
        "decay of the average of weights that is evaluated and saved; 0: none",
    ),
}
OPTIONS: training.Options = (
    training.SHARED
    | NOISE
    | {
        "--learning-rate": ("learning_rate", RATE, 1e-3, "peak"),
        "--objective": ("objective", OBJECTIVES, "low_variance", "low_variance or continuous, of the same bound"),
        "--start-level": ("start_level", SHARE, 0.15, "share masked in the first step of --level-warmup-steps"),
        "--level-warmup-steps": ("level_warmup_steps", Whole(0), 0, "from there to all shares, to help a fresh model"),
        "--seed": ("seed", SEED, 0, "same seed, same fresh model, order and noise"),
    }
)
MASK = "<mask>"  # the token that a tokenizer without one gets, behind all others


def add_parser(methods: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "masked diffusion: fill in what is masked, all at once"
    description = "Train a masked language model as the denoiser of masked diffusion."
    train = training.add_method(methods, "diffusion", what, description)
    train.add_argument("--model", metavar="DIR", help="a masked LM's folder or an embedded one's name (default: fresh)")
    add_tokenizer(train)
    training.add_size(train, heads=6, inner=320)
    add_pieces(train)
    training.add_options(train, OPTIONS)
    train.set_defaults(run=run)


def add_pieces(parser: argparse.ArgumentParser) -> None:
    what = "no text holds parts of two documents (default: documents are packed one after another)"
    parser.add_argument("--documents-apart", action="store_true", help=what)
    what = "as transformers names it, e.g. eager, on a CPU in bfloat16 the faster one (default: the model's)"
    parser.add_argument("--attention", metavar="NAME", help=what)


def run(args: argparse.Namespace) -> int:
    from transformers import set_seed

    from pyquiet.diffusion.arguments import DiffusionTrainingArguments
    from pyquiet.diffusion.trainer import DiffusionTrainer

    training.check_start(args)
    settings = training.training_arguments(args, DiffusionTrainingArguments, OPTIONS)
    tokenizer = load_tokenizer("--tokenizer" if args.tokenizer else "--model", args.tokenizer or args.model)
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    train_dataset, eval_dataset = pieces(args, tokenizer, settings.max_length)
    set_seed(settings.seed)  # a fresh model is random
    denoiser = start_denoiser(args, "--model", tokenizer) if args.model else _fresh(args, tokenizer)
    trainer = DiffusionTrainer(
        denoiser,
        settings,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    return training.train(trainer, in_words)


def pieces(args: argparse.Namespace, tokenizer: Any, max_length: int) -> tuple[Any, Any]:
    """What to learn from and what to evaluate on, in texts of at most `max_length` tokens."""
    from pyquiet.datasets import packed

    texts, eval_texts = training.read_data(args)
    across = not args.documents_apart
    learned = packed(texts, tokenizer, max_length, across=across)
    return learned, packed(eval_texts, tokenizer, max_length, across=across) if eval_texts else None


def in_words(step: int, logs: dict[str, float]) -> str:
    """A line on a step's training loss or evaluation; empty for other logs."""
    if "nelbo" in logs:
        rest = f"masked {logs['masked_fraction']:.0%}  {logs['tokens_per_second']:.0f} tokens/s"
        return f"step {step:6d}  train  nelbo {logs['nelbo']:.4f}  {rest}"
    if "eval_nelbo" not in logs:
        return ""
    bound = f"nelbo {logs['eval_nelbo']:.4f} +- {logs['eval_nelbo_error']:.4f}"
    return f"step {step:6d}  eval   {bound}  perplexity {logs['eval_perplexity']:.2f}"


def start_denoiser(args: argparse.Namespace, option: str, tokenizer: Any) -> Any:
    """The denoiser that the option names, in float32, with --attention."""
    from transformers import AutoModelForMaskedLM

    from pyquiet.diffusion.modeling import MaskedDenoiser

    model = load_for_training(option, getattr(args, option[2:]), AutoModelForMaskedLM)
    if args.attention:
        model.set_attn_implementation(args.attention)
    try:
        return MaskedDenoiser(model, tokenizer.mask_token_id)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{option} {getattr(args, option[2:])}: {error}") from None


def _fresh(args: argparse.Namespace, tokenizer: Any) -> Any:
    from pyquiet.diffusion.modeling import MaskedDenoiser, backbone

    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = backbone(
        len(tokenizer), mask_token_id=tokenizer.mask_token_id, hidden_size=args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, intermediate_size=args.inner, **ids,
    )  # fmt: skip
    if args.attention:
        model.set_attn_implementation(args.attention)
    return MaskedDenoiser(model)
