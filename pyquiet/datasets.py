"""What a trainer feeds a model: numbered texts, cropped at seeded places and padded on the right."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pyquiet.checks import check_count
from pyquiet.randomness import Purpose, Stream, uniforms

IGNORED = -100  # the label of a token that is not to be predicted


def numbered(dataset: Any) -> Any:
    """The dataset, or each of a dict of them, with the number of each example and of the epoch; None stays None."""
    if dataset is None or isinstance(dataset, _Numbered):
        return dataset
    if isinstance(dataset, dict):
        return {name: numbered(part) for name, part in dataset.items()}
    streamed = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    return _NumberedStream(dataset) if streamed else NumberedTexts(dataset)


class _Numbered:
    """Examples (dicts) with their index as `sequence_ids`, which names their noise, and the `epoch`."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # dataloader workers see it change

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)

    def _numbered(self, index: int, example: dict[str, Any]) -> dict[str, Any]:
        return {"sequence_ids": index, "epoch": int(self._epoch), **example}


class NumberedTexts(_Numbered, Dataset[dict[str, Any]]):
    """Examples that can be asked for by their index."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._numbered(index, self.examples[index])


class _NumberedStream(_Numbered, IterableDataset[dict[str, Any]]):
    """Examples that come one by one; each of several workers numbers its own."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index, example in enumerate(self.examples):
            yield self._numbered(first + step * index, example)


@dataclass
class TextCollator:
    """Batches examples with `input_ids` and, where they have them, `attention_mask` and `labels`.

    A text longer than `max_length` is cropped to it at a place drawn from (seed, epoch, index of the example). Padding
    that examples bring along is dropped; that of the batch lies on the right, and the mask alone tells it, so an end of
    text is a target even where it is the pad token. Other columns are ignored.

    Raises:
        ValueError: an example has no tokens. TypeError: it has no input_ids.
    """

    max_length: int = 256
    seed: int = 0
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        check_count("max_length", self.max_length, least=2)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [self._row(example) for example in examples]
        if len({tuple(row) for row in rows}) > 1:
            raise ValueError("labels: some examples of a batch have them and some have not; give them to all or none")
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        columns = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill[name])
            for name in rows[0]
        }
        short = max(0, 2 - columns["input_ids"].shape[1])  # a text of one token has no next one, but may stand alone
        batch = {name: torch.nn.functional.pad(x, (0, short), value=fill[name]) for name, x in columns.items()}
        if "sequence_ids" in examples[0]:
            batch["sequence_ids"] = torch.tensor([int(example["sequence_ids"]) for example in examples])
        return batch

    def _row(self, example: dict[str, Any]) -> dict[str, Tensor]:
        if "input_ids" not in example:
            raise TypeError(f"an example must have input_ids, got {', '.join(example)}; tokenize the texts first")
        row = {
            name: torch.as_tensor(example[name]) for name in ("input_ids", "labels") if example.get(name) is not None
        }
        if example.get("attention_mask") is not None:
            real = torch.as_tensor(example["attention_mask"]).bool()
            row = {name: x[real] for name, x in row.items()}
        length = len(row["input_ids"])
        if not length:
            raise ValueError(f"example {example.get('sequence_ids', '')} has no tokens; drop empty texts")
        first = self._first(example, length)
        row = {name: x[first : first + self.max_length].long() for name, x in row.items()}
        return {**row, "attention_mask": torch.ones_like(row["input_ids"])}

    def _first(self, example: dict[str, Any], length: int) -> int:
        if length <= self.max_length:
            return 0
        place = Stream(self.seed, Purpose.CROP, int(example.get("sequence_ids", 0)), int(example.get("epoch", 0)))
        return int(uniforms(place, 1).item() * (length - self.max_length + 1))


def documents(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each text, its end of text among them.

    Raises:
        ValueError: a text is empty.
    """
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {number} is empty or no text: {text!r}; drop it")
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        yield ids


_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_dataset(name: str, column: str) -> Iterable[str]:
    """The documents in a column of a dataset's training split: a name or folder, or a json, csv, parquet or txt file.

    Raises:
        ImportError: the datasets library is missing. FileNotFoundError: no such file. ValueError: no such column.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError('datasets is needed to read --dataset: pip install "pyquiet[train]"') from None
    kind = _FILES.get(Path(name).suffix)
    if kind is not None and not Path(name).exists():  # no name of a data set, which would be looked for on the network
        raise FileNotFoundError(f"there is no file {name}")
    if Path(name).is_file():
        if kind is None:
            raise ValueError(f"{name} must be a file that ends in one of {', '.join(_FILES)}")
        rows = datasets.load_dataset(kind, data_files=name, split="train")
    elif (Path(name) / "state.json").exists():
        rows = datasets.load_from_disk(name)
    else:
        rows = datasets.load_dataset(name, split="train")
    if column not in rows.column_names:
        others = ", ".join(rows.column_names)
        raise ValueError(f"the dataset {name} has no column {column!r}, only {others}; name one by --dataset-column")
    texts: Iterable[str] = rows[column]
    return texts


def packed(texts: Iterable[str], tokenizer: Any, max_length: int, *, across: bool = True) -> list[dict[str, Any]]:
    """Examples of `max_length` tokens that hold the documents one after another; the last one holds what remains.

    Not `across`: each document has examples of its own, of which the last one is the shorter.

    Raises:
        ValueError: there is no text, or an empty one.
    """
    check_count("max_length", max_length, least=2)
    pieces = [torch.tensor(ids, dtype=torch.int64) for ids in documents(texts, tokenizer)]
    if not sum(map(len, pieces)):
        raise ValueError("the texts hold no token; give longer ones")
    streams = [torch.cat(pieces)] if across else pieces
    return [{"input_ids": part} for stream in streams for part in stream.split(max_length)]
