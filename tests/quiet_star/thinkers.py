"""Thinking models for the tests, and what the tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pyquiet
from pyquiet.tokens import padded as padded

from .architectures import EOS, EXACT, VOCABULARY, build
from .sequential_reference import Text

# How far a parallel, cached or batched run may lie from the explicit sequences.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Ordinary tokens [rows, length]: neither padding nor the end of the text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, VOCABULARY, (rows, length), generator=generator)


def other(ids: Tensor) -> Tensor:
    """A different ordinary token for each."""
    first = EOS + 1
    return (ids - first + 40) % (VOCABULARY - first) + first


def thinker(
    name: str = "llama",
    *,
    m: int = 2,
    dtype: torch.dtype = torch.float64,
    attention: str = EXACT,
    official: bool = False,
    **changes: Any,
) -> Any:
    """A thinking model around a tiny random base, with w > 0 and START different from END."""
    base = build(name, dtype=dtype, attention=attention, **changes)
    model = pyquiet.QuietStarForCausalLM.from_base(base, thought_tokens=m, start_init=7, official=official)
    return awake(model)


@torch.no_grad()
def awake(model: Any, seed: int = 1) -> Any:
    """The model with random START and END and a random mixing head whose w lies around 0.5."""
    generator = torch.Generator().manual_seed(seed)

    def redraw(parameter: Tensor, std: float) -> None:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(std * noise)

    redraw(model.start_embedding, 0.01 * model.base.get_input_embeddings().weight.float().std())
    redraw(model.end_embedding, 0.01 * model.base.get_input_embeddings().weight.float().std())
    layers = linear_layers(model)
    for layer in layers:
        redraw(layer.weight, layer.in_features**-0.5)
    # ReLU outputs times positive weights: w > 0 for every input.
    last = layers[-1].weight
    last.abs_()
    probe = torch.randn(256, layers[0].in_features, generator=generator, dtype=torch.float64)
    last.mul_(0.5 / model.mixing_head(probe.to(last.dtype)).mean())
    model.generation_config.eos_token_id = None
    return model.eval()


def linear_layers(model: Any) -> list[nn.Linear]:
    """The linear layers of the mixing head, in order."""
    return [layer for layer in model.mixing_head.modules() if isinstance(layer, nn.Linear)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Same shape, and no element further apart than the tolerance (absolute)."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=0, atol=tolerance)


def assert_same_thoughts(actual: Any, expected: Text | Any, tolerance: float) -> None:
    """Identical tokens; log-probabilities and weights within the tolerance."""
    assert torch.equal(actual.tokens, expected.tokens)
    fields = ("log_probs", "weight", "mixed_log_probs", "base_log_probs")
    for name in fields:
        assert_close(getattr(actual, name), getattr(expected, name), tolerance)


def tokens_of(answer: Any, prompt_length: int) -> Tensor:
    """The generated tokens [B, new] of the result of `generate`."""
    return answer.sequences[:, prompt_length:]


class CallCounter:
    """Counts the forwards of the base network while the block runs."""

    def __init__(self, model: Any) -> None:
        self.network, self.calls = model.base.base_model, 0

    def __enter__(self) -> CallCounter:
        self.handle = self.network.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _count(self, *_: object) -> None:
        self.calls += 1
