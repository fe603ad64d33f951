"""Calibrators as files: scores as safetensors, all else as JSON with hashes of both."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from pyquiet.files import replacing
from pyquiet.scaling.calibration import Calibrator, Hierarchical, PerQuestion, PerTurn, Pooled, hashed
from pyquiet.scaling.cold import spent_on
from pyquiet.scaling.conformal import Bank
from pyquiet.scaling.learning import Adaptive, Online
from pyquiet.scaling.spent import Spent

Arrays = dict[str, NDArray[np.float64]]
Kept = Pooled | Hierarchical | PerTurn | PerQuestion | Online | Adaptive


def save_calibrator(calibrator: Calibrator, folder: str | os.PathLike[str], taxonomy: Mapping[str, str]) -> None:
    """Writes a calibrator with what was spent on it, and one that learns during a run with what it has learned so far.

    Args:
        taxonomy: what the scores depend on (models, template, ...); it must be the same where they are used.

    Raises TypeError for a calibrator of another kind than those of this package.
    """
    packed, arrays = _packed(calibrator)
    about = {"format": 1, "version": calibrator.version, "taxonomy": dict(taxonomy), "calibrator": packed}
    if (spent := spent_on(calibrator)) is not None:
        about["spent"] = spent.to_dict()
    about["scores"] = {name: hashed(scores.tobytes()) for name, scores in arrays.items()}
    about["seal"] = hashed(json.dumps(about, sort_keys=True))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / "scores.safetensors") as partial:
        save_file({name: torch.from_numpy(scores.copy()) for name, scores in arrays.items()}, partial)
    with replacing(path / "calibration.json") as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_calibrator(folder: str | os.PathLike[str], taxonomy: Mapping[str, str] | None = None) -> Kept:
    """The calibrator that `save_calibrator` wrote.

    Raises ValueError if the scores are not those that were saved, or depend on what is not the same in `taxonomy`;
    OSError for files that are missing.
    """
    path = Path(folder)
    try:
        about = json.loads((path / "calibration.json").read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path}/calibration.json is no calibration ({error}); calibrate again") from None
    if not isinstance(about, dict) or about.pop("seal", None) != hashed(json.dumps(about, sort_keys=True)):
        raise ValueError(f"{path}/calibration.json was changed after it was saved; calibrate again")
    if taxonomy is not None:
        check_taxonomy(about["taxonomy"], taxonomy, str(path))
    arrays = {name: tensor.numpy() for name, tensor in load_file(path / "scores.safetensors").items()}
    if {name: hashed(scores.tobytes()) for name, scores in arrays.items()} != about["scores"]:
        raise ValueError(f"{path}/scores.safetensors does not hold the scores that were saved; calibrate again")
    calibrator = _unpacked(about["calibrator"], arrays)
    calibrator.taxonomy = about["taxonomy"]
    calibrator.spent = Spent.from_dict(about["spent"]) if "spent" in about else None
    return calibrator


def check_taxonomy(made: Mapping[str, str], now: Mapping[str, str], what: str) -> None:
    """Raises ValueError unless all that scores depended on is the same now."""
    for name, value in made.items():
        if now.get(name) != value:
            raise ValueError(
                f"{what}: calibrated with {name}={value!r}, and this is {now.get(name)!r}; scores of different "
                "settings are never ranked together: calibrate again"
            )


def _packed(calibrator: Calibrator) -> tuple[dict[str, Any], Arrays]:
    """JSON values and arrays that a calibrator can be made of again."""
    if isinstance(calibrator, Adaptive):
        base, arrays = _packed(calibrator.base)
        learned = {"step": calibrator.step, "seen": calibrator.seen, "taken": calibrator.taken}
        return {"kind": "adaptive", "base": base} | learned, arrays
    if isinstance(calibrator, Online):
        learned, scores = calibrator.state()
        options = {name: getattr(calibrator, name) for name in ("update", "window", "batch", "n_min")}
        return {"kind": "online", "options": options, "learned": learned}, {"scores": np.asarray(scores, np.float64)}
    kind = next((name for name, made in _BANKS.items() if type(calibrator) is made), None)
    if kind is None or not isinstance(calibrator, Pooled | Hierarchical | PerTurn | PerQuestion):
        raise TypeError(
            f"calibrator: {type(calibrator).__name__} is none of this package's, so how to save it is not known here"
        )
    more: dict[str, Any] = {}
    if isinstance(calibrator, PerTurn):
        banks = {str(turn): bank for turn, bank in calibrator.banks.items()}
        more = {"base": calibrator.base, "buckets": list(calibrator.buckets)}
    elif isinstance(calibrator, PerQuestion):
        banks = {str(i): bank for i, bank in enumerate(calibrator.banks.values())}
        more = {"questions": [*calibrator.banks]}
    else:
        banks = {"0": calibrator.bank}
    groups = {name: list(bank.groups) for name, bank in banks.items()}
    if isinstance(calibrator, Hierarchical | PerTurn):
        more["chains"] = calibrator.chains
    about = {"kind": kind, "n_min": calibrator.n_min, "groups": groups} | more
    return about, {name: bank.scores for name, bank in banks.items()}


def _unpacked(about: Mapping[str, Any], arrays: Arrays) -> Kept:
    if about["kind"] == "adaptive":
        adaptive = Adaptive(_unpacked(about["base"], arrays), step=about["step"])
        adaptive.seen, adaptive.taken = about["seen"], about["taken"]
        return adaptive
    if about["kind"] == "online":
        options = {name: value for name, value in about["options"].items() if value is not None}
        online = Online(**options)
        online.restore(about["learned"], arrays["scores"].tolist())
        return online
    banks = {name: Bank(arrays[name], tuple(groups)) for name, groups in about["groups"].items()}
    n_min, chains = about["n_min"], about.get("chains")  # banks that were saved before have none
    if about["kind"] == "per_turn":
        turns = {int(turn): bank for turn, bank in banks.items()}
        return PerTurn(turns, base=about["base"], buckets=about["buckets"], n_min=n_min, chains=chains)
    if about["kind"] == "per_question":
        return PerQuestion(dict(zip(about["questions"], banks.values(), strict=True)), n_min=n_min)
    if about["kind"] == "hierarchical":
        return Hierarchical(banks["0"], n_min=n_min, chains=chains)
    return Pooled(banks["0"], n_min=n_min)


_BANKS: dict[str, type] = {
    "pooled": Pooled, "hierarchical": Hierarchical, "per_turn": PerTurn, "per_question": PerQuestion,
}  # fmt: skip
