"""The losses of the no-thought stage equal slow ones and their own gradients, and refuse what they cannot mean."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import pyquiet.quiet_star.thinking
from pyquiet.quiet_star import distillation
from pyquiet.quiet_star.distillation import next_token_loss
from pyquiet.randomness import Drawn, Purpose, Stream, draw

from .architectures import build, explicit_logits
from .thinkers import assert_close, awake, linear_layers, padded, random_ids, thinker

OBJECTIVES = ["released", "paper", "kl", "advantage"]
TEXTS = [random_ids(1, length, seed=length)[0] for length in (8, 5, 2)]
IDS = torch.tensor([11, 3, 2**32 - 1])
SEED, N = 5, 2


def pair(name="llama", **changes):
    """A student, and a teacher with other weights."""
    student = build(name, seed=4, **changes)
    return student, thinker(name, m=2, **changes)


def laws(model, text, **options):
    """Log-probabilities [T - 1, V] of one text's next tokens, float64."""
    return model(text[None], **options).logits[0, :-1].double().log_softmax(-1)


def slow(student, teacher, texts, objective, ignored=()):
    """The objective, mean NLLs and the teacher's share, position by position, from texts without padding."""
    total, nlls, teacher_nlls, better, count = torch.zeros((), dtype=torch.float64), [], [], 0, 0
    for b, text in enumerate(texts):
        hidden = student.base_model(text[None]).last_hidden_state[0]
        with torch.no_grad():
            options = {"seed": SEED, "sequence_ids": IDS[b : b + 1], "thoughts_per_token": N}
            teacher_laws = laws(teacher, text, think="always", **options)
        for j in range(len(text) - 1):
            if (b, j + 1) in ignored:
                continue
            logits = explicit_logits(student, hidden[j])
            law = logits.log_softmax(-1)
            s, t = -law[text[j + 1]], -teacher_laws[j, text[j + 1]]
            gap = float(t - s)
            if objective == "advantage":
                term = max(0.0, -gap) * s
            elif objective == "paper":
                term = gap * s
            elif objective == "kl":
                term = sum(p.exp() * (p - q) for p, q in zip(teacher_laws[j].unbind(), law.unbind(), strict=True))
            else:
                stream = Stream(SEED, Purpose.ANSWER, sequence=int(IDS[b]), position=j)
                action = int(draw(logits.detach()[None], stream=stream).tokens)
                term = -max(0.0, gap) * (logits / 3).log_softmax(-1)[action]
            total, count = total + term, count + 1
            nlls.append(s)
            teacher_nlls.append(t)
            better += bool(t < s)
    return total / count, sum(nlls) / count, sum(teacher_nlls) / count, better / count


