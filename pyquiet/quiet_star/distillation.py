"""Distilling thoughts away: a model that answers at once learns from what a thinking one predicts.

The no-thought (NTP) stage of Fast Quiet-STaR (arXiv 2505.17746) with four objectives. The student's LM head runs a
chunk of positions at a time and once more in the backward pass, so that logits of the whole batch never exist.

Letters: B batch, T text positions, C = T - 1 positions with a next token, R of these that are targets, V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyquiet.checks import check_weight, check_word
from pyquiet.heads import embedding_table, finish_logits, head_weight, log_prob
from pyquiet.quiet_star.adapters import unwrapped
from pyquiet.quiet_star.inputs import check_inputs, check_labels, check_no_nan, check_positions
from pyquiet.quiet_star.modeling import QuietStarForCausalLM
from pyquiet.quiet_star.objective import next_token_targets
from pyquiet.quiet_star.thinking import Text, ThoughtOptions, average
from pyquiet.quiet_star.training import chunk_size, recomputed, without_dropout
from pyquiet.randomness import Purpose, Stream, draw

NtpObjective = Literal["released", "paper", "kl", "advantage"]

_RELEASED_TEMPERATURE = 3.0
_Grade = Callable[..., tuple[Tensor, ...]]


@dataclass
class NextTokenLoss:
    """A loss and what went into it; only `loss` carries a gradient. Means are over targets, 0 stands elsewhere."""

    loss: Tensor  # []
    distillation: Tensor  # [] the objective's term, without its weight
    student_nll: Tensor  # []
    teacher_nll: Tensor  # []
    teacher_better: Tensor  # [] share of targets to which the teacher gives more probability
    targets: Tensor  # bool [B, C]
    student_nlls: Tensor  # [B, C]
    teacher_nlls: Tensor  # [B, C]
    actions: Tensor | None  # int64 [B, C], what the student drew for "released"; -1 where there is no target


def next_token_loss(
    student: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    ntp_objective: NtpObjective = "advantage",
    teacher: QuietStarForCausalLM | None = None,
    teacher_nlls: Tensor | None = None,
    policy_weight: float = 1.0,
    nll_weight: float = 0.0,
    thoughts_per_token: int | None = None,
    seed: int | None = None,
    sequence_ids: Tensor | None = None,
    target_count: Tensor | int | None = None,
) -> NextTokenLoss:
    """The loss of a student that predicts x_{j+1} at once, against a teacher that thinks first.

    With s = NLL of the next token under the student, t under the teacher, and [.] held constant, it is policy_weight
    times the mean over targets of the objective, plus nll_weight * mean s. The objective is

    - "advantage": [max(0, s - t)] s. The next token is learned where the teacher is better, as far as it is better.
    - "kl": KL(teacher || student) over the whole vocabulary, thoughts averaged in probability.
    - "paper": [t - s] s, that is -r log p with r = t - s, as documented. Unclamped: where the teacher is better the
      weight is negative and the student is pushed away from the true token. Kept as it stands.
    - "released": -[max(0, t - s)] log p_3(a), the released code's: a is drawn from the student, p_3 is the student at
      temperature 3 and policy_weight is 1e6. The reward knows nothing of a, so the expected gradient on the logits is
      [max(0, t - s)] (p_3 - p_1) / 3: the student sharpens itself where it already is the better one.

    Args:
        student: any causal LM of transformers; of a thinking model its base; in PEFT's wrapping too.
        input_ids: int64 [B, T]. attention_mask: [B, T], 0 at padding, which may lie on either side.
        labels: int64 [B, T], -100 at tokens that are not to be predicted, elsewhere input_ids; None predicts all.
        teacher: runs without gradient, dropout and autocast; only "kl" needs it. teacher_nlls: float [B, C], its NLLs
            in nats (`teacher_nlls`), read at targets. One of both must be given; but for "kl", the NLLs come first.
        thoughts_per_token: N of the teacher; None is its configuration's.
        seed, sequence_ids: of the teacher's thoughts and the drawn action, as in `think_at_every_token`.
        target_count: targets of a joint batch that this one is a part of; the losses of its parts then add up to its
            own. None counts this batch alone.

    Returns:
        `NextTokenLoss`, in float32 (float64 for a float64 student).

    Raises:
        ValueError, TypeError: an option is out of range; no teacher, or one with another vocabulary; inputs as for
            `think_at_every_token`; labels that are not the text's; nothing to predict; a NaN.
    """
    student = answering_model(student)
    _check_options(student, ntp_objective, teacher, teacher_nlls, policy_weight, nll_weight)
    _check_texts(student, input_ids, attention_mask, labels, teacher_nlls)
    checked = ThoughtOptions.checked(1, len(input_ids), seed, thoughts_per_token, 1.0, None, None, sequence_ids)
    options = (checked.seed, thoughts_per_token, 1.0, None, None, sequence_ids)
    text = Text.of(input_ids, attention_mask)
    targets = next_token_targets(input_ids, attention_mask, labels)
    if target_count is None and not targets.any():
        raise ValueError("input_ids: no text has a second token that labels let be predicted: nothing to learn")

    more: tuple[Tensor, ...] = ()
    grade: _Grade = _nothing
    copies = 1
    if ntp_objective == "kl":
        assert teacher is not None
        more = _thoughts(teacher, input_ids, attention_mask, options, targets)
        copies, grade = 1 + more[1].shape[1], _divergence(teacher)
    elif teacher_nlls is None:
        assert teacher is not None
        teacher_nlls = mixed_nlls(teacher, input_ids, attention_mask, options)
    if ntp_objective == "released":
        more, grade = _addresses(text, targets, checked), _sampled(checked.seed)
    rows = _hidden(student, input_ids, text)[:, :-1][targets]  # [R, d]
    s, *graded = _graded(student, rows, input_ids[:, 1:][targets], grade, more, copies)
    t = graded[1] if ntp_objective == "kl" or teacher_nlls is None else teacher_nlls[targets].to(s)
    losses = _losses(ntp_objective, s, t, graded)

    student_nlls, teacher_nlls = _spread(s, targets), _spread(t, targets)
    check_no_nan(student_nlls, teacher_nlls)
    count = torch.as_tensor(len(s) if target_count is None else target_count, device=s.device).clamp_min(1)
    distillation, nll = losses.sum() / count, s.sum() / count
    return NextTokenLoss(
        loss=policy_weight * distillation + nll_weight * nll,
        distillation=distillation.detach(),
        student_nll=nll.detach(),
        teacher_nll=t.sum() / count,
        teacher_better=(t < s).sum() / count,
        targets=targets,
        student_nlls=student_nlls,
        teacher_nlls=teacher_nlls,
        actions=_spread(graded[1], targets, -1) if ntp_objective == "released" else None,
    )


def _spread(values: Tensor, targets: Tensor, fill: int = 0) -> Tensor:
    """Values [R] of the targets, without gradient, at their places in [B, C]; `fill` elsewhere."""
    out = values.new_full(targets.shape, fill)
    out[targets] = values.detach()
    return out


def _losses(ntp_objective: NtpObjective, s: Tensor, t: Tensor, graded: list[Tensor]) -> Tensor:
    """The objective at each target, [R], from NLLs of student and teacher and what was graded beside them."""
    gap = s.detach() - t
    if ntp_objective == "advantage":
        return gap.clamp_min(0) * s
    if ntp_objective == "paper":
        return -gap * s
    return (-gap).clamp_min(0) * graded[0] if ntp_objective == "released" else graded[0]


def answering_model(model: Any) -> PreTrainedModel:
    """The causal LM that answers without thoughts: the base of a thinking model, out of PEFT's wrapping."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"the student must be a transformers causal LM, got {type(inner).__name__}")
    return inner.base if isinstance(inner, QuietStarForCausalLM) else inner


