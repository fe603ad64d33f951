"""The trainer: the same run whatever the batches, micro-batches, processes and interruptions; and what it logs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

import pyquiet
from pyquiet import QuietStarObjective
from pyquiet.datasets import TextCollator
from pyquiet.randomness import epoch_seed

from ..processes import in_processes
from .thinkers import random_ids, thinker
from .training_runs import arguments, examples, mixed_examples, run, weights


def assert_same(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_is_that_of_the_loss(tmp_path):
    """One step of plain gradient descent, by hand."""
    model = thinker(m=2)
    expected = copy.deepcopy(model).train()
    texts = examples(4, longest=9)
    arguments_ = arguments(tmp_path, per_device_train_batch_size=4, max_steps=1, learning_rate=0.1)
    trainer = run(model, arguments_, texts)

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = expected.thinking_loss(**batch, objective=QuietStarObjective(), seed=epoch_seed(arguments_.seed, 0)).loss
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert_same(weights(model), weights(expected), 1e-12)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)  # float32, Trainer sums


@pytest.mark.parametrize("changes", [{}, {"policy_weight": 2.0, "thoughts_per_token": 3}], ids=str)
def test_micro_batches_make_the_joint_batch(tmp_path, changes):
    texts = examples(16, longest=9)
    joint, parts = thinker(m=2), thinker(m=2)
    one = run(joint, arguments(tmp_path / "a", per_device_train_batch_size=8, **changes), texts)
    two = run(
        parts,
        arguments(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **changes),
        texts,
    )
    assert_same(weights(parts), weights(joint), 1e-10)
    for name in ("loss", "base_nll", "mixed_nll", "policy", "reward"):
        values = [[log[name] for log in trainer.state.log_history if "loss" in log] for trainer in (one, two)]
        assert values[0] == pytest.approx(values[1], abs=1e-6), name
        assert any(values[0]), name


def test_official_micro_batches_are_averaged(tmp_path):
    """Their means are over non-zero losses: each has its own, and a step is the mean of them, as in the release."""
    model, expected = thinker(m=2), thinker(m=2)
    settings = {"official": True, "policy_weight": 1.0, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = run(model, arguments(tmp_path, learning_rate=0.1, **settings), examples(4, longest=9))
    objective = QuietStarObjective(official=True, policy_weight=1.0)
    for part in ((0, 1), (2, 3)):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in part])
        out = expected.thinking_loss(**batch, objective=objective, seed=epoch_seed(0, 0))
        (out.loss / 2).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert_same(weights(model), weights(expected), 1e-10)


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, at):
    """Epochs have four steps, so the run breaks off within one, at its end and in the next; dropout is on."""
    texts = examples(16, longest=20)

    def model():
        return thinker("gpt2", m=2, dtype=torch.float32, resid_pdrop=0.1, embd_pdrop=0.1)

    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": at,
        "max_length": 12,
        "train_sampling_strategy": "random",
    }
    unbroken, resumed = model(), model()
    first = run(unbroken, arguments(tmp_path, **settings), texts)
    second = run(
        resumed, arguments(tmp_path, **settings), texts, resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}")
    )
    assert_same(weights(resumed), weights(unbroken))
    assert_same(
        {str(k): v["exp_avg_sq"] for k, v in second.optimizer.state_dict()["state"].items()},
        {str(k): v["exp_avg_sq"] for k, v in first.optimizer.state_dict()["state"].items()},
    )
    assert second.state.log_history[-2]["loss"] == first.state.log_history[-2]["loss"]


def test_epochs_differ_in_crops_and_thoughts(tmp_path):
    model, seen = thinker(m=2), []
    loss = model.thinking_loss

    def spy(input_ids, *args, **kwargs):
        out = loss(input_ids, *args, **kwargs)
        seen.append((input_ids, out.tokens))
        return out

    model.thinking_loss = spy
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.0, "max_length": 8}
    run(model, arguments(tmp_path, **settings), examples(4, longest=8))  # nothing to crop
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])
    seen.clear()
    run(model, arguments(tmp_path, **settings), [{"input_ids": random_ids(1, 40, seed=i)[0]} for i in range(4)])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[1][0], seen[2][0])


def test_streams_have_noise_of_their_epoch(tmp_path):
    """One of two steps an epoch, whose length the trainer does not know."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(4, longest=8))

    seeds, model = [], thinker(m=2)
    loss = model.thinking_loss
    model.thinking_loss = lambda *args, seed, **kwargs: seeds.append(seed) or loss(*args, seed=seed, **kwargs)
    run(model, arguments(tmp_path, max_steps=6), Stream())
    assert seeds == [epoch_seed(0, epoch) for epoch in (0, 0, 1, 1, 2, 2)]


