"""The loss against transformers' XLNet, one conditional at a time, and the noise that it is given."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyquiet import losses
from pyquiet.any_subset.order import order_from_mask
from pyquiet.any_subset.training import any_subset_loss, random_blocks, random_order, subset_scores
from pyquiet.trainers import stratified

from ..allocations import allocations
from ..chi_square import chi_square
from .models import random_xlnet, transformers_logits

N, V = 9, 11
KNOWN = torch.tensor(
    [[1, 0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0, 0, 0]], dtype=torch.bool
)
MASK = torch.tensor([[1] * 9, [1] * 9, [1] * 7 + [0] * 2])
SIZE, OFFSET = torch.tensor([2, 3, 2]), torch.tensor([1, 0, 1])


@pytest.fixture(scope="module")
def model():
    return random_xlnet(V)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(1))


def orders(known=KNOWN, mask=MASK):
    order, prompt = order_from_mask(known, mask)
    return {"order": order, "prompt": prompt, "attention_mask": mask}


def conditional(model, tokens, b, rank, sees):
    """log p of the token of this rank of text b, given the first `sees` ranks, by transformers."""
    order, prompt, length = orders()["order"], orders()["prompt"], int(MASK[b].sum())
    position = int(order[b, rank])
    logits = transformers_logits(model, tokens[b, :length], order[b, :length], int(prompt[b]), position, sees)
    return logits.log_softmax(-1)[tokens[b, position]]


def targets():
    """(text, rank, first rank of its block) of every target, written out by hand from KNOWN, SIZE and OFFSET."""
    blocks = {0: [3, 4, 4, 6, 6, 8], 1: [1, 1, 1, 4, 4, 4, 7, 7], 2: [5, 6]}
    return [(b, rank, start) for b, starts in blocks.items() for rank, start in enumerate(starts, int(KNOWN[b].sum()))]


def test_the_loss_is_that_of_single_conditionals(model, tokens):
    out = any_subset_loss(model, tokens, **orders(), draft_weight=0.3, block_size=SIZE, block_offset=OFFSET)
    # The last two positions of text 2 are padding.
    joint = -sum(conditional(model, tokens, b, rank, rank) for b, rank, _ in targets()) / 16
    draft = -sum(conditional(model, tokens, b, rank, start) for b, rank, start in targets()) / 16
    torch.testing.assert_close(out.joint_nll, joint, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.draft_nll, draft, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, 0.7 * joint + 0.3 * draft, rtol=0, atol=1e-5)
    assert abs(joint - draft) > 0.01


def test_blocks_of_one_are_joint_and_one_block_is_the_marginals(model, tokens):
    def draft(size):
        blocks = {"block_size": torch.full((3,), size), "block_offset": torch.zeros(3, dtype=torch.int64)}
        return any_subset_loss(model, tokens, **orders(), draft_weight=1.0, **blocks).draft_nll

    joint = any_subset_loss(model, tokens, **orders()).joint_nll
    torch.testing.assert_close(draft(1), joint)
    marginal = -sum(conditional(model, tokens, b, rank, int(KNOWN[b].sum())) for b, rank, _ in targets()) / 16
    torch.testing.assert_close(draft(N), marginal, rtol=0, atol=1e-5)


def test_only_what_has_a_weight_is_computed(model, tokens):
    out = any_subset_loss(model, tokens, **orders())
    assert out.draft_nll is None
    assert out.loss == out.joint_nll
    out = any_subset_loss(model, tokens, **orders(), draft_weight=1.0, block_size=SIZE, block_offset=OFFSET)
    assert out.joint_nll is None
    assert out.loss == out.draft_nll


def test_gradients_are_those_of_finite_differences(tokens):
    """Along a direction in which all weights move, in float64."""
    model = random_xlnet(V, scale=0.7).double()
    generator = torch.Generator().manual_seed(2)
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def loss():
        return any_subset_loss(model, tokens, **orders(), draft_weight=0.4, block_size=SIZE, block_offset=OFFSET).loss

    loss().backward()
    slope = sum((p.grad * v).sum() for p, v in zip(parameters, direction, strict=True) if p.grad is not None)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(v, alpha=step)
            values.append(loss())
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(v, alpha=step)
    assert slope.item() == pytest.approx(((values[0] - values[1]) / 2e-6).item(), rel=1e-6)
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, _ in model.named_parameters()} - used == {
        name for name, _ in model.named_parameters() if name.endswith(("r_s_bias", "seg_embed"))
    }


def test_the_parts_of_a_batch_add_up(model, tokens):
    options = {**orders(), "block_size": SIZE, "block_offset": OFFSET}
    whole = any_subset_loss(model, tokens, **options, draft_weight=0.5)
    parts = [
        any_subset_loss(
            model, tokens[part], **{n: x[part] for n, x in options.items()}, draft_weight=0.5, target_count=16
        )
        for part in (slice(1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.joint_nll for part in parts), whole.joint_nll)


@pytest.mark.parametrize("prompt", [0, 1, 3])
def test_the_joint_law_sums_to_one(prompt):
    """Over all fillings of three or four places by four tokens; with an empty prompt too."""
    model = random_xlnet(4)
    known = torch.arange(4) >= 4 - prompt
    free = (~known).nonzero().squeeze(-1)
    fillings = torch.tensor(list(itertools.product(range(4), repeat=len(free))))
    ids = torch.full((len(fillings), 4), 2)
    ids[:, free] = fillings
    order, length = order_from_mask(known.expand_as(ids))
    scores = subset_scores(model, ids, order=order, prompt=length)
    assert scores.joint_nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    mean = any_subset_loss(model, ids, order=order, prompt=length).loss
    assert mean.item() == pytest.approx((scores.joint_nll.sum() / scores.targets.sum()).item(), rel=1e-5)


def test_texts_of_one_token_and_nothing_to_fill(model):
    ids = torch.tensor([[3]])
    order, prompt = order_from_mask(torch.tensor([[False]]))
    assert any_subset_loss(model, ids, order=order, prompt=prompt).loss.item() > 0
    nothing = any_subset_loss(model, ids, order=order, prompt=torch.tensor([1]))
    assert nothing.loss.item() == 0
    nothing.loss.backward()  # as a part of a joint batch it must take part in the gradients' exchange


def test_logits_in_parts_are_the_same(model, tokens, monkeypatch):
    def gradients():
        model.zero_grad()
        out = any_subset_loss(model, tokens, **orders(), draft_weight=0.5, block_size=SIZE, block_offset=OFFSET)
        out.loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients()
    monkeypatch.setattr(losses, "LOGITS", 3 * 2 * V)
    parts = gradients()
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_no_logits_of_the_whole_batch():
    model = random_xlnet(60_000)
    ids = torch.randint(0, 60_000, (8, 64))
    order, prompt = random_order(torch.full((8,), 0.9), ids, seed=0, sequence_ids=torch.arange(8))
    _, largest = allocations(lambda: any_subset_loss(model, ids, order=order, prompt=prompt).loss.backward())
    assert largest <= 4 * losses.LOGITS  # and the whole batch's would be 111 MB


def test_dropout_is_on_in_training(tokens):
    model = random_xlnet(V, dropout=0.3).train()

    def loss(seed):
        torch.manual_seed(seed)
        return any_subset_loss(model, tokens, **orders()).loss.item()

    assert loss(0) == loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


def test_acceptance_is_that_of_the_laws(model, tokens):
    scores = subset_scores(model, tokens, **orders(), reach=2)
    order, prompt, _ = orders().values()
    for b in range(3):
        length, m = int(MASK[b].sum()), int(prompt[b])
        for j in (1, 2):
            found = []
            for rank in range(m + j, length):
                laws = [
                    transformers_logits(model, tokens[b, :length], order[b, :length], m, int(order[b, rank]), sees)
                    for sees in (rank, rank - j)
                ]
                found.append(torch.minimum(laws[0].softmax(-1), laws[1].softmax(-1)).sum())
            assert scores.drafts[b, j - 1] == len(found)
            assert scores.acceptance[b, j - 1].item() == pytest.approx(sum(found, torch.tensor(0.0)).item(), abs=1e-4)
    assert scores.targets.tolist() == [6, 8, 2]
    assert scores.joint_nll.sum() / 16 == pytest.approx(any_subset_loss(model, tokens, **orders()).loss.item(), 1e-5)


def test_bad_input(model, tokens):
    blocks = {"block_size": SIZE, "block_offset": OFFSET}
    for match, changes in {
        "draft_weight": {"draft_weight": 1.5, **blocks},
        r"block_size must be int64 \[3\]": {"draft_weight": 0.5, "block_offset": OFFSET},
        "block_offset": {"draft_weight": 0.5, "block_size": SIZE},
        r"block_size must.*got tensor\(\[0": {"draft_weight": 0.5, **blocks, "block_size": 0 * SIZE},
        "order must hold": {"order": torch.zeros(3, N, dtype=torch.int64)},
        "prompt must be": {"prompt": torch.tensor([1, 2, N + 1])},
    }.items():
        with pytest.raises(ValueError, match=match):
            any_subset_loss(model, tokens, **{**orders(), **changes})
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 11\)"):
        any_subset_loss(model, tokens + V, **orders())
    with pytest.raises(ValueError, match="input_ids must be int64"):
        any_subset_loss(model, tokens.float(), **orders())
    with pytest.raises(TypeError, match="XLNetLMHeadModel"):
        any_subset_loss(torch.nn.Linear(1, 1), tokens, **orders())


def test_an_order_depends_on_the_text_alone():
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    rate, numbers = torch.tensor([0.5, 0.5, 0.9]), torch.tensor([4, 5, 6])
    order, prompt = random_order(rate, ids, seed=3, sequence_ids=numbers, attention_mask=mask)
    assert prompt.tolist() == [6, 7 - 4, 1]  # 3.5 targets of 7 are rounded to the even 4
    for row in range(3):
        length = int(mask[row].sum())
        alone = random_order(rate[row : row + 1], ids[:1, :length], seed=3, sequence_ids=numbers[row : row + 1])
        assert order[row, :length].tolist() == alone[0][0].tolist()
        assert order[row, length:].tolist() == list(range(length, 12))
        m = int(prompt[row])
        assert all(part.tolist() == sorted(part.tolist()) for part in (order[row, :m], order[row, m:length]))
    other = random_order(rate, ids, seed=4, sequence_ids=numbers, attention_mask=mask)[0]
    assert not torch.equal(other, order)


def test_every_part_is_as_likely_and_one_token_is_always_left():
    ids = torch.zeros(3000, 5, dtype=torch.int64)
    order, prompt = random_order(torch.full((3000,), 0.4), ids, seed=0, sequence_ids=torch.arange(3000))
    assert set(prompt.tolist()) == {3}
    known = order[:, :3].tolist()
    counts = torch.tensor([known.count(list(part)) for part in itertools.combinations(range(5), 3)])
    assert counts.sum() == 3000
    assert chi_square(counts, torch.full((10,), 0.1)) > 1e-4
    assert random_order(torch.zeros(1), ids[:1], seed=0, sequence_ids=torch.tensor([0]))[1].item() == 4
    assert random_order(torch.ones(1), ids[:1], seed=0, sequence_ids=torch.tensor([0]))[1].item() == 0


def test_blocks_are_uniform_and_named_by_text():
    size, offset = random_blocks(torch.arange(4000), seed=1, sizes=(2, 4))
    cells = [(s, o) for s in (2, 3, 4) for o in range(s)]
    pairs = list(zip(size.tolist(), offset.tolist(), strict=True))
    counts = torch.tensor([pairs.count(cell) for cell in cells])
    assert counts.sum() == 4000
    assert chi_square(counts, torch.tensor([1 / 3 / s for s, _ in cells])) > 1e-4
    again = random_blocks(torch.tensor([17]), seed=1, sizes=(2, 4))
    assert (again[0].item(), again[1].item()) == pairs[17]


def test_a_step_has_rates_of_every_size():
    slots = torch.arange(8)
    for step in range(20):
        u = stratified(slots, 8, seed=2, step=step)
        assert sorted((u * 8).floor().tolist()) == list(range(8))
    alone = torch.stack([stratified(torch.tensor([3]), 8, seed=2, step=step)[0] for step in range(400)])
    counts = torch.histc(alone.float(), 10, 0, 1)
    assert chi_square(counts, torch.full((10,), 0.1)) > 1e-4
    assert math.isclose(alone[0], stratified(slots, 8, seed=2, step=0)[3])
