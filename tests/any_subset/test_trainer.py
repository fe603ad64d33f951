"""The trainer: the same run whatever the batches, micro-batches, processes and interruptions; and what it logs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import XLNetLMHeadModel

from pyquiet import AnySubsetTrainer, load
from pyquiet.any_subset.training import any_subset_loss, random_blocks, random_order, subset_scores
from pyquiet.randomness import epoch_seed
from pyquiet.trainers import prepare_arguments, stratified

from ..processes import in_processes
from .runs import V, arguments, examples, model, run, weights


def assert_same(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def loss_by_hand(trained, batch, rates, seed, **options):
    """The loss of a padded batch, whose texts are to be filled to these rates."""
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    order, prompt = random_order(rates, **text, seed=seed, sequence_ids=batch["sequence_ids"])
    size, offset = random_blocks(batch["sequence_ids"], seed=seed)
    blocks = {"block_size": size, "block_offset": offset}
    return any_subset_loss(trained, **text, order=order, prompt=prompt, **{"draft_weight": 0.5, **blocks, **options})


def test_a_step_is_that_of_the_loss(tmp_path):
    """One step of plain gradient descent, by hand."""
    trained = model()
    expected = copy.deepcopy(trained).train()
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "low_mask_rate": 0.2, "high_mask_rate": 0.9}
    trainer = run(trained, arguments(tmp_path, **options, draft_weight=0.3), examples(4))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    rates = 0.2 + 0.7 * stratified(torch.arange(4), 4, seed=0, step=0)
    out = loss_by_hand(expected, batch, rates, epoch_seed(0, 0), draft_weight=0.3)
    out.loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert_same(weights(trained), weights(expected), 1e-12)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(out.loss.item(), abs=1e-6)  # float32, Trainer sums
    assert log["joint_nll"] == pytest.approx(out.joint_nll.item(), abs=1e-9)
    assert log["draft_nll"] == pytest.approx(out.draft_nll.item(), abs=1e-9)
    assert 0.2 < log["masked_fraction"] < 0.9
    assert log["tokens_per_second"] > 0
    assert trainer.model is trained


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_micro_batches_make_the_joint_batch(tmp_path, weight):
    joint, parts = model(), model()
    one = run(joint, arguments(tmp_path / "a", per_device_train_batch_size=8, draft_weight=weight), examples(16))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "draft_weight": weight}
    two = run(parts, arguments(tmp_path / "b", **cut), examples(16))
    assert_same(weights(parts), weights(joint), 1e-10)
    for name in ("loss", "joint_nll", "draft_nll"):
        values = [[log.get(name) for log in x.state.log_history if "loss" in log] for x in (one, two)]
        assert values[0] == pytest.approx(values[1], abs=1e-6), name
        assert (values[0][0] is None) == (name == f"{('joint', None, 'draft')[int(2 - 2 * weight)]}_nll"), name


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, at):
    """Epochs have four steps, so the run breaks off within one, at its end and in the next; dropout is on."""
    settings = {
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": at,
        "mask_warmup_steps": 6,
        "train_sampling_strategy": "random",
    }
    unbroken, resumed = model(dropout=0.2), model(dropout=0.2)
    first = run(unbroken, arguments(tmp_path, **settings), examples(16))
    checkpoint = str(tmp_path / f"checkpoint-{at}")
    second = run(resumed, arguments(tmp_path, **settings), examples(16), resume_from_checkpoint=checkpoint)
    assert_same(weights(resumed), weights(unbroken))
    assert second.state.log_history[-2]["loss"] == first.state.log_history[-2]["loss"]


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    """Of two micro-batches in each: sums over both meet."""
    in_processes(2, "any_subset.runs", tmp_path, "2")
    trained = model()
    settings = {"max_steps": 3, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    joint = arguments(tmp_path / "one", per_device_train_batch_size=4, **settings)
    trainer = run(trained, joint, examples(24), eval_dataset=examples(5))
    assert_same(load_file(tmp_path / "two.safetensors"), weights(trained), 1e-6)
    logs, evaluation = torch.load(tmp_path / "logs.pt")
    for name in ("loss", "joint_nll", "draft_nll"):
        expected = [log[name] for log in trainer.state.log_history if "loss" in log]
        assert [log[name] for log in logs if "loss" in log] == pytest.approx(expected, abs=1e-6), name
    expected = trainer.evaluate()
    for name in ("eval_joint_nll_50", "eval_joint_nll_95", "eval_acceptance_95_1"):
        assert evaluation[name] == pytest.approx(expected[name], abs=1e-6), name
    saved = XLNetLMHeadModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same(weights(saved), weights(trained.float()), 1e-6)


def test_epochs_and_steps_have_noise_of_their_own(tmp_path, monkeypatch):
    seen = []

    def spy(trained, input_ids, *, order, prompt, **options):
        seen.append((order, prompt))
        return any_subset_loss(trained, input_ids, order=order, prompt=prompt, **options)

    monkeypatch.setattr("pyquiet.any_subset.training.any_subset_loss", spy)
    options = {"low_mask_rate": 0.5, "high_mask_rate": 0.5, "max_steps": 3, "per_device_train_batch_size": 4}
    run(model(), arguments(tmp_path, **options), examples(4))
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][0], seen[1][0])
    seen.clear()
    longer = [{"input_ids": torch.arange(60) % V} for _ in range(4)]
    run(model(), arguments(tmp_path, max_steps=3, per_device_train_batch_size=4, max_length=60), longer)
    assert not torch.equal(seen[0][1], seen[2][1])


def test_the_rates_warm_up(tmp_path):
    args = arguments(tmp_path, low_mask_rate=0.6, high_mask_rate=0.8, start_mask_rate=0.2, mask_warmup_steps=4)
    assert args.mask_rates(0) == (0.2, 0.2)
    assert args.mask_rates(2) == pytest.approx((0.4, 0.5))
    assert args.mask_rates(4) == args.mask_rates(99) == pytest.approx((0.6, 0.8))
    assert arguments(tmp_path, mask_warmup_steps=4).mask_rates(0) == (0.15, 0.15)
    assert arguments(tmp_path).mask_rates(0) == (0.15, 0.95)
    texts = [{"input_ids": torch.arange(100) % V} for _ in range(16)]
    options = {"max_steps": 3, "mask_warmup_steps": 2, "start_mask_rate": 0.1, "low_mask_rate": 0.9, "max_length": 100}
    trainer = run(model(), arguments(tmp_path, **options, high_mask_rate=0.9), texts)
    fractions = [log["masked_fraction"] for log in trainer.state.log_history if "loss" in log]
    assert fractions == pytest.approx([0.1, 0.5, 0.9])


def test_evaluation_is_over_all_targets_and_always_the_same(tmp_path):
    trained, texts = model(), examples(5)
    options = {"learning_rate": 0.0, "eval_mask_rates": [0.3, 0.8], "per_device_eval_batch_size": 2}
    trainer = run(trained, arguments(tmp_path, **options), texts, eval_dataset=texts)
    first, second = trainer.evaluate(), trainer.evaluate(list(texts))
    names = [f"joint_nll_{rate}" for rate in (30, 80)] + [f"acceptance_{rate}_{j}" for rate in (30, 80) for j in (1, 2)]
    assert all(first[f"eval_{name}"] == second[f"eval_{name}"] for name in names)
    trained.eval()
    for rate in (30, 80):
        sums = []
        for i in range(5):
            batch = trainer.data_collator([trainer.eval_dataset[i]])
            text = {name: batch[name] for name in ("input_ids", "attention_mask")}
            order, prompt = random_order(
                torch.tensor([rate / 100]), **text, seed=epoch_seed(0, 2**32 - 1), sequence_ids=batch["sequence_ids"]
            )
            sums.append(subset_scores(trained, **text, order=order, prompt=prompt))
        nll, targets, accepted, drafts = (torch.cat(x).sum(0) for x in zip(*sums, strict=True))
        assert first[f"eval_joint_nll_{rate}"] == pytest.approx((nll / targets).item(), abs=1e-9)
        for j in (1, 2):
            expected = (accepted / drafts)[j - 1].item()
            assert first[f"eval_acceptance_{rate}_{j}"] == pytest.approx(expected, abs=1e-9)
    assert math.isfinite(first["eval_loss"])
    assert AnySubsetTrainer(trained, arguments(tmp_path), eval_dataset=texts).evaluate()["eval_joint_nll_95"] > 0


def test_the_best_model_has_the_lowest_joint_nll(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "max_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "joint_nll_50", "learning_rate": 50.0}
    trainer = run(model(), arguments(tmp_path, **options), examples(8), eval_dataset=examples(4))
    values = [log["eval_joint_nll_50"] for log in trainer.state.log_history if "eval_joint_nll_50" in log]
    assert trainer.state.best_metric == min(values)


def test_bfloat16_computes_over_float32_weights(tmp_path):
    trained, exact = model().float(), model().float()
    options = {"learning_rate": 1e-3, "optim": "adamw_torch", "per_device_train_batch_size": 4}
    run(trained, arguments(tmp_path / "a", bf16=True, **options), examples(8), eval_dataset=examples(2)).evaluate()
    run(exact, arguments(tmp_path / "b", **options), examples(8))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), exact.parameters(), strict=True))
    assert max((a - b).abs().max() for a, b in zip(trained.parameters(), exact.parameters(), strict=True)) <= 5e-3


def test_a_second_call_of_train_goes_on(tmp_path):
    twice, once = model(), model()
    trainer = run(twice, arguments(tmp_path, max_steps=1), examples(2))
    trainer.train()
    assert_same(weights(run(once, arguments(tmp_path, max_steps=1), examples(2)).model), weights(once))
    assert not torch.equal(twice.lm_loss.bias, once.lm_loss.bias)


def test_a_model_goes_through_the_disk(tmp_path):
    trained = model()
    run(trained, arguments(tmp_path), examples(4)).save_model(str(tmp_path / "model"))
    loaded = XLNetLMHeadModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert_same(weights(loaded), weights(trained.float()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"draft_weight": -0.1}, "draft_weight"),
        ({"low_mask_rate": 0.9, "high_mask_rate": 0.5}, "low_mask_rate must be at most"),
        ({"start_mask_rate": 2.0}, "start_mask_rate"),
        ({"mask_warmup_steps": -1}, "mask_warmup_steps"),
        ({"smallest_block": 0}, "smallest_block"),
        ({"smallest_block": 4, "largest_block": 3}, "largest_block"),
        ({"eval_mask_rates": []}, "eval_mask_rates"),
        ({"eval_mask_rates": [1.2]}, "eval_mask_rates"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_out_of_range(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **changes)


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="XLNetLMHeadModel"):
        run(load("tiny-causal")[0], arguments(tmp_path), examples(2))
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        run(model().bfloat16(), arguments(tmp_path), examples(2))
    with pytest.raises(TypeError, match="AnySubsetTrainingArguments"):
        AnySubsetTrainer(model(), None)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        run(model(), arguments(tmp_path, gradient_checkpointing=True), examples(2))
    with pytest.raises(ValueError, match="input_ids must be in"):
        run(model(), arguments(tmp_path), [{"input_ids": [V, 1]}] * 2)
    plain = arguments(tmp_path)
    plain.metric_for_best_model, plain.greater_is_better = "acceptance_95_1", None
    prepare_arguments(plain)
    assert plain.greater_is_better is None