def test_noise_is_never_unnamed(tmp_path):
    class Nameless(TextCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            del batch["sequence_ids"]
            return batch

    with pytest.raises(ValueError, match="sequence_ids"):
        run(thinker(m=1), arguments(tmp_path), examples(4, longest=8), data_collator=Nameless())
    with pytest.raises(ValueError, match="remove_unused_columns"):
        arguments(tmp_path, remove_unused_columns=True)


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    """Of two micro-batches in each: sums over both meet."""
    in_processes(2, "quiet_star.training_runs", "distributed", tmp_path, "2")
    model = thinker(m=2)
    settings = {"max_steps": 3, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    trainer = run(model, arguments(tmp_path / "one", per_device_train_batch_size=4, **settings), mixed_examples())
    assert_same(load_file(tmp_path / "two.safetensors"), weights(model), 1e-6)
    logs = torch.load(tmp_path / "logs.pt")
    for name in ("loss", "base_nll", "mixed_nll", "policy", "reward"):
        expected = [log[name] for log in trainer.state.log_history if "loss" in log]
        assert [log[name] for log in logs if "loss" in log] == pytest.approx(expected, abs=1e-6), name


def test_sharded_weights_get_the_same_gradients(tmp_path):
    in_processes(2, "quiet_star.training_runs", "sharded", tmp_path)
    model, ids = thinker(m=2).train(), random_ids(4, 9)
    model.thinking_loss(ids, seed=1).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same(load_file(tmp_path / "gradients.safetensors"), expected, 1e-12)


def test_logs_say_what_happened(tmp_path):
    model = thinker(m=2)
    texts = examples(4, longest=12)
    trainer = run(
        model,
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=0.0),
        texts,
        eval_dataset=texts,
    )
    log = trainer.state.log_history[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    out = model.train().thinking_loss(**batch, seed=epoch_seed(0, 0))
    for name in ("base_nll", "mixed_nll", "policy", "reward", "weight_mean", "weight_std", "thought_entropy"):
        assert log[name] == pytest.approx(getattr(out, name).item(), abs=1e-9), name
    targets = out.base_nlls != 0
    base, gain = out.base_nlls[targets], (out.base_nlls - out.mixed_nlls[..., 0].mean(-1))[targets]
    assert log["gain"] == pytest.approx(gain.mean().item(), abs=1e-9)
    order = sorted(range(len(base)), key=lambda i: base[i])
    hardest = order[-(len(base) // 10) :]
    assert log["gain_decile_10"] == pytest.approx(sum(gain[i].item() for i in hardest) / len(hardest), abs=1e-9)
    assert sum(name.startswith("gain_decile") for name in log) == 10
    assert log["tokens_per_second"] > 0


def test_evaluation_is_over_all_tokens_and_always_the_same(tmp_path):
    model, texts = thinker(m=2), [{"input_ids": random_ids(1, 30, seed=i)[0]} for i in range(5)]
    trainer = run(
        model,
        arguments(tmp_path, max_steps=2, learning_rate=0.0, max_length=10, thoughts_per_token=3),
        texts,
        eval_dataset=texts,
    )
    first, second = trainer.evaluate(), trainer.evaluate(list(texts))
    metrics = ("eval_loss", "eval_base_nll", "eval_mixed_nll", "eval_gain", "eval_gain_decile_1", "eval_gain_decile_10")
    assert [first[x] for x in metrics] == [second[x] for x in metrics]
    rows = [trainer.data_collator([trainer.eval_dataset[i]]) for i in range(5)]
    base, mixed = [], []
    for row in rows:
        seed = epoch_seed(0, 2**32 - 1)
        out = model.think_at_every_token(
            row["input_ids"], seed=seed, sequence_ids=row["sequence_ids"], thoughts_per_token=3
        )
        base.append(-out.base_log_probs)
        mixed.append(-(out.mixed_log_probs.exp().mean(-1).log()))
    assert first["eval_base_nll"] == pytest.approx(torch.cat(base).mean().item(), abs=1e-9)
    assert first["eval_mixed_nll"] == pytest.approx(torch.cat(mixed).mean().item(), abs=1e-9)
    assert first["eval_gain"] == pytest.approx(first["eval_base_nll"] - first["eval_mixed_nll"], abs=1e-9)


def test_rates_of_their_own(tmp_path):
    model = thinker(m=2)
    settings = {"max_steps": 1, "head_learning_rate": 0.3, "meta_learning_rate": 0.02, "learning_rate": 0.1}
    trainer = run(model, arguments(tmp_path, **settings), examples(4, longest=9))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, rate in rates.items():
        own = 0.3 if name.startswith("mixing_head") else 0.02 if name.startswith(("start_", "end_")) else 0.1
        assert rate == own, name


def test_a_curriculum_goes_through_its_stages(tmp_path):
    model, seen = thinker(m=5), []
    loss = model.thinking_loss

    def spy(*args, objective, **kwargs):
        out = loss(*args, objective=objective, **kwargs)
        seen.append((out.tokens.shape[-1], out.mixed_nlls.shape[-1]))
        return out

    model.thinking_loss = spy
    stages = ["3,4:2:0.02", "1,2:3:0.01"]
    settings = {"curriculum": stages, "optim": "adamw_torch", "logging_steps": 1}
    trainer = run(model, arguments(tmp_path, **settings), examples(8, longest=9))
    assert seen == [(3, 4), (3, 4), (1, 2), (1, 2), (1, 2)]
    assert model.config.thought_tokens == 1
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([0.02, 0.02, 0.01, 0.01, 0.01])
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {5}  # the optimiser's state lives on


def test_a_curriculum_scales_the_schedule(tmp_path):
    settings = {"curriculum": ["3,4:2:0.02", "1,2:2:0.01"], "lr_scheduler_type": "linear", "warmup_steps": 0}
    trainer = run(thinker(m=5), arguments(tmp_path, learning_rate=0.02, **settings), examples(8, longest=9))
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([0.02 * 1, 0.02 * 0.75, 0.01 * 0.5, 0.01 * 0.25])


def test_the_best_of_a_curriculum_thinks_as_it_learned_to(tmp_path):
    model, texts = thinker(m=5), examples(8, longest=9)
    settings = {"curriculum": ["3,4:1:1e-9", "1,2:1:5.0"], "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    settings |= {"save_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "mixed_nll"}
    trainer = run(model, arguments(tmp_path, **settings), texts, eval_dataset=texts)
    evaluations = [log["eval_mixed_nll"] for log in trainer.state.log_history if "eval_mixed_nll" in log]
    assert evaluations[0] < evaluations[1]
    assert trainer.state.best_metric == evaluations[0]  # the lowest
    assert model.config.thought_tokens == 3


def test_a_curriculum_resumes_in_its_stage(tmp_path):
    settings = {"curriculum": ["3,4:2", "1,2:3"], "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    unbroken, resumed, texts = thinker(m=5), thinker(m=5), examples(8, longest=9)
    run(unbroken, arguments(tmp_path, **settings), texts)
    run(resumed, arguments(tmp_path, **settings), texts, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(resumed), weights(unbroken))


def test_bfloat16_computes_over_float32_weights(tmp_path):
    model = thinker(m=2, dtype=torch.float32)
    exact = copy.deepcopy(model)
    settings = {"max_steps": 2, "learning_rate": 1e-5, "optim": "adamw_torch", "per_device_train_batch_size": 4}
    run(model, arguments(tmp_path / "a", bf16=True, **settings), examples(8, longest=12))
    run(exact, arguments(tmp_path / "b", **settings), examples(8, longest=12))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    pairs = [(model.state_dict()[name], value) for name, value in exact.state_dict().items()]
    assert any(not torch.equal(a, b) for a, b in pairs)  # the products were rounded
    assert max((a - b).abs().max() for a, b in pairs) <= 5e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, checkpointing):
    model, plain = thinker(m=2), thinker(m=2)
    run(model, arguments(tmp_path / "a", gradient_checkpointing=checkpointing), examples(8, longest=9))
    run(plain, arguments(tmp_path / "b"), examples(8, longest=9))
    assert_same(weights(model), weights(plain))


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a QuietStarForCausalLM.*from_base"):
        run(thinker(m=2).base, arguments(tmp_path), examples(2, longest=9))
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        run(thinker(m=2, dtype=torch.bfloat16), arguments(tmp_path), examples(2, longest=9))
    with pytest.raises(ValueError, match="context"):
        run(thinker(m=2, max_position_embeddings=12), arguments(tmp_path, max_length=9), examples(2, longest=9))
    narrow = thinker(m=1, max_position_embeddings=12)
    with pytest.raises(ValueError, match="context"):
        run(narrow, arguments(tmp_path, max_length=8, curriculum=["3,1:1"]), examples(2, longest=9))
    for option, match in (
        ({"lookahead": 0}, "lookahead"),
        ({"baseline": "median"}, "baseline"),
        ({"max_length": 1}, "max_length"),
    ):
        with pytest.raises(ValueError, match=match):
            arguments(tmp_path, **option)
    with pytest.raises(TypeError, match="curriculum"):
        arguments(tmp_path, curriculum="5,4:10")
    with pytest.raises(ValueError, match="max_steps"):
        arguments(tmp_path, curriculum=["5,4:10"], max_steps=7)
    with pytest.raises(ValueError, match="head_learning_rate"):
        arguments(tmp_path, head_learning_rate=-0.1)
    for stage in ("5", "5,4", "5,4:0", "5,4:10:-1", "5,4:10:1e-6:2", "a,b:c"):
        with pytest.raises(ValueError, match="curriculum"):
            arguments(tmp_path, curriculum=[stage])


@pytest.mark.parametrize("official", [False, True])
def test_short_texts_do_not_stop_a_run(tmp_path, official):
    """A batch without a single thought to reward, or a single token to predict."""
    model = thinker(m=2)
    texts = [{"input_ids": random_ids(1, length)[0]} for length in (1, 1, 2, 3)]
    settings = {"official": official, "policy_weight": 1.0, "max_steps": 2, "per_device_train_batch_size": 2}
    trainer = run(model, arguments(tmp_path, **settings), texts, eval_dataset=texts)
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert not any("gain_decile_1" in log for log in trainer.state.log_history)  # too few tokens for tenths
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_saved_and_loaded(tmp_path):
    model = thinker(m=2)
    trainer = run(model, arguments(tmp_path), examples(4, longest=9))
    trainer.save_model(tmp_path / "model")
    loaded = pyquiet.QuietStarForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert_same(weights(loaded), weights(model))
