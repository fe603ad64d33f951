"""Checks of arguments name the argument and the value, and let through what is well."""

from typing import Literal

import pytest

from pyquiet import QuietStarObjective
from pyquiet.checks import check_positive, check_weight, check_word


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (
            lambda: check_word("side", "up", Literal["left", "right"]),
            ValueError,
            "side must be one of left, right, got 'up'",
        ),
        (lambda: check_word("side", ["left"], {"left": 1}), ValueError, r"side must be one of left, got \['left'\]"),
        (lambda: check_positive("x", 0), ValueError, "x must be a finite number above 0, got 0"),
        (lambda: check_positive("x", float("inf")), ValueError, "x must be a finite number above 0, got inf"),
        (lambda: check_weight("x", -1), ValueError, "x must be a finite number of at least 0, got -1"),
        (lambda: check_weight("x", float("nan")), ValueError, "x must be a finite number of at least 0, got nan"),
        (lambda: QuietStarObjective(policy_weight="a"), TypeError, "policy_weight must be a number, got str 'a'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_is_named(make, kind, words) -> None:
    with pytest.raises(kind, match=words):
        make()


def test_what_is_well_comes_back() -> None:
    assert check_word("side", "left", ("left", "right")) == "left"
    assert (check_positive("x", 1e-9), check_weight("x", 0)) == (1e-9, 0)
