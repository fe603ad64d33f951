"""ASSD: gaps filled several tokens at a time, by exactly the law of one at a time."""

import torch

import pyquiet
from pyquiet.demo.scene import Scene
from pyquiet.plotting.page import View
from pyquiet.tokens import padded
from pyquiet.zoo import held_out, load

_TEXTS, _LENGTH, _MASKED = 8, 80, 0.6  # texts, their tokens at most, the share of them that is missing


def show(seed: int, progress: bool) -> Scene:
    """Takes some seconds."""
    model, tokenizer = load("tiny-any-subset")
    texts = [row["text"] for row in held_out("passages")[:: 240 // _TEXTS]]
    ids, attention = padded([tokenizer(text, verbose=False).input_ids[:_LENGTH] for text in texts], "right")
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    mask = (chance < _MASKED) & (attention == 1)
    out = {
        method: pyquiet.infill(
            model, ids, mask=mask, attention_mask=attention, method=method, k=k, coupling="gumbel", seed=seed
        )
        for method, k in (("sequential", "auto"), ("assd", 5), ("one_call", 3))
    }
    missing = int(mask.sum())
    calls = {method: int(sum(x.sum() for x in one.calls.values())) / missing for method, one in out.items()}
    seconds = {method: one.seconds for method, one in out.items()}
    equal = all(bool((one.tokens == out["sequential"].tokens).all()) for one in out.values())
    joint = pyquiet.joint_log_prob(model, out["assd"].tokens, known=~mask, attention_mask=attention)
    gap = float((joint - out["assd"].log_probs.sum(1)).abs().max())

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.infilling import infilling_view

        drafted = out["assd"]
        return (infilling_view(drafted, tokenizer, int(drafted.rounds.argmin())),)  # the shortest to read

    return Scene(
        "Gaps filled in parallel, exactly (ASSD)",
        "A model that can fill any part of a text drafts several missing tokens in one call and checks them in a "
        "second; what is refused is drawn anew. The law of the text is that of one call a token.",
        f"{missing} missing tokens: one by one 1 call of the model a token and {seconds['sequential']:.2f} s, drafting "
        f"and checking in two calls {calls['assd']:.2f} and {seconds['assd']:.2f} s, in one {calls['one_call']:.2f} "
        f"and {seconds['one_call']:.2f} s (fewer calls save time where a call costs more than the work around it, as "
        f"in larger models); the texts of all three are {'' if equal else 'NOT '}the same for the same seed, and their "
        f"probabilities agree with the model's own within {gap:.0e} nats",
        {"tokens": missing, "calls_per_token": calls, "seconds": seconds, "same_texts": equal, "joint_gap": gap},
        draw,
    )
