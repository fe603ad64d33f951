"""Books as paragraphs: light cleaning, sections, and the split into training and held-out text.

A book is one plain text file. It becomes a list of sections (chapters, tales), a section a list of
paragraphs. The last 3 % of the characters of each book, in whole paragraphs, are held out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

Section = list[str]

HELD_OUT_FRACTION = 0.03
PARAGRAPH_BREAK = "\n\n"

_LICENCE_START = re.compile(r"^\*\*\* ?START OF.*$", re.MULTILINE)
_LICENCE_END = re.compile(r"^\*\*\* ?END OF.*$", re.MULTILINE)
_PLAIN = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\t": " ",
        "_": None,  # underscores mark italics in these files
        "\ufffd": None,
        "\u25a0": None,
        "\u2022": None,
    }
)
_BROKEN_WORD = re.compile(r"(?<=[a-z])- *\n(?=[a-z])")
_NO_LETTER = re.compile(r"[^A-Za-z0-9]*")
_NUMBERED_HEADING = re.compile(
    r"(?i:chapter|volume|book|stave|adventure|letter|part)\s+([IVXLCivxlc]+|\d+|the\s+\w+)\b.{0,60}"
    r"|[IVXLC]+(\.|--) ?[A-Z].{0,60}"
)
_PAGE_HEADER = re.compile(r"\d+ [A-Z .,']+|[A-Z .,']+ \d+")
_LONG_BLOCK = 6000


@dataclass(frozen=True)
class Book:
    """One book: its sections for training and its held-out end."""

    name: str
    train: list[Section]
    held_out: list[Section]


def read_books(folder: Path) -> list[Book]:
    """All ``*.txt`` books of `folder`, by name; ValueError when there are none."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ValueError(f"data={str(folder)!r} holds no *.txt file; pass the folder of the books")
    return [_read_book(file) for file in files]


def characters(sections: list[Section]) -> int:
    """Length of the text, paragraph breaks included."""
    return sum(len(PARAGRAPH_BREAK.join(section)) for section in sections)


def _read_book(file: Path) -> Book:
    paragraphs = _paragraphs(file.read_text(encoding="utf-8", errors="replace"))
    lengths = [len(paragraph) for paragraph in paragraphs]
    budget, first_held_out = HELD_OUT_FRACTION * sum(lengths), len(paragraphs)
    while first_held_out > 1 and budget > 0:
        first_held_out -= 1
        budget -= lengths[first_held_out]
    train, held_out = paragraphs[:first_held_out], paragraphs[first_held_out:]
    return Book(file.stem, _sections(train), _sections(held_out))


def _paragraphs(text: str) -> list[str]:
    text = text.replace("\r\n", "\n").translate(_PLAIN)
    start, end = _LICENCE_START.search(text), _LICENCE_END.search(text)
    text = text[start.end() if start else 0 : end.start() if end else len(text)]
    text = _BROKEN_WORD.sub("", text)
    blocks = [part for block in re.split(r"\n\s*\n", text) for part in _split_long(block)]
    paragraphs = [_unwrap(block.strip("\n")) for block in blocks]
    return [p for p in paragraphs if not (_NO_LETTER.fullmatch(p) or _is_page_header(p))]


def _split_long(block: str) -> list[str]:
    """A book without blank lines: there a short line that ends a sentence ends a paragraph."""
    if len(block) < _LONG_BLOCK:
        return [block]
    lines = block.split("\n")
    short = 0.85 * max(map(len, lines))
    parts: list[list[str]] = [[]]
    for line in lines:
        parts[-1].append(line)
        if len(line) < short and line.rstrip().endswith((".", "!", "?", '"', "'", ":")):
            parts.append([])
    return ["\n".join(part) for part in parts if part]


def _unwrap(block: str) -> str:
    """One paragraph without hard line breaks; indented blocks are verse and keep theirs."""
    lines = block.split("\n")
    verse = len(lines) > 1 and all(line.startswith("   ") for line in lines)
    return ("\n" if verse else " ").join(" ".join(line.split()) for line in lines).strip()


def _sections(paragraphs: list[str]) -> list[Section]:
    sections: list[Section] = [[]]
    for paragraph in paragraphs:
        # Headings in a row (volume, chapter, title) open one section together.
        if _is_heading(paragraph) and any(not _is_heading(p) for p in sections[-1]):
            sections.append([])
        sections[-1].append(paragraph)
    return [section for section in sections if section]


def _is_page_header(paragraph: str) -> bool:
    header = _PAGE_HEADER.fullmatch(paragraph) is not None
    return header and _NUMBERED_HEADING.fullmatch(paragraph) is None


def _is_heading(paragraph: str) -> bool:
    if len(paragraph) > 80 or paragraph[0] in "\"'(":
        return False
    shouted = paragraph.isupper() and paragraph[-1] not in "!?,;"
    return shouted or _NUMBERED_HEADING.fullmatch(paragraph) is not None
