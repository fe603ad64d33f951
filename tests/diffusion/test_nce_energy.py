"""The trained energy: zero at first, saved and loaded as it is, the same however its texts are batched and padded."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    EsmConfig,
    RobertaConfig,
)

import pyquiet
from pyquiet.diffusion.energy import Energy
from pyquiet.diffusion.modeling import MaskedDenoiser, backbone
from pyquiet.diffusion.nce_energy import NCEEnergy, NCEEnergyConfig
from pyquiet.diffusion.sampling import diffuse

V, MASK, PAD = 19, 18, 1
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {
    "max_position_embeddings": 24,
    "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CONFIGS = {
    "bert": BertConfig(**SIZES, **TEXT),
    "roberta": RobertaConfig(**SIZES, **TEXT),
    "albert": AlbertConfig(**SIZES, **TEXT, embedding_size=8),
    "electra": ElectraConfig(**SIZES, **TEXT, embedding_size=8),
    "distilbert": DistilBertConfig(
        vocab_size=V, dim=16, n_layers=2, n_heads=2, hidden_dim=24, pad_token_id=PAD, dropout=0.0, attention_dropout=0.0
    ),
    "modernbert": None,
}
every_architecture = pytest.mark.parametrize("name", CONFIGS)


def denoiser(name: str = "modernbert", seed: int = 0) -> MaskedDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "modernbert":
            model = backbone(V, mask_token_id=MASK, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        else:
            model = AutoModelForMaskedLM.from_config(CONFIGS[name])
    return MaskedDenoiser(model.eval(), MASK)


def energy(name: str = "modernbert", pool: str = "sum_masked", seed: int = 0) -> NCEEnergy:
    """One that has left zero, in float64."""
    model = NCEEnergy.from_denoiser(denoiser(name, seed), pool).double()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model


def problem(B=3, k=4, T=7, seed=0):
    """Candidates, noisy texts, time and log mu, and the padding, on either side."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(2, MASK, (B, T), generator=generator)
    masked = torch.rand(B, T, generator=generator) < 0.5
    drawn = torch.randint(2, MASK, (B, k, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, -2:] = mask[1, :2] = False
    candidates = torch.where(masked[:, None], drawn, texts[:, None])
    time = torch.rand(B, generator=generator, dtype=torch.float64)
    return candidates, texts.masked_fill(masked, MASK), time, torch.zeros(B, k), mask


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@every_architecture
@pytest.mark.parametrize("pool", ["sum_masked", "mean"])
@torch.no_grad()
def test_it_starts_at_zero(name, pool):
    candidates, input_ids, time, log_mu, mask = problem()
    model = NCEEnergy.from_denoiser(denoiser(name), pool)
    found = model(candidates, input_ids, time, log_mu, attention_mask=mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.zeros(3, 4))
    assert isinstance(model, Energy)
    assert model.time_free
    assert not model.needs_log_mu
    assert not model.self_normalized


@every_architecture
@torch.no_grad()
def test_the_trunk_starts_from_what_the_denoiser_was_trained_on(name):
    """Of a text without masks, the trunk's hidden states are the denoiser's."""
    mu = denoiser(name)
    model = NCEEnergy.from_denoiser(mu)
    texts = torch.randint(2, MASK, (2, 7), generator=torch.Generator().manual_seed(0))
    close(model._hidden(texts, model.get_input_embeddings()(texts), None), mu.hidden(texts), atol=1e-5)


@every_architecture
@pytest.mark.parametrize("pool", ["sum_masked", "mean"])
@torch.no_grad()
def test_padding_and_batch_have_no_say(name, pool):
    model = energy(name, pool)
    candidates, input_ids, time, log_mu, mask = problem()
    found = model(candidates, input_ids, time, log_mu, attention_mask=mask)
    for b in range(3):
        rows = candidates[b : b + 1, :, mask[b]], input_ids[b : b + 1, mask[b]]
        alone = model(*rows, time[b : b + 1], log_mu[b : b + 1])
        close(alone, found[b : b + 1])
    strange = candidates.masked_fill(~mask[:, None], -100)
    close(model(strange, input_ids.masked_fill(~mask, MASK), time, log_mu, attention_mask=mask), found)
    assert found.std() > 0.02


@pytest.mark.parametrize("microbatch", [1, 5, 12, None])
@pytest.mark.parametrize("pool", ["sum_masked", "mean"])
@torch.no_grad()
def test_the_microbatch_changes_nothing(pool, microbatch):
    model = energy(pool=pool)
    candidates, input_ids, time, log_mu, mask = problem()
    one_by_one = torch.cat([model(candidates[:, j : j + 1], input_ids, attention_mask=mask) for j in range(4)], 1)
    model.microbatch = microbatch
    close(model(candidates, input_ids, time, log_mu, attention_mask=mask), one_by_one)


@torch.no_grad()
def test_pooling_is_what_it_says():
    candidates, input_ids, *_ = problem()
    model = energy(pool="sum_masked")
    noisy = model.get_input_embeddings()(input_ids)
    hidden = model._hidden(candidates[:, 0], noisy, None)
    each = model.head(hidden)[..., 0]
    close(model(candidates, input_ids)[:, 0], (each * (input_ids == MASK)).sum(1))
    model.config.pool = "mean"
    close(model(candidates, input_ids)[:, 0], model.head(hidden.mean(1))[:, 0])


@torch.no_grad()
def test_both_texts_are_read():
    model = energy()
    candidates, input_ids, *_ = problem()
    found = model(candidates, input_ids)
    other = candidates.clone()
    other[..., 3] = (other[..., 3] + 1) % MASK
    assert (model(other, input_ids) - found).abs().min() > 1e-6
    noisier = input_ids.clone()
    noisier[noisier != MASK] = 5
    assert (model(candidates, noisier) - found).abs().min() > 1e-6


@pytest.mark.parametrize("name", ["modernbert", "albert"])
@pytest.mark.parametrize("pool", ["sum_masked", "mean"])
def test_gradients_reach_every_weight(name, pool):
    model = energy(name, pool).train()
    candidates, input_ids, time, log_mu, mask = problem()
    model(candidates, input_ids, time, log_mu, attention_mask=mask).square().sum().backward()
    without = {"trunk.pooler", "mask_token"}
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not [name for name in lacking if not any(part in name for part in without)]


def test_a_fresh_energy_learns_from_its_last_layer_on():
    model = NCEEnergy.from_denoiser(denoiser())
    candidates, input_ids, *_ = problem()
    model(candidates, input_ids).sum().backward()
    assert model.head[-1].weight.grad.abs().max() > 0
    assert not model.projection.weight.grad.any()


def test_gradient_checkpointing_gives_the_same_gradients():
    candidates, input_ids, *_ = problem()
    grads = []
    for checkpointing in (False, True):
        model = energy().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(candidates, input_ids).square().sum().backward()
        grads.append(model.projection.weight.grad)
    close(*grads)


@every_architecture
@torch.no_grad()
def test_it_survives_save_and_load(name, tmp_path):
    model = energy(name, "mean").float().eval()
    candidates, input_ids, *_ = problem()
    expected = model(candidates, input_ids)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, NCEEnergyConfig)
    assert (config.pool, config.mask_token_id) == ("mean", MASK)
    assert type(config.base_config) is type(model.trunk.config)
    for loaded in (NCEEnergy.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is NCEEnergy
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in model.state_dict().items())
        assert torch.equal(loaded(candidates, input_ids), expected)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}


