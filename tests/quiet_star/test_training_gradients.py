"""Gradients of the training loss: against explicit sequences, finite differences, and with checkpointing."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from pyquiet import QuietStarObjective
from pyquiet.quiet_star.thinking import Text
from pyquiet.quiet_star.training import grade_thoughts

from . import loss_reference
from .architectures import ARCHITECTURES
from .test_training_loss import right_columns
from .thinkers import assert_close, padded, random_ids, thinker

TEXTS = [random_ids(1, length, seed=length)[0] for length in (7, 5)]
OBJECTIVE = QuietStarObjective(lookahead=2)
# Architectures that are float64 throughout; the others' norms round to float32, and so do their gradients.
EXACT_NORMS = ("gpt2", "gpt_neox", "phi", "opt", "starcoder2")
FLOAT32_NORMS = 2e-6


def gradients(model, loss):
    """Gradient of every parameter by name, in which none is missing."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(actual, expected, tolerance):
    """Every tensor within the tolerance of its largest element, or of the largest of all where that is tiny."""
    assert actual.keys() == expected.keys()
    overall = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * overall)
        assert (actual[name] - gradient).abs().max() <= tolerance * scale, name


def check_gradients(model, objective, tolerance, side="left"):
    ids, mask = padded(TEXTS, side)
    out = model.thinking_loss(ids, mask, objective=objective, seed=2)
    actual = gradients(model, out.loss)
    tokens = right_columns(out.tokens, mask)
    reference = loss_reference.loss_of(model, TEXTS, tokens, objective, pad=model.config.pad_token_id)
    expected = gradients(model, reference.loss)
    for name in ("start_embedding", "end_embedding", "mixing_head.0.weight"):
        assert expected[name].any()
    assert_same_gradients(actual, expected, tolerance)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "llama_head12"])
def test_explicit_sequences(name):
    check_gradients(thinker(name, m=2), OBJECTIVE, 1e-10 if name in EXACT_NORMS else FLOAT32_NORMS)


def test_explicit_sequences_beside_a_window():
    check_gradients(thinker("starcoder2", m=2, sliding_window=3), OBJECTIVE, 1e-10)


@pytest.mark.parametrize(
    "objective",
    [
        QuietStarObjective(official=True, lookahead=2),
        QuietStarObjective(lookahead=3, baseline="mean", relu=True, over_steps="mean", policy_temperature=3),
        QuietStarObjective(lookahead=1, thoughts_per_token=1, policy_weight=0.0),
        QuietStarObjective(lookahead=4, thoughts_per_token=3),
    ],
    ids=["official", "options", "no policy", "three thoughts"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_objectives(objective, side):
    check_gradients(thinker("starcoder2", m=2, official=objective.official), objective, 1e-10, side)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32(attention):
    check_gradients(thinker(m=2, dtype=torch.float32, attention=attention), OBJECTIVE, 2e-5)


def differences(model, function, entries=2, step=1e-6):
    """(name, autograd's, central difference) at some entries of every parameter."""
    parameters = dict(model.named_parameters())
    exact = torch.autograd.grad(function(), list(parameters.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    for (name, parameter), gradient in zip(parameters.items(), exact, strict=True):
        flat = parameter.data.view(-1)
        gradient = torch.zeros_like(flat) if gradient is None else gradient.flatten()
        # The largest entry, which a missing gradient would miss most, and others at random.
        largest = [int(gradient.abs().argmax())]
        for i in largest + torch.randint(len(flat), (entries - 1,), generator=generator).tolist():
            before, values = float(flat[i]), []
            for sign in (1, -1):
                flat[i] = before + sign * step
                with torch.no_grad():
                    values.append(float(function()))
            flat[i] = before
            yield name, float(gradient[i]), (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
def test_finite_differences_of_the_likelihoods(name):
    model, (ids, mask) = thinker(name, m=2), padded(TEXTS, "right")
    objective = QuietStarObjective(lookahead=2, policy_weight=0.0)
    tokens = model.thinking_loss(ids, mask, objective=objective, seed=2).tokens.clamp_min(0)
    weights = torch.randn(2, 6, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def likelihoods():
        graded = grade_thoughts(model, ids, Text.of(ids, mask), tokens, objective)
        real = mask[:, :-1, None, None] * weights
        return (graded.base * real[..., 0, 0]).sum() + (graded.mixed * real).sum()

    checked = list(differences(model, likelihoods))
    assert {n for n, *_ in checked} == {n for n, _ in model.named_parameters()}
    for parameter, exact, difference in checked:
        assert abs(exact - difference) <= 1e-6 * max(1, abs(exact)), parameter


def test_finite_differences_of_the_policy():
    """With the rewards frozen: no gradient flows through them."""
    model, ids = thinker("gpt2", m=2), random_ids(1, 6)
    objective = QuietStarObjective(lookahead=2, base_weight=0.0, mixed_weight=0.0)
    out = model.thinking_loss(ids, objective=objective, seed=2)
    assert out.rewards.any()

    def policy():
        graded = grade_thoughts(model, ids, Text.of(ids, None), out.tokens, objective)
        return objective.policy_losses(out.rewards, graded.thoughts)[:, : 6 - 2].mean()

    assert_close(policy(), out.policy, 1e-12)
    actual = gradients_or_zero(model, model.thinking_loss(ids, objective=objective, seed=2).loss)
    for name, exact, difference in differences(model, policy):
        assert abs(exact - difference) <= 1e-6 * max(1, abs(exact)), name
    expected = gradients_or_zero(model, policy())
    assert not actual["mixing_head.4.weight"].any()
    assert actual["start_embedding"].any()
    assert_same_gradients(actual, expected, 1e-12)


def gradients_or_zero(model, loss):
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), values, strict=True)}


class Runs:
    """Counts how often the first layer's MLP is entered, recomputations included."""

    def __init__(self, model):
        self.count = 0
        model.base.base_model.layers[0].mlp.register_forward_pre_hook(self.add)

    def add(self, *_):
        self.count += 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)], ids=str
)
def test_activation_checkpointing_changes_nothing(name, attention, reentrant, dtype):
    model, (ids, mask) = thinker(name, m=2, dtype=dtype, attention=attention).train(), padded(TEXTS, "left")
    plain = gradients(model, model.thinking_loss(ids, mask, objective=OBJECTIVE, seed=2).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = model.base.base_model.layers[0]
    function, runs = layer._gradient_checkpointing_func, Runs(model)
    loss = model.thinking_loss(ids, mask, objective=OBJECTIVE, seed=2).loss
    assert runs.count == 1 + 2 + 1  # the text, START and the first thought token, the packed pass
    forward = runs.count
    assert model.base.config._attn_implementation == attention
    assert layer._gradient_checkpointing_func is function
    assert layer.gradient_checkpointing
    # As on CUDA, the backward pass runs in another thread, which sees no context variable of this one.
    result = {}
    worker = threading.Thread(target=lambda: result.update(gradients(model, loss)))
    worker.start()
    worker.join()
    assert runs.count == forward + 1
    assert model.base.config._attn_implementation == attention
    assert plain.keys() == result.keys()
    for key, gradient in plain.items():
        assert torch.equal(gradient, result[key]), key


@pytest.mark.parametrize("implementation", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT], ids=str)
def test_layers_in_checkpoint_wrappers(implementation):
    """What FSDP's activation checkpointing makes of the layers."""
    model, ids = thinker(m=2, dtype=torch.float32, attention="sdpa").train(), random_ids(2, 7)
    plain = gradients(model, model.thinking_loss(ids, seed=0).loss)
    kind = type(model.base.base_model.layers[0])
    apply_activation_checkpointing(
        model.base,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, kind),
    )
    runs = Runs(model)
    loss = model.thinking_loss(ids, seed=0).loss
    forward = runs.count
    wrapped = gradients(model, loss)
    assert runs.count == forward + 1
    for expected, actual in zip(plain.values(), wrapped.values(), strict=True):
        assert torch.equal(actual, expected)


