"""What denoisers learn from: a loss that is a tight bound for the exact posterior, and masks of the stated law."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pyquiet import losses
from pyquiet.diffusion.modeling import MaskedDenoiser, backbone
from pyquiet.diffusion.schedule import KINDS, Schedule
from pyquiet.diffusion.training import completions, nelbo, random_masks

from ..allocations import allocations
from ..chi_square import chi_square
from .toys import PROPOSAL, SOURCE, ExactMarginals, Product, S, T, ids_of

MASK = 1
TEXTS = ids_of(torch.cartesian_prod(*[torch.arange(S)] * T), MASK)  # all 27
SETS = torch.tensor(list(itertools.product([False, True], repeat=T)))  # of masked positions, all 8
TEXTS_OF = torch.cartesian_prod(*[torch.arange(S)] * T).T  # [T, 27], as symbols
ENTROPY = -(SOURCE * SOURCE.log()).sum().item()


class InDouble:
    """A toy's head without its rounding to float32."""

    def head(self, rows):
        wide = rows.new_full((len(rows), self.vocab_size), -torch.inf)
        wide[:, ids_of(torch.arange(self.vocab_size - 1), self.mask_id)] = rows
        return wide


class Exact(InDouble, ExactMarginals):
    pass


class Apart(InDouble, Product):
    pass


def over_sets(denoiser, weight):
    """The mean over the source of the NLL of each set of masked positions, [8], weighed by weight(n)."""
    means = []
    for masked in SETS:
        each = torch.full((len(TEXTS),), weight(int(masked.sum())), dtype=torch.float64)
        out = nelbo(denoiser, TEXTS, masked=masked.expand(len(TEXTS), -1), weight=each)
        means.append((SOURCE.flatten() * out.text).sum())
    return torch.stack(means)


def low_variance(denoiser, weight=lambda n: T / n if n else 0.0):
    """The exact mean of the loss of a text over how many are masked, and which."""
    size = SETS.sum(1)
    chance = torch.tensor([0.0 if n == 0 else 1 / (T * math.comb(T, n)) for n in size.tolist()], dtype=torch.float64)
    return (chance * over_sets(denoiser, weight)).sum().item()


def continuous(denoiser, schedule, nodes=400):
    """The exact mean of the loss of a text over which are masked at a time, integrated over the time."""
    x, share = np.polynomial.legendre.leggauss(nodes)
    t = torch.tensor((x + 1) / 2)
    alpha, size = schedule.alpha(t)[:, None], SETS.sum(1)
    chance = (1 - alpha) ** size * alpha ** (T - size)  # [nodes, 8]
    each = over_sets(denoiser, lambda n: 1.0)
    return (torch.tensor(share / 2) * schedule.weight(t) * (chance * each).sum(1)).sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_exact_posterior_the_bound_is_the_entropy(kind):
    """And of another denoiser it is above; a loss that does not weigh is neither."""
    assert low_variance(Exact(SOURCE)) == pytest.approx(ENTROPY, abs=1e-9)
    assert continuous(Exact(SOURCE), Schedule(kind)) == pytest.approx(ENTROPY, abs=1e-6)
    apart = low_variance(Apart(PROPOSAL))
    cross = -(SOURCE * torch.stack([PROPOSAL[i].log()[TEXTS_OF[i]] for i in range(T)]).sum(0).view(3, 3, 3)).sum()
    assert apart == pytest.approx(cross.item(), abs=1e-9)  # a law without correlations is its own bound
    assert continuous(Apart(PROPOSAL), Schedule(kind)) == pytest.approx(apart, abs=1e-6)
    assert apart > ENTROPY + 0.1
    assert abs(low_variance(Exact(SOURCE), lambda n: 1.0) - ENTROPY) > 0.1


