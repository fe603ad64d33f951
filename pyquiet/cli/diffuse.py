"""`pyquiet diffuse`: write a text, or what is missing of one, by masked diffusion whose steps an energy corrects."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pyquiet.cli import options, prompts
from pyquiet.cli.live import shown
from pyquiet.cli.loading import CAUSAL, DENOISER, load_denoiser, load_energy, network
from pyquiet.cli.reports import STANDARD_OUTPUT, add_json, check_json, give, in_marks, memory_in_words, told_parts
from pyquiet.diffusion.inputs import SAMPLERS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pyquiet.diffusion import MaskedDenoiser
    from pyquiet.diffusion.sampling import Diffusion
    from pyquiet.prompts import Prompt
    from pyquiet.prompts.answers import Cost, Row


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "diffuse",
        help="write a text in parallel steps, corrected by an energy",
        description="Write a text, continue one (--prompt) or fill its gaps (--text), several tokens a step: masked "
        "diffusion, each step of which picks one of several candidates by an energy. On a terminal the text is shown "
        "as it fills in.",
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="what to continue (default: nothing)")
    given.add_argument("--text", help=r"with gaps: ___, or ___3___ for 3 tokens; \_ is an underscore, \\ a backslash")
    words = "tokens to write, where there is no --text (default: 64)"
    parser.add_argument("--length", type=options.Whole(), help=words)
    parser.add_argument("--gap-tokens", type=options.Whole(), help="of ___ in --text (default: 3)")
    parser.add_argument("--num-samples", type=options.Whole(), default=1, help="texts to write")
    add_model(parser)
    parser.add_argument(
        "--energy",
        metavar="DIR",
        help=f"none, ar ({CAUSAL}), tiny-energy, or the folder of a causal LM or a trained energy (default: ar for "
        f"{DENOISER}, none for others)",
    )
    words = f"from blanks to the whole text; fewer are quicker, more write better (default: {STEPS})"
    parser.add_argument("--steps", type=options.Whole(), help=words)
    parser.add_argument("--sampler", choices=SAMPLERS, default="schedule_first", help=SAMPLER_HELP)
    parser.add_argument("--context", type=options.Whole(), help="tokens that semi_autoregressive sees at once")
    words = "open the N surest tokens of a text in each step, in place of --steps; no longer by the law of diffusion"
    parser.add_argument("--by-confidence", type=options.Whole(), help=words)
    add_law(parser, temperature=0.5)
    add_json(parser)
    prompts.add_prompts(parser, given, ["prompt", "text"])
    parser.set_defaults(run=run)


STEPS = 64
SAMPLER_HELP = (
    "in which order the tokens open; first_hitting has no use for --steps, semi_autoregressive is for longer texts "
    "than the model sees at once"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what `load_denoiser` takes, and of where it runs."""
    words = "folder of a masked LM, or an embedded one's name"
    parser.add_argument("--model", default=DENOISER, metavar="DIR", help=words)
    options.add_tokenizer(parser)
    options.add_place(parser)


