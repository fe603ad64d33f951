"""`pyquiet train any-subset`: teach a model to fill in any part of a text."""

import argparse
from typing import Any

from pyquiet.cli import training
from pyquiet.cli.loading import load_for_training, load_tokenizer
from pyquiet.cli.options import Whole, add_tokenizer
from pyquiet.cli.training import RATE, SEED, SHARE

OPTIONS: training.Options = training.SHARED | {
    "--max-length": ("max_length", Whole(2), 256, "tokens of a text; documents are packed to it"),
    "--learning-rate": ("learning_rate", RATE, 1e-4, "peak"),
    "--weight-decay": ("weight_decay", RATE, 1e-2, "of AdamW"),
    "--draft-weight": ("draft_weight", SHARE, 0.5, "of the drafts' NLL, from 0 to 1; the joint law has the rest"),
    "--low-mask-rate": ("low_mask_rate", SHARE, 0.15, "smallest share of a text to be filled"),
    "--high-mask-rate": ("high_mask_rate", SHARE, 0.95, "largest share"),
    "--start-mask-rate": ("start_mask_rate", SHARE, None, "both at first (default: --low-mask-rate)"),
    "--mask-warmup-steps": ("mask_warmup_steps", Whole(0), 0, "from there to the range"),
    "--seed": ("seed", SEED, 0, "same seed, same fresh model, order and what is filled"),
}


def add_parser(methods: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "any-subset models: fill in any part of a text, and draft it well"
    description = "Train an XLNet to fill in any part of a text, given the rest (an any-subset autoregressive model)."
    train = training.add_method(methods, "any-subset", what, description)
    train.add_argument("--model", metavar="DIR", help="an XLNet's folder or an embedded one's name (default: fresh)")
    add_tokenizer(train)
    size = training.add_size(train, heads=4, inner=768)
    size.add_argument("--reach", type=Whole(), default=64, help="distance beyond which positions are not told apart")
    training.add_options(train, OPTIONS)
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from transformers import set_seed

    from pyquiet.any_subset.arguments import AnySubsetTrainingArguments
    from pyquiet.any_subset.trainer import AnySubsetTrainer
    from pyquiet.datasets import packed

    training.check_start(args)
    settings = training.training_arguments(args, AnySubsetTrainingArguments, OPTIONS)
    texts, eval_texts = training.read_data(args)
    tokenizer = load_tokenizer("--tokenizer" if args.tokenizer else "--model", args.tokenizer or args.model)
    set_seed(settings.seed)  # a fresh model is random
    trainer = AnySubsetTrainer(
        _model(args, tokenizer),
        settings,
        train_dataset=packed(texts, tokenizer, settings.max_length),
        eval_dataset=packed(eval_texts, tokenizer, settings.max_length) if eval_texts else None,
        processing_class=tokenizer,
    )
    return training.train(trainer, in_words)


def in_words(step: int, logs: dict[str, float]) -> str:
    """A line on a step's training loss or evaluation; empty for other logs."""
    if "masked_fraction" in logs:
        parts = [f"{name} {logs[f'{name}_nll']:.4f}" for name in ("joint", "draft") if f"{name}_nll" in logs]
        rest = f"masked {logs['masked_fraction']:.0%}  {logs['tokens_per_second']:.0f} tokens/s"
        return f"step {step:6d}  train  {'  '.join(parts)}  {rest}"
    rates = [name.removeprefix("eval_joint_nll_") for name in logs if name.startswith("eval_joint_nll_")]
    if not rates:
        return ""
    words = []
    for rate in rates:
        drafts = [f"{value:.2f}" for name, value in logs.items() if name.startswith(f"eval_acceptance_{rate}_")]
        words.append(f"{rate} % masked: joint {logs[f'eval_joint_nll_{rate}']:.4f}, accepted {' '.join(drafts)}")
    return f"step {step:6d}  eval   {'; '.join(words)}"


def _model(args: argparse.Namespace, tokenizer: Any) -> Any:
    from transformers import XLNetConfig, XLNetLMHeadModel

    if args.model:
        return load_for_training("--model", args.model, XLNetLMHeadModel)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = XLNetConfig(
        vocab_size=len(tokenizer), n_layer=args.layers, d_model=args.width, n_head=args.heads, d_inner=args.inner,
        clamp_len=args.reach, dropout=0.0, **ids,
    )  # fmt: skip
    return XLNetLMHeadModel(config)
