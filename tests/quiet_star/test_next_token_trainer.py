"""The trainer of the no-thought stage learns, adds micro-batches up, resumes to the bit and says what is wrong."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments

from pyquiet.quiet_star.distillation import mixed_nlls, next_token_loss
from pyquiet.quiet_star.next_token import NextTokenCollator, NextTokenTrainer, NextTokenTrainingArguments
from pyquiet.quiet_star.teacher import teacher_nlls
from pyquiet.randomness import epoch_seed

from ..processes import in_processes
from .architectures import build
from .thinkers import padded, random_ids, thinker

LENGTHS = (9, 4, 7, 12, 3, 8)
DATA = [{"input_ids": random_ids(1, length, seed=length)[0].tolist()} for length in LENGTHS]


def teacher_of(**changes):
    return thinker(m=1, dtype=torch.float32, attention="sdpa", **changes)


def student_of(**changes):
    return build("llama", seed=4, dtype=torch.float32, attention="sdpa", **changes)


def trainer_of(tmp_path, student=None, teacher=None, data=DATA, eval_data=None, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_length": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return NextTokenTrainer(
        student or student_of(),
        NextTokenTrainingArguments(**(defaults | options)),
        train_dataset=data,
        eval_dataset=eval_data,
        teacher=teacher,
    )


def weights_of(model):
    return torch.cat([x.detach().flatten() for x in model.parameters()])


@pytest.mark.parametrize("objective", ["released", "paper", "kl", "advantage"])
def test_the_objective_falls(tmp_path, objective):
    """Noise that never changes, so the objective may be compared."""
    student, teacher = student_of(), teacher_of()
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_of(tmp_path, student, teacher, eval_data=DATA, ntp_objective=objective, max_steps=12)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    if objective in ("kl", "advantage"):
        assert last["eval_loss"] < 0.8 * first["eval_loss"]
        assert last["eval_student_nll"] < first["eval_student_nll"] - 0.1
    elif objective == "paper":  # its reward is held constant in a step, and its sign leads away from the text
        assert last["eval_student_nll"] > first["eval_student_nll"]
    assert last["eval_teacher_nll"] == first["eval_teacher_nll"]
    assert not torch.equal(weights_of(student), weights_of(student_of()))
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def one_loss(student, teacher, indices, seed, **options):
    ids, mask = padded([torch.tensor(DATA[i]["input_ids"]) for i in indices], "right")
    return next_token_loss(
        student, ids, mask, teacher=teacher, seed=seed, sequence_ids=torch.tensor(indices), **options
    )


def test_logs_say_what_was_learned_from(tmp_path):
    student, teacher = student_of(), teacher_of()
    expected = one_loss(student, teacher, range(6), epoch_seed(3, 0), nll_weight=0.5, policy_weight=2.0)
    trainer = trainer_of(
        tmp_path,
        copy.deepcopy(student),
        teacher,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=1,
        nll_weight=0.5,
        ntp_policy_weight=2.0,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    for name in ("student_nll", "teacher_nll", "teacher_better"):
        assert logs[name] == pytest.approx(float(getattr(expected, name)), rel=1e-5)
    assert logs["tokens_per_second"] > 0


def test_evaluation_has_noise_of_its_own(tmp_path):
    student, teacher = student_of(), teacher_of()
    metrics = trainer_of(tmp_path, student, teacher, eval_data=DATA).evaluate()
    out = one_loss(student, teacher, range(6), epoch_seed(3, 2**32 - 1))
    for name in ("student_nll", "teacher_nll", "teacher_better"):
        assert metrics[f"eval_{name}"] == pytest.approx(float(getattr(out, name)), rel=1e-5)
    other = one_loss(student, teacher, range(6), epoch_seed(3, 0))
    assert metrics["eval_teacher_nll"] != pytest.approx(float(other.teacher_nll), rel=1e-5)


@pytest.mark.parametrize("objective", ["released", "kl"])
def test_accumulation_is_the_joint_batch(tmp_path, objective):
    teacher = teacher_of()
    results = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        student = student_of()
        trainer_of(
            tmp_path,
            student,
            teacher,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            ntp_objective=objective,
        ).train()
        results.append(weights_of(student))
    assert (results[0] - weights_of(student_of())).abs().max() > 1e-3
    for result in results[1:]:
        assert (result - results[0]).abs().max() < 1e-6


def distributed_run(folder, processes):
    """Three steps over joint batches of four texts, micro-batches accumulated: the run's log, and its weights saved."""
    student = student_of()
    trainer = trainer_of(
        folder,
        student,
        teacher_of(),
        per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=2,
        max_steps=3,
        optim="sgd",
        learning_rate=0.1,
        ntp_objective="released",
        nll_weight=0.1,
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer.train()
    assert trainer.args.world_size == processes
    if trainer.is_world_process_zero():
        save_file({"weights": weights_of(student)}, folder / f"{processes}.safetensors")
        (folder / f"{processes}.json").write_text(json.dumps(trainer.state.log_history))


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    in_processes(2, "quiet_star.test_next_token_trainer", tmp_path)
    distributed_run(tmp_path, 1)
    one, two = (load_file(tmp_path / f"{n}.safetensors")["weights"] for n in (1, 2))
    assert (one - two).abs().max() < 1e-6
    assert (one - weights_of(student_of())).abs().max() > 1e-3
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    for name in ("loss", "student_nll", "teacher_nll", "teacher_better"):
        assert [log[name] for log in two[:3]] == pytest.approx([log[name] for log in one[:3]], rel=1e-5)


def test_a_resumed_run_is_the_whole_one(tmp_path):
    """Across an epoch's end, with dropout, shuffling and actions drawn anew each epoch."""
    teacher = teacher_of()
    options = {"ntp_objective": "released", "nll_weight": 1.0, "max_steps": 5, "per_device_train_batch_size": 2}

    def student():
        return student_of(attention_dropout=0.1)

    whole = student()
    trainer_of(tmp_path / "a", whole, teacher, save_strategy="steps", save_steps=2, **options).train()
    resumed = student()
    trainer = trainer_of(tmp_path / "b", resumed, teacher, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.state.global_step == 5
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_epochs_have_noise_of_their_own(tmp_path):
    """And as many thoughts as the arguments say."""
    teacher, student = teacher_of(), student_of()
    options = {"learning_rate": 0.0, "num_train_epochs": 2, "per_device_train_batch_size": 6}
    for thoughts in (None, 3):
        trainer = trainer_of(tmp_path, student, teacher, teacher_thoughts_per_token=thoughts, **options)
        trainer.train()
        for epoch, logs in enumerate(trainer.state.log_history[:2]):
            expected = one_loss(student, teacher, range(6), epoch_seed(3, epoch), thoughts_per_token=thoughts)
            assert logs["teacher_nll"] == pytest.approx(float(expected.teacher_nll), rel=1e-5)
    assert trainer.state.log_history[0]["teacher_nll"] != pytest.approx(logs["teacher_nll"], rel=1e-4)


def test_bfloat16_with_float32_weights(tmp_path):
    student, teacher = student_of(), teacher_of()
    exact = one_loss(student, teacher, range(6), epoch_seed(3, 0))
    options = {"bf16": True, "per_device_train_batch_size": 6, "max_steps": 1, "learning_rate": 1e-6}
    trainer = trainer_of(tmp_path, student, teacher, **options)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert 1e-5 < abs(logs["student_nll"] - float(exact.student_nll)) < 0.05
    assert logs["teacher_nll"] == pytest.approx(float(exact.teacher_nll), rel=1e-5)
    assert student.dtype == torch.float32
    assert 0 < (weights_of(student) - weights_of(student_of())).abs().max() < 1e-5


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_stored_nlls_are_the_online_teacher(tmp_path, side):
    """The same batches, texts padded or not: the same bits."""
    teacher, data = teacher_of(), DATA[:3]
    if side:
        ids, mask = padded([torch.tensor(x["input_ids"]) for x in data], side)
        data = [{"input_ids": row, "attention_mask": real} for row, real in zip(ids, mask, strict=True)]
    nlls = teacher_nlls(teacher, data, seed=3, progress=False)
    assert [(row.dtype, len(row)) for row in nlls] == [(np.float32, n - 1) for n in LENGTHS[:3]]
    stored = [{**example, "teacher_nlls": row} for example, row in zip(data, nlls, strict=True)]
    results = []
    for examples, who in ((data, teacher), (stored, None), (stored, teacher)):
        student = student_of()
        # In the order of the data, as the teacher read them: a sum's last bit hangs on a row's place in the batch.
        trainer = trainer_of(
            tmp_path, student, who, examples, max_steps=1, train_sampling_strategy="sequential", logging_steps=1
        )
        trainer.train()
        results.append(weights_of(student))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], weights_of(student_of()))
    assert not np.array_equal(nlls[0], teacher_nlls(teacher, data, seed=4, progress=False)[0])


