"""`pyquiet think`: continue a prompt with a model that thinks before every token."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyquiet import QuietStarForCausalLM

DEFAULT_MODEL = "tiny-causal"
MODEL_HELP = "folder of a causal or thinking model, or an embedded one's name: tiny-causal (default), tiny-thinker"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "think",
        help="continue a prompt, thinking before every token",
        description="Continue a prompt with a model that thinks before every token, and print the "
        "answer as it comes. A plain causal LM is wrapped; until it has learned to mix its "
        "thoughts in, its answer is that of the plain model.",
    )
    parser.add_argument("--model", metavar="DIR", help=MODEL_HELP)
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue (default: standard input)")
    parser.add_argument("--show-thoughts", action="store_true", help="print each token with the thought before it")
    parser.add_argument("--think", choices=["always", "never"], default="always", help="never: the plain model")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same answer (default: 0)")
    parser.add_argument("--device", default="cpu", help="where to run, as torch names it (default: cpu)")
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    answer.add_argument("--top-k", type=int, metavar="K")
    answer.add_argument("--top-p", type=float, metavar="P")
    thought = parser.add_argument_group("the thoughts")
    thought.add_argument("--thought-tokens", type=int, metavar="M", help="tokens of a thought (default: 5)")
    thought.add_argument("--thoughts-per-token", type=int, metavar="N", help="thoughts to average (default: 1)")
    thought.add_argument("--thought-temperature", type=float, default=1.0)
    thought.add_argument("--thought-top-k", type=int, metavar="K")
    thought.add_argument("--thought-top-p", type=float, metavar="P")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.show_thoughts and args.think == "never":
        raise ValueError("--show-thoughts needs --think always")
    check_answer_options(args)
    device = usable_device(args.device)
    prompt = args.prompt if args.prompt is not None else sys.stdin.read().rstrip("\n")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python hands on bytes it cannot decode
        raise ValueError("the prompt is not UTF-8 text")
    model, tokenizer = load_thinker(args.model, args.thought_tokens)
    model.to(device)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    options: dict[str, Any] = {
        "do_sample": args.temperature > 0,
        "top_k": args.top_k or 0,
        "top_p": args.top_p or 1.0,
    }
    if args.temperature > 0:
        options["temperature"] = args.temperature
    else:
        options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if args.think == "always":
        for name in ("thoughts_per_token", "thought_temperature", "thought_top_k", "thought_top_p"):
            options[name] = getattr(args, name)
    model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        think=args.think,
        seed=args.seed,
        streamer=Printer(tokenizer, args.show_thoughts),
        **options,
    )
    if args.think == "always" and not any(p.any() for p in model.mixing_head[-1].parameters()):
        print(
            "note: this model has not learned to use its thoughts yet (their weight is 0), "
            "so the answer is the plain model's",
            file=sys.stderr,
        )
    return 0


def check_answer_options(args: argparse.Namespace) -> None:
    """Raises ValueError for sampling options of the answer that are out of range."""
    if args.temperature < 0:
        raise ValueError(f"--temperature must be 0 or more, got {args.temperature}")
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"--top-k must be 1 or more, got {args.top_k}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {args.top_p}")


def usable_device(name: str) -> "torch.device":
    """The device of that name, once something could be put on it; else ValueError."""
    import torch

    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def load_thinker(
    path: str | None, thought_tokens: int | None
) -> "tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]":
    """The thinking model in a folder or embedded, a plain causal LM wrapped, and its tokenizer."""
    from safetensors import SafetensorError

    from pyquiet import QuietStarForCausalLM
    from pyquiet.zoo import available

    path = DEFAULT_MODEL if path is None else path
    if not os.path.isfile(os.path.join(path, "config.json")) and path not in available():
        raise ValueError(
            f"--model {path}: no model folder (a folder with a config.json); give the path of one, or the name of an "
            f"embedded model ({', '.join(available())})"
        )
    wrap: dict[str, Any] = {} if thought_tokens is None else {"thought_tokens": thought_tokens}
    try:
        model, tokenizer = load_model(path)
        if not isinstance(model, QuietStarForCausalLM):
            return QuietStarForCausalLM.from_base(model, tokenizer=tokenizer, **wrap).eval(), tokenizer
    except SafetensorError as error:
        raise ValueError(f"--model {path}: its weights cannot be read ({error}); copy the model anew") from None
    if thought_tokens not in (None, model.config.thought_tokens):
        raise ValueError(
            f"--thought-tokens {thought_tokens}: this model learned thoughts of {model.config.thought_tokens} tokens; "
            "leave the option out"
        )
    return model.eval(), tokenizer


def load_model(path: str) -> "tuple[PreTrainedModel | str, PreTrainedTokenizerBase]":
    """The model embedded under that name or thinking in that folder, or the path of a plain one, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from pyquiet import QuietStarForCausalLM, load

    if not os.path.isfile(os.path.join(path, "config.json")):
        return load(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    thinks = AutoConfig.from_pretrained(path).model_type == "quiet_star"
    return QuietStarForCausalLM.from_pretrained(path) if thinks else path, tokenizer


class Printer:
    """A streamer that prints text as it grows or, with thoughts, a line a token: weight, thought, token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", show_thoughts: bool) -> None:
        self.tokenizer, self.show_thoughts = tokenizer, show_thoughts
        self.ids: list[int] = []
        self.printed = ""
        self.lines: list[str] = []

    def put(self, value: "Tensor") -> None:
        prompt = not self.ids
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        new = text[len(self.printed) :]
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # else the middle of a character
        if whole:
            self.printed = text
        if not self.show_thoughts and whole:
            print(new, end="", flush=True)
        elif self.show_thoughts and prompt:
            print(text)
        elif self.show_thoughts:
            token = repr(new)
            print("\n".join(f"{token:16s} {line}" for line in self.lines), flush=True)

    def put_thoughts(self, tokens: "Tensor", weight: "Tensor") -> None:
        """Thoughts before the next token: tokens int64 [1, N, m], weight [1, N]."""
        self.lines = [
            f"w {w:+.3f}  thought {self.tokenizer.decode(thought)!r}"
            for thought, w in zip(tokens[0].tolist(), weight[0].tolist(), strict=True)
        ]

    def end(self) -> None:
        rest = self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.printed) :]
        print("" if self.show_thoughts else rest, flush=True)
