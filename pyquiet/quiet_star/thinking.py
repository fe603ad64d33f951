"""Sampling thoughts: START, m tokens, END after many positions at once, in m + 1 forwards of the base."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pyquiet.checks import check_count
from pyquiet.heads import rows_at_once
from pyquiet.quiet_star.thoughts import ThoughtCache, ThoughtLayout, run_rows
from pyquiet.randomness import Purpose, Stream, check_processing, check_sequence_ids, draw, resolve_seed

if TYPE_CHECKING:
    from pyquiet.quiet_star.modeling import QuietStarForCausalLM

Think = Literal["always", "never"]


@dataclass
class ThoughtOptions:
    """How thoughts are drawn. Temperature, top-k and top-p are those of the thoughts, not of the answer."""

    seed: int
    thoughts: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    sequence_ids: Tensor | None = None  # int64 [B]

    @classmethod
    def checked(
        cls,
        default_thoughts: int,
        batch: int,
        seed: int | None,
        thoughts_per_token: int | None,
        thought_temperature: float,
        thought_top_k: int | None,
        thought_top_p: float | None,
        sequence_ids: Tensor | None,
    ) -> "ThoughtOptions":
        """These, as users call them, checked: ValueError or TypeError by name. A seed of None is taken here."""
        thoughts = default_thoughts if thoughts_per_token is None else thoughts_per_token
        check_count("thoughts_per_token", thoughts, least=1)
        try:
            check_processing(1, thought_temperature, thought_top_k, thought_top_p)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"thought sampling (thought_temperature, thought_top_k, thought_top_p): {error}"
            ) from None
        if sequence_ids is not None:
            check_sequence_ids(sequence_ids, batch)
        return cls(resolve_seed(seed), thoughts, thought_temperature, thought_top_k, thought_top_p, sequence_ids)


@dataclass
class Text:
    """Where the text of each row lies: `start` columns of left padding, then `length` tokens; both int64 [B]."""

    start: Tensor
    length: Tensor
    mask: Tensor | None  # bool [B, T]; None without padding

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None) -> "Text":
        B, T = input_ids.shape
        if attention_mask is None or bool(attention_mask.all()):
            zeros = torch.zeros(B, dtype=torch.int64, device=input_ids.device)
            return cls(zeros, zeros + T, None)
        mask = attention_mask.to(torch.bool)
        return cls(mask.long().argmax(1), mask.sum(1), mask)

    def positions(self, columns: Tensor) -> Tensor:
        """int64 [B, n]: where the tokens at `columns` [n] stand, padding not counted; at padding, a place within."""
        return torch.minimum((columns - self.start[:, None]).clamp_min(0), (self.length - 1)[:, None])


@dataclass
class Round:
    """Thoughts after T0 positions: END's hidden state [B, T0, N, d], tokens and log_probs [B, T0, N, m].

    END's hidden state has d = 0 where only the tokens were asked for.
    """

    text_hidden: Tensor | None  # [B, n, d] of the text rows that went along
    end_hidden: Tensor
    tokens: Tensor
    log_probs: Tensor


class Thinker:
    """Reads text into a cache and thinks after any of its positions."""

    def __init__(
        self,
        model: "QuietStarForCausalLM",
        text: Text,
        options: ThoughtOptions,
        return_index: Tensor | None = None,
    ) -> None:
        self.model, self.text, self.options = model, text, options
        self.cache = ThoughtCache(model.base.config.get_text_config().num_hidden_layers)
        device = text.start.device
        batch = text.start.numel()
        ids = options.sequence_ids
        self.sequence = torch.arange(batch, device=device) if ids is None else ids.to(device)
        # Return r of a sequence numbers its thoughts from r * N, so that return 0 is what a single return would be.
        self.first_index = 0 if return_index is None else return_index * options.thoughts
        self.calls = self.token_passes = 0

    def read(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, n, d] of further text [B, n]."""
        embeds = self.model.embed(input_ids)
        return self._run(embeds, self._text_positions(input_ids.shape[1]), text_rows=input_ids.shape[1])

    def think(self, limits: Tensor, new_text: Tensor | None = None, *, tokens_only: bool = False) -> Round:
        """Thinks where `limits` [B, T0] (text columns seen, new ones included) says; reads `new_text` [B, n] along.

        `tokens_only` spares the last forward, which the thought's tokens do not need.
        """
        m, N = self.model.config.thought_tokens, self.options.thoughts
        n = 0 if new_text is None else new_text.shape[1]
        opening = [self.model.start] if m else [self.model.start, self.model.end]
        hidden = self._run_paths(limits, torch.stack(opening), 0, copies=N, text=new_text)
        text_hidden, hidden = hidden[:, :n], hidden[:, n:].unflatten(1, (limits.shape[1], 1, -1))
        limits = limits.repeat_interleave(N, 1)
        tokens, log_probs = [], []
        for k in range(m):
            token, log_prob = self._draw(hidden[..., -1, :], limits, k)  # [B, T0, N]
            tokens.append(token)
            log_probs.append(log_prob)
            if tokens_only and k == m - 1:
                hidden = hidden[..., :0]
                break
            rows = self.model.embed(token.flatten(1))[:, :, None]  # [B, T0 * N, 1, d]
            if k == m - 1:
                rows = torch.cat([rows, self.model.end.expand_as(rows)], 2)
            hidden = self._run_paths(limits, rows, k + 1).unflatten(1, (-1, N, rows.shape[2]))
        self.cache.drop_paths()
        end = hidden[..., -1, :].expand(-1, -1, N, -1)
        shape = (*end.shape[:3], m)
        if not m:
            empty = limits.new_empty(shape)
            return Round(text_hidden if n else None, end, empty, end.new_empty(shape))
        return Round(text_hidden if n else None, end, torch.stack(tokens, -1), torch.stack(log_probs, -1))

    def _draw(self, hidden: Tensor, limits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The thought token t_{k+1} from hidden [B, T0, N or 1, d]: tokens and log-probabilities [B, T0, N]."""
        B, T0, shared, _ = hidden.shape
        N = self.options.thoughts
        first = torch.as_tensor(self.first_index, device=hidden.device).reshape(-1, 1, 1)
        index = first + torch.arange(N, device=hidden.device)
        sequence = self.sequence[:, None, None].expand(B, T0, N).reshape(B * T0, N)
        position = (limits - self.text.start[:, None] - 1).clamp_min(0).view(B * T0, N)
        index = index.expand(B, T0, N).reshape(B * T0, N)
        rows = hidden.reshape(B * T0, shared, -1)
        ids = drawable(self.model)
        drawn = []
        for part in chunks(B * T0, N * self.model.logits_size):
            logits = self.model.finish(self.model.raw_logits(rows[part]))[..., :ids]
            stream = Stream(
                self.options.seed,
                Purpose.THOUGHT,
                sequence=sequence[part].flatten(),
                position=position[part].flatten(),
                step=k,
                index=index[part].flatten(),
            )
            drawn.append(
                draw(
                    logits.expand(-1, N, -1).flatten(0, 1),
                    stream=stream,
                    temperature=self.options.temperature,
                    top_k=self.options.top_k,
                    top_p=self.options.top_p,
                )
            )
        tokens = torch.cat([d.tokens for d in drawn]).view(B, T0, N)
        return tokens, torch.cat([d.log_probs for d in drawn]).view(B, T0, N)

    def _run_paths(
        self,
        limits: Tensor,
        rows: Tensor,
        first_step: int,
        *,
        copies: int = 1,
        text: Tensor | None = None,
    ) -> Tensor:
        """Runs path rows [steps, d] or [B, paths, steps, d], after the rows of `text`; hidden [B, all rows, d]."""
        B, paths = limits.shape
        rows = rows.expand(B, paths, -1, -1)
        steps = rows.shape[2]
        # Beyond a right-padded row's end no path is read; it only has to stay within the context.
        seen = torch.minimum(limits - self.text.start[:, None], self.text.length[:, None]).clamp_min(0)
        positions = seen[..., None] + torch.arange(first_step, first_step + steps, device=limits.device)
        embeds = rows.flatten(1, 2).contiguous()  # some bases scale in place what they get
        positions = positions.flatten(1)
        if text is not None:
            embeds = torch.cat([self.model.embed(text), embeds], 1)
            positions = torch.cat([self._text_positions(text.shape[1]), positions], 1)
        return self._run(
            embeds,
            positions,
            text_rows=embeds.shape[1] - paths * steps,
            paths=paths,
            steps=steps,
            first_step=first_step,
            path_length=self.model.config.thought_tokens + 2,
            copies=copies,
            text_limits=limits,
            text_start=None if self.text.mask is None else self.text.start,
        )

    def _run(self, embeds: Tensor, positions: Tensor, **rows: Any) -> Tensor:
        self.calls += 1
        self.token_passes += embeds.shape[1]
        layout = ThoughtLayout(self.cache, **rows)
        columns = self.cache.get_seq_length() + layout.text_rows
        mask = None if self.text.mask is None else self.text.mask[:, :columns]
        return run_rows(self.model.base, embeds, positions, mask, layout)

    def _text_positions(self, n: int) -> Tensor:
        done = self.cache.get_seq_length()
        return self.text.positions(torch.arange(done, done + n, device=self.text.start.device))


def chunks(rows: int, elements_a_row: int) -> Iterator[slice]:
    """Slices of `rows` such that no chunk of logits gets large, however long the text."""
    size = rows_at_once(elements_a_row)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def drawable(model: "QuietStarForCausalLM") -> int:
    """How many ids a thought may take: all V but START and END, the last two of an official model's."""
    return min(model.config.reserved_ids, default=model.logits_size)


def average(logits: Tensor) -> Tensor:
    """Logits [..., V] of the mean law of N thoughts' logits [..., N, V]; those of a single thought as they are."""
    if logits.shape[-2] == 1:
        return logits[..., 0, :]
    return logits.log_softmax(-1).logsumexp(-2) - math.log(logits.shape[-2])
