"""`pyquiet think`: continue a prompt with a model that thinks before every token."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyquiet.cli import options, prompts
from pyquiet.cli.live import Printer
from pyquiet.cli.loading import THINKER, load_thinker
from pyquiet.cli.reports import add_json, check_json, give, told_parts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pyquiet import QuietStarForCausalLM
    from pyquiet.gaps import Codec
    from pyquiet.prompts import Prompt
    from pyquiet.prompts.answers import Cost, Row


EXAMPLE = (
    "There were four friends. Anne wrote to Tom. Joe wrote to Emma. Tom wrote to Joe. Emma wrote to Anne. A letter "
    "from Anne, passed on three times, came to"
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "think",
        help="continue a prompt, thinking before every token",
        description="Continue a prompt with a model that thinks before every token, and print the "
        "answer as it comes. A plain causal LM is wrapped; until it has learned to mix its "
        "thoughts in, its answer is that of the plain model.",
    )
    add_model(parser)
    given = parser.add_mutually_exclusive_group()
    words = "what to continue (default: standard input; on a terminal an example)"
    given.add_argument("--prompt", metavar="TEXT", help=words)
    parser.add_argument("--show-thoughts", action="store_true", help="print each token with the thought before it")
    parser.add_argument("--think", choices=["always", "never"], default="always", help="never: the plain model")
    options.add_max_new_tokens(parser, 64)
    options.add_seed(parser, "answer")
    options.add_place(parser)
    answer = parser.add_argument_group("the answer")
    options.add_temperature(answer, 0.8, "the answer")
    options.add_top(answer)
    thought = parser.add_argument_group("the thoughts")
    add_thought_tokens(thought)
    options.add_thoughts_per_token(thought)
    options.add_temperature(thought, 1.0, "the thoughts", prefix="thought-")
    options.add_top(thought, prefix="thought-")
    add_json(parser)
    prompts.add_prompts(parser, given, ["prompt"])
    parser.set_defaults(run=run)


def add_model(parser: argparse.ArgumentParser, default: str = THINKER) -> None:
    """Adds the option of the model that `load_thinker` takes."""
    words = "folder of a causal or thinking model, or an embedded one's name"
    parser.add_argument("--model", default=default, metavar="DIR", help=words)


def add_thought_tokens(parser: Any) -> None:
    words = "tokens of a thought, of a plain model that is wrapped (default: 5)"
    parser.add_argument("--thought-tokens", type=options.Whole(), help=words)


def run(args: argparse.Namespace) -> int:
    if args.show_thoughts and args.think == "never":
        raise ValueError("--show-thoughts needs --think always")
    check_json(args)
    prompts.check(args)
    device = options.usable_device(args.device)
    if args.prompts is not None:
        return _run_many(args, device)
    prompt = options.given_text("--prompt", args.prompt, EXAMPLE)
    model, tokenizer = load_thinker(args.model, args.thought_tokens)
    model.to(device, options.dtype(args))
    if args.json is not None:
        (sample,), took = _answers(args, model, tokenizer, {0: prompt})
        report = {"model": args.model, "seed": args.seed, "samples": [sample], **took}
        give(args, report, sample["text"], {"model": model})
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        streamer = Printer(tokenizer, args.show_thoughts)
        model.generate(**inputs, think=args.think, seed=args.seed, streamer=streamer, **_generation(args))
    _say_whether_thoughts_count(args, model)
    return 0


def _run_many(args: argparse.Namespace, device: "torch.device") -> int:
    """Continues the prompts of a file, each with the noise of its number."""
    import torch

    given = prompts.read(args)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the mixing head of a plain model is random, without effect, and part of its digest
        model, tokenizer = load_thinker(args.model, args.thought_tokens)
    for prompt in given[0]:
        with prompt.blamed():
            _check_prompt(args, model, tokenizer(prompt.text, verbose=False)["input_ids"])
    model.to(device, options.dtype(args))

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
    how: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        how |= {"temperature": args.temperature, "top_k": args.top_k or 0, "top_p": args.top_p or 1.0}
    else:
        how |= {"temperature": None, "top_k": None, "top_p": None}
    if args.think == "always":
        for name in ("thoughts_per_token", "thought_temperature", "thought_top_k", "thought_top_p"):
            how[name] = getattr(args, name)
    return how


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

    from pyquiet.tokens import padded

    how = _generation(args) | {"think": args.think, "seed": seed, "return_dict_in_generate": True}
    if args.think == "always":
        how |= {"sequence_ids": torch.tensor(list(prompts), device=model.device), "return_thoughts": True}
    ids, mask = (x.to(model.device) for x in padded(list(prompts.values()), "left"))
    out: Any = model.generate(ids, attention_mask=mask, pad_token_id=0, **how)
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
            "parts": told_parts(parts),
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
