"""PEFT adapters on the base: what they compute, what trains, and that they come back from a checkpoint."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from packaging import version
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import pyquiet

from .architectures import EXACT, VOCABULARY, build
from .test_checkpoint import LOADERS
from .thinkers import assert_close, assert_same_thoughts, awake, padded, random_ids, thinker
from .training_runs import arguments, examples, run, weights

peft = pytest.importorskip("peft")

from_base = pyquiet.QuietStarForCausalLM.from_base
from_pretrained = pyquiet.QuietStarForCausalLM.from_pretrained
TARGETS = ["q_proj", "v_proj"]


def lora(**changes):
    return peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 8} | changes)


@torch.no_grad()
def stir(model):
    """Random numbers in all that trains: fresh adapters change nothing."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def wrapped(config=None, *, name="starcoder2", dtype=torch.float64, attention=EXACT, **changes):
    """A `PeftModel` around a tiny base, its adapters stirred; in float64 starcoder2 is exact throughout."""
    model = peft.get_peft_model(build(name, dtype=dtype, attention=attention, **changes), config or lora())
    return stir(model).eval()


def adapted(config=None, *, m=2, **changes):
    return awake(from_base(wrapped(config, **changes), thought_tokens=m, start_init=7))


def inject(base, config, name="default"):
    """`base.add_adapter`, whichever version of PEFT transformers asks for."""
    if version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION):
        peft.inject_adapter_in_model(config, base, name)
    else:
        base.add_adapter(config, name)


def assert_same_model(actual, expected):
    old, new = dict(expected.named_parameters()), dict(actual.named_parameters())
    assert new.keys() == old.keys()
    for name, parameter in old.items():
        assert torch.equal(new[name], parameter), name
        assert new[name].dtype == parameter.dtype, name
        assert new[name].requires_grad == parameter.requires_grad, name
    ids = random_ids(2, 6)
    for think in ("always", "never"):
        options = {"seed": 1} if think == "always" else {}
        logits = [model.eval()(ids, think=think, **options).logits for model in (actual, expected)]
        assert torch.equal(*logits)


@pytest.fixture(scope="module")
def pair():
    """A model with adapters, and the same one with the adapters merged into the base's weights."""
    outside = wrapped(lora(use_dora=True))
    model = awake(from_base(outside, thought_tokens=2, start_init=7))
    merged = from_base(copy.deepcopy(outside).merge_and_unload(), thought_tokens=2, start_init=7)
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}
    assert not merged.load_state_dict(rest, strict=False).unexpected_keys
    merged.generation_config.eos_token_id = None
    plain = from_base(build("starcoder2"), thought_tokens=2)
    assert not torch.allclose(merged.base(random_ids(1, 4)).logits, plain.base(random_ids(1, 4)).logits, atol=0.1)
    return model, merged.eval()


def test_thoughts_and_losses_equal_those_of_merged_weights(pair):
    model, merged = pair
    ids, mask = padded([random_ids(1, n, seed=n)[0] for n in (9, 6)], "left")
    expected = merged.think_at_every_token(ids, mask, seed=4)
    assert_same_thoughts(model.think_at_every_token(ids, mask, seed=4), expected, 1e-11)
    losses = [each.thinking_loss(ids, mask, seed=4) for each in pair]
    assert_close(losses[0].loss, losses[1].loss, 1e-11)
    assert torch.equal(losses[0].tokens, losses[1].tokens)


@pytest.mark.parametrize("think", ["always", "never"])
def test_generation_equals_that_of_merged_weights(pair, think):
    ids, mask = padded([random_ids(1, n, seed=n)[0] for n in (5, 3)], "left")
    options = {"max_new_tokens": 8, "seed": 1, "do_sample": True, "think": think, "return_dict_in_generate": True}
    ours, theirs = (each.generate(ids, attention_mask=mask, output_logits=True, **options) for each in pair)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), 1e-11)


def test_only_adapters_and_what_thinks_get_gradients():
    """And an adapter's gradient is the chain rule's from that of the merged weight W + scaling B A."""
    outside = wrapped()
    model = awake(from_base(outside, thought_tokens=2, start_init=7))
    merged = from_base(copy.deepcopy(outside).merge_and_unload().requires_grad_(True), thought_tokens=2, start_init=7)
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}
    merged.load_state_dict(rest, strict=False)
    ids = random_ids(2, 9)
    for each in (model, merged):
        each.thinking_loss(ids, seed=4).loss.backward()
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert own == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name in own if not name.startswith("base.")} == rest.keys()
    assert all("lora_" in name for name in own if name.startswith("base."))
    assert len(own) == len(rest) + 2 * 2 * len(TARGETS)
    expected = dict(merged.named_parameters())
    for name in rest:
        assert_close(model.get_parameter(name).grad, expected[name].grad, 1e-10)
    for name, layer in model.base.named_modules():
        if not isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        A, B, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        whole = expected[f"base.{name}.weight"].grad
        assert whole.any()
        assert_close(A.grad, scale * B.T @ whole, 1e-10)
        assert_close(B.grad, scale * whole @ A.T, 1e-10)


