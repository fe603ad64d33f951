"""What masked diffusion writes and what it takes: a table of samplers, energies and steps (arXiv 2410.21357)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pyquiet.checks import check_count, check_word
from pyquiet.datasets import packed
from pyquiet.diffusion.sampling import Diffusion, diffuse
from pyquiet.evaluation.estimates import Estimate, aligned
from pyquiet.evaluation.judging import Judge, judge_texts
from pyquiet.evaluation.ngrams import NGramModel, distinct_ngrams, ngram_variation
from pyquiet.gaps import Codec

ORDERS = (1, 2, 3)  # of n-grams
# Lower is better; none of them sees all: each is printed beside the entropy.
QUALITIES = ("perplexity", "ngram_nll", *(f"variation_{n}" for n in ORDERS))
COSTS = ("denoiser_calls", "energy_passes", "passes", "depth", "seconds")
_TITLES = {
    "perplexity": "gen. PPL",
    "entropy_nats": "entropy (nats)",
    "entropy_bits": "(bits)",
    "ngram_nll": "n-gram NLL",
    **{f"variation_{n}": f"TV {n}" for n in ORDERS},
    **{f"distinct_{n}": f"distinct {n}" for n in ORDERS},
    "denoiser_calls": "denoiser calls",
    "energy_passes": "energy passes",
    "passes": "all passes",
    "depth": "depth",
    "ess": "ESS",
    "seconds": "seconds",
}
_BINS = 16  # of time
_LAST_QUALITY = "distinct_3"


@dataclass(frozen=True)
class DiffusionRow:
    """One sampler with one energy at one number of steps, or the held-out text itself, which has no steps.

    Attributes:
        values: by name, of each text, float64 [texts].
        variation: total variation from the reference's n-grams, by n, of all texts together.
        trace: mean time and mean ESS of the picks in each sixteenth of time from noise (1) to text (0), and how many
            picks these are, float64 [at most 16, 3].
    """

    sampler: str
    energy: str
    steps: int | None
    values: dict[str, Tensor]
    variation: dict[int, Estimate]
    trace: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.float64))

    @property
    def method(self) -> str:
        return self.sampler if self.energy == "none" else f"{self.sampler} + {self.energy}"

    def estimates(self) -> dict[str, Estimate]:
        """Means over the texts, geometric ones of perplexities, and their errors; of a variation, the jackknife's."""
        found = {name: Estimate.of(values) for name, values in self.values.items()}
        found["perplexity"] = Estimate.geometric(self.values["perplexity"])
        found |= {f"variation_{n}": estimate for n, estimate in self.variation.items()}
        if self.steps is not None:
            found["passes"] = Estimate.of(self.values["denoiser_calls"] + self.values["energy_passes"])
        return found