def _check_options(
    student: PreTrainedModel,
    ntp_objective: str,
    teacher: QuietStarForCausalLM | None,
    teacher_nlls: Tensor | None,
    policy_weight: float,
    nll_weight: float,
) -> None:
    check_objective(ntp_objective, policy_weight, nll_weight)
    if teacher is None and (teacher_nlls is None or ntp_objective == "kl"):
        need = 'a teacher: "kl" compares whole laws' if ntp_objective == "kl" else "a teacher or its teacher_nlls"
        raise ValueError(f"teacher is None: ntp_objective={ntp_objective!r} needs {need}")
    if teacher is None:
        return
    if not isinstance(teacher, QuietStarForCausalLM):
        raise TypeError(f"teacher must be a QuietStarForCausalLM, got {type(teacher).__name__}")
    if teacher.logits_size != (size := head_weight(student).shape[0]):
        raise ValueError(
            f"teacher predicts {teacher.logits_size} tokens, the student {size}; both must share one vocabulary"
        )


def _check_texts(
    student: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    teacher_nlls: Tensor | None,
) -> None:
    check_inputs(input_ids, attention_mask, embedding_table(student).shape[0])
    check_labels(labels, input_ids, some=False)
    if teacher_nlls is not None and teacher_nlls.shape != input_ids[:, 1:].shape:
        raise ValueError(
            f"teacher_nlls must be [B, T - 1] = {list(input_ids[:, 1:].shape)}, got {list(teacher_nlls.shape)}"
        )


def check_objective(ntp_objective: str, policy_weight: float, nll_weight: float) -> None:
    """Raises ValueError unless the objective is one of the four and the weights are finite and not negative."""
    check_word("ntp_objective", ntp_objective, NtpObjective)
    check_weight("policy_weight", policy_weight)
    check_weight("nll_weight", nll_weight)


