"""The record that goes with reports: where they came from, and of which weights."""

import json
from datetime import UTC, datetime

import pytest
import torch
from torch import nn

import pyquiet
from pyquiet import native
from pyquiet.environment import environment_record, examine, fingerprint


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False)).to(dtype)


def test_the_record_says_when_where_and_of_which_models() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    record = environment_record("pyquiet try", {"seed": 3, "text": ["a.txt"]}, {"judge": network(torch.bfloat16)})
    assert before <= datetime.fromisoformat(record["date"]) <= datetime.now(UTC)
    assert (record["command"], record["arguments"]) == ("pyquiet try", {"seed": 3, "text": ["a.txt"]})
    described = record["models"]["judge"]
    assert described.pop("fingerprint") == fingerprint(network(torch.bfloat16))
    assert described == {"class": "Sequential", "parameters": 10, "dtype": "bfloat16", "device": "cpu"}
    assert record["pyquiet"] == pyquiet.__version__
    assert record["versions"]["torch"]["version"] == torch.__version__
    assert record["native"]["isa"] == native.isa()
    assert record["threads"]["torch"] == torch.get_num_threads()
    assert record["processor"]
    assert json.loads(json.dumps(record)) == record
    assert examine().items() <= record.items()


def flip_a_bit(model: nn.Module) -> None:
    model[1].weight.data.view(torch.int32)[0, 1] ^= 1


def rename(model: nn.Module) -> None:
    model.add_module("2", model[1])
    del model._modules["1"]


def swap_bytes_of_equal_size(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.reshape(3, 2)


@pytest.mark.parametrize("change", [flip_a_bit, rename, swap_bytes_of_equal_size])
def test_a_fingerprint_tells_weights_apart(change) -> None:
    model = network()
    before = fingerprint(model)
    assert before == fingerprint(network())
    change(model)
    assert fingerprint(model) != before


def test_a_fingerprint_does_not_depend_on_how_tensors_lie_in_memory() -> None:
    model = network()
    before = fingerprint(model)
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    model[0].bias.data = torch.stack([model[0].bias.data] * 2, 1)[:, 0]
    assert fingerprint(model) == before
