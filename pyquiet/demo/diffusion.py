"""EDLM: masked diffusion in few steps, plain and corrected by an energy."""

from typing import Any

import pyquiet
from pyquiet.demo.scene import Scene
from pyquiet.evaluation import Estimate, NGramModel, histogram_entropy
from pyquiet.plotting.page import View
from pyquiet.zoo import held_out, load

_TEXTS, _LENGTH, _STEPS, _CANDIDATES = 24, 64, 8, 8
_GRAM = 4  # characters that a text is judged by


def show(seed: int, progress: bool) -> Scene:
    """Takes a sixth of a minute."""
    denoiser, tokenizer = load("tiny-denoiser")
    causal = load("tiny-causal")[0]
    energies = {
        "plain": None,
        "autoregressive": pyquiet.AREnergy(causal, bos_id=tokenizer.bos_token_id),
        "trained": load("tiny-energy")[0],
    }
    judge = NGramModel([row["text"] for row in held_out("passages") + held_out("stories")], _GRAM)
    settings: dict[str, Any] = {"length": _LENGTH, "num_samples": _TEXTS, "steps": _STEPS, "candidates": _CANDIDATES}
    out = {
        name: pyquiet.diffuse(pyquiet.MaskedDenoiser(denoiser, tokenizer.mask_token_id), energy, seed=seed, **settings)
        for name, energy in energies.items()
    }
    losses = {
        name: judge.nll(tokenizer.batch_decode(one.tokens, skip_special_tokens=True)) for name, one in out.items()
    }
    numbers = {
        name: {
            "ngram_nll": float(losses[name].mean()),
            "below_plain": Estimate.of(losses["plain"] - losses[name]).to_dict(),
            "entropy": float(histogram_entropy(one.tokens).mean()),
            "denoiser_calls": float(one.denoiser_calls.double().mean()),
            "energy_passes": float(one.energy_passes.double().mean()),
            "ess": float(one.ess.nanmean()),
            "seconds": one.seconds,
        }
        for name, one in out.items()
    }
    gains = "; ".join(
        f"{name} {Estimate.of(losses['plain'] - losses[name])} lower, entropy {numbers[name]['entropy']:.2f}"
        for name in list(out)[1:]
    )

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.film import film_view

        return (film_view(out["autoregressive"], tokenizer),)

    return Scene(
        "Text out of noise, corrected by an energy (EDLM)",
        "All tokens begin masked, and each step opens some of them at once. Plain diffusion draws these as if they did "
        "not depend on each other; here several completions are drawn, and an energy that reads them whole picks one.",
        f"{_TEXTS} texts of {_LENGTH} tokens in {numbers['plain']['denoiser_calls']:.1f} denoiser calls each; loss "
        f"under the {_GRAM}-grams of held-out texts, nats a character (lower is closer to them): plain "
        f"{numbers['plain']['ngram_nll']:.3f}, entropy {numbers['plain']['entropy']:.2f}; by energy: {gains}; for "
        f"which {numbers['trained']['energy_passes']:.0f} completions of each text were read besides",
        {"texts": _TEXTS, "length": _LENGTH, "candidates": _CANDIDATES, "by_energy": numbers},
        draw,
    )
