"""`pyquiet train quiet-star`: teach a model to think."""

import argparse
from typing import TYPE_CHECKING

from pyquiet.cli import training
from pyquiet.cli.loading import CAUSAL, load_thinker
from pyquiet.cli.options import Whole
from pyquiet.cli.think import add_model, add_thought_tokens
from pyquiet.cli.training import RATE, SEED

if TYPE_CHECKING:
    from pyquiet import QuietStarTrainingArguments

OPTIONS: training.Options = training.SHARED | {
    "--max-length": ("max_length", Whole(2), 256, "tokens of a text; longer ones are cropped at seeded places"),
    "--learning-rate": ("learning_rate", RATE, 1e-5, "peak, of the base"),
    "--head-learning-rate": ("head_learning_rate", RATE, None, "of the mixing head (default: as the base)"),
    "--meta-learning-rate": ("meta_learning_rate", RATE, None, "of START and END as stored (default: as the base)"),
    "--weight-decay": ("weight_decay", RATE, 1e-3, "of AdamW"),
    "--thoughts-per-token": ("thoughts_per_token", Whole(), 2, "thoughts to average"),
    "--lookahead": ("lookahead", Whole(), 4, "tokens predicted after a thought"),
    "--policy-weight": ("policy_weight", RATE, None, "of REINFORCE (default: 1)"),
    "--seed": ("seed", SEED, 0, "same seed, same crops, order and thoughts"),
}


def add_parser(methods: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "Quiet-STaR: thoughts at every token, rewarded by what they foretell"
    description = "Train a causal LM to think after every token (Quiet-STaR)."
    train = training.add_method(methods, "quiet-star", what, description)
    add_model(train, CAUSAL)
    add_thought_tokens(train)
    train.add_argument("--official", action="store_true", help="the released code's loss, number for number")
    train.add_argument("--curriculum", nargs="+", metavar="M,A:STEPS[:RATE]", help="stages, instead of --steps")
    train.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    training.add_options(train, OPTIONS)
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from transformers import set_seed

    from pyquiet.quiet_star import QuietStarTrainer
    from pyquiet.quiet_star.data import tokenize

    settings = training_arguments(args)
    texts, eval_texts = training.read_data(args)
    set_seed(settings.seed)  # a fresh mixing head is random
    model, tokenizer = load_thinker(args.model, args.thought_tokens)
    trainer = QuietStarTrainer(
        model.float(),  # of weights in half precision, small steps would be lost
        settings,
        train_dataset=tokenize(texts, tokenizer, settings.max_length),
        eval_dataset=tokenize(eval_texts, tokenizer, settings.max_length) if eval_texts else None,
        processing_class=tokenizer,
    )
    return training.train(trainer, in_words)


def training_arguments(args: argparse.Namespace) -> "QuietStarTrainingArguments":
    """The training arguments that the options say; ValueError names what transformers does not take."""
    from pyquiet.quiet_star import QuietStarTrainingArguments

    stages = ["--curriculum", *args.curriculum] if args.curriculum else []
    # Said only where it is asked for: transformers warns of the name, which it is about to change.
    more = {"official": args.official, "gradient_checkpointing": args.gradient_checkpointing or None}
    settings: QuietStarTrainingArguments
    settings = training.training_arguments(args, QuietStarTrainingArguments, OPTIONS, *stages, **more)
    return settings


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
