"""Where thoughts help: what a text's tokens gain by them, from the easiest tenth to the hardest (arXiv 2403.09629)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pyquiet.checks import check_count, check_word
from pyquiet.evaluation.estimates import finite, mean_and_error
from pyquiet.heads import rows_at_once
from pyquiet.randomness import resolve_seed
from pyquiet.tokens import padded

if TYPE_CHECKING:
    from pyquiet.quiet_star import QuietStarForCausalLM

Difficulty = Literal["entropy", "loss"]

_LONGEST_WINDOW = 256  # of the paper's texts


@dataclass(frozen=True)
class DifficultyTable:
    """Tokens in bins of equal size (to within one) by rank of difficulty, the easiest first; means in nats."""

    count: Tensor  # int64 [bins]
    low: Tensor  # float64 [bins] the least difficulty in the bin
    high: Tensor  # float64 [bins] the greatest
    base_nll: Tensor  # float64 [bins]
    mixed_nll: Tensor  # float64 [bins]
    gain: Tensor  # float64 [bins] mean of base_nll - mixed_nll
    gain_error: Tensor  # float64 [bins] its standard error, tokens taken as independent; nan for a single token
    total: "DifficultyTable | None" = None  # all tokens in one bin

    def rows(self) -> list[dict[str, Any]]:
        """A dict of JSON values for each bin, `total` left out."""
        names = [name for name in self.__dataclass_fields__ if name != "total"]
        columns = zip(*(getattr(self, name).tolist() for name in names), strict=True)
        return [{name: finite(x) for name, x in zip(names, column, strict=True)} for column in columns]

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values: `bins`, a list of `rows`, and `total`, one of them."""
        return {"bins": self.rows(), "total": self.total.rows()[0] if self.total else None}

    def __str__(self) -> str:
        lines = [f"{'':>5}{'tokens':>9}{'difficulty':>19}{'base NLL':>10}{'mixed NLL':>11}{'gain':>9}{'s.e.':>8}"]
        rows = [(str(i + 1), row) for i, row in enumerate(self.rows())]
        rows += [("all", row) for row in (self.total.rows() if self.total else [])]
        for name, row in rows:
            error = "-" if row["gain_error"] is None else f"{row['gain_error']:.4f}"
            lines.append(
                f"{name:>5}{row['count']:>9}{row['low']:>10.4f} ..{row['high']:>7.4f}{row['base_nll']:>9.4f}"
                f"{row['mixed_nll']:>10.4f}{row['gain']:>+11.4f}{error:>8}"
            )
        return "\n".join(lines)


@torch.no_grad()
def gain_by_decile(difficulty: Tensor, base_nll: Tensor, mixed_nll: Tensor, bins: int = 10) -> DifficultyTable:
    """What tokens gain by thoughts, in bins of equal size by rank of difficulty.

    Args:
        difficulty: [n], greater is harder; equal ones keep their order. base_nll, mixed_nll: [n] nats, without and
            with thoughts. Sums are taken in float64, on the tensors' own device.
        bins: at most so many; fewer tokens than that make a bin each.

    Raises:
        ValueError: not three vectors of one length, no token, bins < 1 or a difficulty that is NaN.
    """
    n = difficulty.numel()
    if not difficulty.shape == base_nll.shape == mixed_nll.shape == (n,) or n == 0:
        shapes = ", ".join(str(list(x.shape)) for x in (difficulty, base_nll, mixed_nll))
        raise ValueError(f"difficulty, base_nll and mixed_nll must be [n] with n >= 1, got {shapes}: select the tokens")
    check_count("bins", bins, least=1)
    if difficulty.isnan().any():
        raise ValueError("difficulty holds NaN, which has no rank")
    base, mixed = base_nll.double(), mixed_nll.double()
    order = difficulty.argsort(stable=True)
    values = torch.stack([difficulty.double(), base, mixed, base - mixed])
    values = values[:, order]
    return replace(_binned(values, min(bins, n)), total=_binned(values, 1))


def _binned(values: Tensor, bins: int) -> DifficultyTable:
    """The table of sorted values [difficulty, base, mixed, gain] x [n]."""
    parts = values.tensor_split(bins, 1)
    columns = []
    for difficulty, base, mixed, gain in parts:
        columns.append(torch.stack([difficulty[0], difficulty[-1], base.mean(), mixed.mean(), *mean_and_error(gain)]))
    count = torch.tensor([part.shape[1] for part in parts], device=values.device)
    return DifficultyTable(count, *torch.stack(columns, 1))


@dataclass(frozen=True)
class TokenGains:
    """The predicted tokens of some texts, in order, without and with the thought before each. On the CPU."""

    row: Tensor  # int64 [n] the text
    index: Tensor  # int64 [n] the token's place in it
    token: Tensor  # int64 [n]
    base_nll: Tensor  # [n] nats, without a thought
    mixed_nll: Tensor  # [n] nats, under the mean of the N thoughts' laws
    entropy: Tensor  # [n] nats, of the base's law of the token
    thoughts: Tensor  # int64 [n, N, m]
    weight: Tensor  # [n, N] w, the thought's weight in the mix

    @property
    def gain(self) -> Tensor:
        """[n] nats won by thinking."""
        return self.base_nll - self.mixed_nll

    def difficulty(self, by: Difficulty = "entropy") -> Tensor:
        """[n] nats: what the base expects to lose at the token ("entropy"), or what it does lose ("loss").

        Entropy is the honest measure: it is known before the token is. Tokens chosen by a high base loss are in part
        those where the base was unlucky, and any other prediction, be it no better, does better there (regression to
        the mean), and worse at those of a low loss.
        """
        check_word("by", by, Difficulty)
        return self.entropy if by == "entropy" else self.base_nll

    def table(self, by: Difficulty = "entropy", bins: int = 10) -> DifficultyTable:
        """`gain_by_decile` of these tokens."""
        return gain_by_decile(self.difficulty(by), self.base_nll, self.mixed_nll, bins)


