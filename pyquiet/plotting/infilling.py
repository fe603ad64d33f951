"""The order of infilling: round after round, which drafts were kept and which were refused."""

from transformers import PreTrainedTokenizerBase

from pyquiet.any_subset import Infilling, Origin
from pyquiet.plotting.page import MASK, View, shown, span
from pyquiet.plotting.pieces import token_pieces

WORDS = (
    "Read from top to bottom: each line is a round, and what it decided is coloured by how that came about; what "
    "earlier rounds filled in is underlined. Point at a coloured word for its log-probability."
)
LEGEND = {
    Origin.DRAWN: "drawn from its exact law",
    Origin.ACCEPTED: "a draft that was kept",
    Origin.REPLACED: "drawn in place of a refused draft, which is struck out",
    Origin.BONUS: "one more, behind drafts that were all kept",
}
_STYLE = """
.o1{background:rgb(128 128 128/.35)}.o2{background:rgb(var(--good)/.5)}.o3{background:rgb(var(--bad)/.6)}
.o4{background:rgb(var(--good)/.25);border-bottom:2px dotted}
.text .was{border-bottom:2px solid rgb(var(--good)/.6)}.text del{color:var(--faint)}
.rounds td,.rounds th{text-align:left;vertical-align:top}
"""


def infilling_view(filled: Infilling, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> View:
    """How text number `row` was filled: a line a round, what it decided coloured by how it came about."""
    ids, rounds = filled.tokens[row].tolist(), filled.reveal_round[row].tolist()
    origins, refused = filled.origin[row].tolist(), filled.refused[row].tolist()
    pieces = token_pieces(tokenizer, ids)

    def position(at: int, number: int) -> str:
        if rounds[at] > number:
            return MASK
        if rounds[at] < number:
            hidden = rounds[at] < 0 and ids[at] in tokenizer.all_special_ids  # what opens or pads the text
            return "" if hidden else span(pieces[at], "was" * (rounds[at] >= 0))
        struck = f"<del>{shown(token_pieces(tokenizer, [refused[at]])[0])}</del>" if refused[at] >= 0 else ""
        hint = f"{LEGEND[Origin(origins[at])]}, log-probability {filled.log_probs[row, at]:.2f}"
        return struck + span(pieces[at], f"o{origins[at]}", hint=hint, stop=True)

    lines = "".join(
        f'<tr><td>{number + 1}</td><td><div class="text">{"".join(position(at, number) for at in range(len(ids)))}'
        "</div></td></tr>\n"
        for number in range(max(rounds) + 1)
    )
    legend = ", ".join(f'<span class="o{origin:d}">{words}</span>' for origin, words in LEGEND.items())
    head = "<tr><th>round</th><th>text</th></tr>"
    return View(f'<p>{legend}</p>\n<table class="rounds">{head}\n{lines}</table>', _STYLE, WORDS)