def test_gradients_under_activation_checkpointing():
    grads, plain = [], adapted().train()
    for checkpointing in (False, True):
        model = copy.deepcopy(plain)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.thinking_loss(random_ids(2, 8), seed=4).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_adapters_can_come_after_wrapping(tmp_path):
    model = thinker("llama", dtype=torch.float32, attention="sdpa")
    inject(model.base, lora())
    stir(model)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        *("base", "mixing_head", "start_embedding", "end_embedding")
    }
    model.save_pretrained(tmp_path)
    assert_same_model(from_pretrained(tmp_path), model)


CASES = {
    "LoRA": {},
    "GPT-2": {"name": "gpt2", "config": lora(target_modules=["c_attn"], fan_in_fan_out=True)},
    "DoRA": {"config": lora(use_dora=True, use_rslora=True, rank_pattern={"v_proj": 3})},
    "PiSSA": {"config": lora(init_lora_weights="pissa")},
    "modules to save": {"config": lora(modules_to_save=["lm_head"], bias="lora_only")},
    "float64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16, "config": lora(modules_to_save=["lm_head"])},
    "tied": {"tie_word_embeddings": True},
    "tied, head adapted": {"tie_word_embeddings": True, "config": lora(target_modules=["q_proj", "lm_head"])},
    "tied, table adapted": {"tie_word_embeddings": True, "config": lora(target_modules=["q_proj", "embed_tokens"])},
    "tied, table saved": {"tie_word_embeddings": True, "config": lora(modules_to_save=["embed_tokens"])},
    "IA3": {"config": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])},
    "LoHa": {"config": peft.LoHaConfig(target_modules=TARGETS)},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_everything_comes_back(case, tmp_path):
    settings = {"name": "llama", "dtype": torch.float32, "attention": "sdpa"} | CASES[case]
    model = adapted(copy.deepcopy(settings.pop("config", None)), **settings)
    model.save_pretrained(tmp_path / "first")
    for loader in LOADERS.values():
        loaded = loader(tmp_path / "first")
        assert_same_model(loaded, model)
        assert type(loaded.base) is type(model.base)
    loaded.save_pretrained(tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
    tied = settings.get("tie_word_embeddings", False) or case == "GPT-2"
    table, head = (loaded.base.get_submodule(name) for name in ("base_model", "lm_head"))
    table = table.get_input_embeddings()
    table, head = (getattr(layer, "original_module", layer) for layer in (table, head))
    assert (table.weight.data_ptr() == head.weight.data_ptr()) == tied


@torch.no_grad()
def test_taking_adapters_over_changes_no_output():
    for case in ("tied, head adapted", "tied, table saved"):
        outside = wrapped(copy.deepcopy(CASES[case]["config"]), name="llama", tie_word_embeddings=True)
        ids = random_ids(2, 5)
        expected = outside(ids).logits
        assert torch.equal(from_base(outside, thought_tokens=1)(ids, think="never").logits, expected), case


@torch.no_grad()
def test_bf16_bases_keep_adapters_in_float32(tmp_path):
    model = adapted(name="llama", dtype=torch.bfloat16, attention="sdpa")
    dtypes = {name: p.dtype for name, p in model.base.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}):
        assert {name: p.dtype for name, p in from_pretrained(tmp_path, **options).base.named_parameters()} == dtypes
    model.base.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in from_pretrained(tmp_path).base.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_several_adapters_come_back_as_active_as_they_were(tmp_path):
    outside = wrapped(name="llama", dtype=torch.float32, attention="sdpa")
    outside.add_adapter("second", lora(target_modules=["up_proj"], init_lora_weights=False))
    model = awake(from_base(outside, thought_tokens=2, start_init=7))
    for state in ("default", "second"):
        outside.set_adapter(state)
        model.save_pretrained(tmp_path, max_shard_size="20kB")
        assert_same_model(from_pretrained(tmp_path), model)
    outside.base_model.disable_adapter_layers()
    model.save_pretrained(tmp_path)
    assert_same_model(from_pretrained(tmp_path), model)


@torch.no_grad()
def test_official_models_have_adapters_too(tmp_path):
    outside = wrapped(name="llama", dtype=torch.float32, attention="sdpa")
    model = awake(from_base(outside, thought_tokens=1, start_init=7, official=True))
    assert outside.get_input_embeddings().weight.shape[0] == VOCABULARY
    model.save_pretrained(tmp_path)
    assert_same_model(from_pretrained(tmp_path), model)


