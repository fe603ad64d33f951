"""Quiet-STaR: what thoughts gain on texts that nobody was trained on, by how hard a token is."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyquiet.demo.scene import Scene
from pyquiet.evaluation import opening_ids, thinking_gains
from pyquiet.evaluation.prompts import padded
from pyquiet.plotting.figures import as_svg
from pyquiet.plotting.page import View
from pyquiet.zoo import held_out, load

_STORIES, _PASSAGES = 6, 12  # one of so many


def show(seed: int, progress: bool) -> Scene:
    """Takes about a fifth of a minute on two cores."""
    model, tokenizer = load("tiny-thinker")
    texts = [row["text"] for row in held_out("stories")[::_STORIES] + held_out("passages")[::_PASSAGES]]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    opening = opening_ids(tokenizer)
    gains = thinking_gains(model, rows, seed=seed, opening=opening, progress=progress)
    plain = next_token_nll(load("tiny-causal")[0], [[*opening, *row] for row in rows])
    hardest = gains.entropy.argsort(stable=True)[-(len(plain) // 10) :]
    nll = {"thinking": gains.mixed_nll, "not thinking": gains.base_nll, "tiny-causal": plain}
    every = {name: float(x.mean()) for name, x in nll.items()}
    hard = {name: float(x[hardest].mean()) for name, x in nll.items()}

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.difficulty import draw_gain_by_decile
        from pyquiet.plotting.thoughts import thoughts_view

        figure = draw_gain_by_decile(gains.table(), title="what thoughts gain, from the easiest tenth to the hardest")
        return View(as_svg(figure)), thoughts_view(gains, tokenizer, limit=1200)

    return Scene(
        "A thought before every token (Quiet-STaR)",
        "Before each token the model writes a few hidden tokens, at all places of the text at once, and mixes what "
        "they say into its prediction. Loss is in nats a token: the lower, the better the text was foreseen.",
        f"{len(plain)} tokens of stories and books: loss {every['thinking']:.3f} with thoughts, "
        f"{every['not thinking']:.3f} without, {every['tiny-causal']:.3f} by the model it grew from; on the tenth that "
        f"is hardest to foresee {hard['thinking']:.3f}, {hard['not thinking']:.3f} and {hard['tiny-causal']:.3f}",
        {"tokens": len(plain), "nll": every, "nll_hardest_tenth": hard, "deciles": gains.table().to_dict()},
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
