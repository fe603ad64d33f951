"""The energy of a causal LM is what the model itself says of whole texts, one at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
)

import pyquiet
from pyquiet.diffusion.ar_energy import AREnergy, check_tokenizers
from pyquiet.diffusion.sampling import diffuse

from .networks import network

V, MASK, BOS, PAD = 17, 17, 0, 16
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, bos_token_id=BOS),
    "mistral": MistralConfig(**LLAMA, bos_token_id=BOS, sliding_window=3),  # shorter than most prefixes here
    "gemma2": Gemma2Config(**LLAMA, bos_token_id=BOS, head_dim=8, sliding_window=3, final_logit_softcapping=2.0),
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=BOS),
    "opt": OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, bos_token_id=BOS),
    "mamba": MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=BOS),
}


def causal(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **options):
    """A random causal LM to which every token matters."""
    config = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **options)
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=1.5 / weight.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def problem(B=3, k=4, T=9, *, seed=0, first_masked=None):
    """Texts of different lengths, padded on either side, with tokens masked, and candidates for them."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, PAD, (B, T), generator=generator)
    masked = torch.rand(B, T, generator=generator) < 0.5
    for b in range(B):
        start = (2 + b if first_masked is None else first_masked) % T
        masked[b, :start], masked[b, start] = False, True
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, -2:] = False
    mask[1:2, :2] = False
    drawn = torch.randint(1, PAD, (B, k, T), generator=generator)
    candidates = torch.where((masked & mask)[:, None], drawn, texts[:, None]).masked_fill(~mask[:, None], PAD)
    input_ids = texts.masked_fill(masked, MASK).masked_fill(~mask, PAD)
    log_mu = -5 * torch.rand(B, k, generator=generator, dtype=torch.float64)
    return candidates, input_ids, torch.full((B,), 0.5, dtype=torch.float64), log_mu, mask


@torch.no_grad()
def plain_score(lm, tokens, keep=None, bos=BOS):
    """log p of a text behind a BOS, token by token in one forward; only the kept ones."""
    tokens = tokens[1:] if int(tokens[0]) == bos else tokens
    ids = torch.cat([torch.tensor([bos]), tokens])[None]
    logits = lm(ids).logits[0, :-1]
    score = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    score = score.gather(1, tokens[:, None])[:, 0].double()
    return (score if keep is None else score[keep]).sum()


def plain_energy(lm, candidates, input_ids, log_mu, mask, carry_over=False):
    out = log_mu.clone()
    for b in range(len(out)):
        masked = input_ids[b, mask[b]] == MASK
        for j in range(out.shape[1]):
            out[b, j] -= plain_score(lm, candidates[b, j, mask[b]], masked if carry_over else None)
    return out


