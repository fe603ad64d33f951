"""Whether what `ATTS` is given can serve, and goes together: found out before any model is asked."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from pyquiet.scaling.calibration import PerQuestion
from pyquiet.scaling.calls import Retry
from pyquiet.scaling.cold import presampled
from pyquiet.scaling.drift import DriftMonitor
from pyquiet.scaling.limits import TakeoverLimit
from pyquiet.scaling.plan import Plan
from pyquiet.scaling.policy import ConformalPolicy, Policy, check_watched


def check_kinds(given: Mapping[str, Any]) -> None:
    """Raises TypeError for an argument that cannot serve, with what would; None is none."""
    for name, value in given.items():
        serves, remedy = _KINDS[name]
        if value is not None and not serves(value):
            raise TypeError(f"{name} must be {remedy}, got {value!r}")


def check_together(plan: Plan, policy: Policy | None, calibration: Any, drift: DriftMonitor | None) -> None:
    """Raises ValueError for arguments of which one would do nothing beside another.

    Args:
        calibration: a calibrator; of anything else nothing is known yet.
    """
    for name, value in (("calibration", calibration), ("drift", drift)):
        if policy is not None and value is not None:
            raise ValueError(f"{name} does nothing beside policy: give it to ConformalPolicy, or leave one of them out")
    decides, watch = calibration, drift
    if isinstance(policy, ConformalPolicy):
        decides, watch = policy.calibrator, policy.drift
    if watch is not None and plan.no_promise:
        raise ValueError(f"drift watches what is promised, and nothing is ({plan.no_promise}): leave one out")
    if watch is not None:
        check_watched(decides)
    filled = presampled(decides)
    if isinstance(filled, PerQuestion) and not filled.banks and filled.n_min > plan.chains:
        raise ValueError(
            f"PerQuestion: n_min must be at most chains, {plan.chains}, since as many chunks are drafted for a "
            f"question's bank; got {filled.n_min}, so that no question would have one"
        )


def _instance(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _with(*names: str) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, type) and all(hasattr(value, name) for name in names)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "calibration": (
        lambda value: isinstance(value, str | os.PathLike) or _with("p_value", "version")(value),
        "a calibrator, such as Pooled(bank), or the folder of one that was saved",
    ),
    "policy": (_with("decide", "observe", "together"), "a policy, such as RankPolicy(4)"),
    "score": (_with("__call__", "name"), "a score, such as MeanNLL()"),
    "plan": (_instance(Plan), "a plan, Plan(...)"),
    "template": (lambda value: isinstance(value, str) or callable(value), "a text with {question}, or a function"),
    "system": (_instance(str), "a text"),
    "extract": (callable, "a function of a text that gives its answer, or None"),
    "retry": (_instance(Retry), "a Retry(tries, ...)"),
    "limit": (_instance(TakeoverLimit), "a TakeoverLimit(per_question, ...)"),
    "drift": (_instance(DriftMonitor), "a DriftMonitor(level)"),
}
