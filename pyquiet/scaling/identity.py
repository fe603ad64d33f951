"""What runs and banks depend on, as plain values: what a journal begins with, and what a saved bank is good for."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pyquiet.scaling.calibration import Calibrator, PerTurn
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.cold import ColdStart, is_warm
from pyquiet.scaling.learning import Adaptive
from pyquiet.scaling.policy import ConformalPolicy, Policy
from pyquiet.scaling.records import Question

if TYPE_CHECKING:
    from pyquiet.scaling.atts import ATTS

# What scores of first chunks do not depend on.
LATER = ("rule", "chains", "extract", "on_score_failure", "on_cold", "closing_turn", "limit")


def header(atts: "ATTS", questions: Sequence[Question], policy: Policy | None, engine: str) -> dict[str, Any]:
    """What a journal begins with: everything that must be the same for a run to go on. JSON values."""
    rule = {
        "takeover_rate": atts.rule.takeover_rate, "tail": atts.rule.tail, "discard_rate": atts.rule.discard_rate,
        "on_takeover": atts.on_takeover, "resamples": atts.resamples, "on_cold": atts.on_cold,
        "on_score_failure": atts.on_score_failure, "drift": None if atts.drift is None else atts.drift.settings,
    }  # fmt: skip
    decides: dict[str, Any] = {"policy": "calibration" if policy is None else type(policy).__name__}
    decides |= rule if atts.policy is None else {"policy_settings": getattr(policy, "identity", {})}
    if isinstance(policy, ConformalPolicy):
        bank = policy.calibrator
        decides["calibrator"] = _kind(bank.base if isinstance(bank, ColdStart) else bank)
    others = {"score": atts.score.name, "select": atts.select, "extract": _called(atts.extract), "limit": _limit(atts)}
    return {
        "version": 1,
        "engine": engine,
        "config": atts.plan.to_dict() | decides | others,
        "draft": dict(atts.draft.identity),
        "target": dict(atts.target.identity),
        "kv_bytes_per_token": {
            role: getattr(backend, "kv_bytes_per_token", None)
            for role, backend in (("draft", atts.draft), ("target", atts.target))
        },
        "template": _template(atts),
        "bank": "" if atts.calibrator is None else atts.calibrator.version,
        "questions": [{"id": q.id, "answer": q.answer, "group": q.group, "text": q.text} for q in questions],
    }


def taxonomy(atts: "ATTS", policy: ConformalPolicy | None = None) -> dict[str, str]:
    """What scores depend on; those of later turns also on the rule at earlier ones, and on which chains go on.

    Args:
        policy: decides in place of the one that `atts` makes of its arguments.
    """
    plan, decides = atts.plan.to_dict(), policy or atts
    ends = ("target", "chain_tokens", "answer_from_rejected", "closing_cue")
    rule = decides.rule
    discards = f" discard {rule.discard_rate:g}" if rule.discard_rate else ""
    again = decides.on_takeover == "resample" or rule.discard_rate > 0
    tries = f" resamples {decides.resamples}" if again and decides.resamples != 2 else ""  # 2: as banks made before say
    return {
        "draft": _digest(dict(atts.draft.identity)),
        "target": _digest(dict(atts.target.identity)),
        "sampling": _digest({name: plan[name] for name in ("draft", "stop")}),
        "score": atts.score.name,
        "template": _template(atts),
        "chain_seconds": str(atts.plan.chain_seconds),
        "rule": f"{rule.tail} {rule.takeover_rate:g} {decides.on_takeover}{discards}{tries}",
        "chains": _digest({name: plan[name] for name in ends}),
        "extract": _called(atts.extract),
        "on_score_failure": decides.on_score_failure,
        "on_cold": decides.on_cold,
        "closing_turn": "" if atts.plan.closing_cue is None else str(atts.plan.turns),
        "limit": "" if atts.limit is None else json.dumps(_limit(atts)),
    }


def made_with(atts: "ATTS", calibrator: Calibrator) -> dict[str, str]:
    """What the scores in such a calibrator depend on when it is made by `atts`: all, or only what first chunks do."""
    everything = taxonomy(atts)
    later: tuple[str, ...] = () if isinstance(calibrator, PerTurn) else LATER
    if is_warm(calibrator, Cell("", "", 0)):
        later += ("on_cold",)  # it decided nothing
    return {name: value for name, value in everything.items() if name not in later}


def _kind(calibrator: Calibrator) -> list[Any]:
    """What a bank's hash does not tell."""
    told = [type(calibrator).__name__, getattr(calibrator, "n_min", 1), list(getattr(calibrator, "buckets", ()))]
    learns = {
        name: getattr(calibrator, name) for name in ("update", "batch", "window", "step") if hasattr(calibrator, name)
    }
    base = [_kind(calibrator.base)] if isinstance(calibrator, Adaptive) else []
    return [*told, *([learns] if learns else []), *base]


def _limit(atts: "ATTS") -> dict[str, Any] | None:
    return None if atts.limit is None else {f.name: getattr(atts.limit, f.name) for f in fields(atts.limit) if f.init}


def _called(function: Any) -> str:
    """The name of a function, or the class of an object that is called as one."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"


def _template(atts: "ATTS") -> str:
    template = atts.template if isinstance(atts.template, str) else getattr(atts.template, "__qualname__", None)
    return _digest([template, atts.system])


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
