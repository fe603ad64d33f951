"""Released checkpoints, made here with random numbers."""

import json

import pytest
import torch
from safetensors.torch import save_file

import pyquiet
from pyquiet.any_subset import load_released

from .models import random_xlnet


@pytest.fixture(scope="module")
def model():
    return random_xlnet()


def weights_of(model, prefix="", head=True):
    keep = {key: value.clone() for key, value in model.state_dict().items() if head or key != "lm_loss.weight"}
    return {prefix + key: value for key, value in keep.items()}


def assert_same(found, model):
    ours, theirs = found.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert found.lm_loss.weight is found.transformer.word_embedding.weight
    assert not found.training
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    known = torch.tensor([[True, False, True, False, True]])
    both = [pyquiet.joint_log_prob(m, ids, known=known) for m in (found, model)]
    assert torch.equal(*both)


def test_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert_same(load_released(tmp_path), model)
    assert {x.dtype for x in load_released(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("file", ["weights.safetensors", "pytorch_model.bin"])
def test_a_state_dict_of_any_wrapping_is_read_and_its_sizes_inferred(model, tmp_path, file, prefix, head):
    save = save_file if file.endswith("safetensors") else torch.save
    save(weights_of(model, prefix, head), tmp_path / file)
    assert_same(load_released(tmp_path / file), model)


def test_a_configuration_beside_the_file_or_given_goes_before_sizes(tmp_path):
    model = random_xlnet(clamp_len=2)
    torch.save(weights_of(model), tmp_path / "model.pt")
    assert load_released(tmp_path / "model.pt").config.clamp_len == -1
    assert_same(load_released(tmp_path / "model.pt", model.config), model)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    found = load_released(tmp_path / "model.pt")
    assert found.config.clamp_len == 2
    assert_same(found, model)


def test_half_precision_is_kept_unless_another_is_asked_for(model, tmp_path):
    torch.save({key: value.half() for key, value in weights_of(model).items()}, tmp_path / "model.pt")
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        assert {x.dtype for x in load_released(tmp_path / "model.pt", dtype=dtype).parameters()} == {expected}


def changed(weights, **changes):
    return {key: value for key, value in (weights | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"transformer.layer.1.rel_attn.k": None}, "lacks transformer.layer.1.rel_attn.k"),
        ({"transformer.word_embedding.weight": None}, "lacks transformer.word_embedding.weight"),
        ({"extra": torch.zeros(2)}, "unexpected keys, extra"),
        ({"lm_loss.bias": torch.zeros(3)}, r"lm_loss.bias of shape \[3\], not \[11\]"),
        ({"epoch": 3}, "state dict alone"),
    ],
)
def test_what_is_wrong_with_a_state_dict_is_named(model, tmp_path, changes, named):
    torch.save(changed(weights_of(model), **changes), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=named):
        load_released(tmp_path / "model.pt")


def test_other_files_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither"):
        load_released(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_released(tmp_path)
    for file, content in (("a.safetensors", b"no weights"), ("a.bin", b"no weights"), ("b.bin", b"")):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=file):
            load_released(tmp_path / file)
    torch.save({"weights": print}, tmp_path / "code.bin")
    with pytest.raises(ValueError, match=r"code\.bin: no weights"):
        load_released(tmp_path / "code.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama'"):
        load_released(tmp_path)
    model.save_pretrained(tmp_path)
    save_file(changed(weights_of(model, head=False), **{"transformer.mask_emb": None}), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks transformer.mask_emb"):
        load_released(tmp_path)
