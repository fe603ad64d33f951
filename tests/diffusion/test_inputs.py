"""What `diffuse` refuses, by name and before anything is computed."""

import re
from types import SimpleNamespace

import pytest
import torch

from pyquiet.diffusion.hooks import by_confidence, remdm
from pyquiet.diffusion.sampling import diffuse

from .networks import MASK, PairEnergy, V, network

IDS = torch.tensor([[3, MASK, 5], [MASK, MASK, 9]])
WINDOWS = {"sampler": "semi_autoregressive"}


@pytest.fixture(scope="module")
def denoiser():
    denoiser = network()
    denoiser.hidden = None  # nothing may be computed
    return denoiser


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"input_ids": None}, "input_ids and length are both None"),
        ({"input_ids": None, "length": 0}, "length"),
        ({"input_ids": None, "length": 4.0}, "length"),
        ({"input_ids": None, "length": 4, "mask": IDS == MASK}, "mask and attention_mask go with input_ids"),
        ({"input_ids": None, "length": 4, "num_samples": 0}, "num_samples"),
        ({"input_ids": None, "length": 4, "sequence_ids": torch.arange(2)}, "sequence_ids"),
        ({"length": 4}, "length=4"),
        ({"num_samples": 3}, "num_samples=3"),
        ({"num_samples": True}, "num_samples"),
        ({"window": "x"}, "window must be a number, got str 'x'"),
        ({"window": True}, "window must be a number"),
        ({"energy_temperature": "1"}, "energy_temperature must be a number"),
        ({"input_ids": IDS.tolist()}, "input_ids must be a tensor"),
        ({"input_ids": IDS.int()}, "input_ids must be int64"),
        ({"input_ids": IDS[0]}, "input_ids must be int64"),
        ({"input_ids": IDS[:0]}, "input_ids must be int64"),
        ({"input_ids": None, "length": 1025}, "1025 columns are longer than the 1024"),
        (WINDOWS | {"input_ids": None, "length": 1025, "context": 1025}, "1025 columns are longer than the 1024"),
        ({"input_ids": torch.tensor([[V, MASK]])}, f"input_ids holds the token {V}"),
        ({"input_ids": torch.tensor([[-1, MASK]])}, "input_ids holds the token -1"),
        ({"mask": [[True]]}, "mask must be a tensor"),
        ({"mask": (IDS == MASK).long()}, "mask must have the shape"),
        ({"mask": (IDS == MASK)[:, 1:]}, "mask must have the shape"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "mask gives the token of text 0 at 1"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask must have the shape"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "attention_mask hides all of text 1"),
        (
            {"attention_mask": torch.tensor([[0.0, 0.0, -1e4], [0.0] * 3])},
            r"attention_mask must hold 1, and 0 .* -10000",
        ),
        ({"sequence_ids": torch.zeros(3, dtype=torch.int64)}, "sequence_ids"),
        ({"sequence_ids": torch.tensor([0, -1])}, "sequence_ids"),
        ({"sequence_ids": [0, 1]}, "sequence_ids"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"candidates": 0}, "candidates"),
        ({"candidates": True}, "candidates"),
        ({"window": 1.5}, "window"),
        ({"window": float("nan")}, "window"),
        ({"energy_temperature": 0.0}, "energy_temperature"),
        ({"energy_temperature": float("nan")}, "energy_temperature"),
        ({"energy_temperature": float("inf")}, "energy_temperature"),
        ({"energy": 3}, "energy must be"),
        ({"energy": PairEnergy(), "tokens": lambda c, o: c.tokens}, "tokens takes the place"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"banned": [False] * V}, "banned"),
        ({"banned": torch.zeros(V + 1, dtype=torch.bool)}, "banned"),
        ({"banned": torch.ones(V, dtype=torch.bool)}, "banned leaves nothing"),
        ({"banned": torch.arange(V) != MASK}, "banned leaves nothing"),
        ({"mode": "other"}, "mode must be one of standard, reveal_set"),
        ({"scheme": "other"}, "scheme must be one of"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"ess_target": 0.5}, "ess_target"),
        ({"ess_target": 65.0}, "ess_target"),
        ({"ess_target": 2.0, "candidates": 100}, "candidates=100"),
        ({"energy_microbatch": 0}, "energy_microbatch"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"sampler": "euler"}, "sampler must be one of schedule_first"),
        ({"context": 4}, "context and stride"),
        ({"stride": 4}, "context and stride"),
        (WINDOWS, "context is None"),
        (WINDOWS | {"context": 0}, "context"),
        (WINDOWS | {"context": 4, "stride": 0}, "stride"),
        (WINDOWS | {"context": 4, "stride": 5}, "stride=5"),
        ({"order": 3}, "order must be callable"),
        ({"order": by_confidence(1), "sampler": "cached"}, "order decides itself"),
        ({"remask": remdm(), "sampler": "first_hitting"}, "remask decides itself"),
        ({"schedule": "linear"}, "schedule must be a Schedule"),
        ({"on_step": 3}, "on_step must be callable"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named(denoiser, options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        diffuse(denoiser, **{"input_ids": IDS} | options)


def test_texts_are_as_long_as_the_denoiser_was_made_for_and_longer_in_windows():
    denoiser = network("bert")  # of 512 positions, a table
    assert diffuse(denoiser, length=512, steps=1).tokens.shape == (1, 512)
    with pytest.raises(ValueError, match=re.escape("513 columns are longer than the 512")):
        diffuse(denoiser, length=513, steps=1)
    assert MASK not in diffuse(denoiser, length=513, steps=1, sampler="semi_autoregressive", context=512).tokens


def test_a_denoiser_that_is_none():
    with pytest.raises(TypeError, match="model must be a masked language model"):
        diffuse(lambda ids: ids, input_ids=IDS)
    names = ("mask_id", "vocab_size", "hidden", "head")
    with pytest.raises(TypeError, match="denoiser is a SimpleNamespace that lacks device, training"):
        diffuse(SimpleNamespace(**{name: getattr(network(), name) for name in names}), input_ids=IDS)
    for part in ("denoiser", "model"):
        denoiser = network()
        (denoiser if part == "denoiser" else denoiser.model).train()
        with pytest.raises(ValueError, match="denoiser is in training mode"):
            diffuse(denoiser, input_ids=IDS)
