"""A step of masked diffusion with an energy as the released code takes it: every tensor over the whole vocabulary.

In its best form: the weights have the right sign, the candidates of a text lie beside each other, and the pick is used
in the step that made it. What it costs stays as it is: an update that is thrown away, probabilities repeated for each
of the k candidates, races of exponentials over [k B, T, V] (in float32, which cuts off the tail of the law), one-hot
vectors, a second update, and log-probabilities [k B, T, V] for the energy (arXiv 2410.21357).

Letters: B texts, k candidates, T positions, V vocabulary with the mask token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Energy = Callable[[Tensor, Tensor, int], Tensor]  # candidates [k B, T], log mu [B, T, V], k -> [B, k]


def race(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row of [..., V]: argmax of p / E with exponential noise E, in float32."""
    noise = torch.rand(probabilities.shape, generator=generator)
    return (probabilities / (1e-10 - (noise + 1e-10).log())).argmax(-1)


def log_law(denoiser: Any, tokens: Tensor) -> Tensor:
    """log mu [B, T, V]: never the mask token, and at given positions the token that stands there."""
    hidden = denoiser.hidden(tokens)
    logits = denoiser.head(hidden.flatten(0, 1)).view(*tokens.shape, -1)
    logits = logits - logits.logsumexp(-1, keepdim=True)
    given = tokens != denoiser.mask_id
    logits[given] = -1e6
    logits[given, tokens[given]] = 0
    return logits


def update(law: Tensor, tokens: Tensor, mask_id: int, t: float, s: float, generator: torch.Generator) -> Tensor:
    """The texts at time s of those at time t, by a law of the clean text [B, T, V]; alpha = 1 - t."""
    reverse = law * (t - s)
    reverse[..., mask_id] = s
    return torch.where(tokens == mask_id, race(reverse, generator), tokens)


def step(
    denoiser: Any, energy: Energy, tokens: Tensor, k: int, t: float, s: float, generator: torch.Generator
) -> Tensor:
    """The texts int64 [B, T] at time s."""
    B, T = tokens.shape
    log_mu = log_law(denoiser, tokens)
    law = log_mu.exp()
    update(law, tokens, denoiser.mask_id, t, s, generator)  # thrown away
    repeated = law.repeat_interleave(k, 0)  # [k B, T, V]
    candidates = race(repeated, generator)
    weights = (-energy(candidates, log_mu, k)).softmax(-1)
    pick = weights.multinomial(1, generator=generator)
    chosen = candidates.view(B, k, T).gather(1, pick[..., None].expand(-1, -1, T))[:, 0]
    return update(functional.one_hot(chosen, law.shape[-1]).float(), tokens, denoiser.mask_id, t, s, generator)


def fill(denoiser: Any, energy: Energy, tokens: Tensor, k: int, steps: int, generator: torch.Generator) -> Tensor:
    """Texts without masks, after so many steps."""
    for n in range(steps):
        tokens = step(denoiser, energy, tokens, k, 1 - n / steps, 1 - (n + 1) / steps, generator)
    return tokens


def ar_energy(lm: Any, bos_id: int) -> Energy:
    """That of a causal LM behind a BOS, from its whole logits and the repeated log mu."""

    def energy(candidates: Tensor, log_mu: Tensor, k: int) -> Tensor:
        inputs = functional.pad(candidates, (1, 0), value=bos_id)[:, :-1]
        log_p = lm(inputs).logits.log_softmax(-1).gather(-1, candidates[..., None])[..., 0].sum(-1)
        of_mu = log_mu.repeat_interleave(k, 0).gather(-1, candidates[..., None])[..., 0].sum(-1)
        return (of_mu - log_p).view(-1, k)

    return energy
