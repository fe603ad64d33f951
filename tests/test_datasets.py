"""Texts on their way to a trainer: crops, padding, numbers, epochs, data sets and packing."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from pyquiet import load
from pyquiet.datasets import NumberedTexts, TextCollator, numbered, packed, read_dataset
from pyquiet.files import read_texts

from .chi_square import chi_square


def example(ids, number=0, epoch=0, **more):
    return {"input_ids": ids, "sequence_ids": number, "epoch": epoch, **more}


def test_a_batch_is_padded_on_the_right_and_the_mask_alone_tells():
    batch = TextCollator(max_length=8, pad_token_id=2)([example([5, 2, 2], 7), example([3, 4, 5, 6, 2], 1)])
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2, 2], [3, 4, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]  # ends of text stay targets
    assert batch["sequence_ids"].tolist() == [7, 1]
    assert all(x.dtype == torch.int64 for x in batch.values())
    assert set(batch) == {"input_ids", "attention_mask", "sequence_ids"}


def test_padding_of_the_examples_is_dropped_and_labels_go_along():
    row = example([0, 0, 5, 6, 7], attention_mask=[0, 0, 1, 1, 1], labels=[-100, -100, -100, 6, 7], text="ignored")
    batch = TextCollator(max_length=8)([row, example([1, 2], attention_mask=[1, 1], labels=[1, 2])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 2, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [1, 2, -100]]
    single = TextCollator(max_length=8)([example([9])])
    assert single["attention_mask"].tolist() == [[1, 0]]


def test_crops_are_seeded_by_epoch_and_example():
    ids = list(range(100))

    def crop(seed, epoch, number):
        labels = [i if i % 2 else -100 for i in ids]
        batch = TextCollator(max_length=10, seed=seed)([example(ids, number, epoch, labels=labels)])
        first = int(batch["input_ids"][0, 0])
        assert batch["input_ids"][0].tolist() == ids[first : first + 10]
        assert batch["labels"][0].tolist() == labels[first : first + 10]
        return first

    assert crop(1, 2, 3) == crop(1, 2, 3)
    places = {crop(s, e, n) for s, e, n in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}
    assert len(places) == 4


def test_every_place_is_as_likely():
    collate = TextCollator(max_length=4)
    places = Counter(int(collate([example(list(range(8)), n)])["input_ids"][0, 0]) for n in range(2000))
    assert set(places) == {0, 1, 2, 3, 4}
    assert chi_square(torch.tensor([places[i] for i in range(5)]), torch.full((5,), 0.2)) > 1e-4


def test_examples_that_ask_for_the_epoch_hear_of_it():
    class Texts(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    texts = Texts([{"input_ids": [1, 2]}])
    numbered(texts).set_epoch(4)
    assert texts.epoch == 4


def test_numbers_and_epochs_reach_the_workers():
    texts = NumberedTexts([{"input_ids": [i, i]} for i in range(4)])
    loader = DataLoader(texts, batch_size=None, num_workers=1, persistent_workers=True)
    assert [(x["sequence_ids"], x["epoch"]) for x in loader] == [(i, 0) for i in range(4)]
    texts.set_epoch(3)
    assert [(x["sequence_ids"], x["epoch"]) for x in loader] == [(i, 3) for i in range(4)]


def test_streams_are_numbered_too():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"input_ids": [1, 2]}, {"input_ids": [3], "sequence_ids": 9}])

    stream = numbered(Stream())
    stream.set_epoch(2)
    assert [(x["sequence_ids"], x["epoch"]) for x in stream] == [(0, 2), (9, 2)]
    assert numbered(None) is None
    assert set(numbered({"a": [1], "b": [2]})) == {"a", "b"}


def test_bad_examples():
    collate = TextCollator()
    with pytest.raises(TypeError, match="input_ids"):
        collate([{"text": "words"}])
    with pytest.raises(ValueError, match="example 3 has no tokens"):
        collate([example([1], 3, attention_mask=[0])])
    with pytest.raises(ValueError, match="labels"):
        collate([example([1, 2]), example([1, 2], labels=[1, 2])])
    with pytest.raises(ValueError, match="max_length"):
        TextCollator(max_length=1)


def test_reading(tmp_path):
    (tmp_path / "a.txt").write_text("caf\u00e9", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": x, "n": 1}) for x in ("one", "two")))
    assert read_texts([tmp_path / "a.txt"]) == ["caf\u00e9"]
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        read_texts([tmp_path / "b.txt"])
    with pytest.raises(FileNotFoundError):
        read_texts([tmp_path / "none.txt"])
    assert list(read_dataset(str(tmp_path / "c.jsonl"), "text")) == ["one", "two"]
    with pytest.raises(ValueError, match=r"no column 'body', only text, n"):
        read_dataset(str(tmp_path / "c.jsonl"), "body")
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.csv"):
        read_dataset("nowhere.csv", "text")
    (tmp_path / "c.xml").touch()
    with pytest.raises(ValueError, match=r"must be a file that ends in one of \.jsonl, "):
        read_dataset(str(tmp_path / "c.xml"), "text")


def test_packing_loses_nothing():
    _, tokenizer = load("tiny-causal")
    texts = ["Once upon a time", "The king was old. " * 9, "End"]
    pieces = packed(texts, tokenizer, 8)
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert [token for piece in pieces for token in piece["input_ids"].tolist()] == stream
    assert [len(piece["input_ids"]) for piece in pieces] == [8] * (len(stream) // 8) + [len(stream) % 8]
    assert len(stream) % 8
    with pytest.raises(ValueError, match="no token"):
        packed([], tokenizer, 8)
    with pytest.raises(ValueError, match="text 1 is empty"):
        packed(["a", " "], tokenizer, 8)
    with pytest.raises(ValueError, match="max_length"):
        packed(["a"], tokenizer, 1)
