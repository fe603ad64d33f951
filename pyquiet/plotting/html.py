"""A text as one page of HTML: each token coloured by what the thought before it gained, the thought on hover."""

import os
from collections.abc import Iterator
from html import escape

from transformers import PreTrainedTokenizerBase

from pyquiet.evaluation.difficulty import Difficulty, TokenGains
from pyquiet.files import replacing
from pyquiet.plotting.pieces import token_pieces, visible

LEVELS = (0.01, 0.05, 0.2, 1.0)  # nats of gain or loss from which a token is coloured deeper

_BLUE, _ORANGE = ("#dcebfa", "#b5d3f2", "#7fb0e3", "#4a8fd3"), ("#fdebd7", "#fbd3a8", "#f5ad66", "#e58a2b")
_COLOURS = "".join(
    f".{sign}{i}{{background:{colour}}}"
    for sign, colours in (("g", _BLUE), ("l", _ORANGE))
    for i, colour in enumerate(colours, 1)
)
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "#text,td,pre{font-family:monospace}#text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9}"
    "#text span{border-right:1px solid #eee}#text span:target{outline:2px solid #c00}"
    ".n::before{content:'\\21B5';color:#999}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}"
    "td.t{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}summary{font-size:1.2em;margin:1em 0;"
    "cursor:pointer}" + _COLOURS
)


def write_thoughts_page(
    gains: TokenGains,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    *,
    by: Difficulty = "entropy",
    title: str = "Thoughts",
    limit: int = 5000,
) -> None:
    """Writes one HTML file that needs no other, no network and no script.

    It shows the gains by decile; the text, a token's probabilities and thoughts on hover; and all that in a table,
    sorted by gain.

    Args:
        by: the measure of difficulty of the deciles. limit: tokens shown, the first ones; the page says how many are
            left out. The deciles are of all.

    Raises:
        ValueError: limit < 1. OSError: the file cannot be written.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(_page(gains, tokenizer, by, title, limit))


def _page(
    gains: TokenGains, tokenizer: PreTrainedTokenizerBase, by: Difficulty, title: str, limit: int
) -> Iterator[str]:
    tokens = _Shown(gains, tokenizer, limit)
    n, total = len(tokens.pieces), len(gains.token)
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_shown(title)}</title>'
    yield f"<style>{_STYLE}</style></head>\n<body><h1>{_shown(title)}</h1>\n<p>"
    yield f"{total} tokens." if n == total else f"The first {n} of {total} tokens (the limit can be raised)."
    yield " Blue: the thought made the token more probable; orange: less. Shades from "
    yield f"{', '.join(map(str, LEVELS))} nats. p: probability without and with the thought; w: the thought's weight."
    yield f"</p>\n<details open><summary>Gain by {by}, all tokens</summary><pre>{escape(str(gains.table(by)))}</pre>"
    yield '</details>\n<details open><summary>Text</summary><div id="text">'
    for i in range(n):
        yield tokens.span(i)
    yield "</div></details>\n<details><summary>Tokens by gain</summary><table>\n<thead><tr><th>token</th><th></th>"
    yield "<th>gain</th><th>base p</th><th>mixed p</th><th>entropy</th><th>thoughts</th></tr></thead><tbody>\n"
    for i in gains.gain[:n].argsort(descending=True, stable=True).tolist():
        yield tokens.table_row(i)
    yield "</tbody></table></details></body></html>\n"


class _Shown:
    """The tokens of a page, as plain numbers and strings."""

    def __init__(self, gains: TokenGains, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self.row = gains.row[:limit].tolist()
        self.pieces = token_pieces(tokenizer, gains.token[:limit].tolist())
        self.gain, self.entropy = gains.gain[:limit].tolist(), gains.entropy[:limit].tolist()
        self.base, self.mixed = ((-nll[:limit]).exp().tolist() for nll in (gains.base_nll, gains.mixed_nll))
        n, N, _ = gains.thoughts[:limit].shape
        texts = iter(tokenizer.batch_decode(gains.thoughts[:limit].flatten(0, 1).tolist()))
        self.thoughts = [
            "\n".join(f"w {w:+.3f}: {next(texts)}" for w in weights) for weights in gains.weight[:limit].tolist()
        ]

    def span(self, i: int) -> str:
        hint = (
            f"p {self.base[i]:.3g} to {self.mixed[i]:.3g}, gain {self.gain[i]:+.3f}, entropy {self.entropy[i]:.2f}\n"
            f"{self.thoughts[i]}"
        )
        level = sum(abs(self.gain[i]) >= least for least in LEVELS)
        colour = [f"{'g' if self.gain[i] > 0 else 'l'}{level}"] if level else []
        mark = _classes(*colour, *self._newline(i))
        new_text = "<hr>" if i and self.row[i] != self.row[i - 1] else ""
        return f'{new_text}<span id="t{i}"{mark} title="{_shown(hint)}">{_shown(self.pieces[i])}</span>'

    def table_row(self, i: int) -> str:
        numbers = (f"{self.gain[i]:+.3f}", f"{self.base[i]:.3g}", f"{self.mixed[i]:.3g}", f"{self.entropy[i]:.2f}")
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        return (
            f"<tr><td{_classes('t', *self._newline(i))}>{_shown(self.pieces[i])}</td>"
            f'<td><a href="#t{i}">{i}</a></td>{cells}'
            f'<td class="t">{_shown(self.thoughts[i])}</td></tr>\n'
        )

    def _newline(self, i: int) -> list[str]:
        return ["n"] if "\n" in self.pieces[i] else []


def _classes(*names: str) -> str:
    return f' class="{" ".join(names)}"' if names else ""


def _shown(text: str) -> str:
    return escape(visible(text))
