"""The torch route of `pyquiet.randomness` on a CUDA device gives what the CPU gives."""

import pytest
import torch

from pyquiet.randomness import Purpose, Stream, draw, uniforms

pytestmark = pytest.mark.gpu


def test_uniforms_are_bit_equal():
    position = torch.arange(999) * 4_000_037
    stream = Stream(-3, Purpose.RESIDUAL, position=position, step=2, index=position % 2**26)
    on_gpu = uniforms(stream, 999, "cuda")
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), uniforms(stream, 999))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}])
def test_draws_are_the_same_tokens(options):
    logits = torch.randn(64, 997, generator=torch.Generator().manual_seed(0))
    stream = Stream(5, Purpose.ANSWER)
    here = draw(logits, stream=stream, **options)
    there = draw(logits.cuda(), stream=stream, **options)
    assert torch.equal(there.tokens.cpu(), here.tokens)
    torch.testing.assert_close(there.log_probs.cpu(), here.log_probs)
