"""The law of what `verify_draft` returns, in float32 on the native path; and that the test rejects wrong samplers."""

import pytest
import torch

from pyquiet.kernels import verify_draft
from pyquiet.randomness import Purpose, Stream, draw, process_logits

from ..chi_square import chi_square

V, K, ROWS = 7, 3, 20_000
SEED = 23
CHANCE = 1e-4  # of a right sampler to fail, at each position


def toy(spread=1.0):
    g = torch.Generator().manual_seed(5)
    q = torch.randn(K + 1, V, generator=g) * 1.3
    return q, q[:K] + spread * torch.randn(K, V, generator=g)


def drafts(p, **options):
    """ROWS drafts of each row of p, and their log-sum-exps."""
    drawn = [
        draw(row.expand(ROWS, -1), stream=Stream(SEED, Purpose.DRAFT, position=j), **options) for j, row in enumerate(p)
    ]
    return torch.stack([x.tokens for x in drawn], 1), torch.stack([x.lse for x in drawn], 1)


def verified(q, p, d, **options):
    return verify_draft(q.expand(ROWS, -1, -1), p.expand(ROWS, -1, -1), d, stream=Stream(SEED), **options)


def p_values(result, q, **options):
    """For each position, of the tokens of the sequences that came to it against the target's own law there.

    The rows do not depend on earlier tokens here, and the numbers of different rows are independent.
    """
    laws = process_logits(q, **options).softmax(-1)
    return [
        chi_square(torch.bincount(result.tokens[result.count > j, j], minlength=V), laws[j]) for j in range(len(laws))
    ]


BANNED = torch.tensor([False, True, False, False, False, True, False])
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "banned": {"banned": BANNED},
    "all": {"temperature": 1.3, "top_k": 5, "top_p": 0.95, "banned": BANNED},
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_follow_the_target(options, deterministic):
    q, p = toy()
    d, lse = drafts(p, **options)
    for given in (None, lse):
        result = verified(q, p, d, draft_lse=given, deterministic=deterministic, **options)
        assert min(p_values(result, q, **options)) > CHANCE


@pytest.mark.parametrize("draft_temperature", [0, 0.5, 2.0])
def test_the_draft_may_have_its_own_temperature(draft_temperature):
    q, p = toy()
    d, _ = drafts(p, temperature=draft_temperature)
    assert min(p_values(verified(q, p, d, draft_temperature=draft_temperature), q)) > CHANCE


def test_a_draft_without_part_of_the_support():
    q, p = toy()
    p[:, ::2] = -torch.inf
    assert min(p_values(verified(q, p, drafts(p)[0]), q)) > CHANCE


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_gumbel_tokens_follow_the_target(options):
    q, p = toy(0.3)
    d, _ = drafts(p, coupling="gumbel", **options)
    assert min(p_values(verified(q, p, d, coupling="gumbel", **options), q, **options)) > CHANCE


def test_acceptance_is_the_overlap_of_the_laws():
    q, p = toy()
    result = verified(q, p, drafts(p)[0])
    overlap = torch.minimum(q[:K].softmax(-1), p.softmax(-1)).sum(-1)
    for j in range(K):
        came = result.accepted >= j
        rate = (result.accepted[came] > j).double().mean()
        assert abs(rate - overlap[j]) < 4 * (overlap[j] * (1 - overlap[j]) / came.sum()) ** 0.5


def test_a_replacement_from_the_target_is_rejected():
    q, p = toy()
    d, _ = drafts(p)
    result = verified(q, p, d)
    for j in range(K):
        replaced = (result.count == j + 1) & (result.accepted == j)
        wrong = draw(q[j].expand(ROWS, -1), stream=Stream(SEED, Purpose.CANDIDATE, position=j)).tokens
        result.tokens[replaced, j] = wrong[replaced]
    assert max(p_values(result, q)[:K]) < 1e-6


def test_a_ratio_at_another_temperature_is_rejected():
    q, p = toy()
    d, _ = drafts(p, temperature=0.6)
    assert max(p_values(verified(q, p, d), q)[:K]) < 1e-6


def test_a_banned_id_that_is_not_renormalised_is_rejected():
    q, p = toy()
    d, _ = drafts(p, banned=BANNED)
    lse = p.logsumexp(-1).expand(ROWS, -1)  # banned ids included
    assert min(p_values(verified(q, p, d, draft_lse=lse, banned=BANNED), q, banned=BANNED)[:K]) < 1e-6
