"""The trainer of energies: the same run whatever the batches, processes and interruptions; it learns, calibrated."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from pyquiet.diffusion.modeling import MaskedDenoiser
from pyquiet.diffusion.nce_energy import NCEEnergy
from pyquiet.diffusion.trainer import NCETrainer
from pyquiet.diffusion.training import completions, nce_loss, random_masks
from pyquiet.randomness import epoch_seed
from pyquiet.trainers import stratified

from ..processes import in_processes
from .runs import MASK, energy, examples, model, nce_arguments, run_nce, weights
from .test_trainer import assert_same
from .toys import Product


def energies_by_hand(trained, batch, level, seed, negatives, denoiser=None):
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    numbers, ids = batch["sequence_ids"], batch["input_ids"]
    masks = random_masks(level, **text, seed=seed, sequence_ids=numbers, objective="continuous")
    options = {"masked": masks.masked, "count": negatives, "seed": seed, "sequence_ids": numbers}
    drawn = completions(denoiser or model(), **text, **options)
    candidates = torch.cat([ids[:, None], drawn], 1)
    noisy = ids.masked_fill(masks.masked, MASK)
    return trained(candidates, noisy, masks.time, attention_mask=text["attention_mask"]), masks.time


def test_a_step_is_that_of_the_loss(tmp_path):
    """One step of plain gradient descent, by hand; and what it logs."""
    trained = energy()
    expected = copy.deepcopy(trained).train()
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "ema_decay": 0.0}
    trainer = run_nce(trained, nce_arguments(tmp_path, **options), examples(8))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    level = stratified(torch.arange(8), 8, seed=0, step=0)
    energies, time = energies_by_hand(expected, batch, level, epoch_seed(0, 0), 2)
    loss = nce_loss(energies[:, 0], energies[:, 1:]).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert_same(weights(trained), weights(expected), 1e-12)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-6)
    positive, negative = energies[:, :1], energies[:, 1:]
    right = (negative > positive).double() + (negative == positive).double() / 2
    assert log["accuracy"] == pytest.approx(right.mean().item(), abs=1e-9)
    for i in range(4):
        part = (time > i / 4) & (time <= (i + 1) / 4)
        assert part.sum() == 2
        z = (-negative[part]).exp().mean().log().item()
        assert log[f"log_z_{25 * (i + 1)}"] == pytest.approx(z, abs=1e-6)
    assert log["tokens_per_second"] > 0


def test_micro_batches_make_the_joint_batch(tmp_path):
    joint, parts = energy(), energy()
    one = run_nce(joint, nce_arguments(tmp_path / "a", per_device_train_batch_size=8), examples(16))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    two = run_nce(parts, nce_arguments(tmp_path / "b", **cut), examples(16))
    assert_same(weights(parts), weights(joint), 1e-10)
    for name in ("loss", "accuracy"):
        values = [[log.get(name) for log in x.state.log_history if "loss" in log] for x in (one, two)]
        assert values[0] == pytest.approx(values[1], abs=1e-6), name


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    settings = {
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 3,
        "ema_decay": 0.7,
        "train_sampling_strategy": "random",
    }
    unbroken, resumed = energy(), energy()
    denoiser = model(dropout=0.3).train()
    first = run_nce(unbroken, nce_arguments(tmp_path, **settings), examples(16), denoiser=denoiser)
    again = {"denoiser": denoiser, "resume_from_checkpoint": str(tmp_path / "checkpoint-3")}
    second = run_nce(resumed, nce_arguments(tmp_path, **settings), examples(16), **again)
    assert_same(weights(resumed), weights(unbroken))
    for trainer, name in ((first, "a"), (second, "b")):
        trainer.save_model(str(tmp_path / name))
    saved = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert_same(saved[1], saved[0])
    loaded = NCEEnergy.from_pretrained(tmp_path / "a", dtype=torch.float64)
    assert torch.equal(loaded.projection.weight, saved[0]["projection.weight"])


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    in_processes(2, "diffusion.runs", tmp_path, "energy", "2")
    trained = energy()
    settings = {"max_steps": 3, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    joint = nce_arguments(tmp_path / "one", per_device_train_batch_size=4, **settings)
    trainer = run_nce(trained, joint, examples(24), eval_dataset=examples(5))
    assert_same(load_file(tmp_path / "two.safetensors"), weights(trained), 1e-6)
    logs, evaluation = torch.load(tmp_path / "logs.pt")
    for name in ("loss", "accuracy"):
        expected = [log[name] for log in trainer.state.log_history if "loss" in log]
        assert [log[name] for log in logs if "loss" in log] == pytest.approx(expected, abs=1e-6), name
    expected = trainer.evaluate()
    for name in ("eval_accuracy", "eval_log_z"):
        assert evaluation[name] == pytest.approx(expected[name], abs=1e-5), name


def test_the_denoiser_stays_as_it_is_and_proposes_without_dropout(tmp_path):
    """Trainer puts what it trains into training mode; the frozen denoiser is none of it."""
    runs = []
    for number, denoiser in enumerate((model(dropout=0.5).train(), MaskedDenoiser(model().eval()))):
        before = weights(denoiser)
        trainer = run_nce(energy(), nce_arguments(tmp_path / str(number)), examples(4), denoiser=denoiser)
        assert_same(weights(denoiser), before)
        assert denoiser.training == (number == 0)
        assert all(parameter.grad is None for parameter in denoiser.parameters())
        runs.append(trainer)
    assert_same(weights(runs[0].model), weights(runs[1].model))
    assert runs[0].state.log_history[0]["loss"] == runs[1].state.log_history[0]["loss"]
    other = run_nce(energy(), nce_arguments(tmp_path / "c"), examples(4), denoiser=TrainingModeDenoiser())
    assert other.state.log_history[0]["loss"] != runs[0].state.log_history[0]["loss"]


class TrainingModeDenoiser:
    """What is to be avoided: dropout in the proposal, out of the trainer's reach."""

    def __init__(self):
        self.inner = MaskedDenoiser(model(dropout=0.5).train())
        self.mask_id, self.vocab_size, self.device, self.training = MASK, self.inner.vocab_size, self.inner.device, True
        self.hidden, self.head = self.inner.hidden, self.inner.head