def test_a_failing_pass_leaves_the_base_as_it_was(monkeypatch):
    model = thinker(m=1, attention="sdpa").train()
    model.gradient_checkpointing_enable()
    layer = model.base.base_model.layers[0]
    function = layer._gradient_checkpointing_func

    def broken(*_, **__):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(layer.mlp, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            model.thinking_loss(random_ids(1, 6), seed=0)
    assert model.base.config._attn_implementation == "sdpa"
    assert layer._gradient_checkpointing_func is function
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.thinking_loss(random_ids(1, 6), seed=0).loss.isfinite()


def test_frozen_weights_get_no_gradient():
    """Adapters, START, END and the head can be trained alone."""
    model = thinker(m=2)
    model.base.requires_grad_(False)
    model.thinking_loss(random_ids(1, 7), seed=0).loss.backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert model.start_embedding.grad.any()
    assert model.mixing_head[0].weight.grad.any()


def test_bfloat16_base_and_autocast():
    """Queries, keys and values of several types meet in one kernel; w and the mix stay in float32."""
    exact, ids = thinker(m=2, dtype=torch.float32, attention="sdpa"), random_ids(2, 8)
    tokens = exact.thinking_loss(ids, seed=1).tokens
    expected = grade_thoughts(exact, ids, Text.of(ids, None), tokens, OBJECTIVE)
    with torch.autocast("cpu", torch.bfloat16):
        out = exact.thinking_loss(ids, seed=1)
        auto = grade_thoughts(exact, ids, Text.of(ids, None), tokens, OBJECTIVE)
    half = thinker(m=2, dtype=torch.bfloat16, attention="sdpa")
    rounded = grade_thoughts(half, ids, Text.of(ids, None), tokens, OBJECTIVE)
    for graded in (auto, rounded):
        assert graded.weight.dtype == graded.mixed.dtype == torch.float32
        assert (graded.mixed - expected.mixed).abs().mean() < 0.1
        assert (graded.base - expected.base).abs().mean() < 0.1
    out.loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in exact.parameters())


def test_chunks_of_the_head_change_nothing(monkeypatch):
    """One position at a time (each chunk reaches into the next three) or all at once."""
    model, (ids, mask) = thinker("gpt2", m=2), padded(TEXTS, "left")
    results = []
    for size in (1, 3000, 1 << 22):
        monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", size)
        out = model.thinking_loss(ids, mask, seed=0)
        results.append((out, gradients(model, out.loss)))
    for out, found in results[:-1]:
        assert_close(out.mixed_nlls, results[-1][0].mixed_nlls, 1e-12)
        assert_close(out.loss, results[-1][0].loss, 1e-12)
        assert_same_gradients(found, results[-1][1], 1e-10)


def test_a_graph_serves_twice():
    model = thinker(m=2, dtype=torch.float64)
    ids = random_ids(2, 7)
    loss = model.thinking_loss(ids, objective=QuietStarObjective(lookahead=2), seed=0).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)
