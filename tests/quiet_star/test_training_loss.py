"""The training loss equals a slow reference, sees no future, and refuses what it cannot mean."""

from __future__ import annotations

import math

import pytest
import torch

from pyquiet import QuietStarObjective
from pyquiet.quiet_star.thinking import Text
from pyquiet.quiet_star.training import grade_thoughts

from . import loss_reference
from .architectures import EOS, PAD, VOCABULARY
from .thinkers import CallCounter, assert_close, linear_layers, other, padded, random_ids, thinker

TEXTS = [random_ids(1, length, seed=length)[0] for length in (8, 6)]


def right_columns(values, mask):
    """The entries of [B, C, ...] at tokens, in right-padded columns [B, C, ...]."""
    out = torch.zeros_like(values)
    for b, row in enumerate(mask.bool()):
        n = min(int(row.sum()), values.shape[1])
        first = int(row.long().argmax())
        out[b, : values.shape[1] - first] = values[b, first:][:n] if first else values[b]
    return out


def check(model, objective, texts=TEXTS, side="right", seed=3, tolerance=1e-12, labels=None):
    """The loss of the texts and everything it is made of equal the reference; returns both."""
    ids, mask = padded(texts, side)
    with torch.no_grad():
        targets = None if labels is None else padded(labels, side)[0]
        actual = model.thinking_loss(ids, mask, targets, objective=objective, seed=seed)
        tokens = right_columns(actual.tokens, mask)
        expected = loss_reference.loss_of(model, texts, tokens, objective, pad=model.config.pad_token_id, labels=labels)
    base, mixed, rewards = (right_columns(getattr(actual, x), mask) for x in ("base_nlls", "mixed_nlls", "rewards"))
    assert_close(
        torch.stack([base[k] for k in expected.base_nlls]), torch.stack([*expected.base_nlls.values()]), tolerance
    )
    assert_close(
        torch.stack([mixed[k] for k in expected.mixed_nlls]), torch.stack([*expected.mixed_nlls.values()]), tolerance
    )
    assert_close(
        torch.stack([rewards[k] for k in expected.rewards]),
        torch.tensor([*expected.rewards.values()], dtype=torch.float64),
        tolerance,
    )
    assert int((actual.base_nlls != 0).sum()) <= len(expected.base_nlls)  # and nothing at padding
    assert_close(actual.base_nll, expected.base, tolerance)
    assert_close(actual.mixed_nll, expected.mixed, tolerance)
    scale = max(1, abs(float(expected.loss)), abs(float(expected.policy)))
    assert_close(actual.policy / scale, expected.policy / scale, tolerance)
    assert_close(actual.loss / scale, expected.loss / scale, tolerance)
    return actual, expected


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "cohere", "llama_head12"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_architectures(name, side):
    check(thinker(name, m=2), QuietStarObjective(), side=side)


@pytest.mark.parametrize("m", [0, 1, 3])
@pytest.mark.parametrize("thoughts", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [1, 4])
def test_sizes(m, thoughts, lookahead):
    check(thinker(m=m), QuietStarObjective(thoughts_per_token=thoughts, lookahead=lookahead))


