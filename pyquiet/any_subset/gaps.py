"""Texts with gaps, filled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyquiet.any_subset.engine import as_engine
from pyquiet.any_subset.likelihood import joint_log_prob
from pyquiet.any_subset.sampling import infill
from pyquiet.gaps import Gapped
from pyquiet.randomness import Purpose, Stream, draw, resolve_seed

MOST_LENGTHS = 64  # combinations of lengths that a text's gaps may have
KINDS = ("target", "draft", "auxiliary")  # of calls
Cost = dict[str, float]  # what fillings took: tokens, rounds, target_calls .., seconds


@dataclass(frozen=True)
class Filled:
    """A filled text: ids, which of them were given, its gaps' lengths, and log p of the others, processing included."""

    ids: list[int]
    given: list[bool]
    lengths: tuple[int, ...]
    log_prob: float


@torch.no_grad()
def fill_gaps(
    model: Any,
    texts: Sequence[Gapped],
    *,
    seed: int | None = 0,
    sequence_ids: Sequence[int] | None = None,
    temperature: float = 1.0,
    **options: Any,
) -> tuple[list[Filled], Cost]:
    """The texts filled by `infill` in one batch, and what that took.

    Where gaps may have several lengths, each combination is filled, and one is drawn by its probability given the text,
    all being equally probable before. With x the text before the first gap, y the rest and g a filling, that is in
    proportion to p(y | x) = p(g, y | x) / p(g | x, y), two joint probabilities of the model: without bias for a g that
    is drawn at temperature 1, exact where the model's orders agree. Where nothing follows the gap, nothing tells its
    length. At temperature 0 the most probable combination is taken.

    Args:
        sequence_ids: name the noise of each text; None is its number.
        options: those of `infill`.

    Returns:
        The texts; and tokens, rounds, target_calls, draft_calls, auxiliary_calls and seconds of all lengths tried.

    Raises:
        ValueError: as `infill`; more than 64 combinations of lengths, or more tokens than fit into memory.
    """
    seed, engine = resolve_seed(seed), as_engine(model)
    ids = list(range(len(texts)) if sequence_ids is None else sequence_ids)
    choices = [combinations(text) for text in texts]
    _check_memory(model, texts, sum(map(len, choices)), engine.device)
    rows = [(text, lengths) for text, several in zip(texts, choices, strict=True) for lengths in several]
    known = [text.given(lengths) for text, lengths in rows]
    batch = (
        pad_sequence([text.tokens(lengths) for text, lengths in rows], True),
        pad_sequence(known, True, True),
        pad_sequence([torch.ones_like(given) for given in known], True),
    )
    tokens, given, real = (x.to(engine.device) for x in batch)
    # The first combination has the text's own noise, as of `infill`; the others have that of ids far beyond.
    noise = torch.tensor([i + (j << 26) for i, several in zip(ids, choices, strict=True) for j in range(len(several))])
    settings = {"seed": seed, "sequence_ids": noise, "temperature": temperature, **options}
    out = infill(engine, tokens, mask=~given, attention_mask=real, **settings)
    weights = torch.zeros(len(rows))
    counts = (~given, out.rounds, out.calls["density"], out.calls["draft"], out.drafter_calls)
    took: Cost = dict(zip(("tokens", "rounds", *(f"{kind}_calls" for kind in KINDS)), map(_total, counts), strict=True))
    took["seconds"] = out.seconds
    if len(rows) > len(texts):
        ends = torch.tensor([len(text.pieces[0]) for text, _ in rows], device=engine.device)
        before = torch.arange(tokens.shape[1], device=engine.device) < ends[:, None]
        both = [joint_log_prob(engine, out.tokens, known=x, attention_mask=real) for x in (before, given)]
        weights = (both[0] - both[1]).cpu()
        took["target_calls"] += 2 * len(rows)
    filled, start = [], 0
    for i, several in zip(ids, choices, strict=True):
        choice = Stream(seed, Purpose.RESAMPLE, i)
        laws = weights[None, start : start + len(several)]
        best = int(draw(laws, stream=choice, temperature=float(temperature > 0)).tokens)
        row, start = start + best, start + len(several)
        log_prob = float(out.log_probs[row].sum())
        filled.append(Filled(out.tokens[row, real[row]].tolist(), known[row].tolist(), several[best], log_prob))
    return filled, took


def combinations(text: Gapped) -> list[tuple[int, ...]]:
    """The lengths that the gaps of a text may have together; ValueError for more than 64."""
    if (most := prod(map(len, text.lengths))) > MOST_LENGTHS:
        raise ValueError(f"the gaps have {most} combinations of lengths; give ranges of {MOST_LENGTHS} at most")
    return list(product(*text.lengths))


def _total(counts: Tensor) -> int:
    return int(counts.sum())


def _check_memory(model: Any, texts: Sequence[Gapped], rows: int, device: torch.device) -> None:
    """Refuses what cannot end well: of an XLNet, the cache and the scores of what is computed at once are counted."""
    config = getattr(model, "config", None)
    if config is None:
        return
    given = max(sum(map(len, text.pieces)) for text in texts)
    length = max(sum(map(len, text.pieces)) + sum(gap[-1] for gap in text.lengths) for text in texts)
    at_once = given if rows == len(texts) else length
    needed = 4 * rows * (3 * config.n_head * at_once**2 + 2 * config.n_layer * config.d_model * length)
    there = _memory(device)
    if needed > there:
        raise ValueError(
            f"text: {rows} rows of up to {length} tokens need {needed / 2**30:.1f} GiB or more, of {there / 2**30:.1f} "
            "GiB of memory; give shorter texts or gaps, narrower ranges of lengths or fewer at a time"
        )


def _memory(device: torch.device) -> int:
    """Bytes that may be used on the device, at most."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
