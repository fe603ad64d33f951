"""What runs and banks depend on, as plain values: what a journal begins with, and what a saved bank is good for."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyquiet.scaling.policy import Policy
from pyquiet.scaling.records import Question

if TYPE_CHECKING:
    from pyquiet.scaling.atts import ATTS

LATER = ("rule", "chains")  # what scores of first chunks do not depend on


def header(atts: "ATTS", questions: Sequence[Question], policy: Policy | None, engine: str) -> dict[str, Any]:
    """What a journal begins with: everything that must be the same for a run to go on. JSON values."""
    rule = {
        "takeover_rate": atts.rule.takeover_rate, "tail": atts.rule.tail, "on_takeover": atts.on_takeover,
        "on_score_failure": atts.on_score_failure,
    }  # fmt: skip
    decides: dict[str, Any] = {"policy": "calibration" if policy is None else type(policy).__name__}
    decides |= rule if atts.policy is None else {}
    return {
        "version": 1,
        "engine": engine,
        "config": atts.plan.to_dict() | decides | {"score": atts.score.name, "select": atts.select},
        "draft": dict(atts.draft.identity),
        "target": dict(atts.target.identity),
        "template": _template(atts),
        "bank": "" if atts.calibrator is None else atts.calibrator.version,
        "questions": [{"id": q.id, "answer": q.answer, "group": q.group, "text": q.text} for q in questions],
    }


def taxonomy(atts: "ATTS") -> dict[str, str]:
    """What scores depend on; those of later turns also on the rule at earlier ones, and on which chains go on."""
    plan = atts.plan.to_dict()
    ends = ("target", "chain_tokens", "answer_from_rejected", "closing_cue")
    return {
        "draft": _digest(dict(atts.draft.identity)),
        "target": _digest(dict(atts.target.identity)),
        "sampling": _digest({name: plan[name] for name in ("draft", "stop")}),
        "score": atts.score.name,
        "template": _template(atts),
        "rule": f"{atts.rule.tail} {atts.rule.takeover_rate:g} {atts.on_takeover}",
        "chains": _digest({name: plan[name] for name in ends}),
    }


def _template(atts: "ATTS") -> str:
    template = atts.template if isinstance(atts.template, str) else getattr(atts.template, "__qualname__", None)
    return _digest([template, atts.system])


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
