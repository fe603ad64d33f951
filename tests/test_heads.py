"""The LM head on few rows: the product that is taken instead of the module's, and when it is not."""

import pytest
import torch
from torch import nn

from pyquiet.heads import apply_head

D, V = 256, 1 << 15


def large(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, V, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D), (2, D), (1, 5, D), (3, 2, D), (0, D)])
def test_equals_the_module(shape: tuple[int, ...], bias: bool) -> None:
    head, hidden = large(bias), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = hidden.double() @ head.weight.double().t() + (head.bias.double() if bias else 0)
    logits = apply_head(head, hidden)
    assert logits.is_contiguous()
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


def test_what_stands_around_a_head_is_heard() -> None:
    head = large(False)
    head.register_forward_hook(lambda module, inputs, output: output + 1)
    hidden = torch.zeros(1, D)
    assert torch.equal(apply_head(head, hidden), torch.ones(1, V))
    wrapped = large(False)
    wrapped.forward = lambda x: x.new_full((1, V), 2.0)  # as accelerate's hooks do it
    assert torch.equal(apply_head(wrapped, hidden), torch.full((1, V), 2.0))


def test_gradients_pass() -> None:
    head, hidden = large(True).requires_grad_(True), torch.randn(2, D, requires_grad=True)
    apply_head(head, hidden).pow(2).sum().backward()
    ours = [hidden.grad, head.weight.grad, head.bias.grad]
    hidden.grad = head.weight.grad = head.bias.grad = None
    head(hidden).pow(2).sum().backward()
    for mine, theirs in zip(ours, [hidden.grad, head.weight.grad, head.bias.grad], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
