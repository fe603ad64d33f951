"""The toy of the draft loss: its data, a short run through all of it, and what its check refuses."""

import json

import pytest
import torch

from .modules import modules


@pytest.fixture
def toy():
    with modules("any_subset_toy", "tiny_any_subset") as recipe:
        yield recipe.run


def test_held_out_bytes_are_of_other_files(toy):
    train, held_out = toy.windows()
    assert train.shape[1] == held_out.shape[1] == 96
    assert 0 < 10 * len(held_out) < len(train)
    assert bytes(train[0].tolist()).isascii()
    assert not {tuple(row) for row in held_out[::50].tolist()} <= {tuple(row) for row in train.tolist()}


def test_a_short_run_is_evaluated_and_refused(toy, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {}
    for name in toy.VARIANTS:
        model = toy.train(name, tmp_path, steps=2)
        assert not model.training
        assert torch.equal(toy.train(name, tmp_path).lm_loss.weight, model.lm_loss.weight)  # as it was saved
        texts = toy.windows()[1][:4]
        results[name] = {**toy.evaluated(model, texts), "calls": toy.costs(model, texts[:1])}
    torch.set_num_threads(threads)
    assert set(results["joint"]) == {"50%", "95%", "calls"}
    assert all(0 < cost <= 1 for cost in results["joint"]["calls"].values())
    json.dumps(results)
    with pytest.raises(AssertionError, match="acceptance of draft"):
        toy.check(results)
    results["joint"]["95%"]["acceptance"][0], results["draft"]["95%"]["acceptance"][0] = 0.4, 0.6
    results["draft"]["calls"]["one_call k=4"] = 0.56
    with pytest.raises(AssertionError, match=r"0\.560 calls"):
        toy.check(results)
    results["draft"]["calls"]["one_call k=4"] = 0.5
    toy.check(results)
