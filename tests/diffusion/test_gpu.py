"""Masked diffusion on a GPU is what it is on the CPU: in float64, where nothing but an exact tie could differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyquiet.diffusion import AREnergy, NCEEnergy, NCETrainer, NCETrainingArguments, diffuse, nll
from pyquiet.diffusion.hooks import by_confidence, by_threshold, remdm
from pyquiet.diffusion.modeling import MaskedDenoiser

from .networks import MASK, V, network
from .runs import arguments, examples, model, run

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WAYS = {
    "schedule_first": {"steps": 5},
    "ancestral": {"sampler": "ancestral", "steps": 5},
    "cached": {"sampler": "cached", "steps": 12},
    "first_hitting": {"sampler": "first_hitting"},
    "windows": {"sampler": "semi_autoregressive", "context": 6, "stride": 4, "steps": 3},
    "reveal set": {"mode": "reveal_set", "steps": 3, "temperature": 0.8, "top_p": 0.9},
    "more candidates": {"ess_target": 3.0, "max_candidates": 12, "steps": 3, "energy_microbatch": 5},
    "by confidence": {"order": by_confidence(2)},
    "by threshold": {"order": by_threshold(0.3)},
    "remasked": {"remask": remdm("rescale", eta=0.5), "steps": 6},
}


def texts():
    """Two texts with gaps, padded on either side: ids and attention mask [2, 9]."""
    ids = torch.randint(8, V, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 3:8] = MASK
    real = torch.ones_like(ids)
    real[0, :2], real[1, -1:] = 0, 0
    return ids, real


def energies(denoiser):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=V, **shape)).to(denoiser.device, torch.float64).eval()
    trained = NCEEnergy.from_denoiser(denoiser).eval()
    trained.head[-1].weight.data.fill_(0.3)

    def reward(candidates, input_ids, time, log_mu, attention_mask):
        return ((candidates % 5 == 0) & attention_mask[:, None]).sum(-1).double()

    return {"none": None, "ar": AREnergy(lm, bos_id=0), "trained": trained, "function": reward}


@pytest.fixture(scope="module")
def both():
    """Denoisers in float64 on the CPU and the GPU, and energies beside them."""
    found = []
    for device in ("cpu", DEVICE):
        denoiser = network().double().to(device)
        found.append((device, denoiser, energies(denoiser)))
    return found


@pytest.mark.parametrize("energy", ["none", "ar", "trained", "function"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_texts(both, way, energy):
    ids, real = texts()
    here, there = (
        diffuse(mu, known[energy], input_ids=ids.to(device), attention_mask=real.to(device), candidates=4, **WAYS[way])
        for device, mu, known in both
    )
    assert there.tokens.device.type == DEVICE
    assert torch.equal(here.tokens, there.tokens.cpu())
    for name in ("reveal_step", "denoiser_calls", "energy_passes", "depth"):
        assert torch.equal(getattr(here, name), getattr(there, name)), name
    torch.testing.assert_close(here.ess, there.ess, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("energy", ["none", "ar", "trained", "function"])
@pytest.mark.parametrize("kind", ["marginal", "K_step"])
def test_the_same_likelihood(both, kind, energy):
    ids, real = texts()
    ids[ids == MASK] = 9
    options = {"kind": kind, "n": 4, "samples": 2, "steps": 3}
    here, there = (
        nll(mu, ids.to(device), known[energy], attention_mask=real.to(device), **options) for device, mu, known in both
    )
    for name in ("lower", "nats", "upper", "draws_error"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_drawn_from_as_it_is(dtype):
    denoiser = network().to(DEVICE, dtype)
    names = ("mask_id", "vocab_size", "device", "training", "hidden", "head")
    wide = SimpleNamespace(**{name: getattr(denoiser, name) for name in names})
    options = {"length": 9, "num_samples": 40, "steps": 4, "seed": 1}
    assert denoiser.native_head(torch.zeros(1, 24, dtype=dtype, device=DEVICE)).dtype == dtype
    assert torch.equal(diffuse(denoiser, **options).tokens, diffuse(wide, **options).tokens)


def test_training_in_bfloat16_over_float32_weights(tmp_path):
    mu = model().float()
    log = run(mu, arguments(tmp_path / "mu", use_cpu=False, bf16=True), examples(8)).state.log_history
    assert all(x["loss"] < 30 for x in log if "loss" in x)
    settings = {"max_steps": 2, "bf16": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
    energy = NCEEnergy.from_denoiser(MaskedDenoiser(mu.eval()))
    trainer = NCETrainer(
        energy.train(),
        NCETrainingArguments(str(tmp_path / "energy"), **settings),
        train_dataset=examples(8),
        denoiser=mu,
    )
    trainer.train()
    assert {p.dtype for p in energy.parameters()} == {torch.float32}
    assert all(x["loss"] < 30 for x in trainer.state.log_history if "loss" in x)
