"""The loop of the release and `thinking_loss` in official mode are one loss, and what the bench counts is right."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Starcoder2Config, Starcoder2ForCausalLM

import pyquiet
from pyquiet import QuietStarObjective

from .memory import saved_mib
from .models import random_thinker
from .released_training import ReleasedLoss, draw, released_loss

PAD, VOCABULARY = 0, 97
SIZES = [(5, 4, 2), (3, 3, 3), (5, 1, 2), (2, 3, 1)]  # m, A, N
TABLE = "base.model.embed_tokens.weight"

pytestmark = pytest.mark.usefixtures("one_thread")


def thinker(m: int) -> Any:
    """A tiny thinking model that is float64 throughout (Llama's norm is not), with wide weights and w other than 0."""
    config = Starcoder2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, attn_implementation="sdpa", dtype=torch.float64, embedding_dropout=0.0,
        attention_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    base = Starcoder2ForCausalLM(config).double()
    model = pyquiet.QuietStarForCausalLM.from_base(base, thought_tokens=m, start_init=7, official=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("_embedding"):
                parameter.copy_(0.002 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def texts(padded: bool) -> tuple[Tensor, Tensor | None]:
    """Ids [2, 12] and their mask. One real token looks like padding: the release predicts it nowhere."""
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = PAD
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def both(
    model: Any, objective: QuietStarObjective, padded: bool = False, trimmed: bool = False
) -> tuple[Any, dict[str, Tensor], ReleasedLoss, dict[str, Tensor]]:
    """Our loss and the release's of the same thoughts, each with its gradients by parameter."""
    ids, mask = texts(padded)
    ours = model.thinking_loss(ids, mask, objective=objective, seed=3)
    tokens = pad(ours.tokens.clamp_min(0), (0, 0, 0, 0, 0, 1))  # the release thinks at the last position too
    theirs = released_loss(
        model, ids, mask, thoughts=objective.thoughts_per_token, lookahead=objective.lookahead,
        policy_weight=objective.policy_weight, tokens=tokens, trimmed=trimmed,
    )  # fmt: skip
    assert torch.equal(theirs.tokens, tokens)
    return ours, gradients(model, ours.loss), theirs, gradients(model, theirs.loss)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def off_by(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest expected element."""
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("policy_weight", [1e6, 1.0])  # next to 1e6 the gradients of the other terms would not show
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("m", "A", "N"), SIZES)
def test_parity(m: int, A: int, N: int, padded: bool, policy_weight: float, trimmed: bool) -> None:
    objective = QuietStarObjective(official=True, lookahead=A, thoughts_per_token=N, policy_weight=policy_weight)
    ours, our_gradients, theirs, their_gradients = both(thinker(m), objective, padded, trimmed)
    for term in ("base_nll", "mixed_nll", "policy", "loss"):
        assert off_by(getattr(theirs, term), getattr(ours, term)) <= 1e-12
    assert ours.policy != 0
    if not trimmed:  # an embedding of padding is never learned; a product with the table does not know that
        assert their_gradients[TABLE][PAD].any()
        assert not our_gradients[TABLE][PAD].any()
        their_gradients[TABLE][PAD] = 0
    for name, gradient in our_gradients.items():
        assert gradient.any(), name
        assert off_by(their_gradients[name], gradient) <= 1e-9, name


@pytest.mark.parametrize(
    "other", [{"relu": False}, {"baseline": "leave_one_out"}, {"over_steps": "sum"}, {"policy_temperature": 1.0}]
)
def test_another_objective_is_another_loss(other: dict[str, Any]) -> None:
    ours, _, theirs, _ = both(thinker(3), QuietStarObjective(official=True, **other))
    assert off_by(theirs.mixed_nll, ours.mixed_nll) <= 1e-12
    assert off_by(theirs.policy, ours.policy) > 1e-3


def test_our_own_means_are_others() -> None:
    released = {"baseline": "mean", "relu": True, "over_steps": "mean", "policy_temperature": 3.0}
    ours, _, theirs, _ = both(thinker(3), QuietStarObjective(**released), padded=True)
    for term in ("base_nll", "mixed_nll", "policy"):
        assert off_by(getattr(theirs, term), getattr(ours, term)) > 1e-3


def test_every_thought_token_counts() -> None:
    model, (ids, _) = thinker(3), texts(False)
    tokens = released_loss(model, ids).tokens
    assert tokens.shape == (2, 12, 2, 3)
    assert int(tokens.max()) < VOCABULARY  # START and END lie above
    before = released_loss(model, ids, tokens=tokens)
    for step in range(3):
        changed = tokens.clone()
        changed[1, 4, 1, step] = (changed[1, 4, 1, step] + 1) % VOCABULARY
        after = released_loss(model, ids, tokens=changed)
        assert after.base_nll == before.base_nll
        assert off_by(after.mixed_nll, before.mixed_nll) > 1e-6


@pytest.mark.parametrize("trimmed", [False, True])
def test_draws_follow_the_logits(trimmed: bool) -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, -1e10, 0.0])
    rows = 20000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = draw(logits.expand(2, rows // 2, -1), trimmed)
    assert drawn.shape == (2, rows // 2)
    law = logits.softmax(-1)
    error = (law * (1 - law) / rows).sqrt()
    assert ((drawn.flatten().bincount(minlength=5) / rows - law).abs() <= 4 * error).all()


def test_saved_memory_is_what_a_graph_holds() -> None:
    weight = torch.ones(256, 1024, requires_grad=True)  # 1 MiB
    x = torch.ones(512, 256, requires_grad=True)  # 0.5 MiB

    def forward() -> Tensor:
        out = x @ weight  # 2 MiB; saves x and the weight
        (out * out).sum()  # a graph that nothing keeps
        return (out.view(-1) * out.t().flatten()).sum()  # saves out, and its transposed copy

    assert saved_mib(forward, [weight]) == pytest.approx(0.5 + 2 + 2)
    assert saved_mib(forward, []) == pytest.approx(1.5 + 2 + 2)


def test_saved_memory_of_a_training_step() -> None:
    model = random_thinker("llama-1m", thought_tokens=9, official=True)
    objective = QuietStarObjective(official=True)

    def text(length: int) -> Tensor:
        return torch.randint(3, 2048, (1, length), generator=torch.Generator().manual_seed(0))

    def ours(length: int) -> float:
        return saved_mib(lambda: model.thinking_loss(text(length), objective=objective, seed=0), model.parameters())

    released = saved_mib(lambda: released_loss(model, text(128)), model.parameters())
    plain, half = ours(128), ours(64)
    assert released > 1.9 * plain
    assert plain == pytest.approx(2 * half, rel=0.05)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert released > 5 * ours(128)
