"""What counts as an energy, and what any function must return to be one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyquiet.diffusion.energy import Energy, as_energy, check_candidates
from pyquiet.diffusion.padding import leftward


class Constant(Energy):
    def __call__(self, candidates, input_ids, time, log_mu, *, attention_mask=None):
        return torch.zeros(candidates.shape[:2])


CALL = (torch.ones(2, 3, 4).long(), torch.zeros(2, 4).long(), torch.full((2,), 0.5).double(), torch.zeros(2, 3))


def test_an_energy_is_taken_as_it_is():
    energy = Constant()
    assert as_energy(energy) is energy
    assert [energy.needs_log_mu, energy.self_normalized, energy.time_free] == [False] * 3


def test_an_energy_needs_its_call():
    with pytest.raises(TypeError, match="abstract"):
        Energy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_function_gets_four_arguments_and_gives_floats(dtype):
    given = []

    def reward(*arguments):
        given.extend(arguments)
        return arguments[0].sum(-1).to(dtype)

    energy = as_energy(reward)
    assert energy.needs_log_mu
    assert not energy.self_normalized
    assert not energy.time_free
    found = energy(*CALL, attention_mask=torch.ones(2, 4).bool())
    assert all(mine is theirs for mine, theirs in zip(given, CALL, strict=True))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found == 4).all()


class Module(nn.Module):
    def forward(self, candidates, input_ids, time, log_mu, attention_mask):
        return (candidates * attention_mask[:, None]).sum(-1).float()


@pytest.mark.parametrize(
    "energy",
    [
        lambda c, x, t, m, *, attention_mask: (c * attention_mask[:, None]).sum(-1).float(),
        partial(lambda factor, c, x, t, m, attention_mask=None: factor * (c * attention_mask[:, None]).sum(-1), 1.0),
        Module().eval(),
    ],
    ids=["function", "partial", "module"],
)
def test_a_function_that_names_the_attention_mask_gets_it(energy):
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    assert as_energy(energy)(*CALL, attention_mask=mask).tolist() == [[2.0] * 3, [4.0] * 3]
    assert as_energy(energy)(*CALL).tolist() == [[4.0] * 3] * 2


def test_a_function_without_the_name_does_not_get_it():
    given = {}
    as_energy(lambda *arguments, **more: given.update(more) or arguments[3])(*CALL, attention_mask=torch.ones(2, 4))
    assert not given


def test_bad_energies_are_named():
    with pytest.raises(TypeError, match=r"energy must be a pyquiet.diffusion.Energy or a function of .*got int"):
        as_energy(3)
    with pytest.raises(ValueError, match=r"energy must return a tensor \[B, k\] = \[2, 3\].*got \[2, 3, 4\]"):
        as_energy(lambda candidates, *_: candidates.float())(*CALL)
    with torch.device("meta"), pytest.raises(TypeError, match=r"got LlamaForCausalLM; .* AREnergy\(model\)"):
        as_energy(LlamaForCausalLM(LlamaConfig()))
    with pytest.raises(ValueError, match=r"real numbers, got torch.complex64"):
        as_energy(lambda candidates, *_: candidates[..., 0] * 1j)(*CALL)
    with pytest.raises(ValueError, match=r"one number a candidate, got list"):
        as_energy(lambda *_: [[0.0]])(*CALL)


def test_shapes_must_fit():
    candidates, input_ids, *_ = CALL
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(check_candidates(candidates, input_ids, mask), mask.bool())
    assert check_candidates(candidates, input_ids, None).all()
    for wrong in (candidates[:1], candidates[..., 1:], candidates[:, 0]):
        with pytest.raises(ValueError, match=r"candidates must be \[B, k, T\] and input_ids \[B, T\]"):
            check_candidates(wrong, input_ids, None)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \[2, 4\], got \[2, 3\]"):
        check_candidates(candidates, input_ids, mask[:, 1:])


def test_what_is_kept_goes_to_the_left_in_its_order():
    keep = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert leftward(keep).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
