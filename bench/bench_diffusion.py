"""Masked diffusion with an energy: one step, and whole texts, against the released procedure; same network and energy.

A GPT-2 sized vocabulary over small random networks: what is compared is how a step goes about its candidates, and with
"autoregressive energy" how it scores them. Values say nothing about quality.
"""

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyquiet.diffusion import AREnergy, MaskedDenoiser, backbone
from pyquiet.diffusion.sampling import diffuse

from . import released_diffusion
from .machine import Machine
from .memory import peak_mib
from .timing import best_seconds

WORDS, BOS, MASK = 50258, 50256, 50257
# Positions, candidates, and the share of positions that are masked.
STEPS = {
    "T256-k4": (256, 4, 1.0),
    "T256-k16": (256, 16, 1.0),
    "T256-k16-half": (256, 16, 0.5),
    "T1024-k4": (1024, 4, 1.0),
}
LENGTH, CANDIDATES, COUNT = 128, 4, 16  # of whole texts, and their steps
MOST = 1 << 28  # elements of a tensor of the released procedure: 1 GB


@cache
def networks() -> tuple[MaskedDenoiser, LlamaForCausalLM]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = backbone(
            WORDS, mask_token_id=MASK, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **shape, tie_word_embeddings=True, bos_token_id=BOS))
    return MaskedDenoiser(trunk.eval(), MASK), lm.eval()


def cheap(candidates: Tensor) -> Tensor:
    """An energy that costs nothing, [...] of candidates [..., T]."""
    return (candidates % 7 == 0).sum(-1).float()


def energies(kind: str) -> tuple[Any, released_diffusion.Energy]:
    """Ours and that of the released procedure."""
    if kind == "autoregressive":
        return AREnergy(networks()[1], bos_id=BOS), released_diffusion.ar_energy(networks()[1], BOS)
    return lambda c, x, t, m: cheap(c), lambda c, log_mu, k: cheap(c).view(-1, k)


def text(length: int, masked: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, BOS, (1, length), generator=generator)
    return tokens.masked_fill(torch.rand(1, length, generator=generator) < masked, MASK)


METHODS = ("released", "pyquiet")


def run(method: str, kind: str, tokens: Tensor, k: int, steps: int) -> Callable[[], Tensor]:
    """The texts that a method writes."""
    denoiser, _ = networks()
    ours, theirs = energies(kind)
    if method == "pyquiet":
        return lambda: diffuse(denoiser, ours, input_ids=tokens, steps=steps, candidates=k).tokens
    if k * tokens.numel() * WORDS > MOST:
        pytest.skip(f"the released procedure would hold several tensors of {k * tokens.numel() * WORDS:.1g} numbers")
    generator = torch.Generator().manual_seed(0)
    return partial(released_diffusion.fill, denoiser, theirs, tokens, k, steps, generator)


def record(
    benchmark: BenchmarkFixture, table: str, shape: str, method: str, call: Callable[[], Tensor], given: Tensor
) -> None:
    with torch.no_grad():
        tokens = call()
        assert ((tokens == given) | (given == MASK)).all()
        assert (tokens != MASK).all()
        seconds = best_seconds(benchmark, call, budget=4.0)
        peak = peak_mib(call)
    masked = int((given == MASK).sum())
    info = {"table": table, "shape": shape, "method": method, "seconds": seconds, "peak_mib": peak}
    benchmark.extra_info.update(info, tokens_a_second=masked / seconds)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("kind", ["free", "autoregressive"])
def test_step(benchmark: BenchmarkFixture, machine: Machine, kind: str, shape: str, method: str) -> None:
    """One step from time 1 to 0, which opens everything that is masked."""
    length, k, masked = STEPS[shape]
    given = text(length, masked)
    record(benchmark, f"one step, {kind} energy, V = {WORDS}", shape, method, run(method, kind, given, k, 1), given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["free", "autoregressive"])
def test_text(benchmark: BenchmarkFixture, machine: Machine, kind: str, method: str) -> None:
    given = text(LENGTH, 1.0)
    table = f"a text of {LENGTH} tokens in {COUNT} steps, {kind} energy, V = {WORDS}"
    record(benchmark, table, f"k{CANDIDATES}", method, run(method, kind, given, CANDIDATES, COUNT), given)


@pytest.mark.parametrize("logits", ["as they are", "widened to float32"])
@pytest.mark.parametrize("width", [64, 768])
def test_half_precision(benchmark: BenchmarkFixture, machine: Machine, width: int, logits: str) -> None:
    """One step of a bfloat16 denoiser: what it saves that draws read its logits without a copy in float32."""
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = MaskedDenoiser(backbone(WORDS, mask_token_id=MASK, **shape).bfloat16().eval(), MASK)
    names = ("mask_id", "vocab_size", "device", "training", "hidden", "head")  # all that a denoiser must have
    drawn: Any = denoiser if logits == "as they are" else SimpleNamespace(**{n: getattr(denoiser, n) for n in names})
    given, free = text(256, 1.0), energies("free")[0]
    seconds = best_seconds(benchmark, lambda: diffuse(drawn, free, input_ids=given, steps=1, candidates=16))
    benchmark.extra_info.update(
        table=f"one step, T 256, k 16, V = {WORDS}, bfloat16, width {width}", method=logits, milliseconds=seconds * 1e3
    )