@pytest.mark.parametrize("pool", ["sum_masked", "mean"])
def test_an_energy_learns_what_the_denoiser_cannot_know(tmp_path, pool):
    """Texts are one symbol three times, a denoiser without correlations: half the texts' pairs are improbable."""
    texts = [{"input_ids": torch.full((3,), 2 * (i % 2))} for i in range(64)]
    law = torch.full((3, 3), 1e-6)
    law[:, :2] = 0.5
    denoiser = Product(law.double(), 1)  # of the ids 0, 2 and 3
    torch.manual_seed(0)
    base = model().float()
    base.config.mask_token_id = 1
    trained = NCEEnergy.from_denoiser(base, pool)
    options = {"max_steps": 150, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "optim": "adamw_torch"}
    options |= {"negatives": 2, "logging_steps": 10, "train_sampling_strategy": "random"}
    trainer = run_nce(trained, nce_arguments(tmp_path, **options), texts, denoiser=denoiser, eval_dataset=texts)
    first, last = (trainer.state.log_history[i] for i in (0, -2))
    assert first["loss"] > last["loss"] + 0.2
    noisy, every = torch.tensor([[1, 1, 1]]), torch.cartesian_prod(*[torch.tensor([0, 2])] * 3)
    with torch.no_grad():
        energies = trained.eval()(every[None], noisy, torch.ones(1))[0]
    same = (every == every[:, :1]).all(1)
    if pool == "sum_masked":  # the truth: log 1/8 - log 1/2 for the two texts, and no bound for the six others
        assert (energies[same] - math.log(1 / 4)).abs().max() < 0.5
    assert energies[same].max() < energies[~same].min() - 2
    found = trainer.evaluate()
    assert found["eval_accuracy"] > 0.55  # most completions are texts
    assert abs(found["eval_log_z"]) < 0.3
    assert {f"eval_log_z_{n}" for n in (25, 50, 75, 100)} <= found.keys()


def test_evaluation_is_of_all_texts_and_always_the_same(tmp_path):
    texts = examples(9)
    trainer = run_nce(
        energy(), nce_arguments(tmp_path, learning_rate=0.0, per_device_eval_batch_size=4), texts, eval_dataset=texts
    )
    first, second = trainer.evaluate(), trainer.evaluate(list(texts))
    names = [name for name in first if "log_z" in name or "accuracy" in name]
    assert len(names) == 6
    assert all(first[name] == second[name] for name in names)
    prediction = trainer.predict(texts)
    time, negative = torch.from_numpy(prediction.predictions).double().split([2, 2], 1)
    assert prediction.metrics["test_log_z"] == pytest.approx((-negative).exp().mean().log().item(), abs=1e-9)
    assert (time[:, 0].sort().values.diff() > 0.01).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"negatives": 0}, "negatives must be at least 1, got 0"), ({"ema_decay": -1}, "ema_decay must be in")],
)
def test_bad_arguments_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        nce_arguments(tmp_path, **changes)


def test_what_cannot_be_trained_is_refused(tmp_path):
    args = nce_arguments(tmp_path)
    with pytest.raises(TypeError, match="NCETrainingArguments, got TrainingArguments"):
        NCETrainer(energy(), TrainingArguments(str(tmp_path)), denoiser=model())
    with pytest.raises(TypeError, match="model must be an NCEEnergy, got BertForMaskedLM"):
        NCETrainer(model(), args, denoiser=model())
    with pytest.raises(ValueError, match="mask token is 11, the denoiser's 3"):
        NCETrainer(energy(), args, denoiser=MaskedDenoiser(model(), 3))
    short = model()
    short.config.max_position_embeddings = 64
    for trained, proposing in ((NCEEnergy.from_denoiser(short), model()), (energy(), short)):
        with pytest.raises(ValueError, match="max_length=65 is more than the 64 that the model was made for"):
            NCETrainer(trained, nce_arguments(tmp_path, max_length=65), denoiser=proposing)
    with pytest.raises(ValueError, match=r"torch.bfloat16.*load the model in float32"):
        NCETrainer(energy().bfloat16(), args, denoiser=model())