def fast(student, teacher, texts, objective, side="right", **options):
    ids, mask = padded(texts, side)
    options = {"seed": SEED, "sequence_ids": IDS[: len(texts)], "thoughts_per_token": N} | options
    return next_token_loss(student, ids, mask, ntp_objective=objective, teacher=teacher, **options)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_the_loss_equals_a_slow_one(name, objective):
    student, teacher = pair(name)
    expected, s, t, better = slow(student, teacher, TEXTS, objective)
    assert abs(float(expected)) > 1e-3
    assert 0 < better < 1
    expected_gradients = gradients(expected, student)
    for side in ("left", "right"):
        actual = fast(student, teacher, TEXTS, objective, side)
        assert_close(actual.distillation, expected, 1e-12)
        assert_close(actual.loss, expected, 1e-12)
        assert_close(torch.stack([actual.student_nll, actual.teacher_nll]), torch.stack([s, t]), 1e-12)
        assert_close(actual.teacher_better, torch.tensor(better), 1e-12)
        tolerance = 1e-10 if name in ("gpt2", "opt") else 1e-7  # RMS norms round to float32
        for one, other in zip(gradients(actual.loss, student), expected_gradients, strict=True):
            assert_close(one, other, tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_labels_padding_and_weights(objective):
    student, teacher = pair()
    ignored = {(0, 2), (0, 7), (1, 1)}
    ids, mask = padded(TEXTS, "left")
    labels = ids.masked_fill(mask == 0, -100)
    for b, column in ignored:
        labels[b, ids.shape[1] - len(TEXTS[b]) + column] = -100
    actual = fast(student, teacher, TEXTS, objective, "left", labels=labels, policy_weight=0.5, nll_weight=2.0)
    expected, s, t, _ = slow(student, teacher, TEXTS, objective, ignored)
    assert_close(actual.loss, 0.5 * expected + 2 * s, 1e-12)
    assert_close(actual.teacher_nll, t, 1e-12)
    assert int(actual.targets.sum()) == 9
    assert not actual.student_nlls[~actual.targets].any()
    assert not torch.isclose(actual.loss, fast(student, teacher, TEXTS, objective, "left").loss)

    other_padding = ids.masked_fill(mask == 0, 50)  # what stands at padding is nobody's business
    again = next_token_loss(
        student, other_padding, mask, labels.where(mask.bool(), 50), ntp_objective=objective, teacher=teacher,
        seed=SEED, sequence_ids=IDS, thoughts_per_token=N, policy_weight=0.5, nll_weight=2.0,
    )  # fmt: skip
    assert torch.equal(again.loss, actual.loss)


@pytest.mark.parametrize("objective", ["paper", "advantage"])
def test_gradients_are_finite_differences_with_frozen_rewards(objective):
    student, teacher = pair("gpt2")
    out = fast(student, teacher, TEXTS, objective)
    reward = out.teacher_nlls - out.student_nlls
    if objective == "advantage":
        reward = (-reward).clamp_min(0)
    generator = torch.Generator().manual_seed(0)
    for parameter, gradient in zip(student.parameters(), gradients(out.loss, student), strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                parameter += step * direction
                nlls = fast(student, None, TEXTS, objective, teacher_nlls=out.teacher_nlls).student_nlls
                values.append(float((reward * nlls).sum() / out.targets.sum()))
                parameter -= step * direction
        slope = (values[0] - values[1]) / 2e-5
        assert abs(slope - float((gradient * direction).sum())) < 1e-6 * max(1, abs(slope))
        assert abs(slope) > 1e-4


def test_each_objective_learns_where_it_says():
    """Signs: with a reward at a single position, which way its next token goes."""
    student, _ = pair()
    ids = TEXTS[0][None]
    own = next_token_loss(student, ids, teacher_nlls=torch.zeros(1, 7)).student_nlls
    for better, moves in ((True, {"paper": -1, "advantage": 1}), (False, {"paper": 1, "advantage": 0})):
        nlls = own.clone()
        nlls[0, 3] += -0.5 if better else 0.5
        for objective, sign in moves.items():
            loss = next_token_loss(student, ids, ntp_objective=objective, teacher_nlls=nlls).loss
            towards = [-x for x in gradients(loss, student)]
            nll = next_token_loss(student, ids, teacher_nlls=nlls).student_nlls[0, 3]
            student_nll = -student(ids).logits[0, 3].log_softmax(-1)[ids[0, 4]]
            assert_close(student_nll, nll, 1e-12)
            change = sum((x * y).sum() for x, y in zip(towards, gradients(student_nll, student), strict=True))
            assert int(change < 0) - int(change > 0) == sign


class OutputGradient:
    """The gradient of a loss with respect to the LM head's output, [R, V], where it is made in one chunk."""

    def __init__(self, student, make_loss):
        kept = []
        head = student.get_output_embeddings()
        handle = head.register_forward_hook(lambda _, inputs, output: kept.append(output))
        self.out = make_loss()
        handle.remove()
        (self.logits,) = kept
        (self.gradient,) = torch.autograd.grad(self.out.loss, kept)


def gaps_and_laws(student, ids, teacher_nlls):
    """t - s at each position of one text, [T - 1], and the student's laws p1 and p3, [T - 1, V]."""
    logits = student(ids).logits[0, :-1].detach()
    p1, p3 = logits.softmax(-1), (logits / 3).softmax(-1)
    nlls = -p1.log().gather(-1, ids[0, 1:, None])[:, 0]
    gap = teacher_nlls[0] - nlls
    return gap, p1, p3


def released_case():
    student = build("llama", seed=4, vocab_size=11)
    ids = random_ids(1, 6, seed=1) % 8 + 3
    nlls = torch.tensor([[0.1, 9.0, 4.0, 0.2, 6.0]], dtype=torch.float64)
    gap, p1, p3 = gaps_and_laws(student, ids, nlls)
    assert (gap > 0).any()
    assert (gap < 0).any()
    return student, ids, nlls, gap, p1, p3


def test_the_released_gradient_by_enumeration(monkeypatch):
    """Over all actions, the expected gradient is r+ (p3 - p1) / 3."""
    student, ids, nlls, gap, p1, p3 = released_case()
    expected = torch.zeros_like(p1)
    for action in range(11):
        tokens = torch.full((5,), action)
        monkeypatch.setattr(distillation, "draw", lambda logits, *, stream: Drawn(tokens, *[tokens.double()] * 2))  # noqa: B023
        case = OutputGradient(
            student, lambda: next_token_loss(student, ids, ntp_objective="released", teacher_nlls=nlls)
        )
        assert torch.equal(case.out.actions[0], tokens)
        expected += p1[:, action, None] * case.gradient
    assert_close(expected, gap.clamp_min(0)[:, None] * (p3 - p1) / 3 / 5, 1e-12)
    assert expected[gap > 0].any(-1).all()
    assert not expected[gap < 0].any()


def test_the_released_gradient_by_the_sampler():
    """The same over real draws, within 4 standard errors along random directions."""
    student, ids, nlls, gap, p1, p3 = released_case()
    copies = 3000
    rows, all_nlls = ids.expand(copies, -1), nlls.expand(copies, -1)
    case = OutputGradient(
        student,
        lambda: next_token_loss(student, rows, ntp_objective="released", teacher_nlls=all_nlls, seed=3),
    )
    each = case.gradient.view(copies, 5, 11) * (copies * 5)
    directions = torch.randn(8, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = torch.einsum("bjv,kjv->bk", each, directions)
    error = samples.std(0) / copies**0.5

    def distance(law):
        return ((samples.mean(0) - torch.einsum("jv,kjv->k", law, directions)) / error).abs().max()

    true = gap.clamp_min(0)[:, None] * (p3 - p1) / 3
    assert distance(true) < 4
    for wrong in (0 * true, -true, 3 * true, gap[:, None] * (p3 - p1) / 3):
        assert distance(wrong) > 8
    counts = torch.nn.functional.one_hot(case.out.actions, 11).double().mean(0)
    assert ((counts - p1).abs() < 4 * (p1 * (1 - p1) / copies).sqrt() + 1e-9).all()


def test_kl_of_a_student_that_is_the_teacher_is_zero():
    student, teacher = build("llama", seed=0), thinker(m=2)
    torch.nn.init.zeros_(linear_layers(teacher)[-1].weight)  # w = 0: the teacher is its base
    loss = fast(student, teacher, TEXTS, "kl").loss
    assert 0 <= float(loss) + 1e-14 < 1e-13
    assert max(float(x.abs().max()) for x in gradients(loss, student)) < 1e-13
    awake(teacher)
    loss = fast(student, teacher, TEXTS, "kl").loss
    assert float(loss) > 1e-3
    assert max(float(x.abs().max()) for x in gradients(loss, student)) > 1e-3


def test_the_gradient_of_kl_is_student_minus_teacher():
    student, teacher = pair()
    ids = TEXTS[0][None]
    case = OutputGradient(
        student, lambda: next_token_loss(student, ids, ntp_objective="kl", teacher=teacher, seed=SEED)
    )
    law = laws(teacher, TEXTS[0], think="always", seed=SEED).exp()
    assert_close(case.gradient, (case.logits.softmax(-1) - law) / 7, 1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_add_up(objective):
    student, teacher = pair()
    joint = fast(student, teacher, TEXTS, objective, nll_weight=0.3)
    parts = []
    for b, text in enumerate(TEXTS):
        options = {"sequence_ids": IDS[b : b + 1], "target_count": 12, "nll_weight": 0.3}
        parts.append(fast(student, teacher, [text], objective, **options))
    for name in ("loss", "distillation", "student_nll", "teacher_nll"):
        assert_close(sum(getattr(part, name) for part in parts), getattr(joint, name), 1e-12)
    summed = [sum(x) for x in zip(*(gradients(part.loss, student) for part in parts), strict=True)]
    for one, other in zip(summed, gradients(joint.loss, student), strict=True):
        assert_close(one, other, 1e-11)


def test_a_part_without_targets_is_zero_and_has_gradients():
    student, teacher = pair()
    for objective in OBJECTIVES:
        for ids in (random_ids(2, 4), random_ids(2, 1)):
            options = {"ntp_objective": objective, "teacher": teacher, "target_count": 5}
            out = next_token_loss(student, ids, labels=torch.full_like(ids, -100), **options)
            assert out.loss == 0
            assert not any(x.any() for x in torch.autograd.grad(out.loss, list(student.parameters())))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_change_nothing_and_keep_no_logits(objective, monkeypatch):
    student, teacher = pair()
    whole = fast(student, teacher, TEXTS, objective)
    expected = gradients(whole.loss, student)
    monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", 3 * 99 * (2 if objective == "kl" else 1))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(_logits_in(x)) or x, lambda x: x):
        chunked = fast(student, teacher, TEXTS, objective)
    assert sizes
    assert max(sizes) == 0
    assert_close(chunked.loss, whole.loss, 1e-13)
    for one, other in zip(gradients(chunked.loss, student), expected, strict=True):
        assert_close(one, other, 1e-12)


def _logits_in(x: Tensor) -> int:
    """Elements of a saved tensor that is made of rows of logits; weights of the vocabulary's size have width 64."""
    return x.numel() if x.shape[-1:] == (99,) else 0


def test_stored_nlls_are_the_online_teacher():
    """In float32, in which they are stored: to the last bit."""
    student, teacher = pair(dtype=torch.float32, attention="sdpa")
    for objective in ("released", "paper", "advantage"):
        online = fast(student, teacher, TEXTS, objective)
        stored = fast(student, None, TEXTS, objective, teacher_nlls=online.teacher_nlls)
        assert online.teacher_nlls.dtype == torch.float32
        assert torch.equal(online.loss, stored.loss)
        for one, other in zip(gradients(online.loss, student), gradients(stored.loss, student), strict=True):
            assert torch.equal(one, other)
        moved = fast(student, None, TEXTS, objective, teacher_nlls=online.teacher_nlls + 0.1)
        assert not torch.equal(moved.loss, stored.loss)


def test_nlls_come_before_the_teacher_but_for_kl():
    student, teacher = pair()
    nlls = torch.full((3, 7), 2.0)
    assert fast(student, teacher, TEXTS, "paper", teacher_nlls=nlls).teacher_nll == 2
    with_both = fast(student, teacher, TEXTS, "kl", teacher_nlls=nlls)
    assert torch.equal(with_both.teacher_nlls, fast(student, teacher, TEXTS, "kl").teacher_nlls)


def test_noise_is_addressed_and_the_teacher_left_alone():
    student, teacher = pair()
    teacher.train()
    state = torch.get_rng_state()
    out = fast(student, teacher, TEXTS, "released")
    assert torch.equal(torch.get_rng_state(), state)
    out.loss.backward()
    assert all(x.grad is None for x in teacher.parameters())
    assert all(module.training for module in teacher.modules())
    assert not torch.equal(fast(student, teacher, TEXTS, "released", seed=6).actions, out.actions)
    alone = fast(student, teacher, TEXTS[1:2], "released", sequence_ids=IDS[1:2])
    assert torch.equal(alone.actions[0], out.actions[1, :4])
    assert (out.actions >= 0).equal(out.targets)
    left = fast(student, teacher, TEXTS, "released", "left")
    assert torch.equal(left.actions[1, -4:], out.actions[1, :4])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_and_autocast(objective):
    """Losses are made in float32; a teacher beside an autocast student says what it says alone."""
    student, teacher = pair(dtype=torch.float32, attention="sdpa")
    exact = fast(student, teacher, TEXTS, objective)
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(student, teacher, TEXTS, objective)
    assert out.loss.dtype == out.student_nlls.dtype == torch.float32
    assert torch.equal(out.teacher_nlls, exact.teacher_nlls)
    assert 0 < (out.student_nlls - exact.student_nlls).abs().max() < 0.1
    half = fast(copy.deepcopy(student).to(torch.bfloat16), teacher, TEXTS, objective)
    assert half.loss.dtype == torch.float32
    assert (half.student_nlls - exact.student_nlls).abs().max() < 0.1


def test_the_teacher_is_asked_without_dropout():
    student, teacher = pair("gpt2", resid_pdrop=0.5)
    student.train()
    asleep = fast(student, teacher, TEXTS, "advantage").teacher_nlls
    again = fast(student, teacher.train(), TEXTS, "advantage")
    assert torch.equal(again.teacher_nlls, asleep)
    assert not torch.equal(fast(student, teacher, TEXTS, "advantage").student_nlls, again.student_nlls)


def test_a_thinking_student_learns_with_its_base():
    student, teacher = pair()
    thinking = awake(pyquiet.QuietStarForCausalLM.from_base(student, thought_tokens=1))
    assert torch.equal(fast(thinking, teacher, TEXTS, "kl").loss, fast(student, teacher, TEXTS, "kl").loss)


def test_bad_arguments():
    student, teacher = pair()
    ids = random_ids(2, 5)
    nlls = torch.zeros(2, 4)

    def refuses(message, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            next_token_loss(student, *(args or (ids,)), **options)

    refuses("ntp_objective must be one of released, paper, kl, advantage, got 'nll'", ntp_objective="nll")
    refuses("needs a teacher or its teacher_nlls")
    refuses("compares whole laws", ntp_objective="kl", teacher_nlls=nlls)
    refuses("must be a QuietStarForCausalLM, got LlamaForCausalLM", teacher=student, error=TypeError)
    refuses("predicts 101 tokens, the student 99", teacher=thinker(official=True))
    refuses(r"teacher_nlls must be \[B, T - 1\] = \[2, 4\], got \[2, 5\]", teacher_nlls=torch.zeros(2, 5))
    refuses("policy_weight must be a finite number of at least 0, got -1", teacher_nlls=nlls, policy_weight=-1)
    refuses("nll_weight must be a finite number of at least 0, got inf", teacher_nlls=nlls, nll_weight=torch.inf)
    refuses("thoughts_per_token must be at least 1", teacher=teacher, thoughts_per_token=0)
    refuses("sequence_ids must be int64 of shape", teacher_nlls=nlls, sequence_ids=torch.zeros(3, dtype=torch.int64))
    refuses("nothing to learn", ids[:, :1], teacher_nlls=nlls[:, :0])
    refuses("nothing to learn", labels=torch.full_like(ids, -100), teacher_nlls=nlls)
    refuses("labels must equal input_ids", labels=ids + 1, teacher_nlls=nlls)
    refuses("must lie in 0..98", ids + 99, teacher_nlls=nlls)
    refuses("row 1 hold NaN", teacher_nlls=torch.tensor([[0.0] * 4, [0.0, torch.nan, 0.0, 0.0]]))
    with pytest.raises(TypeError, match="must be a transformers causal LM, got Linear"):
        next_token_loss(torch.nn.Linear(1, 1), ids, teacher_nlls=nlls)
