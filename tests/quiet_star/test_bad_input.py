"""Bad input is refused at the door: the error names what is wrong, nothing is left half done."""

from __future__ import annotations

import pytest
import torch

from .architectures import CONTEXT, VOCABULARY
from .thinkers import assert_same_thoughts, random_ids, thinker

REFUSED = (ValueError, TypeError, NotImplementedError)
IDS = random_ids(2, 5)


@pytest.fixture(scope="module", params=["sdpa", "exact_softmax"])
def model(request):
    return thinker("llama", m=2, dtype=torch.float32, attention=request.param)


@torch.no_grad()
def said_by(model):
    """What good calls give, and the base's own attention."""
    thoughts, said = model.think_at_every_token(IDS, seed=1), model.generate(IDS, max_new_tokens=2, seed=1)
    return thoughts, (model.base(IDS).logits, said), model.base.config._attn_implementation


@pytest.fixture(scope="module")
def before(model):
    return said_by(model)


@pytest.fixture(autouse=True)
def still_good(model, before):
    """After whatever the test did, good calls give the right answer and the base is untouched."""
    with torch.no_grad():
        yield
    after = said_by(model)
    assert_same_thoughts(after[0], before[0], 0)
    assert all(map(torch.equal, after[1], before[1]))
    assert after[2] == before[2]


def ways(model, ids, mask=None, **options):
    """The three ways into a thinking model, as functions to call."""
    return {
        "think_at_every_token": lambda: model.think_at_every_token(ids, mask, seed=0, **options),
        "forward": lambda: model(ids, attention_mask=mask, think="always", seed=0, **options),
        "generate": lambda: model.generate(ids, attention_mask=mask, max_new_tokens=3, seed=0, **options),
    }


def assert_refused(calls, match):
    for call in calls.values():
        with pytest.raises(REFUSED, match=match):
            call()


def changed(position, value):
    ids = IDS.clone()
    ids[position] = value
    return ids


BAD_IDS = {
    "too large": changed((0, 2), VOCABULARY),
    "negative": changed((1, 0), -1),
    "huge": changed((1, 4), 2**40),
    "no tokens": torch.zeros(2, 0, dtype=torch.int64),
    "no rows": torch.zeros(0, 4, dtype=torch.int64),
    "floating point": IDS.float(),
    "boolean": IDS > 5,
    "one dimension": IDS[0],
    "three dimensions": IDS[None],
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_input_ids(model, case):
    assert_refused(ways(model, BAD_IDS[case]), "input_ids")


BAD_MASKS = {
    "too short": torch.ones(2, 4, dtype=torch.int64),
    "other rows": torch.ones(3, 5, dtype=torch.int64),
    "four dimensions": torch.ones(2, 1, 5, 5, dtype=torch.int64),
    "a hole": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]),
    "only padding": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_attention_mask(model, case):
    assert_refused(ways(model, IDS, BAD_MASKS[case]), "attention_mask")


BAD_OPTIONS = [
    ("thoughts_per_token", 0),
    ("thoughts_per_token", -2),
    ("thoughts_per_token", 1.5),
    ("thought_temperature", -1.0),
    ("thought_temperature", float("nan")),
    ("thought_top_k", 0),
    ("thought_top_k", -3),
    ("thought_top_p", 0.0),
    ("thought_top_p", 1.5),
    ("sequence_ids", torch.tensor([1, 2, 3])),
    ("sequence_ids", torch.tensor([0.5, 1.5])),
    ("sequence_ids", torch.tensor([0, -1])),
    ("sequence_ids", torch.tensor([0, 2**32])),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=str)
def test_options(model, name, value):
    assert_refused(ways(model, IDS, **{name: value}), name.removeprefix("thought_"))


@pytest.mark.parametrize("seed", [2**64, 1.5], ids=str)
def test_seed(model, seed):
    for call in (
        lambda: model.think_at_every_token(IDS, seed=seed),
        lambda: model(IDS, think="always", seed=seed),
        lambda: model.generate(IDS, max_new_tokens=2, seed=seed),
    ):
        with pytest.raises(REFUSED, match="seed"):
            call()


@pytest.mark.parametrize("think", ["sometimes", None, 3])
def test_think(model, think):
    for call in (
        lambda: model(IDS, think=think),
        lambda: model.generate(IDS, max_new_tokens=2, think=think),
    ):
        with pytest.raises(REFUSED, match="think"):
            call()


@pytest.mark.parametrize("think", ["always", "never"])
@pytest.mark.parametrize("temperature", [1e-50, 1e38])
def test_temperatures_that_float32_cannot_divide_by(model, think, temperature):
    options = {"max_new_tokens": 2, "seed": 0, "think": think}
    with pytest.raises(ValueError, match=r"temperature must be .* got 1e"):
        model.generate(IDS, do_sample=True, temperature=temperature, **options)
    model.generate(IDS, do_sample=True, temperature=1e-37, **options)


@pytest.mark.parametrize("layer", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_nan_logits(model, layer):
    weight = model.base.get_parameter(layer)
    kept = weight[5, 3].clone()
    weight[5, 3] = float("nan")
    try:
        calls = ways(model, IDS)
        calls["sampled answer"] = lambda: model.generate(IDS, max_new_tokens=2, do_sample=True, seed=0)
        assert_refused(calls, "(?i)nan")
    finally:
        weight[5, 3] = kept


def test_padding_does_not_count_towards_the_context(model):
    ids = random_ids(1, CONTEXT + 10)
    mask = torch.zeros_like(ids)
    mask[:, -8:] = 1
    thoughts = model.think_at_every_token(ids, mask, seed=3)
    alone = model.think_at_every_token(ids[:, -8:], seed=3)
    assert torch.equal(thoughts.tokens[:, -8:], alone.tokens)


def test_nothing_is_streamed_before_the_refusal(model):
    class Streamer:
        def put(self, value):
            pytest.fail(f"streamed {value}")

        def end(self):
            pytest.fail("ended a stream that never began")

    with pytest.raises(REFUSED, match="input_ids"):
        model.generate(BAD_IDS["too large"], max_new_tokens=2, seed=0, streamer=Streamer())


def test_a_stop_in_the_middle_leaves_nothing_behind(model):
    """A criterion that raises after two tokens, as an interrupt would."""

    def interrupt(input_ids, scores, **_):
        if input_ids.shape[1] == 7:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, max_new_tokens=5, seed=0, stopping_criteria=[interrupt])
