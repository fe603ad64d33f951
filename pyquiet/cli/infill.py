"""`pyquiet infill`: fill the gaps of a text from the model's joint law."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyquiet.any_subset.sampling import METHODS
from pyquiet.cli import prompts
from pyquiet.cli.reports import add_json, check_json, give
from pyquiet.cli.think import check_answer_options, usable_device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pyquiet.any_subset.gaps import Cost, Filled
    from pyquiet.gaps import Codec, Gapped
    from pyquiet.prompts import Prompt
    from pyquiet.prompts.answers import Row

DEFAULT_MODEL = "tiny-any-subset"
_BOLD, _PLAIN = "\033[1m", "\033[0m"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "infill",
        help="fill the gaps of a text",
        description="Fill the gaps of a text from the model's joint law, several tokens at a time. A gap is "
        r"___, ___3___ for 3 tokens, or ___2-5___: each length is then filled, and one drawn by how probable the text "
        r"makes it. \_ is an underscore, \\ a backslash. Spaces before a gap are the model's to write.",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--text", help="with gaps (default: standard input)")
    parser.add_argument("--gap-tokens", default="3", metavar="N", help="of ___, a number or a range (default: 3)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="fillings to draw (default: 1)")
    parser.add_argument("--code", action="store_true", help="white space is written as the released code model has it")
    add_model(parser)
    add_law(parser)
    parser.add_argument("--method", choices=METHODS, default="auto", help="all give the same law (default: auto)")
    add_json(parser)
    prompts.add_prompts(parser, given, ["text"])
    parser.set_defaults(run=run)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_filler` takes, and the device."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="DIR",
        help=f"folder or file of weights of an XLNet, or an embedded one's name (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or embedded model's name, if not the model's")
    parser.add_argument("--device", default="cpu", help="where to run, as torch names it (default: cpu)")


def add_law(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `pyquiet.infill` that a command passes on."""
    parser.add_argument("--k", type=_drafts, default="auto", metavar="K", help="drafts a round (default: auto)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same tokens (default: 0)")


def law(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_law` added, checked."""
    check_answer_options(args)
    return {name: getattr(args, name) for name in ("k", "temperature", "top_k", "top_p", "seed")}


def run(args: argparse.Namespace) -> int:
    from pyquiet.any_subset.gaps import fill_gaps
    from pyquiet.gaps import Codec, parse_gaps, read_length

    check_json(args)
    options, device = law(args) | {"method": args.method}, usable_device(args.device)
    if args.samples < 1:
        raise ValueError(f"--samples must be 1 or more, got {args.samples}")
    default = read_length(args.gap_tokens)
    if args.prompts is not None:
        return _run_many(args, options, default, device)
    text = args.text if args.text is not None else sys.stdin.read().rstrip("\n")
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python hands on bytes it cannot decode
        raise ValueError("the text is not UTF-8 text")
    gaps = parse_gaps(text, default)
    model, tokenizer = load_filler(args.model, args.tokenizer)
    model.to(device, prompts.precision(args))
    codec = Codec(tokenizer, args.code)
    texts = [codec.gapped(*gaps, trim=not args.code)] * args.samples
    with memory_in_words():
        filled, took = fill_gaps(model, texts, banned=codec.banned(model.config.vocab_size), **options)
    words = [in_marks(codec.parts(one.ids, one.given)) for one in filled] + [cost_in_words(took)]
    samples = [_sample(codec, one) for one in filled]
    give(args, {"model": args.model, "seed": args.seed, "samples": samples, **took}, "\n".join(words))
    return 0


def _run_many(args: argparse.Namespace, options: dict[str, Any], default: range, device: "torch.device") -> int:
    """Fills the texts of a file. Sample j of text i has the noise of number i * samples + j."""
    from pyquiet.any_subset import as_engine
    from pyquiet.any_subset.gaps import combinations, fill_gaps
    from pyquiet.any_subset.inputs import read_inputs
    from pyquiet.gaps import Codec, parse_gaps

    given = prompts.read(args)
    model, tokenizer = load_filler(args.model, args.tokenizer)
    model.to(device, prompts.precision(args))
    codec, count = Codec(tokenizer, args.code), args.samples
    options |= {"banned": codec.banned(model.config.vocab_size)}

    def gapped(prompt: "Prompt") -> "Gapped":
        return codec.gapped(*parse_gaps(prompt.text, default), trim=not args.code)

    def answers(batch: "Sequence[Prompt]") -> "tuple[list[list[Row]], Cost]":
        texts = [text for prompt in batch for text in [gapped(prompt)] * count]
        numbers = [prompt.index * count + j for prompt in batch for j in range(count)]
        with memory_in_words():
            filled, took = fill_gaps(model, texts, sequence_ids=numbers, **options)
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
        "parts": [{"text": part, "filled": is_filled} for part, is_filled in codec.parts(one.ids, one.given)],
        "lengths": one.lengths,
        "log_prob": one.log_prob,
    }


def cost_in_words(took: "Cost") -> str:
    """The line on what `fill_gaps` says it took."""
    calls = {kind: took[f"{kind}_calls"] for kind in ("target", "draft", "auxiliary")}
    kinds = ", ".join(f"{count} {kind}" for kind, count in calls.items() if count)
    return (
        f"{took['tokens']} tokens, {calls['target'] + calls['draft']} calls ({kinds}), "
        f"{took['tokens'] / max(1, took['rounds']):.2f} tokens a round, {took['seconds']:.2f} s"
    )


def load_filler(name: str, tokenizer: str | None) -> "tuple[Any, PreTrainedTokenizerBase]":
    """The XLNet of that name, folder or file, and its tokenizer or that of another; ValueError says what is wrong."""
    import torch

    from pyquiet.any_subset import as_engine, load_released
    from pyquiet.zoo import available, load

    if name not in available() and not os.path.exists(name):
        raise ValueError(
            f"--model {name}: no model folder, nor a file of weights; give the path of one, or the name of an embedded "
            f"model ({', '.join(available())})"
        )
    model, words = load(name) if name in available() else (load_released(name, dtype=torch.float32), None)
    as_engine(model)  # refuses what is no XLNet
    return model, words if words is not None and tokenizer in (None, name) else load_tokenizer(tokenizer or name)


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of an embedded model or in a folder; ValueError if there is none."""
    from transformers import AutoTokenizer

    from pyquiet.zoo import available, load

    if source in available():
        return load(source)[1]
    files = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
    if not any(os.path.isfile(os.path.join(source, file)) for file in files):
        raise ValueError(
            f"{source} has no tokenizer (none of {', '.join(files)}); give the folder of one by --tokenizer"
        )
    return AutoTokenizer.from_pretrained(source)


@contextmanager
def memory_in_words() -> Iterator[None]:
    """A ValueError in place of torch's complaint that memory is full."""
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        words = str(error).splitlines()[0]
        raise ValueError(f"memory is full ({words}); give shorter texts or gaps, or fewer at a time") from None


def in_marks(parts: Sequence[tuple[str, bool]]) -> str:
    """The text of such parts: what was filled in is bold on a terminal with colours and in brackets elsewhere."""
    marks = (_BOLD, _PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("[", "]")
    return "".join(_marked(part, *marks) if is_filled else part for part, is_filled in parts)


def _marked(part: str, opened: str, closed: str) -> str:
    words = part.lstrip(" ")
    return f"{part[: len(part) - len(words)]}{opened}{words}{closed}"


def _drafts(word: str) -> int | str:
    return word if word == "auto" else int(word)
