"""One page of HTML that needs no other file, no network and no script: sections of words and views."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from pyquiet.files import replacing
from pyquiet.plotting.pieces import visible

MASKED = "\N{LIGHT SHADE}"
MASK = f'<span class="masked">{MASKED}</span>'  # a token that is not there yet

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    ".text,td,pre{font-family:monospace}.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9}"
    ".text span{border-right:1px solid #eee}.n::before{content:'\\21B5';color:#999}.masked{color:#aaa}"
    "[data-hint]{position:relative}[data-hint]:hover{outline:1px solid #888}"
    "[data-hint]:hover::after{content:attr(data-hint);position:absolute;left:0;top:1.8em;z-index:1;white-space:pre;"
    "padding:.3em .6em;background:#222;color:#fff;font:13px/1.4 monospace;border-radius:4px}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}"
    "td.t{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}"
    "summary{font-size:1.2em;margin:1em 0;cursor:pointer}svg{max-width:100%;height:auto}"
)


@dataclass(frozen=True)
class View:
    """Something to look at: markup, and the style rules it needs beside the page's own."""

    markup: str
    style: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: its title, what a reader should know, and views."""

    title: str
    words: tuple[str, ...] = ()
    views: tuple[View, ...] = ()


def write_page(path: str | os.PathLike[str], title: str, sections: Iterable[Section], *, words: str = "") -> None:
    """Writes the page, whole or not at all.

    Args:
        words: what stands under the title.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(_page(title, words, list(sections)))


def _page(title: str, words: str, sections: list[Section]) -> Iterator[str]:
    styles = dict.fromkeys(view.style for section in sections for view in section.views)
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{shown(title)}</title>'
    yield f"<style>{_STYLE}{''.join(styles)}</style></head>\n<body><h1>{shown(title)}</h1>\n"
    yield f"<p>{shown(words)}</p>\n" if words else ""
    for section in sections:
        yield f"<section><h2>{shown(section.title)}</h2>\n"
        yield from (f"<p>{shown(paragraph)}</p>\n" for paragraph in section.words)
        yield from (view.markup + "\n" for view in section.views)
        yield "</section>\n"
    yield "</body></html>\n"


def shown(text: str) -> str:
    """The text as markup; control characters are shown as pictures of them."""
    return escape(visible(text))


def span(piece: str, *classes: str, hint: str = "", name: str = "") -> str:
    """A token as markup, with what is shown on hover and its id."""
    kinds = [*filter(None, classes), *(["n"] if "\n" in piece else [])]
    marks = [f'id="{name}"'] if name else []
    marks += [f'class="{" ".join(kinds)}"'] if kinds else []
    marks += [f'data-hint="{shown(hint)}"'] if hint else []
    return f"<span{''.join(' ' + mark for mark in marks)}>{shown(piece)}</span>"
