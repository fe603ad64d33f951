"""How well gaps are filled, and sentences of a story scored by ROUGE (arXiv 2504.20456)."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pyquiet.any_subset import as_engine
from pyquiet.any_subset.gaps import Cost, fill_gaps
from pyquiet.checks import check_count
from pyquiet.evaluation.estimates import Estimate
from pyquiet.gaps import Codec, Gapped

_ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
_HIDDEN = {1: slice(2, 3), 3: slice(1, 4)}  # of five sentences
_COLUMNS = (
    ("sentence1", "sentence2", "sentence3", "sentence4", "sentence5"),
    ("InputSentence1", "InputSentence2", "InputSentence3", "InputSentence4"),
)


@dataclass(frozen=True)
class InfillingScores:
    """Measures, float64 [items, samples] each, what was filled in of each item and sample, and what that took."""

    measures: dict[str, Tensor]
    fillings: list[list[str]]
    cost: Cost

    def estimates(self) -> dict[str, Estimate]:
        """Means over the items; the error is that between items, whose samples are averaged."""
        return {name: Estimate.of(values.mean(1)) for name, values in self.measures.items()}

    def to_dict(self) -> dict[str, Any]:
        """Scores, fillings and cost as JSON values."""
        scores = {name: estimate.to_dict() for name, estimate in self.estimates().items()}
        return {**scores, "fillings": self.fillings, **self.cost}

    def __str__(self) -> str:
        scores = "; ".join(f"{name} {score}" for name, score in self.estimates().items())
        return f"{scores}; {len(self.fillings)} items, {len(self.fillings[0])} samples"


def read_stories(path: str | os.PathLike[str]) -> list[list[str]]:
    """Stories of five sentences: a CSV file of ROCStories, or of the Story Cloze Test with its right endings.

    Raises:
        ValueError: it is neither, or holds no story.
    """
    with open(path, newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.DictReader(file))
            whole, cloze = _COLUMNS
            stories = [
                [row[name] for name in whole]
                if whole[0] in row
                else [*(row[name] for name in cloze), row[f"RandomFifthSentenceQuiz{int(row['AnswerRightEnding'])}"]]
                for row in rows
            ]
        except (KeyError, ValueError, TypeError, csv.Error):
            stories = []
    if not stories or not all(sentence for story in stories for sentence in story):
        raise ValueError(
            f"{os.fspath(path)} is no file of stories: a CSV with sentence1 .. sentence5, as ROCStories has them, or "
            "InputSentence1 .. InputSentence4, RandomFifthSentenceQuiz1, 2 and AnswerRightEnding"
        )
    return stories


def infill_stories(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    stories: Sequence[Sequence[str]],
    *,
    hidden: int = 1,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    **options: Any,
) -> InfillingScores:
    """Fills in the third of each story's five sentences, or all but the first and the last; F-measures of ROUGE in %.

    A gap has as many tokens as what is missing, as in the paper. Words are not stemmed.

    Args:
        hidden: sentences to fill in, 1 or 3.
        num_samples: fillings of each story.
        seed: of the fillings, whose noise depends on it, the story's number and the sample's alone.
        options: those of `pyquiet.infill`.

    Raises:
        ImportError: the library rouge-score is missing.
        ValueError, TypeError: an option is out of range; as `infill`.
    """
    if hidden not in _HIDDEN:
        raise ValueError(f"hidden must be 1 or 3, of five sentences, got {hidden}")
    check_count("num_samples", num_samples, least=1)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError('rouge-score is needed to score stories: pip install "pyquiet[eval]"') from None
    codec, part = Codec(tokenizer), _HIDDEN[hidden]
    texts, missing = [], []
    for story in stories:
        before, middle, after = (" ".join(story[x]) for x in (slice(part.start), part, slice(part.stop, None)))
        length = len(codec.behind(f" {middle}"))
        texts += [codec.gapped([before, f" {after}"], [range(length, length + 1)])] * num_samples
        missing += [middle] * num_samples
    found, cost = fill_all(model, codec, texts, seed=seed, batch_size=batch_size, progress=progress, **options)
    scorer = RougeScorer([*_ROUGE.values()])
    scores = [scorer.score(*pair) for pair in zip(missing, found, strict=True)]
    table = {name: [100 * score[key].fmeasure for score in scores] for name, key in _ROUGE.items()}
    measures = {name: torch.tensor(row, dtype=torch.float64).view(-1, num_samples) for name, row in table.items()}
    return InfillingScores(measures, in_turns([text.strip() for text in found], num_samples), cost)


def in_turns(texts: list[str], each: int) -> list[list[str]]:
    """The texts of each item, of which `each` follow each other."""
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def fill_all(
    model: Any, codec: Codec, texts: Sequence[Gapped], *, seed: int, batch_size: int, progress: bool, **options: Any
) -> tuple[list[str], Cost]:
    """What stands in the texts' gaps, filled in batches, and what it took. Special tokens are banned.

    The noise of each text is named by its number.
    """
    check_count("batch_size", batch_size, least=1)
    cost: Cost = {}
    banned, found = codec.banned(as_engine(model).vocab_size), []
    for start in tqdm(range(0, len(texts), batch_size), "filled", disable=None if progress else True):
        batch = texts[start : start + batch_size]
        ids = range(start, start + len(batch))
        filled, took = fill_gaps(model, batch, seed=seed, sequence_ids=ids, banned=banned, **options)
        cost = {name: cost.get(name, 0) + value for name, value in took.items()}
        found += ["".join(part for part, is_filled in codec.parts(one.ids, one.given) if is_filled) for one in filled]
    return found, cost
