"""The denoiser around a masked language model: its rows are the model's own, without the mask token."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from pyquiet.diffusion.modeling import MaskedDenoiser, as_denoiser, backbone, masked_positions, native_head

from .toys import SOURCE, ExactMarginals

V, MASK, PAD = 29, 11, 1
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERTLIKE = {**SIZES, "max_position_embeddings": 24, "pad_token_id": PAD, "mask_token_id": MASK}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig(**BERTLIKE)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**BERTLIKE)),
    "albert": (AlbertForMaskedLM, AlbertConfig(**BERTLIKE, embedding_size=16)),
    "electra": (ElectraForMaskedLM, ElectraConfig(**BERTLIKE, embedding_size=16)),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig(
            vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=24, pad_token_id=PAD
        ),
    ),
    "modernbert": (
        ModernBertForMaskedLM,
        ModernBertConfig(
            **BERTLIKE, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2, global_attn_every_n_layers=1
        ),
    ),
}
IDS = torch.tensor([[0, 5, MASK, 7, MASK, 2, PAD, PAD], [0, MASK, 9, MASK, MASK, 28, 3, 2]])
ATTENDED = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8]).bool()


def model_of(name):
    kind, config = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():  # biases too: a fresh model has none that matter
            parameter.data.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return model_of(request.param)


def denoiser_of(model):
    return MaskedDenoiser(model, mask_id=MASK)


@torch.no_grad()
def test_a_head_row_is_the_whole_model_at_that_position(model):
    """The rows of some positions, in any order, are the logits that the model itself has there."""
    denoiser = denoiser_of(model)
    whole = model(input_ids=IDS, attention_mask=ATTENDED.long()).logits.float()
    hidden = denoiser.hidden(IDS, ATTENDED)
    b, t = torch.tensor([[1, 4], [0, 2], [1, 1], [0, 5], [1, 7]]).T
    logits = denoiser.head(hidden[b, t])
    assert (logits.dtype, logits.shape) == (torch.float32, (5, V))
    others = torch.arange(V) != MASK
    torch.testing.assert_close(logits[:, others], whole[b, t][:, others], rtol=1e-5, atol=1e-5)
    assert (logits[:, MASK] == -torch.inf).all()
    assert whole[:, :, others].std() > 0.1  # a model with an opinion


@torch.no_grad()
def test_log_probs_are_those_of_the_masked_positions_alone(model):
    denoiser = denoiser_of(model)
    log_probs = denoiser.log_probs(IDS, ATTENDED)
    assert log_probs.shape == (5, V)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5))
    assert (log_probs.exp()[:, MASK] == 0).all()
    whole = model(input_ids=IDS, attention_mask=ATTENDED.long()).logits.float()
    whole[..., MASK] = -torch.inf
    expected = torch.cat([whole[0, [2, 4]], whole[1, [1, 3, 4]]]).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denoiser(IDS, ATTENDED), log_probs)


@torch.no_grad()
def test_padding_changes_nothing(model):
    denoiser = denoiser_of(model)
    alone = denoiser.log_probs(IDS[:1, :6])
    together = denoiser.log_probs(IDS, ATTENDED)[:2]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    unseen = IDS.clone()
    unseen[0, 6:] = 21
    torch.testing.assert_close(denoiser.log_probs(unseen, ATTENDED)[:2], alone, rtol=1e-5, atol=1e-5)
    # To the left as well, where a model with absolute positions would count them from the padding on.
    moved, attended = unseen.roll(2, 1), ATTENDED.roll(2, 1)
    torch.testing.assert_close(denoiser.log_probs(moved, attended)[:2], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mask_token_in_the_padding_is_no_masked_position():
    ids = IDS.clone()
    ids[0, 6:] = MASK
    assert torch.equal(masked_positions(ids, MASK, ATTENDED), masked_positions(IDS, MASK, ATTENDED))
    assert torch.equal(masked_positions(ids, MASK, ATTENDED.long()), masked_positions(IDS, MASK, ATTENDED))
    assert masked_positions(ids, MASK).sum() == 7
    assert len(denoiser_of(model_of("bert")).log_probs(ids, ATTENDED)) == 5


def test_no_gradient_goes_to_the_mask_token_and_some_to_all_else(model):
    denoiser = denoiser_of(model)
    log_probs = denoiser.log_probs(IDS, ATTENDED)
    log_probs.gather(1, torch.tensor([[6], [8], [3], [4], [22]])).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    (bias,) = {p for n, p in model.named_parameters() if p.shape == (V,)} or {None}
    if bias is not None:
        assert bias.grad[MASK] == 0
        assert (bias.grad[torch.arange(V) != MASK] != 0).all()


@torch.no_grad()
def test_half_precision_models_give_float32_rows(model):
    denoiser = denoiser_of(model.bfloat16())
    logits = denoiser.head(denoiser.hidden(IDS, ATTENDED)[0])
    assert logits.dtype == torch.float32
    assert denoiser.log_probs(IDS, ATTENDED).dtype == torch.float32
    exact = denoiser.log_probs(IDS, ATTENDED).exp().sum(-1)
    torch.testing.assert_close(exact, torch.ones(5), rtol=0, atol=1e-5)  # normalised in float32, not in bfloat16


@pytest.mark.parametrize(
    ("dtype", "drawn_from"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # which no kernel of the CPU reads
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@torch.no_grad()
def test_draws_are_from_the_models_own_dtype_where_kernels_read_it(dtype, drawn_from):
    denoiser = denoiser_of(model_of("bert").to(dtype))
    rows = denoiser.hidden(IDS, ATTENDED)[0]
    found, wide = native_head(denoiser, rows.dtype)(rows), denoiser.head(rows)
    assert found.dtype == drawn_from
    assert torch.equal(found.to(wide.dtype), wide)


def test_what_passes_for_a_denoiser_need_not_have_another_head():
    toy = ExactMarginals(SOURCE)
    assert native_head(toy, torch.bfloat16) == native_head(toy, torch.float32) == toy.head


@torch.no_grad()
def test_the_context_is_as_long_as_the_model_can_read(model):
    denoiser = denoiser_of(model)
    assert denoiser.context == (22 if model.config.model_type == "roberta" else 24)
    text = torch.full((1, denoiser.context), MASK)
    assert denoiser.log_probs(text).shape == (denoiser.context, V)
    if model.config.model_type != "modernbert":  # the others' tables of positions end there
        with pytest.raises((IndexError, RuntimeError)):
            denoiser.log_probs(torch.cat([text, text[:, :1]], 1))


def test_the_mask_token_is_the_models_own_unless_given():
    model = model_of("bert")
    assert MaskedDenoiser(model).mask_id == MASK
    assert MaskedDenoiser(model, mask_id=0).mask_id == 0
    assert MaskedDenoiser(model).vocab_size == V
    assert MaskedDenoiser(model).device == torch.device("cpu")


def test_the_mode_is_that_of_the_model():
    """`diffuse` refuses a denoiser in training mode, and must not refuse one whose model never was."""
    model = model_of("bert")
    assert not MaskedDenoiser(model).training
    assert not as_denoiser(model).training
    denoiser = MaskedDenoiser(model.train())
    assert denoiser.training
    denoiser.eval()
    assert not model.training


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(model):
    """As an average of weights over a training has; the head must not stay with the original."""
    denoiser = denoiser_of(model)
    before = denoiser.log_probs(IDS, ATTENDED)
    twin = copy.deepcopy(denoiser)
    torch.testing.assert_close(twin.log_probs(IDS, ATTENDED), before)
    for parameter in twin.model.get_output_embeddings().parameters():
        parameter.mul_(2)
    assert not torch.allclose(twin.head(torch.ones(1, 32)), denoiser.head(torch.ones(1, 32)))
    assert torch.equal(denoiser.log_probs(IDS, ATTENDED), before)
    assert sum(p.numel() for p in denoiser.parameters()) == sum(p.numel() for p in model.parameters())


def test_as_denoiser_wraps_models_and_leaves_denoisers():
    model = model_of("bert")
    assert as_denoiser(model).model is model
    denoiser = MaskedDenoiser(model)
    assert as_denoiser(denoiser) is denoiser
    toy = ExactMarginals(SOURCE)
    assert as_denoiser(toy) is toy


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MaskedDenoiser(model_of("bert"), mask_id=V), ValueError, "mask_id"),
        (lambda: MaskedDenoiser(model_of("bert"), mask_id=-1), ValueError, "mask_id"),
        (lambda: MaskedDenoiser(model_of("distilbert")), ValueError, r"MaskedDenoiser\(model, mask_id="),
        (lambda: as_denoiser(LlamaForCausalLM(LlamaConfig(**SIZES))), TypeError, "Llama"),
        (lambda: as_denoiser(BertForSequenceClassification(BertConfig(**BERTLIKE))), TypeError, "Bert"),
        (lambda: as_denoiser(lambda ids: ids), TypeError, "function"),
        (lambda: as_denoiser("bert-base-uncased"), TypeError, "str"),
    ],
    ids=["outside", "negative", "unknown", "causal", "no language model", "function", "name"],
)
def test_what_is_no_masked_language_model_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@torch.no_grad()
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 must"),
    ],
)
def test_a_backbone_that_cannot_be_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        backbone(V, mask_token_id=MASK, **sizes)


def test_the_backbone_sees_the_whole_text_and_has_no_dropout():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = backbone(V, mask_token_id=MASK, hidden_size=32, num_attention_heads=4, intermediate_size=32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    denoiser = MaskedDenoiser(model.train())
    assert (denoiser.mask_id, denoiser.vocab_size) == (MASK, V)
    ids = torch.randint(12, V, (1, 300), generator=torch.Generator().manual_seed(0))
    ids[0, [0, 150, 299]] = MASK
    first = denoiser.log_probs(ids)
    assert torch.equal(first, denoiser.log_probs(ids))  # in train mode
    for far in (1, 298):  # more than any window of local attention away
        changed = ids.clone()
        changed[0, far] = 12 + (changed[0, far] - 11) % (V - 12)
        assert ((first.exp() - denoiser.log_probs(changed).exp()).abs().amax(-1) > 1e-6).all()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_hooks_on_the_models_own_forward_leave_the_head_alone():
    """accelerate's hooks put a forward of theirs on the instance, which runs the whole model."""
    trained = BertForMaskedLM(BertConfig(**BERTLIKE)).eval()
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = MaskedDenoiser(trained).head(rows)
        add_hook_to_module(trained, ModelHook())
        found = MaskedDenoiser(trained).head(rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