def test_a_column_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    teacher = teacher_of()
    data = datasets.Dataset.from_list(DATA)
    nlls = teacher_nlls(teacher, data, seed=3, progress=False)
    data = data.add_column("teacher_nlls", nlls)
    assert all(np.array_equal(np.float32(x["teacher_nlls"]), row) for x, row in zip(data, nlls, strict=True))
    student = student_of()
    trainer_of(tmp_path, student, None, data, max_steps=2).train()
    assert not torch.equal(weights_of(student), weights_of(student_of()))


def test_finished_nlls_are_kept(tmp_path, monkeypatch):
    teacher, path = teacher_of(), tmp_path / "nlls.safetensors"
    expected = teacher_nlls(teacher, DATA, seed=3, batch_size=2, progress=False)
    graded = []

    def failing(teacher, ids, *rest):
        if len(graded) == 2:
            raise KeyboardInterrupt
        graded.append(len(ids))
        return mixed_nlls(teacher, ids, *rest)

    monkeypatch.setattr("pyquiet.quiet_star.teacher.mixed_nlls", failing)
    with pytest.raises(KeyboardInterrupt):
        teacher_nlls(teacher, DATA, seed=3, batch_size=2, path=path, progress=False)
    assert path.exists()
    del graded[1:]
    resumed = teacher_nlls(teacher, DATA, seed=3, batch_size=2, path=path, progress=False)
    assert graded == [2, 2]  # one before, and the last
    assert all(np.array_equal(x, y) for x, y in zip(resumed, expected, strict=True))
    whole = path.stat().st_mtime_ns
    assert len(teacher_nlls(teacher, DATA, seed=3, path=path, progress=False)) == 6
    assert graded == [2, 2]
    assert path.stat().st_mtime_ns == whole  # what is whole is read alone
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    for wrong, call in {
        "another seed": lambda: teacher_nlls(teacher, DATA, seed=4, path=path),
        "another epoch": lambda: teacher_nlls(teacher, DATA, seed=3, epoch=1, path=path),
        "another thoughts_per_token": lambda: teacher_nlls(teacher, DATA, seed=3, thoughts_per_token=2, path=path),
        "another dataset": lambda: teacher_nlls(teacher, DATA[:5], seed=3, path=path),
        "another teacher": lambda: teacher_nlls(thinker(m=1), DATA, seed=3, path=path),
    }.items():
        with pytest.raises(ValueError, match=f"NLLs of {wrong}; remove it"):
            call()


