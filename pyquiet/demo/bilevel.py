"""BSVRB: rows with wrong labels found by a few clean ones."""

import torch

from pyquiet.bilevel.demonstration import demonstrate
from pyquiet.demo.scene import Scene
from pyquiet.plotting import View, as_svg, draw_hypergradient, draw_loss, draw_weights
from pyquiet.tokens import padded
from pyquiet.zoo import held_out, load

_CLEAN = 20  # texts with right labels, to weigh the others by


def show(seed: int, progress: bool) -> Scene:
    """Takes a sixth of a minute."""
    features, labels = _sentences()
    shown = demonstrate(features, labels, clean=_CLEAN, seed=seed, progress=progress)
    numbers = shown.to_dict()

    def draw() -> tuple[View, ...]:
        curves = (
            "Both curves should end low: the loss on the right texts, and how much is left to gain by other weights."
        )
        drawn = "".join(as_svg(drawer(shown.cleaned), curves) for drawer in (draw_loss, draw_hypergradient))
        apart = "Texts with wrong labels should come to count nothing (left), those with right ones all (right)."
        weights = as_svg(draw_weights(shown.cleaned, wrong=shown.wrong), apart)
        return View(drawn, words=curves), View(weights, words=apart)

    return Scene(
        "Wrong labels found (BSVRB)",
        f"Each text of a training set with wrong labels learns how much it should count, so that {numbers['clean']} "
        "texts with right labels are told apart well.",
        f"Of a wrong and a right label the wrong one counts less in {numbers['auc']:.1%} of the cases (AUC; 50% is "
        f"guessing), and accuracy on unseen texts is {numbers['accuracy']:.3f}, {numbers['plain_accuracy']:.3f} where "
        "all labels are trusted.",
        (
            f"{numbers['clean_accuracy']:.3f} by the {numbers['clean']} right ones alone, "
            f"{numbers['oracle_accuracy']:.3f} were all labels right.",
            f"{numbers['rows']} sentences, of stories or of books, {numbers['wrong']} of them with a wrong label, told "
            "apart by what a language model makes of them; twenty regressions learn at once.",
        ),
        numbers,
        draw,
        ("tiny-causal",),
    )


@torch.no_grad()
def _sentences() -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, d] with a constant one, labels [n]: sentences of stories (1) and of books (-1)."""
    model, tokenizer = load("tiny-causal")
    texts = [
        (part, label)
        for found, label in ((held_out("stories"), 1.0), (held_out("passages"), -1.0))
        for row in found
        for part in row["text"].split(". ")[1:4]
        if len(part) > 10
    ]
    rows = [tokenizer(text, verbose=False).input_ids[:48] for text, _ in texts]
    means = []
    for start in range(0, len(rows), 64):
        ids, mask = padded(rows[start : start + 64], "right")
        hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
        means.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    features = torch.cat(means)
    features = (features - features.mean(0)) / features.std(0) / features.shape[1] ** 0.5
    return torch.cat([features, torch.ones(len(features), 1)], 1), torch.tensor([label for _, label in texts])