def add_law(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """Adds the options of `pyquiet.diffuse` that a command passes on, with that default of --temperature."""
    law = parser.add_argument_group("what is drawn")
    law.add_argument("--candidates", type=options.Whole(), default=8, help="of a step, for the energy to pick from")
    words = "share of the time, from its beginning on, in which the energy picks; 1 is all"
    law.add_argument("--window", type=options.Number(0, 1), default=1.0, help=words)
    words = "of the energy; 1 is exact"
    law.add_argument("--energy-temperature", type=options.Number(0, open=True), default=1.0, help=words)
    words = "double the candidates of a step until so many have a say (their effective sample size)"
    law.add_argument("--ess-target", type=options.Number(1), help=words)
    options.add_temperature(law, temperature, "what is proposed")
    options.add_top(law)
    options.add_seed(law, "tokens")


LAW = ("candidates", "window", "energy_temperature", "ess_target", "temperature", "top_k", "top_p", "seed")


def law(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_law` added."""
    return {name: getattr(args, name) for name in LAW}


def run(args: argparse.Namespace) -> int:
    from pyquiet.diffusion.hooks import by_confidence
    from pyquiet.diffusion.sampling import diffuse
    from pyquiet.gaps import Codec

    check_json(args)
    prompts.check(args)
    _check_sampler(args)
    _settle_numbers(args)
    device = options.usable_device(args.device)
    how = law(args) | {"steps": args.steps or STEPS, "sampler": args.sampler, "context": args.context}
    how["order"] = None if args.by_confidence is None else by_confidence(args.by_confidence)
    if args.prompts is not None:
        return _run_many(args, how, device)
    field = "prompt" if args.text is None else "text"
    parts, lengths = _parts(args, field, getattr(args, field) or "")
    denoiser, tokenizer, energy = _models(args, device)
    codec = Codec(tokenizer)
    gapped = codec.gapped(parts, [range(n, n + 1) for n in lengths], trim=True, close=True)
    ids, given = gapped.tokens(lengths, denoiser.mask_id), gapped.given(lengths)
    live = sys.stdout.isatty() and not (args.json == STANDARD_OUTPUT or args.quiet)
    with memory_in_words(), shown(codec, given, denoiser.mask_id) if live else nullcontext() as on_step:
        out = diffuse(
            denoiser,
            energy,
            input_ids=ids[None].to(device),
            mask=~given[None].to(device),
            num_samples=args.num_samples,
            banned=codec.banned(denoiser.vocab_size),
            on_step=on_step,
            progress=False,
            **how,
        )
    samples = [codec.parts(row, given.tolist()) for row in out.tokens.tolist()]
    report = {"model": args.model, "energy": _energy(args), "seed": args.seed, "tokens": sum(lengths)}
    report |= {"samples": _report(samples, out), "seconds": out.seconds}
    give(args, report, _in_words(samples, out), {"model": denoiser, "energy": network(energy)})
    return 0


def _check_sampler(args: argparse.Namespace) -> None:
    """ValueError for windows without their sampler, or it without them, and for an order beside a sampler or steps."""
    if args.by_confidence is not None and (args.steps is not None or args.sampler != "schedule_first"):
        other = f"--sampler {args.sampler}" if args.steps is None else "--steps"
        raise ValueError(f"--by-confidence decides what opens in a step, and so does {other}: leave one of them out")
    if args.sampler != "semi_autoregressive":
        options.check_needed(args, "--sampler semi_autoregressive", "context")
    elif args.context is None:
        raise ValueError("--sampler semi_autoregressive needs --context, the tokens that the model sees at once")


def _settle_numbers(args: argparse.Namespace) -> None:
    """Puts defaults where no lengths and steps are given; ValueError for a length that the text has no use for."""
    if args.text is not None and args.length is not None:
        raise ValueError("--length has no use with --text, whose gaps say how long they are: ___3___, or --gap-tokens")
    if args.text is None and args.prompts is None:
        options.check_needed(args, "--text or --prompts", "gap_tokens")
    args.length, args.gap_tokens = args.length or 64, args.gap_tokens or 3
    if args.by_confidence is None:
        args.steps = args.steps or STEPS


def _in_words(samples: "list[list[tuple[str, bool]]]", out: "Diffusion") -> str:
    """The samples, and what they took."""
    lines = []
    for sample in samples:
        anything_given = not all(is_filled for _, is_filled in sample)
        lines.append(in_marks([(part, is_filled and anything_given) for part, is_filled in sample]))
    cost = _cost_in_words(_cost(out, int((out.reveal_step >= 0).sum())))
    words = f"{cost}, depth {int(out.depth.max())} (passes that wait for one another)"
    if len(drawn := out.trace.candidates[out.trace.corrected].double()):
        words += f", ESS {float(out.ess.nanmean()):.2f} (that many of {float(drawn.mean()):.3g} candidates count)"
    return "\n".join([*lines, f"{words}, {out.seconds:.2f} s"])


def _run_many(args: argparse.Namespace, how: dict[str, Any], device: "torch.device") -> int:
    """Fills the texts of a file. Sample j of text i has the noise of number i * num_samples + j."""
    import torch

    from pyquiet.diffusion.sampling import diffuse
    from pyquiet.gaps import Codec
    from pyquiet.tokens import padded

    many = prompts.read(args)
    denoiser, tokenizer, energy = _models(args, device)
    codec, count = Codec(tokenizer), args.num_samples
    banned = codec.banned(denoiser.vocab_size)

    def read(prompt: "Prompt") -> tuple[list[int], list[bool]]:
        parts, lengths = _parts(args, prompt.field, prompt.text)
        gapped = codec.gapped(parts, [range(n, n + 1) for n in lengths], trim=True, close=True)
        return gapped.tokens(lengths, denoiser.mask_id).tolist(), gapped.given(lengths).tolist()

    def answers(batch: "Sequence[Prompt]") -> "tuple[list[list[Row]], Cost]":
        texts = [text for prompt in batch for text in [read(prompt)] * count]
        ids, real = padded([ids for ids, _ in texts], "right")
        given, _ = padded([given for _, given in texts], "right")
        numbers = torch.tensor([prompt.index * count + j for prompt in batch for j in range(count)])
        with memory_in_words():
            out = diffuse(
                denoiser,
                energy,
                input_ids=ids.to(device),
                mask=(given == 0).to(device),
                attention_mask=real.to(device),
                sequence_ids=numbers,
                banned=banned,
                progress=False,
                **how,
            )
        rows = zip(out.tokens.tolist(), texts, strict=True)
        samples = [codec.parts(row[: len(given)], given) for row, (_, given) in rows]
        answers = [{"sample": i % count, **sample} for i, sample in enumerate(_report(samples, out))]
        cost = _cost(out, sum(not known for _, given in texts for known in given))
        return [answers[i : i + count] for i in range(0, len(answers), count)], cost | {"seconds": out.seconds}

    for prompt in many[0]:
        with prompt.blamed():
            _check_prompt(args, denoiser, energy, *(torch.tensor([x], device=device) for x in read(prompt)))
    return prompts.answer(
        args,
        many,
        answers,
        lambda cost: f"{_cost_in_words(cost)}, {cost['seconds']:.2f} s",
        model=denoiser,
        tokenizer=tokenizer,
        energy=network(energy),
    )


def _check_prompt(
    args: argparse.Namespace, denoiser: "MaskedDenoiser", energy: Any, ids: "torch.Tensor", given: "torch.Tensor"
) -> None:
    """Raises ValueError for a text [1, T] that the denoiser, or the energy where it has a say, does not take."""
    from pyquiet.diffusion.inputs import read_energy, read_texts
    from pyquiet.diffusion.windows import check_texts

    texts = read_texts(denoiser, ids, ~given, None, None, 1, None)
    weighed = read_energy(energy) if max(args.candidates, args.ess_target or 1) > 1 else None
    check_texts(denoiser, weighed, texts, args.context, max(1, (args.context or 1) // 2))


def _models(args: argparse.Namespace, device: "torch.device") -> "tuple[MaskedDenoiser, PreTrainedTokenizerBase, Any]":
    """The denoiser, its tokenizer and the energy that the options name."""
    denoiser, tokenizer = load_denoiser(args.model, args.tokenizer)
    denoiser.to(device, options.dtype(args))
    return denoiser, tokenizer, load_energy(_energy(args), denoiser, tokenizer, options.dtype(args))


def _energy(args: argparse.Namespace) -> str:
    return args.energy or ("ar" if args.model == DENOISER else "none")


def _parts(args: argparse.Namespace, field: str, text: str) -> tuple[list[str], list[int]]:
    """The text around the gaps, and how many tokens these have; a prompt has one behind it."""
    from pyquiet.checks import check_text
    from pyquiet.gaps import parse_gaps

    check_text(f"--{field}", text)
    if field == "prompt":
        return [text, ""], [args.length]
    parts, ranges = parse_gaps(text, range(args.gap_tokens, args.gap_tokens + 1))
    if several := [lengths for lengths in ranges if len(lengths) > 1]:
        first, last = several[0][0], several[0][-1]
        raise ValueError(f"the gap ___{first}-{last}___ has several lengths; give one, or use pyquiet infill")
    return parts, [lengths[0] for lengths in ranges]


def _report(samples: "list[list[tuple[str, bool]]]", out: "Diffusion") -> "list[Row]":
    from pyquiet.evaluation.estimates import finite

    names = ("ess", "log_normalizer", "denoiser_calls", "energy_passes", "depth")
    columns = zip(*(getattr(out, name).tolist() for name in names), strict=True)
    return [
        {
            "text": "".join(part for part, _ in sample),
            "parts": told_parts(sample),
            **{name: finite(value) for name, value in zip(names, row, strict=True)},
        }
        for sample, row in zip(samples, columns, strict=True)
    ]


def _cost(out: "Diffusion", tokens: int) -> "Cost":
    calls, passes = int(out.denoiser_calls.sum()), int(out.energy_passes.sum())
    return {"tokens": tokens, "denoiser_calls": calls, "energy_passes": passes}


def _cost_in_words(cost: "Cost") -> str:
    return f"{cost['tokens']} tokens, {cost['denoiser_calls']} denoiser calls, {cost['energy_passes']} energy passes"