def test_nlls_are_saved_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("pyquiet.quiet_star.teacher._SAVE_EVERY", 0.0)
    written = []
    monkeypatch.setattr("pyquiet.quiet_star.teacher._write", lambda path, done, about: written.append(len(done)))
    teacher_nlls(teacher_of(), DATA, seed=3, batch_size=4, path=tmp_path / "x", progress=False)
    assert written == [4, 6]


def test_a_thinking_model_trains_its_base_and_is_saved_plain(tmp_path):
    model = thinker(m=1, dtype=torch.float32, attention="sdpa")
    teacher = copy.deepcopy(model)
    head = copy.deepcopy(model.mixing_head.state_dict())
    before = weights_of(model.base)
    trainer = trainer_of(tmp_path, model, teacher, max_steps=2)
    trainer.train()
    assert not torch.equal(weights_of(model.base), before)
    assert all(torch.equal(x, head[name]) for name, x in model.mixing_head.state_dict().items())
    trainer.save_model(str(tmp_path / "plain"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(loaded) is type(model.base)
    assert torch.equal(weights_of(loaded), weights_of(model.base))


def test_the_collator():
    examples = [{**DATA[0], "sequence_ids": 4, "teacher_nlls": np.arange(8)}, {**DATA[1], "teacher_nlls": [1.0] * 3}]
    examples[1]["sequence_ids"] = 5
    batch = NextTokenCollator(max_length=9)(examples)
    assert batch["teacher_nlls"].tolist() == [[0.0, 1, 2, 3, 4, 5, 6, 7], [1.0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["teacher_nlls"].dtype == torch.float32
    single = {"input_ids": [5], "sequence_ids": 0, "teacher_nlls": []}
    assert NextTokenCollator()([single])["teacher_nlls"].shape == (1, 1)
    with pytest.raises(ValueError, match="example 4: 8 teacher_nlls for a text of 6 tokens"):
        NextTokenCollator(max_length=6)(examples)
    examples[0]["teacher_nlls"] = [0.0] * 7
    with pytest.raises(ValueError, match="example 4: 7 teacher_nlls for a text of 9 tokens"):
        NextTokenCollator(max_length=9)(examples)


def test_bad_arguments(tmp_path):
    def refuses(message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            trainer_of(tmp_path, **options)

    refuses("ntp_objective must be one of", ntp_objective="nll")
    refuses("policy_weight must be a finite number", ntp_policy_weight=math.nan)
    refuses("teacher_thoughts_per_token must be at least 1", teacher_thoughts_per_token=0)
    refuses("max_length must be at least 2", max_length=1)
    refuses('"kl" compares whole laws', ntp_objective="kl")
    refuses("max_position_embeddings", teacher=teacher_of(), max_length=95)
    refuses("is torch.bfloat16, in which small steps are lost", student=student_of().to(torch.bfloat16))
    refuses("model has no trainable weight", student=student_of().requires_grad_(False))
    refuses("must be a transformers causal LM", TypeError, student=torch.nn.Linear(1, 1))
    model = teacher_of()
    refuses("shares weights with model", student=model, teacher=model, max_length=16)
    with pytest.raises(TypeError, match="args must be NextTokenTrainingArguments, got TrainingArguments"):
        NextTokenTrainer(student_of(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="needs a teacher or its teacher_nlls"):
        trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed_run(Path(sys.argv[1]), 2)
    os._exit(0)  # gloo's threads may abort a process that ends by itself
