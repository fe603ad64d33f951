"""A text as one page of HTML: each token coloured by what the thought before it gained, the thought on hover."""

import os

from transformers import PreTrainedTokenizerBase

from pyquiet.checks import check_count
from pyquiet.evaluation.difficulty import Difficulty, TokenGains
from pyquiet.plotting.page import Section, View, shown, span, write_page
from pyquiet.plotting.pieces import token_pieces

LEVELS = (0.01, 0.05, 0.2, 1.0)  # nats of gain or loss from which a token is coloured deeper
WORDS = (
    "Point at a word, touch it or tab to it: it tells how probable it was without the thought before it and with it, "
    "and the thought. Blue words became more probable, orange ones less. The weight is how much the thought counts; "
    "where it is negative, the prediction moves away from what the thought says."
)
_DEPTHS = [*enumerate(LEVELS, 1)]
_KEY = " ".join(
    [f'<b class="l{i}">&minus;{least:g}</b>' for i, least in reversed(_DEPTHS)]
    + [f'<b class="g{i}">+{least:g}</b>' for i, least in _DEPTHS]
)
_LEGEND = f"<p>{_KEY} and beyond: nats gained (1 nat is 2.7 times as probable)</p>"
_STYLE = ".text span:target{outline:2px solid #c00}"
_STOP = 3  # the level from which a token can be tabbed to


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
    check_count("limit", limit, least=1)
    tokens, total = _Shown(gains, tokenizer, limit), len(gains.token)
    counted = f"{total} tokens" if limit >= total else f"The first {limit} of {total} tokens (the limit can be raised)"
    views = (
        View(f"<pre>{gains.table(by)}</pre>", words=f"The gain of all tokens, by tenths of the base's {by}, in nats."),
        thoughts_view(gains, tokenizer, limit=limit, words=f"{counted}. {WORDS}"),
        View(f"<details><summary>Tokens by gain</summary>{tokens.table()}</details>"),
    )
    write_page(path, title, [Section("Tokens", (), views)])


def thoughts_view(
    gains: TokenGains, tokenizer: PreTrainedTokenizerBase, *, limit: int = 5000, words: str = WORDS
) -> View:
    """The text alone, for a page of your own: a token's probabilities and thoughts where it is pointed at.

    Args:
        limit: tokens shown, the first ones. words: what stands above.
    """
    return View(_LEGEND + _Shown(gains, tokenizer, limit).text(), _STYLE, words)


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
            "\n".join(f"thought, weight {w:+.3f}: {next(texts)}" for w in weights)
            for weights in gains.weight[:limit].tolist()
        ]

    def text(self) -> str:
        return f'<div class="text">{"".join(map(self.span, range(len(self.pieces))))}</div>'

    def span(self, i: int) -> str:
        hint = (
            f"probability {self.base[i]:.3g} without the thought, {self.mixed[i]:.3g} with it\n"
            f"gain {self.gain[i]:+.3f} nats, entropy {self.entropy[i]:.2f} nats\n{self.thoughts[i]}"
        )
        level = sum(abs(self.gain[i]) >= least for least in LEVELS)
        colour = f"{'g' if self.gain[i] > 0 else 'l'}{level}" if level else ""
        new_text = "<hr>" if i and self.row[i] != self.row[i - 1] else ""
        return new_text + span(self.pieces[i], colour, hint=hint, name=f"t{i}", stop=level >= _STOP)

    def table(self) -> str:
        """All that, the greatest gain first."""
        names = ("token", "", "gain", "base p", "mixed p", "entropy", "thoughts")
        head = "".join(f"<th>{name}</th>" for name in names)
        order = sorted(range(len(self.pieces)), key=self.gain.__getitem__, reverse=True)
        rows = "".join(map(self.table_row, order))
        return f"<table>\n<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>"

    def table_row(self, i: int) -> str:
        numbers = (f"{self.gain[i]:+.3f}", f"{self.base[i]:.3g}", f"{self.mixed[i]:.3g}", f"{self.entropy[i]:.2f}")
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        newline = " n" if "\n" in self.pieces[i] else ""
        return (
            f'<tr><td class="t{newline}">{shown(self.pieces[i])}</td><td><a href="#t{i}">{i}</a></td>{cells}'
            f'<td class="t">{shown(self.thoughts[i])}</td></tr>\n'
        )