@pytest.mark.parametrize("carry_over", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_models_score_of_the_whole_text(name, carry_over):
    lm = causal(name)
    candidates, input_ids, time, log_mu, mask = problem()
    expected = plain_energy(lm, candidates, input_ids, log_mu, mask, carry_over)
    energy = AREnergy(lm, mask_id=MASK, carry_over=carry_over)
    found = energy(candidates, input_ids, time, log_mu, attention_mask=mask)
    assert found.dtype == torch.float64
    # Mamba's own forward makes float32 of its logits.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if name == "mamba" else 1e-10)


@pytest.mark.parametrize("microbatch", [1, 3, 5, 12, 100, None])
@pytest.mark.parametrize("carry_over", [False, True])
def test_the_microbatch_changes_nothing(microbatch, carry_over):
    lm = causal()
    candidates, input_ids, time, log_mu, mask = problem()
    energy = AREnergy(lm, mask_id=MASK, carry_over=carry_over, microbatch=microbatch)
    found = energy(candidates, input_ids, time, log_mu, attention_mask=mask)
    torch.testing.assert_close(
        found, plain_energy(lm, candidates, input_ids, log_mu, mask, carry_over), rtol=0, atol=1e-10
    )


def test_observed_tokens_behind_a_mask_matter_unless_carried_over():
    lm = causal()
    candidates, input_ids, time, log_mu, _ = problem(B=1, k=1, first_masked=3)
    input_ids[0, -1] = candidates[0, 0, -1]
    other_candidates, other_ids = candidates.clone(), input_ids.clone()
    other_candidates[0, 0, -1] = other_ids[0, -1] = 1 + candidates[0, 0, -1] % 10
    for carry_over in (False, True):
        energy = AREnergy(lm, mask_id=MASK, carry_over=carry_over)
        one, other = energy(candidates, input_ids, time, log_mu), energy(other_candidates, other_ids, time, log_mu)
        assert bool((one - other).abs().max() > 0.01) == (not carry_over)


def test_a_given_bos_is_read_once_and_a_drawn_one_is_scored():
    lm = causal()
    candidates, input_ids, time, log_mu, _ = problem(B=1, k=2, first_masked=3)
    candidates[:, :, 0] = input_ids[:, 0] = BOS
    found = AREnergy(lm)(candidates, input_ids, time, log_mu)
    expected = [log_mu[0, j] - plain_score(lm, candidates[0, j]) for j in range(2)]
    torch.testing.assert_close(found[0], torch.stack(expected), rtol=0, atol=1e-10)
    input_ids[:, 0] = MASK
    found = AREnergy(lm)(candidates, input_ids, time, log_mu)
    ids = torch.nn.functional.pad(candidates[0], (1, 0), value=BOS)
    law = lm(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(found[0], log_mu[0] - law, rtol=0, atol=1e-10)


def test_z_is_the_probability_of_the_observed_tokens():
    """sum over completions of mu exp(-E) = p_AR(observed), and 1 with carry_over."""
    lm = causal("gpt2")
    V = lm.config.vocab_size
    input_ids = torch.tensor([[3, MASK, 5, MASK, 2]])
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    candidates = input_ids.repeat(V * V, 1)
    candidates[:, [1, 3]] = pairs
    joint = torch.stack([plain_score(lm, row) for row in candidates])
    mu = torch.linspace(-1, 1, V, dtype=torch.float64).log_softmax(0)
    log_mu = mu[pairs].sum(1)[None]
    time = torch.ones(1, dtype=torch.float64)
    for carry_over, expected in ((False, joint.logsumexp(0)), (True, torch.zeros(()).double())):
        energy = AREnergy(lm, mask_id=MASK, carry_over=carry_over)
        assert energy.self_normalized == carry_over
        log_z = (log_mu - energy(candidates[None], input_ids, time, log_mu)).logsumexp(1)
        torch.testing.assert_close(log_z, expected[None], rtol=0, atol=1e-10)


def test_what_all_candidates_begin_with_is_read_once():
    lm = causal()
    candidates, input_ids, time, log_mu, _ = problem(B=2, k=5, T=12, first_masked=7)
    read = []
    lm.base_model.register_forward_pre_hook(lambda m, args, kw: read.append(args[0].numel()), with_kwargs=True)
    energy = AREnergy(lm)
    read.clear()
    energy(candidates, input_ids, time, log_mu)
    lead = (candidates == candidates[:, :1]).all(1).long().cumprod(1).sum(1).min().item()
    assert lead >= 7
    assert sum(read) == 2 * (1 + lead) + 2 * 5 * (12 - 1 - lead)


def test_logits_never_stand_in_memory_at_once():
    lm = causal()
    candidates, input_ids, time, log_mu, _ = problem(B=2, k=8, T=12)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor) and out.ndim and out.shape[-1] == V and len(out) != 16
            ):  # the head's weight
                largest = max(largest, out.numel())
            return out

    energy = AREnergy(lm)
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr("pyquiet.heads._LOGITS_AT_ONCE", 5 * V)
        found = energy(candidates, input_ids, time, log_mu)
    assert 0 < largest <= 5 * V
    torch.testing.assert_close(found, energy(candidates, input_ids, time, log_mu))


