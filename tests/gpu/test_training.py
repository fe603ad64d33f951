"""Training on GPUs: weights sharded by accelerate, and bfloat16."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ..processes import in_processes
from ..quiet_star.thinkers import thinker
from ..quiet_star.training_runs import arguments, examples, run, weights

pytestmark = pytest.mark.gpu


def test_fully_sharded_is_the_run_of_one_process(tmp_path):
    """Over all GPUs there are; the batch of the single process is the joint one."""
    count = torch.cuda.device_count()
    in_processes(count, "quiet_star.training_runs", "gpus", tmp_path)
    model = thinker(m=2, dtype=torch.float32)
    settings = arguments(tmp_path, max_steps=3, per_device_train_batch_size=2 * count)
    run(model, settings, examples(24, longest=9))
    sharded = load_file(tmp_path / "fsdp.safetensors")
    for name, value in weights(model).items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-4)


def test_bfloat16_over_float32_weights(tmp_path):
    model = thinker(m=2, dtype=torch.float32)
    trainer = run(model, arguments(tmp_path, use_cpu=False, bf16=True), examples(8, longest=12))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(log["loss"] < 10 for log in trainer.state.log_history if "loss" in log)
