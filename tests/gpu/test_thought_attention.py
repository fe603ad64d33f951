"""Thought attention on a CUDA device: output, log-sum-exp and gradients against the float64 reference."""

import pytest
import torch

from pyquiet import native
from pyquiet.kernels import thought_attention
from pyquiet.kernels.thought_attention import reference

from ..kernels.test_thought_attention import SHAPES as CPU_SHAPES
from ..kernels.test_thought_attention import broken, make

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, H, G, T, P, Q, D, S, window, softcap, left padding
SHAPES = [
    *CPU_SHAPES,
    (2, 8, 8, 64, 8, 8, 64, 64, None, None, False),
    (1, 8, 2, 200, 8, 8, 128, 200, None, None, True),
    (1, 4, 1, 33, 16, 16, 64, 300, 100, 20.0, True),
    (1, 4, 4, 300, 1, 1, 128, 300, None, None, False),
]


@pytest.fixture(autouse=True)
def native_kernels():
    if native.cuda() is None:
        pytest.fail("the CUDA kernels are not built")


def run(tensors, options, d_out, function):
    """Output, log-sum-exp and the five gradients, in float64 on the CPU."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*tensors, **options)
    gradients = torch.autograd.grad(out, tensors, d_out.to(out))
    return [x.detach().cpu().double() for x in (out, lse, *gradients)]


def on_device(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype):
    """float32 to 5e-6 of the largest element, half precision to two steps of its rounding of it."""
    tensors, options = make(*shape, dtype=dtype)
    d_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = run([x.double() for x in tensors], options, d_out, reference)
    there = [x.cuda() for x in tensors]
    device_options = {name: on_device(value) for name, value in options.items()}
    actual = run(there, device_options, d_out, lambda *x, **o: thought_attention(*x, **o, return_lse=True))
    step = 5e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for a, e in zip(actual, exact, strict=True):
        allowed = step * max(1.0, e.abs().max().item() if e.numel() else 0.0, (shape[6] / 64) ** 0.5)
        torch.testing.assert_close(a, e, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_repeats_give_the_same_bits(dtype):
    tensors, options = make(2, 8, 4, 150, 6, 6, 64, 150, None, None, True, dtype=dtype)
    tensors, options = [x.cuda() for x in tensors], {name: on_device(value) for name, value in options.items()}
    d_out = torch.randn_like(tensors[0])
    first, second = (
        run(tensors, options, d_out, lambda *x, **o: thought_attention(*x, **o, return_lse=True)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_limit_out_of_range_gives_nan_in_its_rows_alone():
    tensors, options = make(1, 2, 1, 20, 3, 3, 64, 30, None, None, False)
    tensors = [x.cuda() for x in tensors]
    limits = options["text_limits"].cuda()
    expected = thought_attention(*tensors, text_limits=limits, scale=0.1)
    limits[0, 7] = 31
    out = thought_attention(*tensors, text_limits=limits, scale=0.1)
    assert out[:, :, 7].isnan().all()
    others = [t for t in range(20) if t != 7]
    torch.testing.assert_close(out[:, :, others], expected[:, :, others])


@pytest.mark.parametrize(
    ("error", "named", "change"),
    [
        (TypeError, "text_key", lambda a: a.update(text_key=a["text_key"].half())),
        (ValueError, "path_key", lambda a: a.update(path_key=a["path_key"].cpu())),
        (ValueError, "window", lambda a: a.update(window=0)),
    ],
)
def test_bad_arguments_are_named(error, named, change):
    def move_and_change(arguments):
        arguments.update({name: on_device(value) for name, value in arguments.items()})
        change(arguments)

    with pytest.raises(error, match=named):
        thought_attention(**broken(move_and_change))


def test_a_thinking_model_on_the_device_agrees_with_the_cpu():
    import pyquiet

    model, tokenizer = pyquiet.load("tiny-causal")
    thinker = pyquiet.QuietStarForCausalLM.from_base(model, tokenizer=tokenizer).eval()
    torch.nn.init.normal_(thinker.mixing_head[-1].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    ids = tokenizer("Once upon a time there was a king", return_tensors="pt").input_ids
    here = thinker.think_at_every_token(ids, seed=0)
    there = thinker.cuda().think_at_every_token(ids.cuda(), seed=0)
    assert torch.equal(there.tokens.cpu(), here.tokens)
    torch.testing.assert_close(there.mixed_log_probs.cpu(), here.mixed_log_probs, rtol=0, atol=1e-3)
