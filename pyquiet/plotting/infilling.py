"""The order of infilling: round after round, which drafts were kept and which were refused."""

from transformers import PreTrainedTokenizerBase

from pyquiet.any_subset import Infilling, Origin
from pyquiet.plotting.page import MASK, View, shown, span
from pyquiet.plotting.pieces import token_pieces

LEGEND = {
    Origin.DRAWN: "drawn from its exact law",
    Origin.ACCEPTED: "a draft that was kept",
    Origin.REPLACED: "drawn in place of a refused draft, which is struck out",
    Origin.BONUS: "one more, behind drafts that were all kept",
}
_COLOURS = {
    Origin.DRAWN: "#b5d3f2",
    Origin.ACCEPTED: "#bfe6bf",
    Origin.REPLACED: "#fbd3a8",
    Origin.BONUS: "#dccbf0",
}
_STYLE = (
    "".join(f".o{origin:d}{{background:{colour}}}" for origin, colour in _COLOURS.items())
    + ".text del{color:#a00}.rounds td,.rounds .t{text-align:left;vertical-align:top}"
)


def infilling_view(filled: Infilling, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> View:
    """How text number `row` was filled: a line a round, what it decided coloured by how it came about."""
    ids, rounds = filled.tokens[row].tolist(), filled.reveal_round[row].tolist()
    origins, refused = filled.origin[row].tolist(), filled.refused[row].tolist()
    pieces = token_pieces(tokenizer, ids)

    def position(at: int, number: int) -> str:
        if rounds[at] > number:
            return MASK
        if rounds[at] < number:
            return span(pieces[at])
        struck = f"<del>{shown(token_pieces(tokenizer, [refused[at]])[0])}</del>" if refused[at] >= 0 else ""
        hint = f"{LEGEND[Origin(origins[at])]}, log p {filled.log_probs[row, at]:.2f}"
        return struck + span(pieces[at], f"o{origins[at]}", hint=hint)

    lines = "".join(
        f'<tr><td>{number + 1}</td><td><div class="text">{"".join(position(at, number) for at in range(len(ids)))}'
        "</div></td></tr>\n"
        for number in range(max(rounds) + 1)
    )
    legend = " ".join(f'<span class="o{origin:d}">{words}</span>;' for origin, words in LEGEND.items())
    head = '<tr><th>round</th><th class="t">text</th></tr>'
    return View(f'<p>{legend}</p>\n<table class="rounds">{head}\n{lines}</table>', _STYLE)
