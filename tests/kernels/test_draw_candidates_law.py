"""The law of candidates, in float32 on the native path; and that the tests reject wrong samplers."""

import math

import pytest
import torch

from pyquiet.kernels import draw_candidates
from pyquiet.randomness import Stream, process_logits

from ..chi_square import chi_square

V, ROWS, K = 7, 5000, 8
CHANCE = 1e-4  # of a right sampler to fail
LOGITS = 1.3 * torch.randn(V, generator=torch.Generator().manual_seed(5))
BANNED = torch.tensor([False, True, False, False, False, True, False])
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "banned": {"banned": BANNED},
    "all": {"temperature": 1.3, "top_k": 5, "top_p": 0.95, "banned": BANNED},
}


def candidates(deterministic=False, **options):
    return draw_candidates(LOGITS.expand(ROWS, -1), K, stream=Stream(23), deterministic=deterministic, **options)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_follow_their_law(options, deterministic):
    law = process_logits(LOGITS[None], **options).double().softmax(-1)[0]
    tokens = candidates(deterministic, **options).tokens
    for j in range(K):
        assert chi_square(torch.bincount(tokens[:, j], minlength=V), law) > CHANCE
    if options:
        assert chi_square(torch.bincount(tokens[:, 0], minlength=V), LOGITS.double().softmax(-1)) < 1e-6


def test_candidates_of_a_row_are_independent():
    tokens = candidates().tokens
    law = LOGITS.double().softmax(-1)
    pairs = torch.outer(law, law).flatten()
    for first, second in ((0, 1), (2, 7)):
        assert chi_square(torch.bincount(tokens[:, first] * V + tokens[:, second], minlength=V * V), pairs) > CHANCE
    assert chi_square(torch.bincount(tokens[:-1, 0] * V + tokens[1:, 0], minlength=V * V), pairs) > CHANCE
    assert chi_square(torch.bincount(tokens[:, 0] * V + tokens[:, 0], minlength=V * V), pairs) < 1e-6


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"temperature": 2.0, "banned": BANNED}], ids=str)
def test_importance_weights_undo_the_processing(options):
    """Of a proposal with full support, E[w] = 1 and E[w f] is f's mean under softmax(logits)."""
    drawn = candidates(**options)
    weights = (drawn.log_base - drawn.log_probs).double().exp().flatten()
    base = LOGITS.masked_fill(BANNED, -torch.inf) if "banned" in options else LOGITS
    for f, mean in (
        (torch.ones(V), 1.0),
        (torch.arange(V), (base.double().softmax(-1) * torch.arange(V)).sum().item()),
    ):
        terms = weights * f[drawn.tokens.flatten()]
        assert abs(terms.mean() - mean) < 4 * terms.std() / len(terms) ** 0.5
    wrong = (drawn.log_probs - drawn.log_base).double().exp()
    assert abs(wrong.mean() - 1) > 4 * wrong.std() / wrong.numel() ** 0.5


TAIL, DRAWS = 20_000, 1 << 20


def tail_hits(k=1 << 15, where=0):
    """How many of DRAWS draws fall on TAIL ids of probability 2^-24 each, one id having all the rest."""
    logits = torch.full((TAIL + 1,), -24 * math.log(2.0))
    logits[where] = math.log1p(-TAIL * 2.0**-24)
    drawn = draw_candidates(logits.expand(DRAWS // k, -1), k, stream=Stream(3))
    return (drawn.tokens != where).sum().item(), drawn


def follows(hits):
    mean = DRAWS * TAIL * 2.0**-24
    return abs(hits - mean) < 3 * mean**0.5


@pytest.mark.parametrize("where", [0, 9_999, TAIL])
def test_the_tail_is_hit_as_often_as_it_weighs(where):
    hits, drawn = tail_hits(where=where)
    assert follows(hits)
    tail = drawn.log_base[drawn.tokens != where]
    torch.testing.assert_close(tail, torch.full_like(tail, -24 * math.log(2.0)), rtol=0, atol=2e-6)
    assert drawn.tokens[drawn.tokens != where].unique().numel() > 0.6 * hits  # all over it


def test_a_race_of_exponentials_of_24_bits_misses_the_tail():
    """The negative control. -log U of U on a grid of 2^-24 is, where it is small, a whole multiple of 2^-24.

    An id of 2^-24 wins if its multiple is below the head's exponential. The least of TAIL exponentials of rate 2^-24 is
    one of rate TAIL 2^-24, so that no race over all ids needs to be run.
    """
    g = torch.Generator().manual_seed(0)
    least, head = (-torch.rand(DRAWS, generator=g, dtype=torch.float64).log() for _ in range(2))
    least /= TAIL * 2.0**-24
    assert follows((least < head).sum().item())
    hits = (least.ceil() < head).sum().item()
    assert not follows(hits)
    assert 0.5 < hits / (DRAWS * TAIL * 2.0**-24) < 0.66  # 1 / (e - 1) = 0.58
