"""Quiet-STaR: what thoughts gain on texts that nobody was trained on, by how hard a token is."""

from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyquiet.demo.scene import Scene
from pyquiet.evaluation import opening_ids, thinking_gains
from pyquiet.plotting.figures import as_svg
from pyquiet.plotting.page import View
from pyquiet.tokens import padded
from pyquiet.zoo import held_out, load

_STORIES, _PASSAGES = 6, 12  # one of so many
_SHOWN = 1200  # tokens on the page


def show(seed: int, progress: bool) -> Scene:
    """Takes about a fifth of a minute on two cores."""
    model, tokenizer = load("tiny-thinker")
    stories, books = held_out("stories")[::_STORIES], held_out("passages")[::_PASSAGES]
    order = [text for pair in zip_longest(stories, books) for text in pair if text]  # so that a view shows both
    rows = [tokenizer(text["text"], add_special_tokens=False).input_ids for text in order]
    opening = opening_ids(tokenizer)
    gains = thinking_gains(model, rows, seed=seed, opening=opening, progress=progress)
    nll = {
        "thinking": gains.mixed_nll,
        "not_thinking": gains.base_nll,
        "tiny_causal": next_token_nll(load("tiny-causal")[0], [[*opening, *row] for row in rows]),
    }
    story = torch.tensor([text in stories for text in order])[gains.row]
    hardest = gains.entropy.masked_fill(~story, -1).argsort(stable=True)[-(int(story.sum()) // 10) :]
    groups = {"stories": story, "hardest_tenth_of_stories": hardest, "books": ~story}
    numbers = {group: {name: float(x[where].mean()) for name, x in nll.items()} for group, where in groups.items()}

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.difficulty import draw_gain_by_decile
        from pyquiet.plotting.page import shown
        from pyquiet.plotting.thoughts import LEGEND, thoughts_view

        figure = draw_gain_by_decile(gains.table(), title="what thoughts gain, from the easiest tenth to the hardest")
        words = f"{LEGEND} The first {_SHOWN} of {len(story)} tokens:"
        return View(as_svg(figure)), View(f"<p>{shown(words)}</p>"), thoughts_view(gains, tokenizer, limit=_SHOWN)

    return Scene(
        "A thought before every token (Quiet-STaR)",
        "Before each token the model writes a few hidden tokens, at all places of the text at once, and mixes what "
        "they say into its prediction. Loss is in nats a token: the lower, the better the text was foreseen.",
        "; ".join(
            f"{group.replace('_', ' ')}: loss {x['thinking']:.3f} with thoughts, {x['not_thinking']:.3f} without"
            for group, x in numbers.items()
        )
        + ". Thoughts help where a conclusion takes steps, not in the prose of books",
        {"tokens": len(story), "nll": numbers, "deciles": gains.table().to_dict()},
        draw,
    )


@torch.no_grad()
def next_token_nll(model: PreTrainedModel, rows: list[list[int]], batch_size: int = 16) -> Tensor:
    """-log p in nats of every token but each row's first, one row behind the other, [n]."""
    parts = []
    for start in range(0, len(rows), batch_size):
        ids, mask = padded(rows[start : start + batch_size], "right")
        log_probs = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        parts.append(-log_probs.gather(2, ids[:, 1:, None])[..., 0][mask[:, 1:] == 1])
    return torch.cat(parts)
