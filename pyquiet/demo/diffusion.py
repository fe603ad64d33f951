"""EDLM: masked diffusion in few steps, plain and corrected by an energy."""

from typing import Any

import pyquiet
from pyquiet.demo.scene import Scene
from pyquiet.evaluation import Estimate, NGramModel, histogram_entropy
from pyquiet.plotting.page import View
from pyquiet.zoo import held_out, load

_TEXTS, _LENGTH, _STEPS, _MORE_STEPS, _CANDIDATES = 48, 64, 8, 64, 8
_GRAM = 4  # characters that a text is judged by


def show(seed: int, progress: bool) -> Scene:
    """Takes a sixth of a minute."""
    denoiser, tokenizer = load("tiny-denoiser")
    causal = pyquiet.AREnergy(load("tiny-causal")[0], bos_id=tokenizer.bos_token_id)
    ways = {
        "plain": (None, _STEPS),
        "with the energy of tiny-causal": (causal, _STEPS),
        "with tiny-energy": (load("tiny-energy")[0], _STEPS),
        f"plain in {_MORE_STEPS} steps": (None, _MORE_STEPS),
    }
    judge = NGramModel([row["text"] for row in held_out("passages") + held_out("stories")], _GRAM)
    masked = pyquiet.MaskedDenoiser(denoiser, tokenizer.mask_token_id)
    settings: dict[str, Any] = {"length": _LENGTH, "num_samples": _TEXTS, "candidates": _CANDIDATES, "seed": seed}
    out = {name: pyquiet.diffuse(masked, energy, steps=steps, **settings) for name, (energy, steps) in ways.items()}
    losses = {name: judge.nll(tokenizer.batch_decode(x.tokens, skip_special_tokens=True)) for name, x in out.items()}
    below = {name: Estimate.of(losses["plain"] - loss) for name, loss in losses.items()}
    numbers = {
        name: {
            "ngram_nll": float(losses[name].mean()),
            "below_plain": below[name].to_dict(),
            "entropy": float(histogram_entropy(one.tokens).mean()),
            "denoiser_calls": float(one.denoiser_calls.double().mean()),
            "energy_passes": float(one.energy_passes.double().mean()),
            "ess": float(one.ess.nanmean()),
            "seconds": one.seconds,
        }
        for name, one in out.items()
    }
    words = "; ".join(
        f"{name} {x['ngram_nll']:.3f}"
        + (f" ({below[name].mean:.3f} +- {below[name].error:.3f} lower)" if name != "plain" else "")
        + f", variety {x['entropy']:.2f}, {x['seconds']:.1f} s"
        for name, x in numbers.items()
    )

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.film import film_view

        return (film_view(out["with tiny-energy"], tokenizer),)

    return Scene(
        "Text out of noise, corrected by an energy (EDLM)",
        "All tokens begin masked, and each step opens some of them at once. Plain diffusion draws these as if they did "
        "not depend on each other; here several completions are drawn, and an energy that reads them whole picks one.",
        f"{_TEXTS} texts of {_LENGTH} tokens in {_STEPS} steps, {_CANDIDATES} completions to pick from in each; how "
        f"badly the {_GRAM}-grams of held-out texts foresee them, in nats a character (lower is closer to real text), "
        f"and how many tokens they vary between (entropy in nats): {words}. What is not above twice its error may be "
        f"chance",
        {"texts": _TEXTS, "length": _LENGTH, "candidates": _CANDIDATES, "by_energy": numbers},
        draw,
    )
