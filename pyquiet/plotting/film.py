"""A text of masked diffusion as a film strip: a frame a step, with how evenly the candidates weighed."""

from transformers import PreTrainedTokenizerBase

from pyquiet.diffusion.sampling import Diffusion
from pyquiet.plotting.page import MASK, View, span
from pyquiet.plotting.pieces import token_pieces

WORDS = (
    "Read from left to right: each frame is a step, and what it opened is marked. The bar is the effective sample size "
    "(ESS): between how many of its candidates the step hesitated, 1 being a clear pick."
)
_STYLE = """
.film{display:flex;overflow-x:auto;gap:.5em;padding:.5em;background:#333}
.frame{flex:0 0 17em;background:var(--paper);padding:.5em;font-size:13px}.frame .text{line-height:1.5}
.text .new{background:rgb(var(--good)/.5);font-weight:bold}
.ess{height:6px;background:var(--line);margin:.3em 0}.ess div{height:6px;background:rgb(var(--good))}
@media print{.film{flex-wrap:wrap}.frame{break-inside:avoid}}
"""


def film_view(written: Diffusion, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> View:
    """How text number `row` came about, a frame for each step that opened something in it.

    The bar of a frame is the effective number of its candidates, of all of them: near one candidate the pick was
    clear, at full length all weighed the same. Steps that were not corrected have none.
    """
    trace = written.trace
    mine = (trace.rows == row).nonzero().flatten().tolist()
    opened = written.reveal_step[row].tolist()
    pieces = token_pieces(tokenizer, written.tokens[row].tolist())

    def frame(entry: int) -> str:
        step, k, ess = int(trace.steps[entry]), int(trace.candidates[entry]), float(trace.ess[entry])
        text = "".join(
            MASK if at_step > step else span(piece, "new" * (at_step == step))
            for at_step, piece in zip(opened, pieces, strict=True)
        )
        bar = (
            f'ESS {ess:.1f} of {k}<div class="ess"><div style="width:{100 * ess / k:.0f}%"></div></div>'
            if k > 1
            else "drawn as it is"
        )
        head = f"step {step + 1}: {opened.count(step)} opened<br>{bar}"
        return f'<div class="frame">{head}<div class="text">{text}</div></div>'

    frames = "".join(map(frame, mine))
    return View(f'<div class="film" tabindex="0" role="group" aria-label="film">{frames}</div>', _STYLE, WORDS)