@torch.no_grad()
def thinking_gains(
    model: "QuietStarForCausalLM",
    rows: Sequence[Sequence[int] | Tensor],
    *,
    seed: int | None = 0,
    thoughts_per_token: int | None = None,
    opening: Sequence[int] = (),
    max_length: int | None = None,
    overlap: int = 1,
    batch_size: int = 8,
    progress: bool = True,
) -> TokenGains:
    """What a thinking model's thoughts change at every token of some texts, dropout off.

    A text is read in windows: `opening`, the `overlap` tokens before, then new tokens. Each token is predicted once,
    but for a text's first where there is no opening.

    Args:
        rows: token ids of each text, int64 [T].
        seed: of the thoughts; None takes one from torch's generator. Windows are counted as sequence ids, so the batch
            size does not matter. thoughts_per_token: N; None is the configuration's.
        opening: ids before every window, such as BOS (`opening_ids(tokenizer)`).
        max_length: tokens of a window; None is the context less a thought, at most 256.
        progress: show a bar where there is a terminal.

    Raises:
        ValueError, TypeError: as `think_at_every_token`; windows without room, or no token to predict.
    """
    seed = resolve_seed(seed)
    texts = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]
    length = _default_length(model) if max_length is None else max_length
    if overlap < (0 if opening else 1) or length < len(opening) + overlap + 1:
        raise ValueError(
            f"max_length={length} must hold the opening ({len(opening)} tokens), overlap={overlap} and a new token; "
            "without an opening the overlap is 1 at least"
        )
    check_count("batch_size", batch_size, least=1)
    windows = list(_windows(texts, list(opening), length, overlap))
    if not windows:
        raise ValueError(f"rows: none of the {len(texts)} texts has a token to predict")
    training = model.training
    model.eval()
    try:
        parts = []
        for start in tqdm(range(0, len(windows), batch_size), "thinking", disable=None if progress else True):
            parts.append(_gains(model, windows[start : start + batch_size], start, seed, thoughts_per_token))
    finally:
        model.train(training)
    return TokenGains(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Window:
    ids: list[int]
    first: int  # of ids, which is predicted, as are all behind it
    row: int
    index: int  # of ids[first] in its row


def _windows(rows: list[list[int]], opening: list[int], max_length: int, overlap: int) -> Iterator[_Window]:
    for number, row in enumerate(rows):
        start = 0 if opening else 1
        while start < len(row):
            seen = max(0, start - overlap)
            end = min(seen + max_length - len(opening), len(row))
            yield _Window(opening + row[seen:end], len(opening) + start - seen, number, start)
            start = end


def _gains(
    model: "QuietStarForCausalLM", windows: list[_Window], number: int, seed: int, thoughts_per_token: int | None
) -> tuple[Tensor, ...]:
    """The fields of `TokenGains` for a batch of windows of which the first is that of this number."""
    ids, mask = padded([window.ids for window in windows], "right")
    column = torch.arange(1, ids.shape[1])
    first = torch.tensor([window.first for window in windows])[:, None]
    chosen = (mask[:, 1:] == 1) & (column >= first)  # [B, T-1]
    place = column - first + torch.tensor([window.index for window in windows])[:, None]
    row = torch.tensor([window.row for window in windows])[:, None].expand_as(place)
    device = model.device
    device_ids, device_mask = ids.to(device), mask.to(device)
    thoughts = model.think_at_every_token(
        device_ids,
        device_mask,
        seed=seed,
        sequence_ids=torch.arange(number, number + len(windows), device=device),
        thoughts_per_token=thoughts_per_token,
    )
    entropy = _base_entropy(model, device_ids, device_mask, chosen.to(device)).cpu()
    mixed = thoughts.mixed_log_probs.cpu()[chosen]  # [n, N]
    return (
        row[chosen],
        place[chosen],
        ids[:, 1:][chosen],
        -thoughts.base_log_probs.cpu()[chosen],
        math.log(mixed.shape[1]) - mixed.logsumexp(1),
        entropy,
        thoughts.tokens[:, :-1].cpu()[chosen],
        thoughts.weight[:, :-1].cpu()[chosen],
    )


def _base_entropy(model: "QuietStarForCausalLM", ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """Entropy [n] in nats of the base's next-token law where `chosen` [B, T-1] says, a chunk of rows at a time."""
    network = model.base.base_model
    hidden = network(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1][chosen]
    parts = []
    for rows in hidden.split(rows_at_once(model.logits_size)):
        law = model.finish(model.raw_logits(rows)).softmax(-1)
        parts.append(torch.special.entr(law).sum(-1))
    return torch.cat(parts)


def _default_length(model: "QuietStarForCausalLM") -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    return int(min(context - model.config.thought_tokens - 2, _LONGEST_WINDOW))
