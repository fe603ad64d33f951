"""What the card of every embedded model says of its size and build is so, and the family is as small as promised."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pyquiet import zoo

FAMILY = 25_000_000  # bytes, tokenizers, cards and texts included
# What a card calls a size, and the names that configurations give it.
SIZES = {
    r"(\d+) layers": ("num_hidden_layers", "n_layer"),
    r"width (\d+)": ("hidden_size", "d_model"),
    r"(\d+) (?:query )?heads": ("num_attention_heads", "n_head"),
    r"heads of size (\d+)": ("head_dim", "d_head"),
    r"(\d+) key/value heads": ("num_key_value_heads",),
    r"MLP (\d+)": ("intermediate_size", "d_inner"),
    r"context (\d+)": ("max_position_embeddings",),
    r"m = (\d+)": ("thought_tokens",),
    r"N = (\d+)": ("thoughts_per_token",),
}


def test_the_family_is_small() -> None:
    files = [
        file for file in Path(zoo.__file__).parent.rglob("*") if "__pycache__" not in file.parts and file.is_file()
    ]
    assert len(files) > 8 * 4
    assert sum(file.stat().st_size for file in files) <= FAMILY


@pytest.mark.parametrize("name", zoo.available())
def test_the_card_tells_the_size_of_the_weights(name: str) -> None:
    file, words = zoo.folder(name) / "model.safetensors", card(name)
    with safe_open(file, framework="pt") as weights:
        slices = [weights.get_slice(key) for key in weights.keys()]  # noqa: SIM118
        parameters = sum(math.prod(x.get_shape()) for x in slices)
        (dtype,) = {x.get_dtype() for x in slices}
    assert dtype == {"float16": "F16", "float32": "F32"}[the(r"(float\d+)", words)]
    number, million = re.search(r"([\d.,]+)( million)? parameters", words).groups()  # type: ignore[union-attr]
    unit = 1e6 if million else 1.0
    rounding = 0.05 * unit if million else 500
    assert float(number.replace(",", "")) * unit == pytest.approx(parameters, abs=rounding)
    for megabytes in re.findall(r"\(([\d.]+) MB\)", words):
        assert float(megabytes) == pytest.approx(file.stat().st_size / 1e6, abs=0.05)


@pytest.mark.parametrize("name", zoo.available())
def test_the_card_tells_the_architecture(name: str) -> None:
    said, config = the(r"(- \*\*Architecture\*\*: .*?)\n- ", card(name)), configuration(name)
    for pattern, names in SIZES.items():
        for number in re.findall(pattern, said):
            known = [config[x] for x in names if config.get(x) is not None]
            size = known[0] if known else config["hidden_size"] // config["num_attention_heads"]  # of a head
            assert int(number) == size, (pattern, names)
    assert sum(bool(re.search(pattern, said)) for pattern in SIZES) >= 2


def card(name: str) -> str:
    return (zoo.folder(name) / "README.md").read_text(encoding="utf-8")


def the(pattern: str, text: str) -> str:
    """The first match's group."""
    found = re.search(pattern, text, re.S)
    assert found, f"{pattern} is not in {text[:200]}"
    return found[1]


def configuration(name: str) -> dict[str, Any]:
    """A model's configuration, with its base's among it."""
    config = json.loads((zoo.folder(name) / "config.json").read_text(encoding="utf-8"))
    return config.get("base_config", {}) | config
