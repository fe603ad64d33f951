"""Answers: found in what a chain wrote, brought to one spelling, and compared (for arXiv 2509.15148)."""

import re
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, lru_cache

from pyquiet.scaling import symbolic

# Tried in turn where nothing is boxed; of several places the last one counts.
DEFAULT = (
    r"####[ \t]*(\S[^\n]*)",
    r"(?i:answer is):?[ \t]*(\S(?:[^ \t\n]|[ \t]++)*?)(?=\.?[ \t]*(?:\n|$)|\.[ \t])",
)
LONGEST = 500  # characters; a longer answer, of a model that goes round in circles, is compared as it stands

_BRACE = re.compile(r"\\{1,2}f?boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace opens nothing

_NUMBER = re.compile(r"([+-]?)(?:(\d+)\s*)?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<!\d)(\d+)/(\d+))")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_POWER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:\\(?:times|cdot)10\^\{?([+-]?\d{1,4})\}?|[eE]([+-]?\d{1,4}))")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WORDS = re.compile(
    r"(?<=[\d}.)])\s*(?:\\(?:text|mbox|textrm|mathrm)\{[^{}]*\}|\s(?!(?:or|and)\b)[A-Za-z]{2,}[A-Za-z. ]*)"
    r"(?:\^\{?\d\}?)?$"
)
_REWRITE = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\[!,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\\displaystyle|\^\{?\\circ\}?|\\degrees?|°", ""),
        (r"\\?[$%]", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(?<=\d)\{,\}(?=\d)", ","),
        ("[\u2212\u2013]", "-"),
    )
]
_UNWRAP = re.compile(r"\\(?:text|mbox|textrm|textbf|mathrm|mathbf|operatorname)\{([^{}]*)\}")
_BRACKETS = {"(": ")]", "[": ")]", "{": "}"}


def extract(text: str, patterns: Sequence[str] = DEFAULT) -> str | None:
    r"""The answer that a text gives: its last balanced `\boxed{...}`, else the last match of the first pattern that has
    one (its first group), else None. A text that was cut behind "The answer is 1" gives 1."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in patterns:
        matches = re.findall(pattern, text)
        if matches:
            return str(matches[-1]).strip() or None
    return None


def _last_boxed(text: str) -> str | None:
    last, answer = 0, None
    opened: list[int] = []  # for each open brace where its box begins, 0 for one that is no box
    for brace in _BRACE.finditer(text):
        begin = opened.pop() if brace[0] == "}" and opened else 0
        if begin > last and (inside := text[begin : brace.start()].strip()):
            last, answer = begin, inside
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(brace.end() if "boxed" in brace[0] else 0)
    return answer


@lru_cache(maxsize=2**16)
def normalise(answer: str) -> str:
    r"""One spelling of an answer: no LaTeX noise, units, currency or percent signs, no separators of thousands.

    Fractions are written \frac{a}{b}; a name in front of "=" goes; words are in lower case. 50\% becomes 50. What is
    longer than `LONGEST` stays as it is.
    """
    text = answer.strip()
    if len(text) > LONGEST:
        return text
    for open_, close in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(open_) and text.endswith(close) and len(text) > len(open_) + len(close):
            text = text[len(open_) : -len(close)].strip()
    for pattern, by in _REWRITE:
        text = pattern.sub(by, text)
    text = text.strip().rstrip(".,").strip()
    text = re.sub(r"^\\?[A-Za-z]+\s*(?:=|\\in(?![A-Za-z]))\s*", "", text)
    text = _WORDS.sub("", text)
    text = _UNWRAP.sub(r"\1", text)
    text = re.sub(r"\s+", "" if re.search(r"[\\\d^=]", text) else " ", text.strip())
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)(?=\{)", r"\\frac{\1}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if re.fullmatch(r"\([A-Za-z]\)", text):
        text = text[1:-1]
    return text.lower() if re.fullmatch(r"[A-Za-z ]{2,}", text) else text


def number(text: str) -> Fraction | None:
    """The number that a normalised answer is: decimal, fraction, mixed or with a power of ten; None if it is none."""
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _POWER.fullmatch(text):
        return Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3])
    match = _NUMBER.fullmatch(text)
    if match is None or (match[2] and not match[3]) or not int(match[4] or match[6]):
        return None
    whole = int(match[2] or 0) + Fraction(int(match[3] or match[5]), int(match[4] or match[6]))
    return -whole if match[1] == "-" else whole


def equal(a: str, b: str, seconds: float = 2.0) -> bool:
    """Whether two answers are the same: as strings, as exact numbers, part by part, or as expressions.

    Parts of tuples and intervals are compared in order, brackets and all; those of sets and bare lists in any order.
    Expressions are compared by math-verify (`pip install "pyquiet[scale]"`; without it, one warning and no more than
    the rest) in a process that is killed after `seconds`; what takes longer is different. Works in any thread, and
    symmetric: equal(a, b) == equal(b, a).
    """
    a, b = sorted((normalise(a), normalise(b)))
    return a == b or (max(len(a), len(b)) <= LONGEST and _equal(a, b, seconds))


def _equal(a: str, b: str, seconds: float) -> bool:
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x == y
    (kind, parts), (other_kind, others) = _parts(a), _parts(b)
    if len(parts) > 1 or len(others) > 1:
        if (kind, len(parts)) != (other_kind, len(others)):
            return False
        if kind:
            return all(equal(p, q, seconds) for p, q in zip(parts, others, strict=True))
        for part in parts:
            same = next((q for q in others if equal(part, q, seconds)), None)
            if same is None:
                return False
            others.remove(same)
        return True
    if not a or not b or not _has_math(a) or not _has_math(b) or not _can_compare():
        return False
    return symbolic.same_expression(a, b, seconds)


def _parts(text: str) -> tuple[str, list[str]]:
    r"""Brackets of a tuple or interval ("" for a set or bare list), and what stands between the outermost commas."""
    kind, inner = "", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
    elif text[:1] in _BRACKETS and text[-1:] in _BRACKETS[text[0]]:
        kind, inner = text[0] + text[-1], text[1:-1]
    parts, depth = [""], 0
    for letter in inner:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:  # the first bracket does not belong to the last: (a)+(b)
            return "", [text]
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return kind, parts


def _has_math(text: str) -> bool:
    """Words alone are no expression."""
    return re.fullmatch(r"[A-Za-z ]{2,}", text) is None


@cache
def _can_compare() -> bool:
    if symbolic.available():
        return True
    warnings.warn(
        "math-verify is missing, so expressions such as \\sqrt{8} and 2\\sqrt{2} count as different; "
        'pip install "pyquiet[scale]"',
        stacklevel=5,
    )
    return False
