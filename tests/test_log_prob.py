"""Log-probabilities that keep only the logits: their values, their gradient, and what a second pass may rely on."""

from __future__ import annotations

import pytest
import torch

from pyquiet.heads import log_prob

SHAPE, V = (3, 5), 37


def plain(logits, token, temperature=1.0):
    return (logits / temperature).log_softmax(-1).gather(-1, token[..., None])[..., 0]


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*SHAPE, V, generator=generator, dtype=torch.float64) * 4
    return logits.to(dtype), torch.randint(V - 2, SHAPE, generator=generator)


def value_and_gradient(function, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    out = function(logits, *args, **kwargs)
    (out * torch.arange(1, out.numel() + 1).view_as(out)).sum().backward()
    return out.detach(), logits.grad


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("banned", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_log_softmax(temperature, banned, dtype, tolerance):
    logits, token = problem(dtype)
    if banned:
        logits[..., -2:] = -torch.inf
    expected = value_and_gradient(plain, logits.double(), token, temperature)
    actual = value_and_gradient(log_prob, logits, token, temperature=temperature)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
    if banned:
        assert (actual[1][..., -2:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_finite_differences(temperature):
    logits, token = problem()
    assert torch.autograd.gradcheck(lambda x: log_prob(x, token, temperature=temperature), logits.requires_grad_())


def test_a_sure_token_is_not_rounded_to_certainty():
    rest = torch.linspace(-14, -2, 60, dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(rest), rest], -1).float() + 1000  # all multiples of 2^-14, so exact
    token = torch.zeros(60, dtype=torch.int64)
    expected = plain(logits.double(), token)
    torch.testing.assert_close(log_prob(logits, token).double(), expected, rtol=0, atol=2e-7)
    assert (log_prob(logits, token) < 0)[expected < -1e-6].all()


def test_sums_are_taken_once():
    logits, token = problem(torch.float32)
    sums = []
    first = value_and_gradient(log_prob, logits, token, sums=sums)
    kept = [x.data_ptr() for x in sums]
    again = value_and_gradient(log_prob, logits, token, sums=sums)
    assert [x.data_ptr() for x in sums] == kept
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    shifted, _ = value_and_gradient(log_prob, logits + 1, token, sums=sums)
    torch.testing.assert_close(shifted, first[0] + 1)  # no law any more: the sums were not taken anew


def test_only_the_logits_are_kept():
    logits, token = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda _: None):
        log_prob(logits.requires_grad_(), token)
    assert sorted(saved)[-2:] == [token.numel(), logits.numel()]


def test_a_second_derivative_is_refused():
    logits, token = problem()
    with pytest.raises(NotImplementedError, match="not differentiable twice"):
        torch.autograd.grad(log_prob(logits.requires_grad_(), token).sum(), logits, create_graph=True)
