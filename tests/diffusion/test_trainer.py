"""The trainer of denoisers: the same run whatever the batches, processes and interruptions; its average, its logs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM, TrainingArguments

from pyquiet.diffusion.modeling import MaskedDenoiser
from pyquiet.diffusion.trainer import DiffusionTrainer
from pyquiet.diffusion.training import nelbo, random_masks
from pyquiet.randomness import epoch_seed
from pyquiet.trainers import evenly_spread, stratified

from ..processes import in_processes
from .runs import MASK, arguments, examples, model, run, weights


def assert_same(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def loss_by_hand(trained, batch, level, seed, **options):
    """The loss of a padded batch whose noise has these levels."""
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    masks = random_masks(level, **text, seed=seed, sequence_ids=batch["sequence_ids"], **options)
    return nelbo(MaskedDenoiser(trained), **text, masked=masks.masked, weight=masks.weight)


@pytest.mark.parametrize("objective", ["low_variance", "continuous"])
def test_a_step_is_that_of_the_loss(tmp_path, objective):
    """One step of plain gradient descent, by hand."""
    trained = model()
    expected = copy.deepcopy(trained).train()
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "objective": objective, "ema_decay": 0.0}
    trainer = run(trained, arguments(tmp_path, **options), examples(4))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    level = stratified(torch.arange(4), 4, seed=0, step=0)
    out = loss_by_hand(expected, batch, level, epoch_seed(0, 0), objective=objective)
    out.loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert_same(weights(trained), weights(expected), 1e-12)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(out.loss.item(), abs=1e-6)  # float32, Trainer sums
    assert log["nelbo"] == pytest.approx(out.loss.item(), abs=1e-9)
    assert 0 < log["masked_fraction"] < 1
    assert log["tokens_per_second"] > 0
    assert trainer.model is trained


def test_micro_batches_make_the_joint_batch(tmp_path):
    joint, parts = model(), model()
    one = run(joint, arguments(tmp_path / "a", per_device_train_batch_size=8), examples(16))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    two = run(parts, arguments(tmp_path / "b", **cut), examples(16))
    assert_same(weights(parts), weights(joint), 1e-10)
    for name in ("loss", "nelbo"):
        values = [[log.get(name) for log in x.state.log_history if "loss" in log] for x in (one, two)]
        assert values[0] == pytest.approx(values[1], abs=1e-6), name


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = model(), model()
    run(plain, arguments(tmp_path / "a"), examples(4))
    run(saving, arguments(tmp_path / "b", gradient_checkpointing=True), examples(4))
    assert saving.is_gradient_checkpointing
    assert_same(weights(saving), weights(plain), 1e-12)


@pytest.mark.parametrize("at", [3, 5])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, at):
    """Epochs have four steps, so the run breaks off within one and in the next; dropout is on."""
    settings = {
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": at,
        "level_warmup_steps": 6,
        "ema_decay": 0.7,
        "train_sampling_strategy": "random",
    }
    unbroken, resumed = model(dropout=0.2), model(dropout=0.2)
    first = run(unbroken, arguments(tmp_path, **settings), examples(16))
    checkpoint = str(tmp_path / f"checkpoint-{at}")
    second = run(resumed, arguments(tmp_path, **settings), examples(16), resume_from_checkpoint=checkpoint)
    assert_same(weights(resumed), weights(unbroken))
    assert second.state.log_history[-2]["loss"] == first.state.log_history[-2]["loss"]
    for trainer, name in ((first, "a"), (second, "b")):
        trainer.save_model(str(tmp_path / name))
    saved = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert_same(saved[1], saved[0])
    assert any(not torch.equal(saved[0][name], value) for name, value in weights(unbroken).items() if name in saved[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one_with_the_joint_batch(tmp_path, accumulate):
    in_processes(2, "diffusion.runs", tmp_path, "diffusion", str(accumulate))
    trained = model()
    settings = {"max_steps": 3, "optim": "adamw_torch", "gradient_accumulation_steps": accumulate}
    joint = arguments(tmp_path / "one", per_device_train_batch_size=4, **settings)
    trainer = run(trained, joint, examples(24), eval_dataset=examples(5))
    assert_same(load_file(tmp_path / "two.safetensors"), weights(trained), 1e-6)
    logs, evaluation = torch.load(tmp_path / "logs.pt")
    for name in ("loss", "nelbo"):
        expected = [log[name] for log in trainer.state.log_history if "loss" in log]
        assert [log[name] for log in logs if "loss" in log] == pytest.approx(expected, abs=1e-6), name
    expected = trainer.evaluate()
    for name in ("eval_nelbo", "eval_perplexity", "eval_nelbo_error"):
        assert evaluation[name] == pytest.approx(expected[name], abs=1e-5), name


def test_epochs_and_steps_have_noise_of_their_own(tmp_path, monkeypatch):
    """The share that is masked does not change here, but what is does from epoch to epoch."""
    seen = []

    def spy(denoiser, input_ids, *, masked, **options):
        seen.append(masked)
        return nelbo(denoiser, input_ids, masked=masked, **options)

    monkeypatch.setattr("pyquiet.diffusion.training.nelbo", spy)
    texts = [{"input_ids": torch.arange(60) % MASK} for _ in range(4)]
    options = {"start_level": 0.51, "level_warmup_steps": 10**9, "max_length": 60}
    run(model(), arguments(tmp_path, **options, max_steps=3, per_device_train_batch_size=4), texts)
    assert [int(masked.sum(1).min()) for masked in seen] == [int(masked.sum(1).max()) for masked in seen] == [31] * 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_the_levels_warm_up(tmp_path):
    args = arguments(tmp_path, start_level=0.2, level_warmup_steps=4)
    assert args.levels(0) == (0.2, 0.2)
    assert args.levels(2) == pytest.approx((0.1, 0.6))
    assert args.levels(4) == args.levels(99) == (0.0, 1.0)
    assert arguments(tmp_path).levels(0) == (0.0, 1.0)
    texts = [{"input_ids": torch.arange(100) % MASK} for _ in range(16)]
    options = {"max_steps": 3, "level_warmup_steps": 2, "start_level": 0.1, "max_length": 100}
    logs = run(model(), arguments(tmp_path, **options, per_device_train_batch_size=4), texts).state.log_history
    fractions = [log["masked_fraction"] for log in logs if "loss" in log]
    assert fractions == pytest.approx([0.11, 0.3, 0.5], abs=0.04)


def test_the_average_forgets_the_start_and_is_what_is_evaluated_and_saved(tmp_path):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "ema_decay": 0.25}
    plain = arguments(tmp_path / "a", **settings | {"ema_decay": 0.0, "save_strategy": "steps", "save_steps": 1})
    trained = model()
    run(trained, plain, examples(16))
    steps = [load_file(tmp_path / "a" / f"checkpoint-{i}" / "model.safetensors") for i in (1, 2, 3, 4)]
    average = dict(steps[0])  # the first step's, then decays of min(0.25, (1 + n) / (10 + n)) for n = 1, 2, 3
    for decay, step in zip((2 / 11, 0.25, 0.25), steps[1:], strict=True):
        average = {name: decay * average[name] + (1 - decay) * value for name, value in step.items()}
    averaged = model()
    trainer = run(averaged, arguments(tmp_path / "b", **settings), examples(16), eval_dataset=examples(4))
    assert_same(weights(averaged), weights(trained))  # training goes on from the weights themselves
    trainer.save_model(str(tmp_path / "saved"))
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), average, 1e-12)
    found = trainer.evaluate()["eval_nelbo"]
    assert_same(weights(averaged), weights(trained))
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    again = DiffusionTrainer(loaded, arguments(tmp_path / "c"), eval_dataset=examples(4))
    assert again.evaluate()["eval_nelbo"] == pytest.approx(found, abs=1e-9)
    raw = DiffusionTrainer(averaged, arguments(tmp_path / "c"), eval_dataset=examples(4))
    assert raw.evaluate()["eval_nelbo"] != pytest.approx(found, abs=1e-5)


def test_the_best_model_has_the_lowest_bound_and_its_average(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "nelbo", "greater_is_better": False}
    texts = {"eval_dataset": examples(4)}
    trainer = run(model(), arguments(tmp_path, **options, learning_rate=10.0, ema_decay=0.3), examples(8), **texts)
    values = [log["eval_nelbo"] for log in trainer.state.log_history if "eval_nelbo" in log]
    assert trainer.state.best_metric == min(values)
    assert len(set(values)) == 3
    assert trainer.evaluate()["eval_nelbo"] == pytest.approx(min(values), abs=1e-9)


def test_evaluation_is_over_all_tokens_and_always_the_same(tmp_path):
    trained, texts = model(), examples(5)
    options = {"learning_rate": 0.0, "per_device_eval_batch_size": 2}
    trainer = run(trained, arguments(tmp_path, **options), texts, eval_dataset=texts)
    first, second = trainer.evaluate(), trainer.evaluate(list(texts))
    assert first["eval_nelbo"] == second["eval_nelbo"]
    seed = epoch_seed(0, 2**32 - 1)
    levels = evenly_spread(torch.arange(5), seed=seed)
    gaps = levels.sort().values.diff()
    assert gaps.min() > 0.05  # spread more evenly than five independent ones are wont to be
    bounds, tokens = [], []
    for i in range(5):
        batch = trainer.data_collator([trainer.eval_dataset[i]])
        out = loss_by_hand(trained.eval(), batch, levels[i : i + 1], seed)
        bounds.append(out.text.item())
        tokens.append(batch["input_ids"].shape[1])
    bound = sum(bounds) / sum(tokens)
    assert first["eval_nelbo"] == pytest.approx(bound, abs=1e-9)
    assert first["eval_perplexity"] == pytest.approx(math.exp(bound), rel=1e-9)
    residual = sum((b - bound * n) ** 2 for b, n in zip(bounds, tokens, strict=True))
    assert first["eval_nelbo_error"] == pytest.approx(residual**0.5 / sum(tokens), rel=1e-6)
    assert math.isfinite(first["eval_loss"])


def test_bfloat16_computes_over_float32_weights(tmp_path):
    trained, exact = model().float(), model().float()
    options = {"learning_rate": 1e-3, "optim": "adamw_torch", "per_device_train_batch_size": 4}
    run(trained, arguments(tmp_path / "a", bf16=True, **options), examples(8), eval_dataset=examples(2)).evaluate()
    run(exact, arguments(tmp_path / "b", **options), examples(8))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), exact.parameters(), strict=True))
    assert max((a - b).abs().max() for a, b in zip(trained.parameters(), exact.parameters(), strict=True)) <= 5e-3


def test_a_denoiser_with_its_own_mask_is_taken(tmp_path):
    trained = model()
    trained.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_id is None"):
        DiffusionTrainer(trained, arguments(tmp_path))
    trainer = run(MaskedDenoiser(trained, MASK), arguments(tmp_path), examples(4))
    assert trainer.model is trained
    assert not torch.equal(trained.cls.predictions.bias, model().cls.predictions.bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "nll"}, "objective must be one of"),
        ({"noise_schedule": "square"}, "kind must be one of"),
        ({"min_time": 0.0}, r"min_time must be in \(0, 1\), got 0"),
        ({"ema_decay": 1.0}, "ema_decay must be below 1"),
        ({"start_level": 2.0}, r"start_level must be in \[0, 1\], got 2"),
        ({"level_warmup_steps": -1}, "level_warmup_steps must be at least 0"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_bad_arguments_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(TypeError, match="DiffusionTrainingArguments, got TrainingArguments"):
        DiffusionTrainer(model(), TrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="max_length=129 is more than the 128 that the model was made for"):
        DiffusionTrainer(model(), arguments(tmp_path, max_length=129))
    with pytest.raises(ValueError, match=r"torch.float16.*load the model in float32"):
        DiffusionTrainer(model().half(), arguments(tmp_path))
    run(model(), arguments(tmp_path, ema_decay=0.0, save_strategy="steps", save_steps=1), examples(4))
    with pytest.raises(ValueError, match=r"holds no average\.safetensors"):
        run(model(), arguments(tmp_path), examples(4), resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