def test_a_bf16_model_is_normalised_in_float32():
    """The released code rounds logits to bfloat16, which is off by hundredths of a nat a token."""
    lm = causal(dtype=torch.bfloat16)
    lm.lm_head.weight.data *= 8  # logits of magnitude 10 and more
    candidates, input_ids, time, log_mu, mask = problem(B=2, k=2, T=12)
    found = AREnergy(lm)(candidates, input_ids, time, log_mu.float(), attention_mask=mask)
    assert found.dtype == torch.float32
    rounded = plain_energy(lm, candidates, input_ids, log_mu, mask)
    hook = lm.lm_head.register_forward_hook(lambda m, args, out: args[0].float() @ m.weight.float().T)
    exact = plain_energy(lm, candidates, input_ids, log_mu, mask)
    hook.remove()
    error, its = (found - exact).abs().max(), (rounded - exact).abs().max()
    assert its > 0.1
    # The trunk itself, in bfloat16, is not the same for every batch; what is left of its noise is far below that.
    assert error < its / 2


def test_autocast_stays_outside():
    lm = causal(dtype=torch.float32)
    candidates, input_ids, time, log_mu, _ = problem()
    energy = AREnergy(lm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = energy(candidates, input_ids, time, log_mu)
    assert torch.equal(found, energy(candidates, input_ids, time, log_mu))
    assert not found.requires_grad


def test_a_thinking_model_answers_at_once():
    thinker, _ = pyquiet.load("tiny-puzzler")
    size = thinker.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, size, (1, 2, 6), generator=torch.Generator().manual_seed(0))
    time, log_mu = torch.ones(1), torch.zeros(1, 2)
    x = torch.full((1, 6), size)
    bos = 1 if thinker.config.bos_token_id is None else thinker.config.bos_token_id
    found = AREnergy(thinker, bos_id=bos)(ids, x, time, log_mu)
    expected = [-plain_score(thinker.base, row, bos=bos) for row in ids[0]]
    torch.testing.assert_close(found[0].double(), torch.stack(expected), rtol=0, atol=1e-4)


def test_the_embedded_model_and_a_mask_beyond_its_vocabulary():
    lm, tokenizer = pyquiet.load("tiny-causal")
    words = torch.tensor([tokenizer("It was the best of times.", add_special_tokens=False)["input_ids"]])
    input_ids = words.clone()
    input_ids[0, 2] = 2048
    candidates = words[:, None].repeat(1, 2, 1)
    candidates[0, 1, 2] = 2047
    energy = AREnergy(lm, mask_id=2048)
    assert energy.vocab_size == 2048
    found = energy(candidates, input_ids, torch.ones(1), torch.zeros(1, 2))
    expected = [-plain_score(lm, row, bos=tokenizer.bos_token_id) for row in candidates[0]]
    torch.testing.assert_close(found[0].double(), torch.stack(expected), rtol=0, atol=1e-3)
    candidates[0, 1, 2] = 2048
    with pytest.raises(ValueError, match="candidates hold the id 2048, the mask"):
        energy(candidates, input_ids, torch.ones(1), torch.zeros(1, 2))


def test_real_models(shared):
    lm = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K").eval()
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    texts = ["Once upon a time, there was a little girl.", "Once upon a time, there was a hungry stone."]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = min(map(len, rows))
    candidates = torch.tensor([row[:width] for row in rows])[None]
    input_ids = torch.where(candidates[:, 0] == candidates[:, 1], candidates[:, 0], 512)
    found = AREnergy(lm, mask_id=512)(candidates, input_ids, torch.ones(1), torch.zeros(1, 2))
    bos = lm.config.bos_token_id
    expected = [-plain_score(lm, row, bos=bos) for row in candidates[0]]
    torch.testing.assert_close(found[0].double(), torch.stack(expected), rtol=0, atol=1e-3)
    assert found[0, 0] + 2 < found[0, 1]