@dataclass(frozen=True)
class Matched:
    """What each method takes to the same quality, by name (see COSTS), and the entropy of its texts there, in bits.

    None: no row of the method is as good. `at_most`: methods whose first row is better already.
    """

    quality: str
    value: float
    methods: dict[str, dict[str, float] | None]
    at_most: frozenset[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        methods = {name: costs and {**costs, "at_most": name in self.at_most} for name, costs in self.methods.items()}
        return {"quality": self.quality, "value": self.value, "methods": methods}

    def __str__(self) -> str:
        names = ("entropy_bits", *COSTS)
        table = [[f"at {_TITLES[self.quality]} {self.value:.4g}", "entropy (bits)", *(_TITLES[name] for name in COSTS)]]
        for method, costs in self.methods.items():
            sign = "<= " if method in self.at_most else ""
            table.append([method, *(f"{sign}{costs[name]:.4g}" if costs else "not reached" for name in names)])
        return aligned(table)


@dataclass(frozen=True)
class DiffusionTable:
    """The rows, of which the first is the held-out text: its variation is the floor that sampling alone leaves."""

    rows: list[DiffusionRow]
    length: int
    level: str

    def methods(self) -> dict[str, list[DiffusionRow]]:
        """The rows of each sampler with each energy, by rising steps."""
        found: dict[str, list[DiffusionRow]] = {}
        for row in sorted(self.rows[1:], key=lambda row: row.steps or 0):
            found.setdefault(row.method, []).append(row)
        return {name: found[name] for name in dict.fromkeys(row.method for row in self.rows[1:])}

    def matched(self, quality: str, value: float | None = None) -> Matched:
        """What each method takes until its rows first reach a quality.

        Between two rows the logarithms of the costs, and the entropy, are taken to be linear in the quality, or in the
        logarithm of a perplexity.

        Args:
            quality: one of QUALITIES; lower is better. value: None takes the best that every method reaches.

        Raises:
            ValueError: there is no such quality.
        """
        check_word("quality", quality, QUALITIES)
        curves = {name: [row.estimates() for row in rows] for name, rows in self.methods().items()}
        if value is None:
            value = max(min(point[quality].mean for point in curve) for curve in curves.values())
        reached = {name: _reached(curve, quality, value) for name, curve in curves.items()}
        at_most = frozenset(name for name, curve in curves.items() if curve[0][quality].mean < value)
        return Matched(quality, value, reached, at_most)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values."""
        rows = [
            {
                "method": row.method,
                "sampler": row.sampler,
                "energy": row.energy,
                "steps": row.steps,
                **{name: estimate.to_dict() for name, estimate in row.estimates().items()},
                "trace": {name: row.trace[:, i].tolist() for i, name in enumerate(("time", "ess", "picks"))},
            }
            for row in self.rows
        ]
        return {
            "texts": len(self.rows[0].values["perplexity"]),
            "length": self.length,
            "level": self.level,
            "rows": rows,
        }

    def __str__(self) -> str:
        names = list(_TITLES)
        cut = names.index(_LAST_QUALITY) + 1
        return f"{self._part(names[:cut], self.rows)}\n\n{self._part(names[cut:], self.rows[1:])}"

    def _part(self, names: Sequence[str], rows: Sequence[DiffusionRow]) -> str:
        table = [["method", "steps", *(_TITLES[name] for name in names)]]
        for row in rows:
            estimates = row.estimates()
            table.append([row.method, str(row.steps or "-"), *(str(estimates[name]) for name in names)])
        return aligned(table)


def diffusion_table(
    denoiser: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    judge: Judge,
    *,
    energies: Mapping[str, Any] | None = None,
    samplers: Sequence[str] = ("schedule_first",),
    steps: Sequence[int] = (8, 16, 32, 64),
    num_samples: int = 16,
    length: int = 128,
    level: Literal["token", "character"] = "token",
    order: int = 2,
    add: float = 0.02,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    **options: Any,
) -> DiffusionTable:
    """Writes texts from nothing by each sampler, energy and number of steps in turn, and looks at what was written.

    Args:
        denoiser: as `pyquiet.diffuse` takes it, and its tokenizer.
        texts: documents; packed one after another they give pieces of `length` tokens. `num_samples` of them, from all
            over, are held out: they are the first row. The others are the reference of the n-grams.
        judge: a causal model and its tokenizer, see `judge_texts`. It flatters the texts of an energy that it is part
            of: there look at the n-grams.
        energies: by the names that the table shall give them; None stands for no energy, and is what is taken if this
            is None.
        level: what n-grams are made of. order, add: those of the `NGramModel` of the reference.
        batch_size: texts at a time. Seconds are those of a batch, evenly shared.
        options: those of `pyquiet.diffuse`.

    Raises:
        ValueError, TypeError: an option is out of range, or the texts are too short; as `pyquiet.diffuse`.
    """
    for name, value in (
        ("num_samples", num_samples),
        ("batch_size", batch_size),
        *(("steps", value) for value in steps),
    ):
        check_count(name, value, least=1)
    held, reference = _pieces(texts, tokenizer, length, num_samples)
    metrics = TextMetrics(tokenizer, judge, reference, level=level, order=order, add=add)
    rows = [DiffusionRow("text", "none", None, *metrics(held))]
    energies = {"none": None} if energies is None else energies
    # First-hitting opens one token a step, whatever the number of steps.
    every = [(s, e, k) for s in samplers for e in energies for k in ((length,) if s == "first_hitting" else steps)]
    plan = list(dict.fromkeys(every))  # none twice
    runs: list[list[Diffusion]] = [[] for _ in plan]
    fixed = {"seed": seed, "progress": False, **options}
    for sampler, energy in dict.fromkeys((s, e) for s, e, _ in plan):  # to get warm
        diffuse(denoiser, energies[energy], length=min(length, 8), steps=2, sampler=sampler, **fixed)
    for ids in tqdm(torch.arange(num_samples).split(batch_size), "written", disable=None if progress else True):
        batch = {"length": length, "num_samples": len(ids), "sequence_ids": ids}
        for (sampler, energy, k), run in zip(plan, runs, strict=True):  # in turn: a change of pace meets all
            run.append(diffuse(denoiser, energies[energy], sampler=sampler, steps=k, **batch, **fixed))
    for (sampler, energy, k), run in zip(plan, runs, strict=True):
        values, variation = metrics(torch.cat([out.tokens.cpu() for out in run]))
        rows.append(DiffusionRow(sampler, energy, k, values | _counts(run), variation, _trace(run)))
    return DiffusionTable(rows, length, level)


class TextMetrics:
    """What a judge, their entropy and their n-grams say of texts, whoever wrote them.

    Args:
        tokenizer: of the texts. judge: see `judge_texts`.
        reference: texts that the n-grams are compared with, int64 [N] each.
        level: what n-grams are made of. order, add: those of the `NGramModel` of the reference.

    Raises:
        ValueError: no such level; the reference is empty; order or add are out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        judge: Judge,
        reference: Sequence[Tensor],
        *,
        level: Literal["token", "character"] = "token",
        order: int = 2,
        add: float = 0.02,
    ) -> None:
        self.level = check_word("level", level, ("token", "character"))
        self.codec, self.judge = Codec(tokenizer), judge
        self.reference = self._symbols(reference)
        self.model = NGramModel(self.reference, order, add=add)

    def __call__(self, tokens: Tensor) -> tuple[dict[str, Tensor], dict[int, Estimate]]:
        """The `values` and `variation` of a `DiffusionRow` for texts int64 [B, T], costs aside."""
        symbols = self._symbols(tokens)
        values = judge_texts(self.judge, [self.codec.decode(row) for row in tokens.tolist()], tokens).columns()
        values["ngram_nll"] = self.model.nll(symbols)
        values |= {f"distinct_{n}": distinct_ngrams(symbols, n) for n in ORDERS}
        return values, {n: ngram_variation(symbols, self.reference, n) for n in ORDERS}

    def _symbols(self, texts: Iterable[Tensor]) -> list[Any]:
        rows = [text.tolist() for text in texts]
        return rows if self.level == "token" else [self.codec.decode(row) for row in rows]


