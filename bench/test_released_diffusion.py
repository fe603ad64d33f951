"""The released procedure, as the benches run it, has the law that `pyquiet.diffuse` has."""

import pytest
import torch
from torch import Tensor

from pyquiet.testing import enumerate_diffusion, exactness_test

from . import released_diffusion

T, S, MASK, K, STEPS = 3, 3, 3, 4, 2


class Table:
    """A denoiser by a table: logits [T, V] that lean on the token to the left, where it is known."""

    mask_id, vocab_size, training, device = MASK, S + 1, False, torch.device("cpu")

    def __init__(self) -> None:
        self.logits = torch.randn(T, S + 1, S + 1, generator=torch.Generator().manual_seed(0))
        self.logits[..., MASK] = -torch.inf

    def hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        left = torch.nn.functional.pad(tokens, (1, 0), value=MASK)[:, :-1]
        return self.logits[torch.arange(T), left]

    def head(self, rows: Tensor) -> Tensor:
        return rows


PAIRS = torch.randn(S + 1, S + 1, generator=torch.Generator().manual_seed(1))


def pairs(candidates: Tensor) -> Tensor:
    return 1.5 * PAIRS[candidates[..., :-1], candidates[..., 1:]].sum(-1)


@pytest.mark.parametrize("prompt", [[MASK] * 3, [MASK, 1, MASK]])
def test_its_law_is_ours(prompt: list[int]) -> None:
    denoiser, ids = Table(), torch.tensor(prompt)

    def draw(samples: int, seed: int, sign: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        energy = lambda candidates, log_mu, k: sign * pairs(candidates.view(-1, k, T))  # noqa: E731
        return released_diffusion.fill(denoiser, energy, ids.repeat(samples, 1), K, STEPS, generator)

    law = enumerate_diffusion(
        denoiser, lambda c, x, t, m: pairs(c), input_ids=ids, steps=STEPS, candidates=K
    )  # fmt: skip
    known = ids != MASK
    result = exactness_test(draw, law, samples=20_000, input_ids=ids, known=known)
    assert result.p_value > 1e-4, result
    as_released = exactness_test(
        lambda samples, seed: draw(samples, seed, -1), law, samples=20_000, input_ids=ids, known=known
    )
    assert as_released.p_value < 1e-12