def test_bad_arguments_are_named():
    lm = causal()
    candidates, input_ids, time, log_mu, mask = problem()
    with pytest.raises(TypeError, match="lm must be a transformers causal LM"):
        AREnergy("gpt2")
    with pytest.raises(TypeError, match="lm must be"):
        AREnergy(lm.model)
    for model in (BertForMaskedLM(BertConfig(**SIZES, intermediate_size=24)).eval(), network().model):
        with pytest.raises(TypeError, match=r"lm is a \w+ForMaskedLM, which looks ahead"):
            AREnergy(model, bos_id=BOS)
    with pytest.raises(ValueError, match=r"bos_id must be a token of lm, in 0..16, got 17"):
        AREnergy(lm, bos_id=17)
    with pytest.raises(ValueError, match="mask_id is None"):
        AREnergy(lm, carry_over=True)
    with pytest.raises(ValueError, match="microbatch must be at least 1"):
        AREnergy(lm, microbatch=0)
    lm.config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_id is None"):
        AREnergy(lm)
    energy = AREnergy(lm, bos_id=BOS)
    strange = candidates.clone()
    strange[2, 1, 4] = MASK
    with pytest.raises(ValueError, match="candidates hold the id 17, no token of lm, which knows 17"):
        energy(strange, input_ids, time, log_mu)
    strange[2, 1, 4] = 9
    with pytest.raises(ValueError, match="candidates hold the id 9, the mask"):
        AREnergy(lm, bos_id=BOS, mask_id=9)(strange, input_ids, time, log_mu)
    with pytest.raises(ValueError, match=r"candidates must be \[B, k, T\]"):
        energy(candidates[:, :, 1:], input_ids, time, log_mu)
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        energy(candidates, input_ids, time, log_mu, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="candidates have 40 tokens to score, but lm was made for 32"):
        energy(torch.ones(1, 2, 40).long(), torch.ones(1, 40).long(), time[:1], log_mu[:1, :2])
    lm.train()
    with pytest.raises(ValueError, match=r"lm is in training mode.*call lm.eval"):
        energy(candidates, input_ids, time, log_mu)


@pytest.mark.parametrize(
    ("length", "options", "named"),
    [
        (33, {}, "33 tokens to score, but lm was made for 32"),
        (40, {"sampler": "semi_autoregressive", "context": 33}, "33 tokens to score"),
        (9, {"given": {3: 20}}, "candidates hold the id 20, no token of lm, which knows 17"),
        (9, {"mask_id": 5}, "its mask_id is 5, but the denoiser's is 7"),
        (9, {"train": True}, "lm is in training mode"),
        # What is right is computed, which here cannot be.
        (32, {}, None),
        (33, {"given": {0: BOS}}, None),
        (33, {"fill": 0, "given": {0: BOS}}, None),  # too long only where there is nothing to fill
        (33, {"candidates": 1}, None),
        (33, {"padding": 1}, None),
        (40, {"sampler": "semi_autoregressive", "context": 32}, None),
    ],
    ids=str,
)
def test_what_it_cannot_read_is_found_before_anything_is_computed(length, options, named):
    denoiser, options = network(), dict(options)
    denoiser.hidden = None
    ids = torch.full((2, length), denoiser.mask_id)
    for place, token in options.pop("given", {}).items():
        ids[:, place] = token
    ids[1, options.pop("fill", length) :] = 9  # the second text is all given, or all masked
    attention = torch.ones_like(ids)
    attention[:, : options.pop("padding", 0)] = 0
    lm = causal().train(options.pop("train", False))
    energy = AREnergy(lm, bos_id=BOS, mask_id=options.pop("mask_id", None))
    with pytest.raises(ValueError if named else TypeError, match=named or "'NoneType' object is not callable"):
        diffuse(denoiser, energy, input_ids=ids, attention_mask=attention, **options)


def test_tokenizers_must_be_the_same_but_for_the_mask():
    _, mine = pyquiet.load("tiny-causal")
    _, lm = pyquiet.load("tiny-causal")
    mine.add_special_tokens({"mask_token": "[MASK]"})
    check_tokenizers(mine, lm)
    mine.add_tokens(["quietly-added"])
    with pytest.raises(ValueError, match=r"'quietly-added' has the id \d+ for the denoiser and does not exist"):
        check_tokenizers(mine, lm)
    _, other = pyquiet.load("tiny-puzzler")
    with pytest.raises(ValueError, match="tokenizers differ"):
        check_tokenizers(other, lm)
