"""Ranks and positions."""

import pytest
import torch

from pyquiet.any_subset import order_from_mask
from pyquiet.any_subset.order import ranks_of


def test_both_parts_ascend():
    order, m = order_from_mask(torch.tensor([False, True, True, False, True]))
    assert (order.tolist(), m) == ([1, 2, 4, 0, 3], 3)


def test_padding_goes_last_in_a_batch():
    known = torch.tensor([[True, False, True], [False, False, True]])
    order, m = order_from_mask(known, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert order.tolist() == [[2, 1, 0], [2, 0, 1]]
    assert m.tolist() == [1, 1]


def test_ranks_invert_orders():
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    assert torch.equal(ranks_of(order).gather(1, order), torch.arange(9).expand(4, 9))


@pytest.mark.parametrize(
    ("known", "attention_mask", "named"),
    [
        (torch.ones(3), None, "known"),
        (torch.ones(1, 2, 3, dtype=torch.bool), None, "known"),
        (torch.ones(3, dtype=torch.bool), torch.ones(4), "attention_mask"),
    ],
)
def test_bad_masks_are_named(known, attention_mask, named):
    with pytest.raises((TypeError, ValueError), match=named):
        order_from_mask(known, attention_mask)