# -- the student


def _hidden(student: PreTrainedModel, input_ids: Tensor, text: Text) -> Tensor:
    """Final-norm hidden states [B, T, d] of one ordinary forward."""
    network, padding = student.base_model, {}
    if text.mask is not None:
        padding["attention_mask"] = text.mask.long()
        if "position_ids" in inspect.signature(network.forward).parameters:
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            padding["position_ids"] = text.positions(columns)
    hidden: Tensor = network(input_ids=input_ids, use_cache=False, **padding).last_hidden_state
    return hidden


def _graded(
    student: PreTrainedModel,
    rows: Tensor,
    tokens: Tensor,
    grade: _Grade,
    more: tuple[Tensor, ...],
    copies: int,
) -> list[Tensor]:
    """NLLs [R] of `tokens` after hidden states `rows` [R, d], and what `grade(logits, tokens, *more)` makes of each.

    `copies` is how many rows of logits one position takes.
    """
    size = chunk_size(max(1, len(rows)), copies * head_weight(student).shape[0])

    def graded(part: Tensor, tokens: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        raw = student.get_output_embeddings()(part)
        logits = finish_logits(student, raw.to(torch.promote_types(raw.dtype, torch.float32)))
        return -log_prob(logits, tokens), *grade(logits, tokens, *more)

    pieces = zip(*(x.split(size) for x in (rows, tokens, *more)), strict=True)
    parts = [recomputed(graded, *piece) for piece in pieces]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _nothing(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    return ()


def _sampled(seed: int) -> _Grade:
    """Grades an action drawn from the student: its -log p_3, and the action."""

    def grade(logits: Tensor, tokens: Tensor, sequence: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        action = draw(logits, stream=Stream(seed, Purpose.ANSWER, sequence=sequence, position=position)).tokens
        return -log_prob(logits / _RELEASED_TEMPERATURE, action), action

    return grade


def _divergence(teacher: QuietStarForCausalLM) -> _Grade:
    """Grades the student's law: the teacher's divergence from it, and the teacher's NLL of the token."""

    def grade(logits: Tensor, tokens: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        law = _mixed_log_probs(teacher, *states).to(logits)
        return (law.exp() * (law - logits.log_softmax(-1))).sum(-1), -law.gather(-1, tokens[:, None])[:, 0]

    return grade


def _addresses(text: Text, targets: Tensor, options: ThoughtOptions) -> tuple[Tensor, Tensor]:
    """Sequence id and position without padding, int64 [R], of each target's noise."""
    B, C = targets.shape
    ids = torch.arange(B) if options.sequence_ids is None else options.sequence_ids
    places = torch.arange(C, device=targets.device) - text.start[:, None]
    return ids.to(targets.device)[:, None].expand(B, C)[targets], places[targets]


# -- the teacher


@torch.no_grad()
def _thoughts(
    teacher: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: tuple[Any, ...],
    targets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [R, d] of the text, [R, N, d] of END after its thoughts, and the thoughts' weights [R, N]."""
    with without_dropout(teacher), torch.autocast(input_ids.device.type, enabled=False):
        text, checked = teacher._prepare(input_ids, attention_mask, options)
        C = targets.shape[1]
        columns = check_positions(None, input_ids)[:, : max(1, C)]  # a base reads no row of nothing
        hidden, round_ = teacher._think_after(columns, input_ids, text, checked)
        hidden, end_hidden = hidden[:, :C][targets], round_.end_hidden[:, :C][targets]
        return hidden, end_hidden, teacher.mix(hidden, end_hidden)


@torch.no_grad()
def _mixed_log_probs(teacher: QuietStarForCausalLM, hidden: Tensor, end_hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-probabilities [R, V] of the next token, thoughts averaged in probability."""
    with torch.autocast(hidden.device.type, enabled=False):
        return average(teacher.mixed_logits(teacher.raw_logits(hidden), end_hidden, weight)).log_softmax(-1)


@torch.no_grad()
def mixed_nlls(
    teacher: QuietStarForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """NLLs [B, C] of the next tokens, 0 at padding; labels have no say, so that every use gets the same bits."""
    targets = next_token_targets(input_ids, attention_mask)
    states = _thoughts(teacher, input_ids, attention_mask, options, targets)
    tokens = input_ids[:, 1:][targets]
    size = chunk_size(max(1, len(tokens)), (1 + states[1].shape[1]) * teacher.logits_size)
    pieces = zip(*(x.split(size) for x in (tokens, *states)), strict=True)
    nlls = [-_mixed_log_probs(teacher, *part).gather(-1, token[:, None])[:, 0] for token, *part in pieces]
    return _spread(torch.cat(nlls), targets)