@pytest.mark.parametrize("objective", ["low_variance", "continuous"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_what_is_drawn_estimates_the_bound(objective, kind):
    """30,000 texts of the source, noised as a trainer does."""
    n, schedule = 30_000, Schedule(kind)
    generator = torch.Generator().manual_seed(0)
    ids = TEXTS[torch.multinomial(SOURCE.flatten(), n, replacement=True, generator=generator)]
    level = torch.rand(n, generator=generator, dtype=torch.float64)
    masks = random_masks(
        level, ids, seed=0, sequence_ids=torch.arange(n), objective=objective, schedule=schedule, min_time=1e-5
    )
    out = nelbo(Apart(PROPOSAL), ids, masked=masks.masked, weight=masks.weight)
    expected = low_variance(Apart(PROPOSAL))
    assert abs(out.text.mean().item() - expected) < 4 * out.text.std().item() / n**0.5
    assert out.loss.item() == pytest.approx(out.text.mean().item() / T)
    assert out.text.std().item() < 0.1 * n**0.5  # so that the test can fail


def test_as_many_are_masked_as_the_level_says_and_each_set_equally_often():
    n = 6000
    ids, mask = torch.zeros(n, 6, dtype=torch.int64), torch.ones(n, 6)
    mask[:, 1] = mask[:, 5] = 0  # four tokens, around and before padding
    masks = random_masks(torch.full((n,), 0.3), ids, seed=3, sequence_ids=torch.arange(n), attention_mask=mask)
    assert (masks.masked.sum(1) == 2).all()  # 1 + floor(0.3 * 4)
    assert not masks.masked[:, [1, 5]].any()
    assert (masks.weight == 2).all()
    assert masks.time.tolist() == pytest.approx([0.5] * n)
    counts = (masks.masked.long() * 2 ** torch.arange(6)).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert chi_square(counts, torch.full((6,), 1 / 6)) > 1e-4
    levels = torch.tensor([0.0, 0.2499, 0.25, 0.999, 1.0])
    few = random_masks(levels, ids[:5], seed=3, sequence_ids=torch.arange(5), attention_mask=mask[:5])
    assert few.masked.sum(1).tolist() == [1, 1, 2, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_masked_with_the_schedules_probability(kind):
    schedule, n, t = Schedule(kind), 2000, 10
    ids, level = torch.zeros(n, t, dtype=torch.int64), torch.full((n,), 0.4)
    options = {"objective": "continuous", "schedule": schedule, "min_time": 0.01}
    masks = random_masks(level, ids, seed=0, sequence_ids=torch.arange(n), **options)
    time = 0.01 + 0.99 * level.double()
    assert torch.equal(masks.time, time)
    assert torch.equal(masks.weight, schedule.weight(time))
    p = 1 - schedule.alpha(time[:1]).item()
    law = torch.tensor([math.comb(t, k) * p**k * (1 - p) ** (t - k) for k in range(t + 1)], dtype=torch.float64)
    assert chi_square(torch.bincount(masks.masked.sum(1), minlength=t + 1), law) > 1e-4


@pytest.mark.parametrize("objective", ["low_variance", "continuous"])
def test_a_texts_masks_are_its_own(objective):
    """They depend on seed, id and level: not on the batch, on the padding behind or on the length of others."""
    ids, level, numbers = torch.zeros(5, 9, dtype=torch.int64), torch.rand(5), torch.tensor([7, 2, 2**31, 0, 9])
    mask = torch.ones(5, 9)
    mask[2:, 6:] = 0
    options = {"seed": 5, "objective": objective}
    whole = random_masks(level, ids, sequence_ids=numbers, attention_mask=mask, **options)
    for i in range(5):
        length = int(mask[i].sum())
        one = random_masks(level[i : i + 1], ids[i : i + 1, :length], sequence_ids=numbers[i : i + 1], **options)
        assert torch.equal(one.masked[0], whole.masked[i, :length])
        assert not whole.masked[i, length:].any()
        assert torch.equal(one.weight[0], whole.weight[i])
    other = random_masks(level, ids, sequence_ids=numbers + 1, attention_mask=mask, **options)
    assert not torch.equal(other.masked, whole.masked)
    again = random_masks(level, ids, sequence_ids=numbers, attention_mask=mask, **(options | {"seed": 6}))
    assert not torch.equal(again.masked, whole.masked)


def small(vocabulary=11):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = backbone(
            vocabulary, mask_token_id=vocabulary - 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16,
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    return MaskedDenoiser(model)


def batch():
    ids = torch.randint(0, 10, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    masks = random_masks(torch.tensor([0.2, 0.6, 0.9]), ids, seed=0, sequence_ids=torch.arange(3), attention_mask=mask)
    return ids, mask, masks


def test_the_loss_is_that_of_the_whole_model():
    """Its own logits at masked positions of the masked texts, without the mask token; the parts of a batch add up."""
    denoiser, (ids, mask, masks) = small(), batch()
    logits = denoiser.model(input_ids=ids.masked_fill(masks.masked, 10), attention_mask=mask).logits[..., :10]
    nlls = -logits.log_softmax(-1).gather(-1, ids.clamp(max=9)[..., None])[..., 0]
    expected = (nlls * masks.masked).sum(1) * masks.weight
    out = nelbo(denoiser, ids, masked=masks.masked, weight=masks.weight, attention_mask=mask)
    torch.testing.assert_close(out.text, expected.float(), rtol=1e-5, atol=1e-5)
    assert out.loss.item() == pytest.approx(expected.sum().item() / 21, rel=1e-5)
    parts = [
        nelbo(denoiser, ids[i : i + 1], masked=masks.masked[i : i + 1], weight=masks.weight[i : i + 1],
              attention_mask=mask[i : i + 1], token_count=torch.tensor(21)).loss.item()
        for i in range(3)
    ]  # fmt: skip
    assert sum(parts) == pytest.approx(out.loss.item(), rel=1e-5)


def test_logits_in_parts_are_the_same(monkeypatch):
    denoiser, (ids, mask, masks) = small(), batch()

    def gradients():
        denoiser.zero_grad()
        out = nelbo(denoiser, ids, masked=masks.masked, weight=masks.weight, attention_mask=mask)
        out.loss.backward()
        return [out.loss.detach()] + [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]

    whole = gradients()
    monkeypatch.setattr(losses, "LOGITS", 3 * 11)
    parts = gradients()
    assert len(whole) == len(parts) > 5
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_where_nothing_is_masked_nothing_is_learned():
    denoiser, (ids, _, masks) = small(), batch()
    out = nelbo(denoiser, ids, masked=torch.zeros_like(masks.masked), weight=masks.weight)
    out.loss.backward()
    assert out.loss.item() == 0
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in denoiser.parameters())


def test_no_logits_of_the_whole_batch():
    denoiser = small(60_000)
    ids = torch.randint(0, 59_999, (8, 64))
    masks = random_masks(torch.full((8,), 0.9), ids, seed=0, sequence_ids=torch.arange(8))
    _, largest = allocations(lambda: nelbo(denoiser, ids, masked=masks.masked, weight=masks.weight).loss.backward())
    assert largest <= 4 * losses.LOGITS  # and the whole batch's would be 123 MB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": torch.tensor([0.5, 1.5])}, "level must be"),
        ({"level": torch.tensor([0.5])}, "level must be"),
        ({"input_ids": torch.zeros(2, 4)}, "input_ids must be int64"),
        ({"sequence_ids": torch.tensor([1, -1])}, "sequence_ids must lie"),
        ({"objective": "loss"}, "objective must be one of low_variance, continuous, got 'loss'"),
        ({"min_time": -0.1}, "min_time must be"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    good = {"level": torch.tensor([0.5, 0.1]), "input_ids": torch.zeros(2, 4, dtype=torch.int64)}
    good |= {"seed": 0, "sequence_ids": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        random_masks(**(good | changes))
    for name in ("level", "input_ids", "schedule"):
        with pytest.raises(TypeError, match=f"{name} must be a"):
            random_masks(**(good | {name: "linear"}))


def test_texts_that_are_masked_already_are_refused():
    masked = torch.ones(1, 3, dtype=torch.bool)
    ids, seen = torch.tensor([[1, 10, 2]]), torch.tensor([[True, False, True]])
    for where in (masked, seen):  # the mask token where nothing is to be predicted is no text either
        with pytest.raises(ValueError, match="input_ids hold 10; give clean texts"):
            nelbo(small(), ids, masked=where, weight=torch.ones(1))
        with pytest.raises(ValueError, match="input_ids hold 10; give clean texts"):
            completions(small(), ids, masked=where, count=2, seed=0, sequence_ids=torch.arange(1))
    good = {"masked": seen, "count": 2, "seed": 0, "sequence_ids": torch.arange(1)}
    for wrong in ({"count": 0}, {"masked": masked[:, :2]}, {"sequence_ids": torch.arange(2)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            completions(small(), ids, **good | wrong)
    with pytest.raises(ValueError, match="input_ids hold 99; give clean texts"):
        completions(small(), torch.tensor([[1, 99, 2]]), masked=seen, count=2, seed=0, sequence_ids=torch.arange(1))
    nelbo(small(), ids, masked=seen, weight=torch.ones(1), attention_mask=seen.long())  # padding may hold anything
    with pytest.raises(ValueError, match=r"masked must be \[B, T\]"):
        nelbo(small(), torch.tensor([[1, 3, 2]]), masked=masked[:, :2], weight=torch.ones(1))
