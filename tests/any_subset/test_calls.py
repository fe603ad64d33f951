"""What holds in every single run: the bound on calls, and equality with sequential filling where noise is shared.

Batches are ragged: texts of 1 to 12 positions with any given set, the empty and the full one included.
"""

from __future__ import annotations

import pytest
import torch

from pyquiet.any_subset import infill, joint_log_prob
from pyquiet.testing import TabularEngine, tiny_xlnet

from .toys import ContraryEngine, capricious_drafter, stubborn_drafter

V, N = 6, 12
NETWORKS = {
    "tabular": TabularEngine(V, N),  # the same bits for the same set, so no near-tie can flip
    "contrary": ContraryEngine(V, N),
    "xlnet": tiny_xlnet(V, seed=1, dtype=torch.float64),
}
DRAFTED = {
    "assd": "assd",
    "one_call": "one_call",
    "ngram": "ngram",
    "stubborn": stubborn_drafter(V),
    "capricious": capricious_drafter(V),
}


def prompts(batch, seed):
    """input_ids, mask and attention_mask, [B, N] each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (batch, N), generator=generator)
    length = torch.randint(1, N + 1, (batch, 1), generator=generator)
    attended = torch.arange(N) < length
    share = torch.rand(batch, 1, generator=generator) * 1.2 - 0.1  # below 0 nothing is given, above 1 everything
    mask = (torch.rand(batch, N, generator=generator) >= share) & attended
    return ids, mask, attended


def fill(network, texts, **options):
    ids, mask, attended = texts
    return infill(NETWORKS[network], ids, mask=mask, attention_mask=attended, seed=3, **options)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("method", DRAFTED)
@pytest.mark.parametrize("network", NETWORKS)
def test_calls_are_never_more_than_tokens(network, method, k):
    texts = ids, mask, attended = prompts(80, seed=k)
    for bonus in (False, True):
        result = fill(network, texts, method=DRAFTED[method], k=k, bonus=bonus)
        calls = sum(result.calls.values())
        assert (calls <= mask.sum(1)).all()
        assert ((calls > 0) == mask.any(1)).all()
        if method == "assd" and (k == 1 or (k == 2 and not bonus)):
            assert torch.equal(calls, mask.sum(1))
        assert torch.equal(result.tokens[~mask], ids[~mask])
        assert ((result.tokens >= 0) & (result.tokens < V))[mask].all()
        assert not result.log_probs[~mask].any()
        joint = joint_log_prob(NETWORKS[network], result.tokens, known=attended & ~mask, attention_mask=attended)
        torch.testing.assert_close(result.log_probs.sum(1), joint.to(result.log_probs.dtype), atol=1e-4, rtol=1e-5)


def test_the_runs_of_the_bound_are_many_and_hard():
    """Over the parameters of the test above: 1200 texts, and a network of which no draft after the first is kept."""
    texts = prompts(80, seed=5)
    assert len(NETWORKS) * len(DRAFTED) * 80 >= 1000
    result = fill("contrary", texts, method="assd", k=5)
    assert result.tried_by_rank[1] > 100
    assert result.accepted_by_rank[1:].sum() == 0
    sure = fill("tabular", texts, method=stubborn_drafter(V), k=5)
    assert 0 < sure.accepted_by_rank[0] < 0.4 * sure.tried_by_rank[0]


SHARED_NOISE = {"greedy": {"temperature": 0.0}, "gumbel": {"coupling": "gumbel"}}


@pytest.mark.parametrize("noise", SHARED_NOISE)
@pytest.mark.parametrize("network", NETWORKS)
def test_shared_noise_gives_the_tokens_of_sequential_filling(network, noise):
    texts = prompts(200, seed=0)
    options = SHARED_NOISE[noise]
    for processing in ({}, {"temperature": 0.8, "top_k": 4, "banned": torch.arange(V) == 2} | options):
        sequential = fill(network, texts, method="sequential", **options | processing)
        assert torch.equal(sum(sequential.calls.values()), texts[1].sum(1))
        for method, k in [("assd", 2), ("assd", 4), ("one_call", 2), ("ngram", 3), ("capricious", 3), ("assd", 1)]:
            result = fill(network, texts, method=DRAFTED[method], k=k, **options | processing)
            assert torch.equal(result.tokens, sequential.tokens), (method, k)
            torch.testing.assert_close(result.log_probs, sequential.log_probs, atol=1e-5, rtol=0)
            assert (sum(result.calls.values()) <= texts[1].sum(1)).all()


@pytest.mark.parametrize("method", [*DRAFTED, "sequential"])
@pytest.mark.parametrize("network", ["tabular", "xlnet"])
@pytest.mark.parametrize("free_order", [False, True])
def test_a_ragged_batch_is_its_texts_one_by_one(network, method, free_order):
    ids, mask, attended = texts = prompts(12, seed=11)
    names = torch.randperm(1000, generator=torch.Generator().manual_seed(2))[:12]
    options = {"method": DRAFTED.get(method, method), "k": 3}
    order = None
    if free_order:
        group = mask.long() + 2 * (~attended).long()
        noise = torch.rand(12, N, generator=torch.Generator().manual_seed(4))
        order = (group + noise).argsort(1)
    batch = fill(network, texts, sequence_ids=names, order=order, **options)
    for row in range(12):
        size = int(attended[row].sum())
        alone = infill(
            NETWORKS[network],
            ids[row : row + 1, :size],
            mask=mask[row : row + 1, :size],
            seed=3,
            sequence_ids=names[row : row + 1],
            order=None if order is None else order[row : row + 1, :size],
            **options,
        )
        assert torch.equal(alone.tokens[0], batch.tokens[row, :size])
        torch.testing.assert_close(alone.log_probs[0], batch.log_probs[row, :size], atol=1e-5, rtol=0)
        assert {kind: int(n[0]) for kind, n in alone.calls.items()} == {k: int(n[row]) for k, n in batch.calls.items()}
        assert alone.rounds[0] == batch.rounds[row]
