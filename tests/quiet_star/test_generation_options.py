"""What a user of transformers expects of `generate`: stopping, streams, processors, configs."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from . import sequential_reference as reference
from .architectures import EOS, PAD, VOCABULARY
from .thinkers import CallCounter, assert_close, padded, random_ids, thinker, tokens_of

DICT = {"return_dict_in_generate": True, "return_thoughts": True}


class Collect(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.reshape(-1).clone())

    def end(self):
        self.ended += 1


class Forbid(LogitsProcessor):
    """Forbids some tokens, and keeps the texts it was shown."""

    def __init__(self, tokens):
        self.tokens, self.seen = tokens, []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores.index_fill(1, torch.tensor(self.tokens), -torch.inf)


class LongEnough(StoppingCriteria):
    """Stops every row at a given length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def first_new_token(tokens):
    """(row, step) of a token that no row has said before, and only this row says then."""
    for step in range(1, tokens.shape[1] - 2):
        for row in range(len(tokens)):
            if (tokens[:, : step + 1] == tokens[row, step]).sum() == 1:
                return row, step
    raise AssertionError("the answers repeat themselves from the start")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_stops_at_eos_and_the_others_go_on(side):
    model = thinker(m=2)
    ids, mask = padded([random_ids(1, n, seed=n)[0] for n in (4, 7, 5)], side)
    options = {"attention_mask": mask, "do_sample": True, "seed": 3, "max_new_tokens": 10, **DICT}
    free = model.generate(ids, **options)
    said = tokens_of(free, 7)
    row, step = first_new_token(said)
    eos = int(said[row, step])
    out = model.generate(ids, eos_token_id=eos, pad_token_id=PAD, **options)
    new = tokens_of(out, 7)
    for b in range(3):
        ends = (said[b] == eos).nonzero().flatten()
        kept = int(ends[0]) + 1 if len(ends) else new.shape[1]
        assert torch.equal(new[b, :kept], said[b, :kept])
        assert (new[b, kept:] == PAD).all()
        assert torch.equal(out.thoughts.tokens[b, :kept], free.thoughts.tokens[b, :kept])
        assert (out.thoughts.tokens[b, kept:] == -1).all()
        assert not out.thoughts.weight[b, kept:].any()
        assert not out.thoughts.log_probs[b, kept:].any()
        assert sum(out.calls.values())[b] == 3 * kept
    assert (new[row, step + 1 :] == PAD).all()
    assert new.shape[1] > step + 1


def test_generation_ends_when_every_row_has_stopped():
    model, ids = thinker(m=1), random_ids(1, 4)
    free = model.generate(ids, do_sample=True, seed=3, max_new_tokens=8)[0, 4:].tolist()
    stop = next(t for t in range(1, 8) if free[t] not in free[:t])
    with CallCounter(model) as counter:
        out = model.generate(ids, do_sample=True, seed=3, max_new_tokens=8, eos_token_id=[98, free[stop]])
    assert out[0, 4:].tolist() == free[: stop + 1]
    assert counter.calls == 2 * (stop + 1)


def test_the_eos_of_the_generation_config_is_respected():
    model, ids = thinker(m=1), random_ids(1, 4)
    free = model.generate(ids, do_sample=True, seed=3, max_new_tokens=8)[0, 4:].tolist()
    stop = next(t for t in range(1, 8) if free[t] not in free[:t])
    model.generation_config.eos_token_id = free[stop]
    out = model.generate(ids, do_sample=True, seed=3, max_new_tokens=8)
    assert out[0, 4:].tolist() == free[: stop + 1]


def test_stopping_criteria():
    model, ids = thinker(), random_ids(2, 4)
    out = model.generate(ids, max_new_tokens=9, stopping_criteria=[LongEnough(7)], seed=1)
    assert out.shape == (2, 7)


def test_max_length():
    assert thinker().generate(random_ids(2, 4), max_length=9, seed=1).shape == (2, 9)


def test_logits_processors_see_the_text_and_change_the_answer():
    model, ids = thinker(), random_ids(2, 4)
    free = model.generate(ids, max_new_tokens=5, seed=1)
    forbid = Forbid([int(free[0, 4]), int(free[1, 6])])
    processors = LogitsProcessorList([forbid])
    out = model.generate(ids, max_new_tokens=5, seed=1, logits_processor=processors)
    assert not torch.isin(out[:, 4:], torch.tensor(forbid.tokens)).any()
    assert [seen.shape[1] for seen in forbid.seen] == [4, 5, 6, 7, 8]
    assert torch.equal(forbid.seen[-1], out[:, :-1])


def test_the_named_processors_of_generate():
    model, ids = thinker(), random_ids(1, 4)
    out = model.generate(ids, max_new_tokens=20, no_repeat_ngram_size=1, seed=1)[0]
    assert len(set(out.tolist())) == 24
    banned = int(out[4])
    out = model.generate(ids, max_new_tokens=5, suppress_tokens=[banned], seed=1)
    assert banned not in out[0, 4:].tolist()
    forced = model.generate(ids, max_new_tokens=5, forced_eos_token_id=42, seed=1)
    assert forced[0, -1] == 42