@torch.no_grad()
def test_unloaded_adapters_leave_a_plain_model(tmp_path):
    for tied in (False, True):
        changes = {"name": "llama", "dtype": torch.float32, "attention": "sdpa", "tie_word_embeddings": tied}
        outside = wrapped(lora(target_modules=["q_proj", "lm_head"]) if tied else None, **changes)
        model = awake(from_base(outside, thought_tokens=1, start_init=7))
        outside.unload()
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(tmp_path)
        assert loaded.config.base_adapters is None
        assert dict(loaded.named_parameters()).keys() == dict(model.named_parameters()).keys()
        assert torch.equal(loaded(random_ids(1, 4), seed=1).logits, model(random_ids(1, 4), seed=1).logits)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    def model():
        return adapted(lora(lora_dropout=0.1), name="llama", dtype=torch.float32)

    settings = {"max_steps": 4, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "max_length": 10}
    unbroken, resumed = model(), model()
    before = weights(unbroken)
    run(unbroken, arguments(tmp_path, **settings), examples(8, longest=12))
    checkpoint = str(tmp_path / "checkpoint-2")
    run(resumed, arguments(tmp_path, **settings), examples(8, longest=12), resume_from_checkpoint=checkpoint)
    after = weights(unbroken)
    assert all(torch.equal(value, after[name]) for name, value in weights(resumed).items())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name, parameter in unbroken.named_parameters() if parameter.requires_grad}
    assert len(weights(from_pretrained(checkpoint))) == len(after)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (peft.VeraConfig(target_modules=["q_proj"], r=4), "VERA.*shared state"),
        (peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0), "OFT.*could not be loaded again"),
        (lora(trainable_token_indices=[3, 4]), "LORA.*trainable_tokens_original"),
    ],
    ids=["prompt tuning", "prefix tuning", "VeRA", "OFT", "trainable tokens"],
)
def test_what_cannot_think_or_come_back_is_refused(config, name):
    with pytest.raises(ValueError, match=name):
        from_base(peft.get_peft_model(build("llama", dtype=torch.float32), config))


@torch.no_grad()
def test_initialisations_that_need_data_are_not_run_again(tmp_path):
    outside = wrapped(name="llama", dtype=torch.float32, attention="sdpa")
    outside.peft_config["default"].init_lora_weights = "corda"
    model = awake(from_base(outside, thought_tokens=1, start_init=7))
    model.save_pretrained(tmp_path)
    assert_same_model(from_pretrained(tmp_path), model)


def test_what_its_configuration_does_not_describe_is_not_saved(tmp_path):
    model = adapted(name="llama", dtype=torch.float32)
    attention = model.base.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.base_layer
    with pytest.raises(ValueError, match=r"LORA.*does not give back model\.layers\.0\.self_attn\.q_proj"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_merged_adapters_are_not_saved(tmp_path):
    outside = wrapped(name="llama", dtype=torch.float32)
    model = from_base(outside, thought_tokens=1)
    outside.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weights"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    outside.unmerge_adapter()
    model.save_pretrained(tmp_path)


def test_adapters_of_the_whole_are_sent_to_the_base(tmp_path):
    model = thinker("llama", dtype=torch.float32)
    for add in (model.add_adapter, model.load_adapter):
        with pytest.raises(ValueError, match=r"model\.base\."):
            add(lora())


def test_peft_around_the_thinking_model(tmp_path):
    """It trains and generates; START and END, which are no modules, are frozen there."""
    model = thinker("llama", dtype=torch.float32, attention="sdpa")
    logits = model(random_ids(1, 5), seed=1).logits
    outside = peft.get_peft_model(model, lora(modules_to_save=["mixing_head"], task_type="CAUSAL_LM"))
    assert torch.equal(outside(input_ids=random_ids(1, 5), seed=1).logits, logits)
    outside.thinking_loss(random_ids(2, 6), seed=0).loss.backward()
    learns = {name for name, parameter in outside.named_parameters() if parameter.grad is not None}
    assert any("mixing_head.modules_to_save" in name for name in learns)
    assert any("lora_B" in name for name in learns)
    assert not any("_embedding" in name or "base_layer" in name for name in learns)
    assert outside.generate(input_ids=random_ids(1, 3), max_new_tokens=2, seed=0).shape == (1, 5)
    with pytest.raises(ValueError, match="inside a PeftModel"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="thinks already"):
        from_base(outside)


def test_without_peft_a_checkpoint_says_what_it_needs(tmp_path, monkeypatch):
    adapted(name="llama", dtype=torch.float32, attention="sdpa").save_pretrained(tmp_path)
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"PEFT adapters \(default\): pip install"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    thinker("llama", dtype=torch.float32, attention="sdpa").save_pretrained(tmp_path / "plain")
    from_pretrained(tmp_path / "plain")
