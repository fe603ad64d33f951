"""Quiet-STaR: what thoughts gain on texts that nobody was trained on, by how hard a token is."""

from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyquiet.demo.scene import Scene, lower
from pyquiet.evaluation import DifficultyTable, Estimate, TokenGains, gain_by_decile, opening_ids, thinking_gains
from pyquiet.plotting import View, as_svg, draw_gain_by_decile, thoughts_view
from pyquiet.plotting.thoughts import WORDS
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
    hardest = torch.zeros_like(story)
    hardest[gains.entropy.masked_fill(~story, -1).argsort(stable=True)[-(int(story.sum()) // 10) :]] = True
    groups = {"stories": story, "hardest_tenth_of_stories": hardest, "books": ~story}
    numbers = {group: {name: float(x[where].mean()) for name, x in nll.items()} for group, where in groups.items()}
    gained = {group: mean_gain(gains, where) for group, where in groups.items()}
    tables = {
        kind: gain_by_decile(gains.entropy[where], gains.base_nll[where], gains.mixed_nll[where])
        for kind, where in groups.items()
        if kind != "hardest_tenth_of_stories"
    }

    def told(group: str) -> str:
        x = numbers[group]
        return f"{x['thinking']:.3f} with thoughts, {x['not_thinking']:.3f} without ({lower(gained[group])})"

    deciles = ", ".join(f"{row['mixed_nll']:.3f}/{row['base_nll']:.3f}" for row in tables["stories"].rows())
    causal = ", ".join(f"{numbers[kind]['tiny_causal']:.3f} on {kind}" for kind in tables)
    return Scene(
        "A thought before every token (Quiet-STaR)",
        "Before each token the model writes a few hidden tokens and mixes what they say into its prediction.",
        f"Loss on the hardest tenth of the tokens of unseen stories: {told('hardest_tenth_of_stories')}, in nats a "
        "token; the lower, the better they were foreseen.",
        (
            f"All tokens of stories: {told('stories')}; of books: {told('books')}.",
            f"With and without, by tenths of the stories' tokens from the easiest to the hardest: {deciles}.",
            f"tiny-causal, from which the model was taught to think: {causal}.",
        ),
        {
            "tokens": len(story),
            "nll": numbers,
            "gain": {group: gain.to_dict() for group, gain in gained.items()},
            "deciles": {kind: table.to_dict() for kind, table in tables.items()},
        },
        lambda: _views(gains, tokenizer, tables),
        ("tiny-thinker", "tiny-causal"),
    )


def _views(
    gains: TokenGains, tokenizer: PreTrainedTokenizerBase, tables: dict[str, DifficultyTable]
) -> tuple[View, ...]:
    drawn = "".join(
        as_svg(draw_gain_by_decile(table, title=kind), f"gains by tenths of difficulty, {kind}")
        for kind, table in tables.items()
    )
    bars = "Each bar is a tenth of the tokens, the easiest on the left: above zero, thoughts helped there."
    words = f"{WORDS} These are the first {_SHOWN} of {len(gains.token)} tokens."
    return View(drawn, words=bars), thoughts_view(gains, tokenizer, limit=_SHOWN, words=words)


def mean_gain(gains: TokenGains, where: Tensor) -> Estimate:
    """The mean gain of some tokens, bool [n]; its error takes texts as independent, and not tokens (jackknife)."""
    total, count = (torch.bincount(gains.row[where], x) for x in (gains.gain[where].double(), where[where].double()))
    total, count = total[count > 0], count[count > 0]
    without = (total.sum() - total) / (count.sum() - count)
    return Estimate.jackknife(float(total.sum() / count.sum()), without)


@torch.no_grad()
def next_token_nll(model: PreTrainedModel, rows: list[list[int]], batch_size: int = 16) -> Tensor:
    """-log p in nats of every token but each row's first, one row behind the other, [n]."""
    parts = []
    for start in range(0, len(rows), batch_size):
        ids, mask = padded(rows[start : start + batch_size], "right")
        log_probs = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        parts.append(-log_probs.gather(2, ids[:, 1:, None])[..., 0][mask[:, 1:] == 1])
    return torch.cat(parts)
