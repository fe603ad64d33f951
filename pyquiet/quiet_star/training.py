"""One training step's loss in two phases: thoughts are drawn without gradient, then one packed pass grades them.

The packed pass reads text and all paths START, t_1 .. t_m, END, A - 1 true tokens in one forward of the base, without a
cache, so that activation checkpointing works; N thoughts share the text. The LM head runs a chunk of positions at a
time and once more in the backward pass, so that logits of the whole batch never exist.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyquiet.heads import log_prob
from pyquiet.quiet_star.configuration import QuietStarConfig
from pyquiet.quiet_star.inputs import check_labels, check_lookahead
from pyquiet.quiet_star.objective import LogProbs, QuietStarObjective, ThinkingLoss, after, combine
from pyquiet.quiet_star.thinking import Text, Thinker, ThoughtOptions, chunks, drawable
from pyquiet.quiet_star.thoughts import ThoughtLayout, run_rows

if TYPE_CHECKING:
    from pyquiet.quiet_star.modeling import QuietStarForCausalLM


class ThinkingTraining:
    """The training loss of a thinking model."""

    def thinking_loss(  # type: ignore[misc]  # self is what this is mixed into
        self: "QuietStarForCausalLM",
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        objective: QuietStarObjective | None = None,
        seed: int | None = None,
        sequence_ids: Tensor | None = None,
        target_counts: Tensor | None = None,
        may_be_empty: bool = False,
    ) -> ThinkingLoss:
        """The Quiet-STaR loss of a batch of texts, with gradients for the base, START, END and the mixing head.

        Args:
            input_ids: int64 [B, T]. attention_mask: [B, T], 0 at padding, which may lie on either side; every token it
                does not exclude is a target, the end of a text too.
            labels: int64 [B, T], -100 at tokens that are not to be predicted, elsewhere input_ids; None predicts all.
            objective: None is `QuietStarObjective()`.
            seed: of the thoughts; None takes one from torch's generator. sequence_ids: int64 [B]; None numbers the
                rows. A thought depends on both and its place, as in `think_at_every_token`; dropout is off for it.
            target_counts: `objective.target_counts` of a joint batch that this one is a part of; the losses of its
                parts then add up to its own. None counts this batch alone.
            may_be_empty: a batch without anything to predict, or to reward, has that term 0 instead of an error.

        Returns:
            `ThinkingLoss`; call `.loss.backward()`. Where attention is native, memory is linear in T.

        Raises:
            ValueError, TypeError: as `think_at_every_token`; also labels that are not the text's, a NaN, or nothing
                to learn: no text is longer than the lookahead.
        """
        objective = objective or QuietStarObjective()
        text, options = self._prepare(
            input_ids, attention_mask, (seed, objective.thoughts_per_token, 1.0, None, None, sequence_ids)
        )
        may_be_empty = may_be_empty or target_counts is not None
        check_labels(labels, input_ids, some=not may_be_empty)
        if not may_be_empty:
            check_lookahead(text.length, objective.lookahead + objective.official, objective.lookahead)
        if target_counts is not None and objective.official:
            raise ValueError("target_counts: the official means are over non-zero losses, which nobody can count ahead")
        tokens, drawn_log_probs = draw_thoughts(self, input_ids, text, options)
        return combine(
            objective,
            grade_thoughts(self, input_ids, text, tokens, objective),
            input_ids,
            text.mask,
            tokens=tokens,
            drawn_log_probs=drawn_log_probs,
            labels=labels,
            pad_token_id=_pad_id(self.config),
            target_counts=target_counts,
        )


@torch.no_grad()
def draw_thoughts(
    model: "QuietStarForCausalLM", input_ids: Tensor, text: Text, options: ThoughtOptions
) -> tuple[Tensor, Tensor]:
    """Phase one: tokens and their log-probabilities [B, C, N, m] of thoughts at all positions but the last."""
    B, T = input_ids.shape
    limits = torch.arange(1, T, device=input_ids.device).expand(B, T - 1)
    if not model.config.thought_tokens:
        empty = limits.new_empty(B, T - 1, options.thoughts, 0)
        return empty, empty.to(torch.float32)
    with without_dropout(model):
        thinker = Thinker(model, text, options)
        thinker.read(input_ids)
        round_ = thinker.think(limits, tokens_only=True)
    return round_.tokens, round_.log_probs


def grade_thoughts(
    model: "QuietStarForCausalLM", input_ids: Tensor, text: Text, tokens: Tensor, objective: QuietStarObjective
) -> LogProbs:
    """Phase two, with gradients: log-probabilities of the texts [B, T] and of their thoughts `tokens` [B, C, N, m]."""
    hidden, paths = _packed_pass(model, input_ids, text, tokens, objective.lookahead)
    m, A = tokens.shape[3], objective.lookahead
    opening, _, talk = paths.split([m, 1, A], 3)  # the rows that predict thought tokens, the last of these, END and on
    base, mixed, weight = _talk(model, hidden, talk, after(input_ids, A))
    thoughts = None
    if m and objective.policy_weight:
        thoughts = _policy(model, opening, tokens, objective.policy_temperature)
    return LogProbs(base, mixed, weight, thoughts)


def _packed_pass(
    model: "QuietStarForCausalLM", input_ids: Tensor, text: Text, tokens: Tensor, A: int
) -> tuple[Tensor, Tensor]:
    """Final-norm hidden states of the text [B, T, d] and of the paths [B, C, N, P, d], in one forward."""
    B, C, N, m = tokens.shape
    T, P, device = C + 1, m + 1 + A, input_ids.device
    embeds = model.embed(input_ids)
    true = model.embed(after(input_ids, A)[:, :, None, : A - 1])  # [B, C, 1, A - 1, d]
    rows = [model.start.expand(B, C, N, 1, -1), model.embed(tokens), model.end.expand(B, C, N, 1, -1)]
    rows = [x.to(embeds.dtype) for x in (*rows, true.expand(-1, -1, N, -1, -1))]
    limits = torch.arange(1, T, device=device).expand(B, C)
    # A path's k-th row stands k places after its position. A row past all targets only has to stay in the context.
    seen = (limits - text.start[:, None]).clamp_min(0)
    steps = torch.minimum(seen[..., None] + torch.arange(P, device=device), (text.length + m)[:, None, None])
    layout = ThoughtLayout(
        cache=None,
        text_rows=T,
        paths=C * N,
        steps=P,
        path_length=P,
        text_limits=limits.repeat_interleave(N, 1),
        text_start=None if text.mask is None else text.start,
    )
    hidden = run_rows(
        model.base,
        torch.cat([embeds, torch.cat(rows, 3).flatten(1, 3)], 1),
        torch.cat(
            [text.positions(torch.arange(T, device=device)), steps[:, :, None].expand(-1, -1, N, -1).flatten(1)], 1
        ),
        text.mask,
        layout,
    )
    text_hidden, paths = hidden.split([T, C * N * P], 1)
    return text_hidden, paths.unflatten(1, (C, N, P))


def _talk(
    model: "QuietStarForCausalLM", hidden: Tensor, talk: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Base log-probabilities [B, C], mixed ones and weights [B, C, N, A], from talk [B, C, N, A, d]."""
    B, C, N, A, _ = talk.shape
    size = chunk_size(C, B * (N * A + 1) * model.logits_size)
    # Chunk c mixes with the text rows of its own positions and of the A - 1 that follow.
    pieces = functional.pad(hidden, (0, 0, 0, A - 2)).split(size, 1)
    reach = 1 + -(-(A - 1) // size)

    def grade(
        sums: tuple[list[Tensor], ...], part: Tensor, target: Tensor, *near: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = part.shape[1]
        text = torch.cat(near, 1)[:, : n + A - 1]
        raw, part = model.raw_logits(text), part.transpose(2, 3)  # [B, n + A - 1, V], [B, n, A, N, d]
        weight = model.mix(_shifted(text, n, A), part)
        logits = model.mixed_logits(_shifted(raw, n, A), part, weight)  # [B, n, A, N, V]
        mixed = log_prob(logits, target[..., None].expand(-1, -1, -1, N), sums=sums[0])
        base = log_prob(model.finish(raw[:, :n]), target[:, :, 0], sums=sums[1])
        return base, mixed.transpose(2, 3), weight.transpose(2, 3)

    parts = [
        recomputed(grade, ([], []), part, target, *pieces[i : i + reach])
        for i, (part, target) in enumerate(zip(talk.split(size, 1), targets.split(size, 1), strict=True))
    ]
    base, mixed, weight = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return base, mixed, weight


def _policy(model: "QuietStarForCausalLM", opening: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [B, C, N, m] of the thought tokens from the rows before them, [B, C, N, m, d]."""
    B, C, N, m = tokens.shape
    size = chunk_size(C, B * N * m * model.logits_size)
    ids = drawable(model)

    def grade(sums: list[Tensor], part: Tensor, target: Tensor) -> Tensor:
        logits = model.finish(model.raw_logits(part))
        logits.detach()[..., ids:] = -torch.inf  # detached: log_prob's gradient is 0 there as it is
        return log_prob(logits, target, temperature=temperature, sums=sums)

    parts = zip(opening.split(size, 1), tokens.split(size, 1), strict=True)
    return torch.cat([recomputed(grade, [], part, target) for part, target in parts], 1)


def _pad_id(config: QuietStarConfig) -> int | None:
    """The id of padding, which in the released code is the end of the text."""
    pad: int | list[int] | None = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    return pad[0] if isinstance(pad, list) else pad


def _shifted(rows: Tensor, n: int, A: int) -> Tensor:
    """[B, n, A, ...] from rows [B, n + A - 1, ...]: those at s = 0 .. A - 1 after each of the first n."""
    return torch.stack([rows[:, s : s + n] for s in range(A)], 2)


def chunk_size(positions: int, elements_a_position: int) -> int:
    part = next(chunks(positions, elements_a_position))
    return int(part.stop)


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), of which nothing but the inputs is kept for the backward pass."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