def test_processors_do_not_touch_the_thoughts():
    model, ids = thinker(m=4), random_ids(1, 4)
    thought = model.generate(ids, max_new_tokens=1, seed=1, **DICT).thoughts.tokens
    suppressed = thought.unique().tolist()
    out = model.generate(ids, max_new_tokens=1, seed=1, suppress_tokens=suppressed, **DICT)
    assert torch.equal(out.thoughts.tokens, thought)


def test_a_streamer_gets_the_prompt_and_every_token_in_turn():
    model, ids = thinker(), random_ids(1, 4)
    streamer = Collect()
    out = model.generate(ids, max_new_tokens=6, seed=1, streamer=streamer)
    assert [len(piece) for piece in streamer.pieces] == [4, 1, 1, 1, 1, 1, 1]
    assert torch.equal(torch.cat(streamer.pieces), out[0])
    assert streamer.ended == 1


@pytest.mark.parametrize("thoughts", [1, 2])
def test_scores_and_logits(thoughts):
    model, ids = thinker(m=2), random_ids(1, 4)
    expected = reference.answer(model, ids[0], 4, m=2, thoughts=thoughts, seed=5)
    out = model.generate(
        ids,
        max_new_tokens=4,
        do_sample=True,
        top_k=3,
        seed=5,
        thoughts_per_token=thoughts,
        output_scores=True,
        output_logits=True,
        **DICT,
    )
    assert len(out.scores) == len(out.logits) == 4
    assert all((score > -torch.inf).sum() == 3 for score in out.scores)
    tokens = tokens_of(out, 4)[0]
    assert all(score[0, token] > -torch.inf for score, token in zip(out.scores, tokens, strict=True))
    assert_close(out.logits[0].log_softmax(-1)[0], expected.scores[0], 1e-12)


def test_the_forms_of_the_result():
    model, ids = thinker(), random_ids(2, 4)
    plain = model.generate(ids, max_new_tokens=3, seed=1)
    assert isinstance(plain, torch.Tensor)
    out = model.generate(ids, max_new_tokens=3, seed=1, return_dict_in_generate=True, return_thoughts=False)
    assert torch.equal(out.sequences, plain)
    assert getattr(out, "thoughts", None) is None
    shown = model.generate(ids, max_new_tokens=3, seed=1, **DICT)
    assert shown.thoughts.tokens.shape == (2, 3, 1, 2)
    assert shown.thoughts.log_probs.shape == (2, 3, 1, 2)
    assert shown.thoughts.weight.shape == (2, 3, 1)
    named = model.generate(input_ids=ids, max_new_tokens=3, seed=1)
    assert torch.equal(named, plain)


def test_defaults_of_the_generation_config():
    model, ids = thinker(), random_ids(1, 4)
    given = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 6}
    expected = model.generate(ids, seed=4, **given)
    greedy = model.generate(ids, seed=4, max_new_tokens=6)
    assert torch.equal(model.generate(ids, seed=4, generation_config=GenerationConfig(**given)), expected)
    model.generation_config.update(**given)
    assert torch.equal(model.generate(ids, seed=4), expected)
    assert torch.equal(model.generate(ids, seed=4, do_sample=False), greedy)
    assert not torch.equal(greedy, expected)


def test_think_always_is_the_default():
    model, ids = thinker(), random_ids(1, 4)
    out = model.generate(ids, max_new_tokens=5, seed=1, return_thoughts=True, return_dict_in_generate=True)
    always = model.generate(ids, max_new_tokens=5, seed=1, think="always")
    assert torch.equal(out.sequences, always)
    assert (out.thoughts.tokens >= 0).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 3}, "beam"),
        ({"num_beams": 4, "num_beam_groups": 2}, "group beam"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"dola_layers": "high"}, "dola"),
        ({"prompt_lookup_num_tokens": 3}, "assist"),
        ({"assistant_model": "itself"}, "assist"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
    ],
    ids=str,
)
def test_other_ways_of_generating_are_refused(options, word):
    model, ids = thinker(), random_ids(1, 4)
    expected = model.generate(ids, max_new_tokens=3, seed=1)
    if "assistant_model" in options:
        options = {"assistant_model": model.base}
    with pytest.raises(ValueError, match=f'{word}.*think="never"'):
        model.generate(ids, max_new_tokens=3, seed=1, **options)
    assert torch.equal(model.generate(ids, max_new_tokens=3, seed=1), expected)


@pytest.mark.parametrize("pad", [-1, VOCABULARY])
def test_a_pad_token_that_is_none_is_refused_where_it_would_be_read(pad):
    model, ids = thinker(), random_ids(2, 4)
    options = {"max_new_tokens": 3, "seed": 1, "eos_token_id": EOS, "pad_token_id": pad}
    with pytest.raises(ValueError, match="pad_token_id"):
        model.generate(ids, **options)
    with pytest.raises(ValueError, match="pad_token_id"):
        model.generate(ids[:1], do_sample=True, num_return_sequences=2, **options)
    assert model.generate(ids[:1], **options).shape[0] == 1
