"""The table of arXiv 2504.20456: what methods of filling in write, and what it takes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pyquiet.any_subset import Infilling, as_engine, infill
from pyquiet.any_subset.sampling import DRAFTS, FIXED_METHODS
from pyquiet.any_subset.training import random_order
from pyquiet.checks import check_count
from pyquiet.datasets import packed
from pyquiet.evaluation.estimates import Estimate, aligned
from pyquiet.evaluation.judging import Judge, judge_texts
from pyquiet.gaps import Codec

_COLUMNS = {
    "perplexity": "gen. PPL",
    "entropy_nats": "entropy (nats)",
    "entropy_bits": "(bits)",
    "target_calls": "target calls",
    "draft_calls": "draft calls",
    "auxiliary_calls": "auxiliary",
    "tokens_per_round": "tokens/round",
    "seconds": "seconds",
}
_WARM = 32  # tokens of the text that each method fills before it is timed


@dataclass(frozen=True)
class GenerativeTable:
    """Of each method, float64 [texts]: perplexity under the judge, entropy, calls, tokens a round, seconds.

    `tokens` of each text's `length` were filled in.
    """

    rows: dict[str, dict[str, Tensor]]
    length: int
    tokens: int

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Means over the texts and their standard errors."""
        return {
            method: {name: Estimate.of(values) for name, values in row.items()} for method, row in self.rows.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values."""
        methods = {method: {n: e.to_dict() for n, e in row.items()} for method, row in self.estimates().items()}
        texts = len(next(iter(self.rows.values()))["seconds"])
        return {"texts": texts, "length": self.length, "filled": self.tokens, "methods": methods}

    def __str__(self) -> str:
        table = [["method", *_COLUMNS.values()]]
        table += [[method, *(str(row[name]) for name in _COLUMNS)] for method, row in self.estimates().items()]
        return aligned(table)


def generative_table(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    judge: Judge,
    *,
    methods: Sequence[str] = FIXED_METHODS,
    limit: int = 16,
    length: int = 512,
    prompt_fraction: float = 0.05,
    k: int | str = "auto",
    seed: int = 0,
    batch_size: int = 1,
    progress: bool = True,
    **options: Any,
) -> GenerativeTable:
    """Fills in texts of which a random part is given, by each method in turn, and looks at what was written.

    Args:
        methods: those of `pyquiet.infill`, each taken once.
        texts: documents; packed one after another they give texts of `length` tokens, of which `limit` are taken from
            all over. The part that is given is drawn by (seed, number of the text) and the same for all methods.
        judge: a causal model and its tokenizer, see `judge_texts`.
        k: drafts a round; "auto" is each method's own number: 5 for "assd" and "ngram", 2 for "one_call".
        batch_size: texts at a time. Seconds are those of a batch, evenly shared: the paper's are of single texts.
        options: those of `pyquiet.infill`. Special tokens are banned.

    Raises:
        ValueError, TypeError: an option is out of range, or the texts are too short; as `infill`.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        check_count(name, value, least=1)
    if not 0 <= prompt_fraction < 1:
        raise ValueError(f"prompt_fraction must be in [0, 1), got {prompt_fraction}")
    pieces = [row["input_ids"] for row in packed(texts, tokenizer, length) if len(row["input_ids"]) == length]
    if len(pieces) < limit:
        raise ValueError(
            f"limit={limit}: the texts hold {len(pieces)} pieces of {length} tokens; take fewer or shorter"
        )
    engine, codec, methods = as_engine(model), Codec(tokenizer), list(dict.fromkeys(methods))
    ids = torch.stack([pieces[i * len(pieces) // limit] for i in range(limit)]).to(engine.device)
    numbers = torch.arange(limit)
    order, prompt = random_order(torch.full((limit,), 1 - prompt_fraction), ids, seed=seed, sequence_ids=numbers)
    hidden = torch.ones(ids.shape, dtype=torch.bool).scatter_(1, order, torch.arange(length) >= prompt[:, None])
    hidden = hidden.to(ids.device)
    fixed = {"seed": seed, "banned": codec.banned(engine.vocab_size), **options}
    rows: dict[str, list[dict[str, Tensor]]] = {method: [] for method in methods}
    for method in methods:
        infill(model, ids[:batch_size, :_WARM], mask=hidden[:batch_size, :_WARM], **_method(method, k), **fixed)
    for batch in tqdm(numbers.split(batch_size), "filled", disable=None if progress else True):
        for method in methods:  # in turn, so that a change of the machine's pace meets all
            out = infill(model, ids[batch], mask=hidden[batch], sequence_ids=batch, **_method(method, k), **fixed)
            written = [codec.decode(row) for row in out.tokens.tolist()]
            judged = judge_texts(judge, written, out.tokens)
            rows[method].append({**judged.columns(), **_counts(out, hidden[batch].sum(1))})
    columns = {
        method: {name: torch.cat([part[name] for part in parts]) for name in _COLUMNS} for method, parts in rows.items()
    }
    return GenerativeTable(columns, length, int(hidden[0].sum()))


def _method(method: str, k: int | str) -> dict[str, Any]:
    if method not in DRAFTS:
        return {"method": method, "k": "auto"}
    # With k="auto" infill would choose by time, and a row of the table would stand for several numbers of drafts.
    return {"method": method, "k": DRAFTS[method] if k == "auto" else k}


def _counts(out: Infilling, filled: Tensor) -> dict[str, Tensor]:
    drawn = (out.calls["density"], out.calls["draft"], out.drafter_calls)
    target, draft, auxiliary = (x.double().cpu() for x in drawn)
    rounds = out.rounds.double().cpu()
    return {
        "target_calls": target,
        "draft_calls": draft,
        "auxiliary_calls": auxiliary,
        "tokens_per_round": filled.double().cpu() / rounds,
        "seconds": torch.full_like(rounds, out.seconds / len(rounds)),
    }
