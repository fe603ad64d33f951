"""One page of HTML that needs no other file, no network and no script: sections of words and views."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from pyquiet.files import replacing
from pyquiet.plotting.pieces import visible

MASKED = "\N{LIGHT SHADE}"
MASK = f'<span class="masked">{MASKED}</span>'  # a token that is not there yet

_STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--faint:#707070;--line:#ddd;--good:74 143 211;--bad:229 138 43}
@media(prefers-color-scheme:dark){
:root{--ink:#e8e8e8;--paper:#1f1f1f;--faint:#a0a0a0;--line:#4a4a4a;--good:48 112 180;--bad:168 84 8}
svg{filter:invert(.88) hue-rotate(180deg)}}
body{font:16px/1.5 sans-serif;max-width:66em;margin:2em auto;padding:0 1em;color:var(--ink);background:var(--paper)}
h2{margin:2.5em 0 .5em}p,li,figcaption{max-width:46em}figure{margin:1.5em 0}figcaption{margin-bottom:.5em}
.number{border-left:4px solid rgb(var(--good));padding-left:.8em}ul{padding-left:1.2em}svg{max-width:100%;height:auto}
.text,td,pre{font-family:monospace}.text{position:relative;max-width:54em;white-space:pre-wrap;overflow-wrap:anywhere}
.text{line-height:1.9}.text span{border-right:1px solid var(--line)}.n::before{content:'\\21B5';color:var(--faint)}
.text .masked{color:var(--faint)}.g1,.g2,.g3,.g4{background:rgb(var(--good)/var(--deep))}
.l1,.l2,.l3,.l4{background:rgb(var(--bad)/var(--deep))}
.g1,.l1{--deep:.15}.g2,.l2{--deep:.35}.g3,.l3{--deep:.65}.g4,.l4{--deep:1}
[data-hint]:is(:hover,:focus){outline:2px solid var(--ink)}
[data-hint]:is(:hover,:focus)::after{content:attr(data-hint);position:absolute;left:0;margin-top:1.9em;z-index:1;
max-width:100%;box-sizing:border-box;white-space:pre-wrap;padding:.3em .6em;background:#222;color:#fff;
font:13px/1.4 monospace;border:1px solid #888;border-radius:4px}
pre{overflow-x:auto}table{border-collapse:collapse;font-size:13px;max-width:100%}
td,th{padding:2px 8px;text-align:right;border-bottom:1px solid var(--line)}
td.t{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer}
@media print{*{print-color-adjust:exact}tr,svg{break-inside:avoid}h2,figcaption{break-after:avoid}}
"""


@dataclass(frozen=True)
class View:
    """Something to look at: markup, the style rules it needs beside the page's own, and what stands above it: a
    sentence that says what to look at.
    """

    markup: str
    style: str = ""
    words: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: its title, what a reader should know, views, what was found, and more of that, folded."""

    title: str
    words: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    found: str = ""
    more: tuple[str, ...] = ()


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
    yield '<meta name="viewport" content="width=device-width,initial-scale=1">'
    yield f"<style>{_STYLE}{''.join(styles)}</style></head>\n<body><main><h1>{shown(title)}</h1>\n"
    yield f"<p>{shown(words)}</p>\n" if words else ""
    for section in sections:
        yield from _section(section)
    yield "</main></body></html>\n"


def _section(section: Section) -> Iterator[str]:
    yield f"<section><h2>{shown(section.title)}</h2>\n"
    yield from (f"<p>{shown(paragraph)}</p>\n" for paragraph in section.words)
    yield f'<p class="number">{shown(section.found)}</p>\n' if section.found else ""
    if section.more:
        items = "".join(f"<li>{shown(item)}</li>" for item in section.more)
        yield f"<details><summary>More numbers</summary><ul>{items}</ul></details>\n"
    for view in section.views:
        caption = f"<figcaption>{shown(view.words)}</figcaption>" if view.words else ""
        yield f"<figure>{caption}{view.markup}</figure>\n"
    yield "</section>\n"


def shown(text: str) -> str:
    """The text as markup; control characters are shown as pictures of them."""
    return escape(visible(text))


def span(piece: str, *classes: str, hint: str = "", name: str = "", stop: bool = False) -> str:
    """A token as markup, with its id and what is shown when it is pointed at, touched or, at a `stop`, tabbed to."""
    kinds = [*filter(None, classes), *(["n"] if "\n" in piece else [])]
    marks = [f'id="{name}"'] if name else []
    marks += [f'class="{" ".join(kinds)}"'] if kinds else []
    marks += [f'data-hint="{shown(hint)}" tabindex="{0 if stop else -1}"'] if hint else []
    return f"<span{''.join(' ' + mark for mark in marks)}>{shown(piece)}</span>"
