"""The two models of `pyquiet scale`, and the bank by which the target takes over."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyquiet.files import check_writable

if TYPE_CHECKING:
    import torch

    from pyquiet.scaling import ATTS, Backend
    from pyquiet.scaling.calibration import Kind

EMBEDDED = ("tiny-draft", "tiny-target")
TURNS = 7  # that get a bank each: a problem of the embedded pair has six steps and an answer at most
Watch = Callable[[str, int], Any]


def embedded_file(name: str) -> Path:
    """A file that came with the embedded target."""
    from pyquiet.zoo import folder

    return folder(EMBEDDED[1]) / name


def model(
    role: str, name: str, tokenizer: str | None, device: "torch.device", dtype: "torch.dtype | None"
) -> "Backend":
    """The model that a user calls so: servers, the tokenizer given for them at hand, or one of this process.

    Raises ValueError for what is none of these, before anybody is asked over the net, and for a tokenizer that is given
    for something else than servers.
    """
    from pyquiet.zoo import check_known

    option = f"--{role}"
    if not name.startswith(("http://", "https://")):
        if tokenizer is not None:
            raise ValueError(f"{option}-tokenizer is for servers; {name} brings its own, leave it out")
        try:
            check_known(option, name)
        except ValueError as error:
            raise ValueError(f"{error}; the address of a server begins with http:// or https://") from None
        from pyquiet.cli.loading import load_causal
        from pyquiet.scaling.backends.huggingface import HFBackend

        network, words = load_causal(option, name)
        return HFBackend(network.to(device, dtype), words)
    from pyquiet.scaling.backends.openai import OpenAIBackend

    addresses, _, served = name.partition("#")
    own = None if tokenizer is None else _tokenizer(f"{option}-tokenizer", tokenizer)
    return OpenAIBackend([address.strip() for address in addresses.split(",")], served or None, tokenizer=own)


def _tokenizer(option: str, name: str) -> Any:
    """An embedded model's tokenizer, a folder's, or that of a model of the Hugging Face hub that was fetched before."""
    from transformers import AutoTokenizer

    from pyquiet.zoo import available, folder

    try:
        return AutoTokenizer.from_pretrained(folder(name) if name in available() else name, local_files_only=True)
    except (OSError, ValueError):
        raise ValueError(
            f"{option} {name}: no embedded model, no folder with a tokenizer, and not fetched from the Hugging Face "
            f"hub before: hf download {name} --exclude '*.safetensors'"
        ) from None


def calibration_journal(journal: str) -> str:
    """Where the calibration that precedes the run of a journal is kept."""
    return f"{journal}.calibration.jsonl"


def check_bank(args: argparse.Namespace) -> None:
    """ValueError for options that make a bank beside one that is brought."""
    if args.calibration is not None:
        own = ("calibrate", "calibrator", "calibration_turns", "n_min", "save_calibration")
        _refuse(args, "--calibration brings a bank", *own)


def settle_bank(atts: "ATTS", args: argparse.Namespace, watch: Watch) -> str:
    """Sees to the bank that was asked for; without a wish to the embedded pair's.

    Says in words which it is. Raises ValueError for a calibrator without questions to calibrate on, and for options
    that go with no bank that is made; `check_bank` was asked before.
    """
    from pyquiet.scaling import PerQuestion

    n_min = args.n_min or 1
    embedded = (args.draft, args.target) == EMBEDDED
    if args.calibration is not None:
        return f"from {args.calibration}"
    if args.calibrator == "per_question" or not (args.calibrate or args.calibrator or embedded):
        why = "every question drafts a bank of its own (--calibrator per_question, or no --calibrate)"
        _refuse(args, why, "calibrate", "calibration_turns", "save_calibration")
        if n_min > atts.plan.chains:
            raise ValueError(
                f"--n-min must be at most --chains, {atts.plan.chains}, the scores in such a bank; got {n_min}"
            )
        atts.calibrator = PerQuestion(n_min=n_min)
        return "first chunks drafted for each question beforehand; the rate is promised for first turns alone"
    if args.calibrator == "online":
        return _online(atts, args, watch)
    if not (args.calibrate or embedded):
        raise ValueError(f"--calibrator {args.calibrator} needs questions: name them by --calibrate FILE")
    own = args.calibrate or args.calibrator or args.calibration_turns or args.n_min or args.save_calibration
    if not own and _shipped(atts):
        return "the one that came with the pair; the rate is promised for problems like those of its questions.jsonl"
    return _calibrated(atts, args, watch)


def _refuse(args: argparse.Namespace, why: str, *options: str) -> None:
    """ValueError for the first of the options that is given."""
    for option in options:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} makes a bank, but {why}: leave one of them out")


def _online(atts: "ATTS", args: argparse.Namespace, watch: Watch) -> str:
    """A bank that grows, and begins with what it is calibrated on, if anything."""
    from pyquiet.scaling import Online, Pooled

    _refuse(args, "that of --calibrator online grows with the run", "calibration_turns", "save_calibration")
    begun = _calibrated(atts, args, watch, "pooled") if args.calibrate else "empty at first"
    bank = atts.calibrator.bank if isinstance(atts.calibrator, Pooled) else None
    atts.calibrator = Online(bank, update="epoch", n_min=args.n_min or 1)
    but = (
        " but to first turns of questions that come while it holds too few scores"
        if args.on_cold == "presample"
        else ""
    )
    return f"online, {begun}; it takes in the first chunks of 16 questions at a time, and no rate is guaranteed{but}"


def _calibrated(atts: "ATTS", args: argparse.Namespace, watch: Watch, kind: "Kind | None" = None) -> str:
    from pyquiet.scaling.questions import read_questions

    source = Path(args.calibrate or embedded_file("calibration.jsonl"))
    kind = kind or args.calibrator or ("pooled" if args.preset == "paper" else "per_turn")
    turns = args.calibration_turns or (TURNS if kind == "per_turn" and not args.calibrate else None)
    questions, each = read_questions(source), args.calibration_chains
    journal = calibration_journal(args.journal) if args.journal else None
    n_min = args.n_min or 1
    if args.save_calibration is not None:
        check_writable(args.save_calibration, make=True)
    with watch("calibrating", len(questions) * each) as show:
        atts.calibrate(questions, kind=kind, chains=each, turns=turns, n_min=n_min, journal=journal, on_record=show)
    if args.save_calibration:
        atts.save_calibration(args.save_calibration)
    return f"{kind}, made now of {len(questions)} questions of {source.name} with {each} chains each"


def _shipped(atts: "ATTS") -> bool:
    """Takes the bank that came with the embedded pair, if it was made with the same settings."""
    from pyquiet.scaling.calibration_files import load_calibrator

    try:
        atts.calibrator = load_calibrator(embedded_file("calibration.json").parent, atts.taxonomy())
    except (ValueError, FileNotFoundError):
        return False
    return True