@torch.no_grad()
def test_a_new_one_from_its_configuration_is_zero_as_well():
    model = NCEEnergy(NCEEnergyConfig(denoiser().model.config, mask_token_id=MASK)).eval()
    half = torch.eye(16) / 2
    assert torch.equal(model.projection.weight, torch.cat([half, half], 1))
    candidates, input_ids, *_ = problem()
    assert not model(candidates, input_ids).any()


@torch.no_grad()
def test_a_bf16_energy_is_summed_in_float32(tmp_path):
    energy().save_pretrained(tmp_path)
    model = NCEEnergy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.trunk.dtype == torch.bfloat16
    assert model.head[0].weight.dtype == torch.float32
    candidates, input_ids, *_ = problem()
    found = model(candidates, input_ids)
    assert found.dtype == torch.float32
    close(found.double(), energy()(candidates, input_ids), atol=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(candidates, input_ids).dtype == torch.float32


def test_the_denoiser_is_left_alone():
    mu = denoiser()
    before = {name: weight.clone() for name, weight in mu.state_dict().items()}
    model = NCEEnergy.from_denoiser(mu)
    model.trunk.get_input_embeddings().weight.data.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in mu.state_dict().items())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="pool must be one of sum_masked, mean, got 'max'"):
        NCEEnergy.from_denoiser(denoiser(), "max")
    with pytest.raises(ValueError, match="config needs base_config and mask_token_id"):
        NCEEnergy(NCEEnergyConfig())
    toy = type("Toy", (), {"mask_id": 0, "vocab_size": 3, "device": None, "training": 0, "hidden": 0, "head": 0})()
    with pytest.raises(TypeError, match="denoiser must be a MaskedDenoiser or a masked LM, got Toy"):
        NCEEnergy.from_denoiser(toy)
    esm = AutoModelForMaskedLM.from_config(
        EsmConfig(**SIZES, **TEXT, mask_token_id=MASK, token_dropout=True, position_embedding_type="rotary")
    )
    with pytest.raises(NotImplementedError, match="EsmModel cannot be an energy's trunk"):
        NCEEnergy.from_denoiser(MaskedDenoiser(esm, MASK))
    candidates, input_ids, *_ = problem()
    with pytest.raises(ValueError, match=r"candidates must be \[B, k, T\]"):
        energy()(candidates[0], input_ids)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask_id": 3}, f"its mask_id is 3, but the denoiser's is {MASK}"),
        ({"token": 28}, "a text holds the id 28, but its trunk knows"),
        ({"length": 25}, "texts of 25 columns are longer than the"),
        ({}, None),
    ],
    ids=str,
)
def test_what_it_cannot_read_is_found_before_anything_is_computed(change, named):
    mu, ids = denoiser("bert"), torch.full((1, change.get("length", 6)), MASK)
    ids[:, 2] = change.get("token", 4)
    found = NCEEnergy.from_denoiser(mu)
    found.mask_id = change.get("mask_id", MASK)
    mu.hidden, mu.context, mu.vocab_size = None, None, 40
    with pytest.raises(ValueError if named else TypeError, match=named or "'NoneType' object is not callable"):
        diffuse(mu, found, input_ids=ids)


def test_the_package_registers_it():
    assert pyquiet.__name__ == "pyquiet"
    assert type(AutoConfig.for_model("pyquiet_energy")) is NCEEnergyConfig
