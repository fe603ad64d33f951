"""`pyquiet infill`: fill the gaps of a text from the model's joint law."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyquiet.any_subset.sampling import METHODS
from pyquiet.cli import options, prompts
from pyquiet.cli.loading import FILLER, load_filler
from pyquiet.cli.reports import add_json, check_json, give, in_marks, memory_in_words, told_parts

if TYPE_CHECKING:
    import torch

    from pyquiet.any_subset.gaps import Cost, Filled
    from pyquiet.gaps import Codec, Gapped
    from pyquiet.prompts import Prompt
    from pyquiet.prompts.answers import Row


EXAMPLE = (
    "It was a long day. Joe had two books. Joe ___1___ three. Then Joe had ___1___ books. Joe lost one. Then Joe had "
    "four books."
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "infill",
        help="fill the gaps of a text",
        description="Fill the gaps of a text, several tokens at a time, each with the probability that it has one by "
        "one. A gap is ___, ___3___ for 3 tokens, or ___2-5___: each length is then filled, and one drawn by how "
        r"probable the text makes it. \_ is an underscore, \\ a backslash. Spaces before a gap are left to it.",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--text", help="with gaps (default: standard input; on a terminal an example)")
    parser.add_argument("--gap-tokens", default="3", metavar="N", help="of ___, a number or a range")
    parser.add_argument("--num-samples", type=options.Whole(), default=1, help="fillings to draw")
    parser.add_argument("--code", action="store_true", help="white space is written as the released code model has it")
    add_model(parser)
    add_law(parser)
    words = "how tokens are guessed; what they become has the same probabilities by all"
    parser.add_argument("--method", choices=METHODS, default="auto", help=words)
    add_json(parser)
    prompts.add_prompts(parser, given, ["text"])
    parser.set_defaults(run=run)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what `load_filler` takes, and of where it runs."""
    parser.add_argument(
        "--model",
        default=FILLER,
        metavar="DIR",
        help="folder or file of weights of an XLNet, or an embedded one's name",
    )
    options.add_tokenizer(parser)
    options.add_place(parser)


def add_law(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `pyquiet.infill` that a command passes on."""
    words = "tokens guessed before they are checked, or auto"
    parser.add_argument("--k", type=_drafts, default="auto", metavar="N", help=words)
    options.add_temperature(parser, 1.0, "the tokens")
    options.add_top(parser)
    options.add_seed(parser, "tokens")


def law(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_law` added."""
    return {name: getattr(args, name) for name in ("k", "temperature", "top_k", "top_p", "seed")}


def run(args: argparse.Namespace) -> int:
    from pyquiet.any_subset.gaps import fill_gaps
    from pyquiet.gaps import Codec, parse_gaps, read_length

    check_json(args)
    prompts.check(args)
    how, device = law(args) | {"method": args.method}, options.usable_device(args.device)
    default = read_length(args.gap_tokens, "gap_tokens")
    if args.prompts is not None:
        return _run_many(args, how, default, device)
    gaps = parse_gaps(options.given_text("--text", args.text, EXAMPLE), default)
    model, tokenizer = load_filler(args.model, args.tokenizer)
    model.to(device, options.dtype(args))
    codec = Codec(tokenizer, args.code)
    texts = [codec.gapped(*gaps, trim=not args.code)] * args.num_samples
    with memory_in_words():
        filled, took = fill_gaps(model, texts, banned=codec.banned(model.config.vocab_size), **how)
    words = [in_marks(codec.parts(one.ids, one.given)) for one in filled] + [cost_in_words(took)]
    samples = [_sample(codec, one) for one in filled]
    give(args, {"model": args.model, "seed": args.seed, "samples": samples, **took}, "\n".join(words), {"model": model})
    return 0


def _run_many(args: argparse.Namespace, how: dict[str, Any], default: range, device: "torch.device") -> int:
    """Fills the texts of a file. Sample j of text i has the noise of number i * num_samples + j."""
    from pyquiet.any_subset import as_engine
    from pyquiet.any_subset.gaps import combinations, fill_gaps
    from pyquiet.any_subset.inputs import read_inputs
    from pyquiet.gaps import Codec, parse_gaps

    given = prompts.read(args)
    model, tokenizer = load_filler(args.model, args.tokenizer)
    model.to(device, options.dtype(args))
    codec, count = Codec(tokenizer, args.code), args.num_samples
    how |= {"banned": codec.banned(model.config.vocab_size)}

    def gapped(prompt: "Prompt") -> "Gapped":
        return codec.gapped(*parse_gaps(prompt.text, default), trim=not args.code)

    def answers(batch: "Sequence[Prompt]") -> "tuple[list[list[Row]], Cost]":
        texts = [text for prompt in batch for text in [gapped(prompt)] * count]
        numbers = [prompt.index * count + j for prompt in batch for j in range(count)]
        with memory_in_words():
            filled, took = fill_gaps(model, texts, sequence_ids=numbers, **how)
        rows = [{"sample": i % count, **_sample(codec, one)} for i, one in enumerate(filled)]
        return [rows[i : i + count] for i in range(0, len(rows), count)], took

    for prompt in given[0]:
        with prompt.blamed():
            text = gapped(prompt)
            *_, longest = combinations(text)
            ids, known = text.tokens(longest)[None].to(device), text.given(longest)[None].to(device)
            read_inputs(as_engine(model), ids, known, None, None)
    return prompts.answer(args, given, answers, cost_in_words, model=model, tokenizer=tokenizer)


def _sample(codec: "Codec", one: "Filled") -> "Row":
    return {
        "text": codec.decode(one.ids),
        "parts": told_parts(codec.parts(one.ids, one.given)),
        "lengths": one.lengths,
        "log_prob": one.log_prob,
    }


def cost_in_words(took: "Cost") -> str:
    """The line on what `fill_gaps` says it took."""
    names = {"target_calls": "exact", "draft_calls": "for drafts", "auxiliary_calls": "lookups of n-grams"}
    kinds = ", ".join(f"{took[kind]} {name}" for kind, name in names.items() if took[kind])
    return (
        f"{took['tokens']} tokens, {took['target_calls'] + took['draft_calls']} calls of the network ({kinds}), "
        f"{took['tokens'] / max(1, took['rounds']):.2f} tokens a round, {took['seconds']:.2f} s"
    )


def _drafts(word: str) -> int | str:
    """The type of `--k`: a number of drafts, all of which a round computes, or auto."""
    return word if word == "auto" else options.Whole(1, 257)(word)
