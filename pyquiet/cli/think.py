"""`pyquiet think`: continue a prompt with a model that thinks before every token."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyquiet.cli import prompts
from pyquiet.cli.reports import add_json, check_json, give

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyquiet import QuietStarForCausalLM
    from pyquiet.gaps import Codec
    from pyquiet.prompts import Prompt
    from pyquiet.prompts.answers import Cost, Row

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
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="what to continue (default: standard input)")
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
    thought.add_argument(
        "--thoughts-per-token", type=int, metavar="N", help="thoughts to average (default: the model's)"
    )
    thought.add_argument("--thought-temperature", type=float, default=1.0)
    thought.add_argument("--thought-top-k", type=int, metavar="K")
    thought.add_argument("--thought-top-p", type=float, metavar="P")
    add_json(parser)
    prompts.add_prompts(parser, given, ["prompt"])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.show_thoughts and args.think == "never":
        raise ValueError("--show-thoughts needs --think always")
    check_answer_options(args)
    check_json(args)
    device = usable_device(args.device)
    if args.prompts is not None:
        return _run_many(args, device)
    prompt = args.prompt if args.prompt is not None else sys.stdin.read().rstrip("\n")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python hands on bytes it cannot decode
        raise ValueError("the prompt is not UTF-8 text")
    model, tokenizer = load_thinker(args.model, args.thought_tokens)
    model.to(device, prompts.precision(args))
    if args.json is not None:
        (sample,), took = _answers(args, model, tokenizer, {0: prompt})
        give(args, {"model": args.model, "seed": args.seed, "samples": [sample], **took}, sample["text"])
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        streamer = Printer(tokenizer, args.show_thoughts)
        model.generate(**inputs, think=args.think, seed=args.seed, streamer=streamer, **_generation(args))
    _say_whether_thoughts_count(args, model)
    return 0


def _run_many(args: argparse.Namespace, device: "torch.device") -> int:
    """Continues the prompts of a file, each with the noise of its number."""
    import torch

    from pyquiet.checks import check_count

    check_count("--max-new-tokens", args.max_new_tokens, least=1)
    given = prompts.read(args)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the mixing head of a plain model is random, without effect, and part of its digest
        model, tokenizer = load_thinker(args.model, args.thought_tokens)
    for prompt in given[0]:
        with prompt.blamed():
            _check_prompt(args, model, tokenizer(prompt.text, verbose=False)["input_ids"])
    model.to(device, prompts.precision(args))

    def answers(batch: "Sequence[Prompt]") -> "tuple[list[list[Row]], Cost]":
        rows, took = _answers(args, model, tokenizer, {prompt.index: prompt.text for prompt in batch})
        return [[row] for row in rows], took

    _say_whether_thoughts_count(args, model)
    return prompts.answer(args, given, answers, _cost_in_words, model=model, tokenizer=tokenizer)


def _check_prompt(args: argparse.Namespace, model: "QuietStarForCausalLM", ids: list[int]) -> None:
    """Raises ValueError for a prompt that the model cannot continue."""
    import torch

    from pyquiet.heads import embedding_table
    from pyquiet.quiet_star.inputs import check_context, check_inputs

    check_inputs(torch.tensor([ids], dtype=torch.int64), None, embedding_table(model.base).shape[0])
    length = len(ids) + args.max_new_tokens - 1  # the last token is not read
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if args.think == "always":
        check_context(model.config, length)
    elif context is not None and length > context:
        raise ValueError(f"{len(ids)} tokens and --max-new-tokens {args.max_new_tokens} exceed the model's {context}")


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` that the command's say."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_k": args.top_k or 0, "top_p": args.top_p or 1.0}
    else:
        options |= {"temperature": None, "top_k": None, "top_p": None}
    if args.think == "always":
        for name in ("thoughts_per_token", "thought_temperature", "thought_top_k", "thought_top_p"):
            options[name] = getattr(args, name)
    return options


def _answers(
    args: argparse.Namespace,
    model: "QuietStarForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    texts: dict[int, str],
) -> "tuple[list[Row], Cost]":
    """What becomes of texts, each with the noise of its number, and what that cost."""
    from pyquiet.gaps import Codec
    from pyquiet.randomness import epoch_seed

    began, codec = time.perf_counter(), Codec(tokenizer)
    ids = {number: tokenizer(text, verbose=False)["input_ids"] for number, text in texts.items()}
    if args.think == "always":
        rows = _batch(args, model, codec, ids, args.seed)
    else:  # torch's generator knows no numbers: each alone, with a seed of its own
        seeds = {number: epoch_seed(args.seed, number) if number else args.seed for number in ids}
        rows = [row for number in ids for row in _batch(args, model, codec, {number: ids[number]}, seeds[number])]
    thoughts = model.config.thoughts_per_token if args.thoughts_per_token is None else args.thoughts_per_token
    tokens = sum(row["tokens"] for row in rows)
    took = {"tokens": tokens, "thoughts": tokens * thoughts * (args.think == "always")}
    return rows, {**took, "seconds": time.perf_counter() - began}


def _batch(
    args: argparse.Namespace, model: "QuietStarForCausalLM", codec: "Codec", prompts: dict[int, list[int]], seed: int
) -> "list[Row]":
    """The rows of prompts that are continued together."""
    import torch

    from pyquiet.evaluation.prompts import padded

    options = _generation(args) | {"think": args.think, "seed": seed, "return_dict_in_generate": True}
    if args.think == "always":
        options |= {"sequence_ids": torch.tensor(list(prompts), device=model.device), "return_thoughts": True}
    ids, mask = (x.to(model.device) for x in padded(list(prompts.values()), "left"))
    out: Any = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for number, (prompt, row) in enumerate(
        zip(prompts.values(), out.sequences[:, ids.shape[1] :].tolist(), strict=True)
    ):
        new = row[: next((i for i, token in enumerate(row, 1) if token in ends), len(row))]
        parts = codec.parts([*prompt, *new], [True] * len(prompt) + [False] * len(new))
        answer: Row = {
            "text": codec.decode([*prompt, *new]),
            "parts": [{"text": part, "filled": is_filled} for part, is_filled in parts],
            "tokens": len(new),
        }
        if args.think == "always":
            weights = out.thoughts.weight[number, : len(new)]
            answer["weight"] = float(weights.double().mean())
        if args.show_thoughts:
            tokens = out.thoughts.tokens[number, : len(new)]
            answer["thoughts"] = _thoughts(codec, prompt, new, tokens.tolist(), weights.tolist())
        rows.append(answer)
    return rows


def _thoughts(
    codec: "Codec", prompt: list[int], new: list[int], thoughts: list[list[list[int]]], weights: list[list[float]]
) -> "list[Row]":
    """Each new token with the thoughts before it and their weights."""
    states = [0] * len(prompt) + [*range(1, len(new) + 1)]
    tokens = [text for text, state, _ in codec.runs([*prompt, *new], states) if state]
    return [
        {"token": token, "thoughts": [{"text": codec.decode(ids), "weight": w} for ids, w in zip(*both, strict=True)]}
        for token, *both in zip(tokens, thoughts, weights, strict=True)
    ]


def _cost_in_words(took: "Cost") -> str:
    return f"{took['tokens']} tokens, {took['thoughts']} thoughts, {took['seconds']:.2f} s"


def _say_whether_thoughts_count(args: argparse.Namespace, model: "QuietStarForCausalLM") -> None:
    if args.think == "always" and not any(p.any() for p in model.mixing_head[-1].parameters()):
        print(
            "note: this model has not learned to use its thoughts yet (their weight is 0), "
            "so the answer is the plain model's",
            file=sys.stderr,
        )


def check_answer_options(args: argparse.Namespace) -> None:
    """Raises ValueError for sampling options of the answer that are out of range."""
    if args.temperature < 0:
        raise ValueError(f"--temperature must be 0 or more, got {args.temperature}")
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"--top-k must be 1 or more, got {args.top_k}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {args.top_p}")


def usable_device(name: str) -> "torch.device":
    """The device of that name, once something could be put on it; else ValueError.

    Of several processes, as torchrun starts them, each has a "cuda" of its own.
    """
    import torch

    from pyquiet.prompts import Ranks

    try:
        return torch.empty(1, device=Ranks.current().device(name)).device
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
            names = [repr(new)] + [""] * (len(self.lines) - 1)  # a line a thought
            print("\n".join(f"{name:16s} {line}" for name, line in zip(names, self.lines, strict=True)), flush=True)

    def put_thoughts(self, tokens: "Tensor", weight: "Tensor") -> None:
        """Thoughts before the next token: tokens int64 [1, N, m], weight [1, N]."""
        self.lines = [
            f"w {w:+.3f}  thought {self.tokenizer.decode(thought)!r}"
            for thought, w in zip(tokens[0].tolist(), weight[0].tolist(), strict=True)
        ]

    def end(self) -> None:
        rest = self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.printed) :]
        print("" if self.show_thoughts else rest, flush=True)