@pytest.mark.parametrize(
    "options",
    [
        {"baseline": "mean"},
        {"relu": True},
        {"over_steps": "mean"},
        {"policy_temperature": 2.5},
        {"policy_weight": 0.3, "base_weight": 0.2, "mixed_weight": 1.5},
        {"policy_weight": 10.0, "baseline": "mean", "relu": True, "over_steps": "mean", "thoughts_per_token": 3},
    ],
    ids=str,
)
def test_options(options):
    plain, _ = check(thinker(m=2), QuietStarObjective(thoughts_per_token=options.get("thoughts_per_token", 2)))
    changed, _ = check(thinker(m=2), QuietStarObjective(**options))
    assert not torch.isclose(plain.loss, changed.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m", "lookahead", "thoughts"), [(5, 4, 2), (3, 3, 3), (5, 1, 2)])
@pytest.mark.parametrize("official_vocabulary", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_released_loss(m, lookahead, thoughts, official_vocabulary, side):
    objective = QuietStarObjective(official=True, thoughts_per_token=thoughts, lookahead=lookahead)
    assert (objective.policy_weight, objective.policy_temperature) == (1e6, 3)
    texts = [TEXTS[0], TEXTS[1].clone()]
    texts[1][2] = PAD  # a real token that looks like padding, which the release does not learn
    actual, _ = check(thinker(m=m, official=official_vocabulary), objective, texts, side)
    column = 1 if side == "right" else 3
    assert actual.base_nlls[1, column] == 0
    assert actual.policy != 0
    ours, _ = check(thinker(m=m, official=official_vocabulary), QuietStarObjective(lookahead=lookahead), texts, side)
    assert ours.base_nlls[1, column] != 0
    assert ours.base_nll != actual.base_nll


def test_the_released_loss_with_options_of_ours():
    check(thinker(m=2), QuietStarObjective(official=True, policy_weight=1.0, relu=False, policy_temperature=1.0))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "llama_head12"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32(name, attention):
    model = thinker(name, m=2, dtype=torch.float32, attention=attention)
    check(model, QuietStarObjective(), side="left", tolerance=1e-5)


def test_a_fresh_head_gives_the_loss_of_the_base():
    """w = 0: the thoughts change nothing, so they earn nothing and START and END learn nothing."""
    model, ids = thinker(m=2), random_ids(2, 8)
    torch.nn.init.zeros_(linear_layers(model)[-1].weight)
    for objective in (QuietStarObjective(lookahead=1), QuietStarObjective(lookahead=1, official=True)):
        out = model.thinking_loss(ids, objective=objective, seed=0)
        expected = torch.nn.functional.cross_entropy(model.base(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert_close(out.loss, expected, 1e-12)
        assert torch.equal(out.base_nlls[..., None, None].expand_as(out.mixed_nlls), out.mixed_nlls)
        assert not out.rewards.any()
        assert out.policy == out.reward == out.weight_mean == 0
    out = model.thinking_loss(ids, seed=0)
    assert not out.rewards.any()
    out.loss.backward()
    assert not model.start_embedding.grad.any()
    assert not model.end_embedding.grad.any()
    assert model.base.get_input_embeddings().weight.grad.any()
    assert linear_layers(model)[-1].weight.grad.any()


@torch.no_grad()
def test_the_loss_sees_no_future():
    model, ids, j, objective = thinker("mistral", m=2), random_ids(1, 9), 5, QuietStarObjective(lookahead=3)
    changed = ids.clone()
    changed[0, j] = other(ids)[0, j]
    first, second = (model.thinking_loss(x, objective=objective, seed=0) for x in (ids, changed))
    for c in range(8):
        same = torch.equal(first.tokens[0, c], second.tokens[0, c])
        assert same or c >= j
        assert (c + 1 >= j) != torch.equal(first.base_nlls[0, c], second.base_nlls[0, c])
        for s in range(3):
            if c + 1 + s < 9:
                same = torch.equal(first.mixed_nlls[0, c, :, s], second.mixed_nlls[0, c, :, s])
                assert (c + 1 + s >= j) != same


@torch.no_grad()
def test_a_thought_reaches_no_other():
    model, ids, objective = thinker(m=2), random_ids(1, 6), QuietStarObjective(lookahead=2)
    text, tokens = Text.of(ids, None), random_ids(10, 2).view(1, 5, 2, 2)
    changed = tokens.clone()
    changed[0, 2, 1, 0] = other(tokens)[0, 2, 1, 0]
    first, second = (grade_thoughts(model, ids, text, x, objective) for x in (tokens, changed))
    assert torch.equal(first.base, second.base)
    for name in ("mixed", "weight", "thoughts"):
        differs = (getattr(first, name) != getattr(second, name)).any(-1)[0]  # [C, N]
        assert differs.nonzero().tolist() == [[2, 1]]


def test_the_thoughts_are_those_of_a_text():
    """The same seed draws what `think_at_every_token` draws; NLLs, weights and the entropy's estimate agree."""
    model, (ids, mask) = thinker(m=3), padded(TEXTS, "left")
    numbers = torch.tensor([4, 9])
    out = model.thinking_loss(ids, mask, seed=5, sequence_ids=numbers)
    there = model.think_at_every_token(ids, mask, seed=5, sequence_ids=numbers, thoughts_per_token=2)
    assert torch.equal(out.tokens, there.tokens[:, :-1])
    assert_close(-out.mixed_nlls[..., 0], there.mixed_log_probs, 1e-12)
    assert_close(-out.base_nlls, there.base_log_probs, 1e-12)
    drawn = there.log_probs[:, :-1][mask[:, :-1].bool()]
    assert_close(out.thought_entropy, -drawn.mean(), 1e-12)
    assert not torch.equal(model.thinking_loss(ids, mask, seed=6).tokens, out.tokens)
    before = torch.get_rng_state()
    assert torch.equal(model.thinking_loss(ids, mask, seed=5, sequence_ids=numbers).loss, out.loss)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert not torch.equal(model.thinking_loss(ids).loss, model.thinking_loss(ids).loss)


def test_statistics_of_the_weight():
    model, ids = thinker(m=2), random_ids(1, 7)
    out = model.thinking_loss(ids, objective=QuietStarObjective(lookahead=1), seed=0)
    weight = model.think_at_every_token(ids, seed=0, thoughts_per_token=2).weight[:, :-1]
    assert_close(out.weight_mean, weight.mean(), 1e-12)
    assert_close(out.weight_std, weight.std(correction=0), 1e-12)
    assert_close(out.reward, out.rewards.mean(), 1e-12)


def test_the_end_of_a_text_is_a_target_and_padding_is_not():
    """With pad = eos too: what is padding says the mask, not the id."""
    model = thinker(m=1)
    model.config.pad_token_id = EOS
    text = TEXTS[0].clone()
    text[-1] = EOS
    alone = model.thinking_loss(text[None], seed=1)
    assert alone.base_nlls.shape == (1, 7)
    assert alone.base_nlls[0, -1] > 0
    for side in ("left", "right"):
        (ids, mask), columns = (
            padded([text, random_ids(1, 12)[0]], side),
            slice(0, 7) if side == "right" else slice(4, 11),
        )
        batch = model.thinking_loss(ids, mask, seed=1)
        assert_close(batch.mixed_nlls[0, columns], alone.mixed_nlls[0], 1e-12)
        assert_close(batch.rewards[0, columns], alone.rewards[0], 1e-12)
        assert (batch.base_nlls[0] != 0).sum() == 7


def test_losses_of_parts_add_up():
    model, objective = thinker(m=2), QuietStarObjective()
    ids, mask = padded([*TEXTS, random_ids(1, 3, seed=9)[0]], "right")
    counts = objective.target_counts(ids, mask)
    assert counts.tolist() == [7 + 5 + 2, 6 + 4 + 1, 5 + 3, 4 + 2, 4 + 2]
    options = {"objective": objective, "seed": 0}
    numbers = torch.arange(3)
    whole = model.thinking_loss(ids, mask, **options)
    parts = [
        model.thinking_loss(ids[b], mask[b], sequence_ids=numbers[b], target_counts=counts, **options)
        for b in (slice(0, 1), slice(1, 2), slice(2, 3))
    ]
    assert_close(sum(p.loss for p in parts), whole.loss, 1e-12)
    assert_close(sum(p.policy for p in parts), whole.policy, 1e-12)
    with pytest.raises(ValueError, match="target_counts"):
        model.thinking_loss(ids, objective=QuietStarObjective(official=True), target_counts=counts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("lookahead", [1, 3])
def test_only_labels_are_predicted(side, official, lookahead):
    labels = [text.clone() for text in TEXTS]
    labels[0][[1, 2, 6]] = -100
    labels[1][:4] = -100  # a window of three without anything to predict
    objective = QuietStarObjective(official=official, lookahead=lookahead)
    masked, expected = check(thinker(m=2), objective, side=side, labels=labels)
    whole, _ = check(thinker(m=2), objective, side=side)
    assert abs(masked.loss - whole.loss) > 1e-4
    assert int((masked.base_nlls != 0).sum()) == 7 - 3 + 5 - 3
    if not official:
        ids, mask = padded(TEXTS, side)
        counts = objective.target_counts(ids, mask, padded(labels, side)[0])
        assert counts[:lookahead].tolist() == [
            sum(k[3] == s and k[2] == 0 for k in expected.mixed_nlls) for s in range(lookahead)
        ]
        assert counts[lookahead] == len(expected.rewards) / 2


def test_labels_that_are_not_the_texts():
    model, ids = thinker(m=1), random_ids(2, 6)
    for labels, match in (
        (other(ids), "must equal input_ids"),
        (ids[:1], "shape"),
        (ids.clone().fill_(-100), "nothing"),
    ):
        with pytest.raises(ValueError, match=rf"labels.*{match}"):
            model.thinking_loss(ids, labels=labels)


def test_forward_with_an_objective_is_the_loss():
    model, ids, objective = thinker(m=2), random_ids(2, 7), QuietStarObjective(lookahead=2)
    labels = ids.clone()
    labels[0, :3] = -100
    options = {"objective": objective, "seed": 5, "sequence_ids": torch.tensor([4, 2])}
    out, expected = model(ids, labels=labels, **options), model.thinking_loss(ids, None, labels, **options)
    assert torch.equal(out.loss, expected.loss)
    assert out.loss.requires_grad


@pytest.mark.parametrize("m", [0, 3])
def test_forwards_of_the_base(m):
    """The text, m for the thoughts, one packed; nothing but the last when there is nothing to draw."""
    model = thinker(m=m)
    with CallCounter(model) as counter:
        model.thinking_loss(random_ids(1, 7), seed=0)
    assert counter.calls == (m + 2 if m else 1)


def test_dropout_is_off_for_the_thoughts_alone():
    model, ids = thinker("gpt2", m=3, resid_pdrop=0.5, embd_pdrop=0.5), random_ids(2, 7)
    quiet = model.thinking_loss(ids, seed=0)
    model.train()
    loud = model.thinking_loss(ids, seed=0)
    assert torch.equal(quiet.tokens, loud.tokens)
    assert abs(quiet.base_nll - loud.base_nll) > 1e-3
    assert all(module.training for module in model.modules())


def test_a_text_that_fills_the_context():
    model = thinker("gpt2", m=2, max_position_embeddings=12)  # a table of positions: one too far is an error
    out = model.thinking_loss(random_ids(1, 8), objective=QuietStarObjective(lookahead=6), seed=0)
    assert out.loss.isfinite()
    with pytest.raises(ValueError, match="context"):
        model.thinking_loss(random_ids(1, 9), seed=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lookahead": 0}, "lookahead"),
        ({"thoughts_per_token": 0}, "thoughts_per_token"),
        ({"policy_temperature": 0.0}, "policy_temperature"),
        ({"policy_temperature": -1.0}, "policy_temperature"),
        ({"policy_temperature": math.inf}, "policy_temperature"),
        ({"policy_weight": -1.0}, "policy_weight"),
        ({"base_weight": math.nan}, "base_weight"),
        ({"baseline": "median"}, "baseline"),
        ({"over_steps": "max"}, "over_steps"),
    ],
    ids=str,
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        QuietStarObjective(**options)
    with pytest.raises(TypeError, match="lookahead"):
        QuietStarObjective(lookahead=2.0)


def test_bad_input():
    model = thinker(m=2)
    with pytest.raises(ValueError, match=r"too short.*4 tokens.*at least 5"):
        model.thinking_loss(random_ids(2, 4))
    assert model.thinking_loss(random_ids(2, 5)).loss.isfinite()
    with pytest.raises(ValueError, match=r"too short.*5 tokens.*at least 6"):
        model.thinking_loss(random_ids(2, 5), objective=QuietStarObjective(official=True))
    with pytest.raises(ValueError, match="too short"):
        model.thinking_loss(random_ids(2, 1), objective=QuietStarObjective(lookahead=1))
    with pytest.raises(ValueError, match="attention_mask row 1"):
        model.thinking_loss(random_ids(2, 6), torch.tensor([[1] * 6, [1, 0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="input_ids"):
        model.thinking_loss(random_ids(2, 6) + VOCABULARY)
    with pytest.raises(ValueError, match="sequence_ids"):
        model.thinking_loss(random_ids(2, 6), sequence_ids=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("where", ["base", "mixing_head"])
def test_nan_is_named(where):
    model = thinker(m=2)
    with torch.no_grad():
        weights = {"base": model.base.get_output_embeddings().weight, "mixing_head": linear_layers(model)[0].weight}
        weights[where][3] = math.nan
    with pytest.raises(ValueError, match=r"(?i)row \d.* nan"):
        model.thinking_loss(random_ids(2, 6), seed=0)


def test_a_single_thought_has_the_base_for_a_baseline():
    model, ids = thinker(m=2), random_ids(1, 7)
    single = QuietStarObjective(thoughts_per_token=1)
    assert single.baseline == "leave_one_out"
    out = model.thinking_loss(ids, objective=single, seed=0)
    assert torch.equal(single.advantages(out.rewards), out.rewards)
    assert out.rewards.any()
