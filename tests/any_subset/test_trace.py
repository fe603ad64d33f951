"""What `infill` tells of how each position came by its token."""

import pytest
import torch

import pyquiet
from pyquiet.any_subset import Origin

from .models import random_xlnet

B, N, V = 6, 24, 11
K = {"sequential": "auto", "assd": 4, "one_call": 2, "ngram": 4}


@pytest.fixture(scope="module")
def run():
    model, generator = random_xlnet(V), torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, N), generator=generator)
    mask = torch.rand(B, N, generator=generator) < 0.7
    mask[1], mask[2] = True, False  # all of a text, and nothing of one
    attention = torch.ones(B, N, dtype=torch.int64)
    attention[3, -5:] = 0
    fill = mask & attention.bool()

    def fill_by(method, coupling="rejection"):
        options = {"mask": mask, "attention_mask": attention, "method": method, "k": K[method], "coupling": coupling}
        return pyquiet.infill(model, ids, seed=4, **options), fill

    return fill_by


@pytest.mark.parametrize("coupling", ["rejection", "gumbel"])
@pytest.mark.parametrize("method", K)
def test_every_filled_position_has_its_round_and_origin(run, method, coupling):
    out, fill = run(method, coupling)
    assert torch.equal(out.origin != Origin.GIVEN, fill)
    assert torch.equal(out.reveal_round >= 0, fill)
    assert torch.equal(out.reveal_round.amax(1) + 1, out.rounds)
    for row, filled in zip(out.reveal_round, fill, strict=True):  # from left to right
        assert (row[filled].diff() >= 0).all()
        assert row[filled].unique().tolist() == list(range(int(row.max()) + 1))


@pytest.mark.parametrize("coupling", ["rejection", "gumbel"])
@pytest.mark.parametrize("method", K)
def test_origins_agree_with_the_counters(run, method, coupling):
    out, fill = run(method, coupling)
    counts = {origin: int((out.origin == origin).sum()) for origin in Origin}
    assert counts[Origin.ACCEPTED] == int(out.accepted_by_rank.sum())
    # A draft's turn came and it was not kept: another token stands there.
    assert counts[Origin.REPLACED] == int((out.tried_by_rank - out.accepted_by_rank).sum())
    assert torch.equal(out.refused >= 0, out.origin == Origin.REPLACED)
    replaced = out.origin == Origin.REPLACED
    assert (out.refused[replaced] != out.tokens[replaced]).all()
    if method == "sequential":
        assert counts[Origin.DRAWN] == int(fill.sum())


def test_every_origin_occurs(run):
    found = torch.cat([run(method, coupling)[0].origin for method in K for coupling in ("rejection", "gumbel")])
    assert found.unique().tolist() == list(Origin)
