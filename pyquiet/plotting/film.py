"""A text of masked diffusion as a film strip: a frame a step, with how evenly the candidates weighed."""

from transformers import PreTrainedTokenizerBase

from pyquiet.diffusion.sampling import Diffusion
from pyquiet.plotting.page import MASK, View, span
from pyquiet.plotting.pieces import token_pieces

LEGEND = "Green: what a step opened. ESS: between how many of its candidates a step hesitated (effective sample size)."
_STYLE = (
    ".film{display:flex;overflow-x:auto;gap:.5em;padding:.5em;background:#333;max-width:100%}"
    ".frame{flex:0 0 17em;background:#fff;padding:.5em;font-size:12px}.frame .text{line-height:1.5}"
    ".new{background:#bfe6bf;font-weight:bold}"
    ".ess{height:6px;background:#eee;margin:.2em 0}.ess div{height:6px;background:#4a8fd3}"
)


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
        head = f"step {step + 1}, time {trace.times[entry]:.2f}<br>{bar}"
        return f'<div class="frame">{head}<div class="text">{text}</div></div>'

    return View(f'<p>{LEGEND}</p><div class="film">{"".join(map(frame, mine))}</div>', _STYLE)
