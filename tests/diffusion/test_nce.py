"""The loss of energies: its optimum and its gradients, and the completions that are told from texts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from pyquiet.diffusion import training
from pyquiet.diffusion.modeling import MaskedDenoiser
from pyquiet.diffusion.training import completions, nce_loss
from pyquiet.kernels import draw_candidates
from pyquiet.randomness import Purpose, Stream

from ..chi_square import chi_square
from .runs import MASK, V, examples, model
from .toys import PROPOSAL, SOURCE, ExactMarginals, Product, ids_of


@pytest.mark.parametrize("nu", [1, 4])
def test_the_optimum_is_the_log_ratio_and_normalised(nu):
    """Descent of a table of 27 energies, all of them masked: the mean loss over texts and completions, exactly."""
    p = SOURCE.flatten()
    mu = torch.einsum("a,b,c->abc", *PROPOSAL).flatten()
    table = torch.zeros(27, dtype=torch.float64, requires_grad=True)
    pairs = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    weight = p[pairs[:, 0]] * mu[pairs[:, 1]]
    optimiser = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, history_size=30,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimiser.zero_grad()
        loss = (weight * nce_loss(table[pairs[:, 0]], table[pairs[:, 1], None].expand(-1, nu))).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    energies = table.detach()
    heavy = (p > 1e-3) & (mu > 1e-3)
    assert heavy.sum() > 15
    torch.testing.assert_close(energies[heavy], (mu.log() - p.log())[heavy], atol=1e-3, rtol=0)
    assert (mu * (-energies).exp()).sum().item() == pytest.approx(1, abs=1e-3)
    assert (mu * energies.exp()).sum().item() > 1.5  # the sign matters


@pytest.mark.parametrize("size", [0.0, 3.0, 50.0, 400.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_gradient_is_right_for_any_energy(size, sign):
    positive = torch.full((2,), sign * size, dtype=torch.float64, requires_grad=True)
    negative = torch.full((2, 3), sign * size, dtype=torch.float64, requires_grad=True)
    loss = nce_loss(positive, negative)
    loss.sum().backward()
    z = sign * size + torch.tensor(3.0, dtype=torch.float64).log()
    torch.testing.assert_close(positive.grad, torch.sigmoid(z).expand(2), rtol=1e-12, atol=0)
    torch.testing.assert_close(negative.grad, -torch.sigmoid(-z).expand(2, 3), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, (-logsigmoid(-z) - 3 * logsigmoid(z)).expand(2), rtol=1e-12, atol=0)
    single = torch.tensor([sign * size], requires_grad=True)
    nce_loss(single, torch.zeros(1, 1)).sum().backward()
    assert single.grad.item() == pytest.approx(torch.tensor(sign * size).double().sigmoid().item(), rel=1e-5)


def test_a_log_of_a_clamped_sigmoid_would_not_do():
    """What the loss must not be: its gradient is lost where the energy is most wrong."""
    wrong = torch.tensor([50.0], requires_grad=True)
    (-(torch.sigmoid(-wrong) + 1e-8).log()).sum().backward()
    assert abs(wrong.grad.item()) < 1e-10
    right = torch.tensor([50.0], requires_grad=True)
    nce_loss(right, torch.zeros(1, 1)).sum().backward()
    assert right.grad.item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [((3,), (2, 1)), ((3,), (3,)), ((3, 1), (3, 1)), ((3,), (3, 0))],
)
def test_bad_shapes_are_named(positive, negative):
    with pytest.raises(ValueError, match="positive must be"):
        nce_loss(torch.zeros(positive), torch.zeros(negative))


def texts(left=False):
    """Three texts, padded on the right or the left, and what is masked in them."""
    rows = [row["input_ids"] for row in examples(3)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        part = slice(9 - len(row), None) if left else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, mask, torch.isin(places, torch.tensor([0, 2, 3, 5])) & (mask == 1)


def test_completions_are_candidates_by_address():
    """Candidate j of position i of a text has an address of its own; the rest of the text stays."""
    denoiser, (ids, mask, masked) = MaskedDenoiser(model()), texts()
    numbers = torch.tensor([4, 2**31, 0])
    options = {"count": 3, "seed": 9}
    drawn = completions(denoiser, ids, masked=masked, attention_mask=mask, sequence_ids=numbers, **options)
    assert drawn.shape == (3, 3, 9)
    assert (drawn == ids[:, None])[~masked[:, None].expand_as(drawn)].all()
    assert not (drawn == MASK).any()
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    with torch.no_grad():
        logits = denoiser.head(denoiser.hidden(ids.masked_fill(masked, MASK), mask)[masked])
    row, column = masked.nonzero(as_tuple=True)
    stream = Stream(9, Purpose.CANDIDATE, numbers[row], column)
    assert torch.equal(drawn[row, :, column], draw_candidates(logits, 3, stream=stream).tokens)
    for i in range(3):
        length = int(mask[i].sum())
        alone = completions(
            denoiser, ids[i : i + 1, :length], masked=masked[i : i + 1, :length], sequence_ids=numbers[i : i + 1],
            **options,
        )  # fmt: skip
        assert torch.equal(alone[0], drawn[i, :, :length])


def test_completions_do_not_depend_on_where_the_padding_is():
    """A toy's laws are by the number of a position among those of its text, as the addresses are."""
    laws = torch.rand(9, V - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = Product(laws / laws.sum(1, keepdim=True), MASK)
    found = []
    for left in (False, True):
        ids, mask, masked = texts(left)
        options = {"attention_mask": mask, "sequence_ids": torch.arange(3), "count": 3, "seed": 9}
        drawn = completions(denoiser, ids, masked=masked, **options)
        found.append(drawn[mask.bool()[:, None].expand_as(drawn)])
    assert torch.equal(*found)


def test_completions_are_drawn_from_half_precision_as_it_is(monkeypatch):
    denoiser, (ids, mask, masked) = MaskedDenoiser(model().bfloat16()), texts()
    options = {"masked": masked, "attention_mask": mask, "sequence_ids": torch.arange(3), "count": 3, "seed": 9}
    dtypes = []
    spy = lambda logits, *a, **k: dtypes.append(logits.dtype) or draw_candidates(logits, *a, **k)  # noqa: E731
    monkeypatch.setattr(training, "draw_candidates", spy)
    drawn = completions(denoiser, ids, **options)
    monkeypatch.setattr(training, "native_head", lambda denoiser, dtype: denoiser.head)
    assert torch.equal(drawn, completions(denoiser, ids, **options))
    assert dtypes == [torch.bfloat16, torch.float32]


def test_completions_have_the_denoisers_law():
    """Of a toy whose law is known, given what is observed; both positions at once, apart from each other."""
    n = 4000
    ids = ids_of(torch.tensor([[0, 2, 1]]), 1).expand(n, -1)
    masked = torch.tensor([True, False, True]).expand(n, -1)
    denoiser = ExactMarginals(SOURCE, 1)
    drawn = completions(denoiser, ids, masked=masked, count=2, seed=0, sequence_ids=torch.arange(n))
    given = SOURCE[:, 2] / SOURCE[:, 2].sum()  # [x0, x2]
    law = torch.zeros(4, 4, dtype=torch.float64)
    law[torch.tensor([0, 2, 3])[:, None], torch.tensor([0, 2, 3])] = torch.outer(given.sum(1), given.sum(0))
    counts = torch.bincount((drawn[..., 0] * 4 + drawn[..., 2]).flatten(), minlength=16)
    assert chi_square(counts, law.flatten()) > 1e-4
    other = completions(Product(), ids, masked=masked, count=2, seed=0, sequence_ids=torch.arange(n))
    assert chi_square(torch.bincount((other[..., 0] * 4 + other[..., 2]).flatten(), minlength=16), law.flatten()) < 1e-4


def test_the_denoiser_proposes_in_evaluation_mode():
    """Whatever mode it is in, which it keeps; dropout would make another proposal of it."""
    trained = model(dropout=0.5).train()
    trained.bert.encoder.layer[1].eval()  # a mode of its own survives too
    modes = [module.training for module in trained.modules()]
    denoiser, (ids, mask, masked) = MaskedDenoiser(trained), texts()
    options = {"masked": masked, "attention_mask": mask, "sequence_ids": torch.arange(3), "count": 4, "seed": 0}
    before = torch.get_rng_state()
    drawn = completions(denoiser, ids, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in trained.modules()] == modes
    assert torch.equal(drawn, completions(MaskedDenoiser(model().eval()), ids, **options))
    with torch.no_grad():
        noisy = denoiser.hidden(ids.masked_fill(masked, MASK), mask)[masked]
    row, column = masked.nonzero(as_tuple=True)
    dropped = draw_candidates(denoiser.head(noisy), 4, stream=Stream(0, Purpose.CANDIDATE, row, column)).tokens
    assert not torch.equal(dropped, drawn[row, :, column])
    assert drawn.max() < V