def _pieces(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> tuple[Tensor, list[Tensor]]:
    """`count` pieces of the texts from all over, int64 [count, length], and the others."""
    pieces = [row["input_ids"] for row in packed(texts, tokenizer, length) if len(row["input_ids"]) == length]
    if len(pieces) <= count:
        raise ValueError(
            f"num_samples={count}: the texts hold {len(pieces)} pieces of {length} tokens, of which some must be left "
            "as the reference; take fewer, shorter pieces or more text"
        )
    held = {i * len(pieces) // count for i in range(count)}
    return torch.stack([pieces[i] for i in sorted(held)]), [piece for i, piece in enumerate(pieces) if i not in held]


def _counts(run: Sequence[Diffusion]) -> dict[str, Tensor]:
    columns = {
        name: torch.cat([getattr(out, name).double().cpu() for out in run])
        for name in ("denoiser_calls", "energy_passes", "depth", "ess")
    }
    seconds = [torch.full((len(out.tokens),), out.seconds / len(out.tokens), dtype=torch.float64) for out in run]
    return columns | {"seconds": torch.cat(seconds)}


def _trace(run: Sequence[Diffusion]) -> Tensor:
    parts = [(out.trace.times[out.trace.corrected], out.trace.ess[out.trace.corrected]) for out in run]
    time, ess = (torch.cat(columns) for columns in zip(*parts, strict=True))
    place = (time * _BINS).ceil().long().clamp(min=1) - 1
    picks = torch.stack([time, ess, torch.ones_like(ess)], 1)
    sums = torch.zeros(_BINS, 3, dtype=torch.float64).index_add_(0, place, picks)
    seen = sums[sums[:, 2] > 0].flip(0)
    return torch.cat([seen[:, :2] / seen[:, 2:], seen[:, 2:]], 1)


def _reached(curve: Sequence[dict[str, Estimate]], quality: str, value: float) -> dict[str, float] | None:
    place = next((i for i, point in enumerate(curve) if point[quality].mean <= value), None)
    if place is None:
        return None
    here, before = curve[place], curve[max(0, place - 1)]
    scale = math.log if quality == "perplexity" else float
    low, high = scale(here[quality].mean), scale(before[quality].mean)
    share = (high - scale(value)) / (high - low) if high > low else 1.0
    costs = {name: before[name].mean ** (1 - share) * here[name].mean ** share for name in COSTS}
    entropy = before["entropy_bits"].mean
    return {"entropy_bits": entropy + share * (here["entropy_bits"].mean - entropy), **costs}
