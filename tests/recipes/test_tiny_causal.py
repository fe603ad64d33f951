"""The recipe of tiny-causal and the export that all recipes share: a short run becomes a folder as it is shipped."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from .modules import modules

PARAGRAPH = "The old man went slowly down the road to the village, where {} children waited for him.\n\n"


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[tuple[SimpleNamespace, Path]]:
    """The recipe's modules and the work folder of a run of one step."""
    books, work = tmp_path / "books", tmp_path / "work"
    books.mkdir()
    (books / "road.txt").write_text("".join(PARAGRAPH.format(n) for n in range(200)))
    with modules("tiny_causal") as recipe:
        settings = recipe.train.Settings(steps=1, tokens_per_step=256, intermediate_size=16)
        recipe.train.train(books, work, settings, Namespace(compile=False, quiet=True, no_bf16=True))
        yield recipe, work


def test_a_run_becomes_the_folder_that_is_shipped(trained: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    _, work = trained
    with modules(".") as shared:
        shared.export.export(work / "model", tmp_path / "shipped", None)
        shared.export.SIZE_LIMIT = 100_000
        with pytest.raises(ValueError, match="more than 100000"):
            shared.export.export(work / "model", tmp_path / "large", None)
    with safe_open(tmp_path / "shipped" / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    with safe_open(work / "checkpoint.safetensors", framework="pt") as checkpoint:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "shipped", dtype=torch.float32)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, checkpoint.get_tensor(f"weight/{name}").half().float()), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "shipped")
    assert tokenizer.decode(tokenizer("The old man").input_ids, skip_special_tokens=True) == "The old man"
    assert (tokenizer.model_max_length, tokenizer.pad_token) == (1024, "<pad>")


def test_a_finished_run_is_left_as_it_is(trained: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    recipe, work = trained
    before = (work / "checkpoint.safetensors").read_bytes(), (work / "log.jsonl").read_bytes()
    settings = recipe.train.Settings(steps=1, tokens_per_step=256, intermediate_size=16)
    recipe.train.train(tmp_path / "books", work, settings, Namespace(compile=False, quiet=True, no_bf16=True))
    assert ((work / "checkpoint.safetensors").read_bytes(), (work / "log.jsonl").read_bytes()) == before
