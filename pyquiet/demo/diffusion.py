"""EDLM: masked diffusion in few steps, plain and corrected by an energy."""

from typing import Any

import pyquiet
from pyquiet.demo.scene import Scene, lower
from pyquiet.evaluation import Estimate, NGramModel, histogram_entropy
from pyquiet.plotting import film_view
from pyquiet.zoo import held_out, load

_TEXTS, _LENGTH, _STEPS, _MORE_STEPS, _CANDIDATES = 48, 64, 8, 64, 8
_GRAM = 4  # characters that a text is judged by


def show(seed: int, progress: bool) -> Scene:
    """Takes a sixth of a minute."""
    denoiser, tokenizer = load("tiny-denoiser")
    causal = pyquiet.AREnergy(load("tiny-causal")[0], bos_id=tokenizer.bos_token_id)
    ways = {
        "plain": (None, _STEPS),
        "with tiny-causal as energy": (causal, _STEPS),
        "with tiny-energy": (load("tiny-energy")[0], _STEPS),
        f"without an energy in {_MORE_STEPS} steps": (None, _MORE_STEPS),
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

    def told(name: str) -> str:
        """Of a way that is not the plain one."""
        x = numbers[name]
        return f"{x['ngram_nll']:.3f} {name} ({lower(below[name])}), variety {x['entropy']:.2f}, {x['seconds']:.1f} s"

    plain = numbers["plain"]

    return Scene(
        "Text out of noise, corrected by an energy (EDLM)",
        f"All tokens begin masked and each step opens several at once; of {_CANDIDATES} guesses at them, an energy "
        "that reads whole texts picks one.",
        f"In {_STEPS} steps each, by {_GRAM}-grams of unseen texts, in nats a character (lower is closer to real "
        f"text): {told('with tiny-energy')}; {plain['ngram_nll']:.3f} without an energy, variety "
        f"{plain['entropy']:.2f}, {plain['seconds']:.1f} s.",
        (
            f"{told('with tiny-causal as energy')}.",
            f"{told(f'without an energy in {_MORE_STEPS} steps')}.",
            f"{_TEXTS} texts of {_LENGTH} tokens. Variety: the entropy of a text's tokens, in nats. An energy reads "
            f"{_CANDIDATES} whole texts a step, which is where its time goes.",
        ),
        {"texts": _TEXTS, "length": _LENGTH, "candidates": _CANDIDATES, "by_energy": numbers},
        lambda: (film_view(out["with tiny-energy"], tokenizer),),
        ("tiny-denoiser", "tiny-energy", "tiny-causal"),
    )
