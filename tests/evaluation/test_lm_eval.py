"""The model `pyquiet` of lm-evaluation-harness: each answer against the model's own, and tasks from files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyquiet
from pyquiet.environment import fingerprint
from pyquiet.evaluation.scoring import Continuation, number_of, score_continuations

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.tasks import TaskManager

from pyquiet.evaluation.lm_eval import PyquietLM
from pyquiet.evaluation.lm_eval.requests import Wish
from pyquiet.prompts import Ranks

PAIRS = [("The sea ", "is wide"), ("Who sings? ", "a bird"), ("The sea ", "was calm"), ("", "alone"), ("x", "y")]
PROMPTS = ["The sea is", "Who", "A bird sang in the tall tree", "1 + 1 ="]


def requests(*args: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=a) for a in args]


@pytest.fixture
def harnessed(reader, by_character):
    """The random thinker of characters as the harness sees it."""

    def build(**options):
        return PyquietLM(reader, by_character, **{"seed": 4, "batch_size": 3, **options})

    return build


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encoded(tokenizer, context, continuation):
    """The harness's rule: spaces at a context's end belong to what follows, nothing stands behind EOS."""
    words = context.rstrip()
    return ids(tokenizer, words) or [tokenizer.eos_token_id], ids(tokenizer, context[len(words) :] + continuation)


@pytest.mark.parametrize(("think", "N"), [("always", 2), ("never", None)])
def test_loglikelihoods_are_the_models_whatever_the_batch(harnessed, reader, by_character, think, N):
    expected = []
    for pair in PAIRS:
        before, tokens = encoded(by_character, *pair)
        row = Continuation(before, tokens, number_of(before))
        expected.append(score_continuations(reader, [row], think=think, seed=4, thoughts_per_token=N)[0].item())
    for size in (1, 3):
        model = harnessed(think=think, thoughts_per_token=N, batch_size=size)
        answers = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
        assert [score for score, _ in answers] == pytest.approx(expected, abs=1e-9)
    assert model.loglikelihood(requests(PAIRS[1]), disable_tqdm=True)[0] == pytest.approx(answers[1], abs=1e-9)


def test_greedy_continuations_are_marked(harnessed, by_character):
    model = harnessed()
    before = ids(by_character, "The sea")
    numbers = torch.tensor([number_of(before)])
    out = model.model.generate(
        torch.tensor([before]), seed=4, sequence_ids=numbers, max_new_tokens=4, do_sample=False, eos_token_id=-1,
        pad_token_id=0,
    )  # fmt: skip
    written = out[0, len(before) :].tolist()
    answers = model._loglikelihood_tokens([(None, before, written), (None, before, written[::-1])], disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False]


def test_a_text_that_is_too_long_loses_its_beginning(harnessed, reader, by_character):
    before, tokens = encoded(by_character, "The sea", " is wide")
    row = Continuation((before + tokens)[-11:-8], tokens, number_of(before))
    expected = score_continuations(reader, [row], think="always", seed=4)[0].item()
    (answer,) = harnessed(max_length=10).loglikelihood(requests(("The sea", " is wide")), disable_tqdm=True)
    assert answer[0] == pytest.approx(expected, abs=1e-9)
    assert harnessed().max_length == 640 - 2 - 2
    assert harnessed(think="never").max_length == 640


@pytest.mark.parametrize("think", ["always", "never"])
def test_whole_texts_are_read_in_windows(harnessed, reader, by_character, think):
    texts = ["The sea is wide and calm.", "Short.", ""]
    model = harnessed(think=think, max_length=10)
    answers = model.loglikelihood_rolling(requests(*[(text,) for text in texts]), disable_tqdm=True)
    long, short = (ids(by_character, text) for text in texts[:2])  # 25 and 6 characters
    read = [by_character.eos_token_id, *long]
    windows = [(read[:1], long[:10]), (read[10:11], long[10:20]), (read[15:21], long[20:])]
    rows = [Continuation(*window, number_of(long, j)) for j, window in enumerate(windows)]
    rows.append(Continuation(read[:1], short, number_of(short, 0)))
    scores = [score_continuations(reader, [row], think=think, seed=4)[0].item() for row in rows]
    assert answers == pytest.approx([sum(scores[:3]), scores[3], 0.0], abs=1e-9)


def written_alone(reader, tokenizer, prompt, think, tokens, number, **options):
    given = ids(tokenizer, prompt)
    if think == "always":
        options |= {"seed": 4, "sequence_ids": torch.tensor([number])}
    out = reader.generate(torch.tensor([given]), think=think, max_new_tokens=tokens, pad_token_id=0, **options)
    new = out[0, len(given) :].tolist()
    return tokenizer.decode(new[: new.index(1)] if 1 in new else new, skip_special_tokens=True)


@pytest.mark.parametrize("think", ["always", "never"])
def test_what_is_written_is_what_generate_writes(harnessed, reader, by_character, think):
    expected = [
        written_alone(reader, by_character, p, think, 8, number_of(ids(by_character, p), 0), do_sample=False)
        for p in PROMPTS
    ]
    assert len(set(expected)) == 4
    stop = expected[2][3:5]
    for size in (1, 3):
        model = harnessed(think=think, batch_size=size)
        tasks = [(prompt, {"max_gen_toks": 8}) for prompt in PROMPTS]
        assert model.generate_until(requests(*tasks), disable_tqdm=True) == expected
        tasks[0] = (PROMPTS[0], {"max_new_tokens": 5})
        tasks[2] = (PROMPTS[2], {"until": ["", stop], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7})
        cut = model.generate_until(requests(*tasks), disable_tqdm=True)
        assert cut == [expected[0][:5], expected[1], expected[2].split(stop)[0], expected[3]]
        assert len(cut[2]) < len(expected[2])


def test_a_stop_sequence_ends_the_work(harnessed, reader, monkeypatch):
    steps = []
    draw = type(reader)._sample

    def watched(self, *args, **kwargs):
        out = draw(self, *args, **kwargs)
        steps.append((out if isinstance(out, torch.Tensor) else out.sequences).shape[1])
        return out

    monkeypatch.setattr(type(reader), "_sample", watched)
    (text,) = harnessed().generate_until(requests(("The sea", {"max_gen_toks": 9})), disable_tqdm=True)
    harnessed().generate_until(requests(("The sea", {"max_gen_toks": 9, "until": text[1]})), disable_tqdm=True)
    assert steps[0] == 7 + 9
    assert steps[1] <= 7 + 2


def test_samples_of_a_repeated_request_differ_and_stay(harnessed, reader, by_character):
    task = ("The sea", {"max_gen_toks": 12, "temperature": 2.0})
    model = harnessed()
    first = model.generate_until(requests(task, ("Who", {"max_gen_toks": 3}), task), disable_tqdm=True)
    assert first[0] != first[2]
    assert model.generate_until(requests(task, task), disable_tqdm=True) == [first[0], first[2]]
    number = number_of(ids(by_character, "The sea"), 1)
    law = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    assert written_alone(reader, by_character, "The sea", "always", 12, number, **law) == first[2]


GREEDY = {"do_sample": False}
WHOLE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("kwargs", "until", "new_tokens", "options"),
    [
        ({}, (), 9, GREEDY),
        ({"until": "x", "max_tokens": "4"}, ("x",), 4, GREEDY),
        ({"until": ["x", "y"], "max_gen_toks": 3, "max_new_tokens": 8}, ("x", "y"), 3, GREEDY),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, (), 9, GREEDY),
        ({"do_sample": None, "temperature": 0.0, "top_k": None}, (), 9, GREEDY),
        ({"do_sample": True}, (), 9, WHOLE),
        ({"temperature": 0.7, "top_k": 5}, (), 9, {**WHOLE, "temperature": 0.7, "top_k": 5}),
        ({"repetition_penalty": 1.2}, (), 9, {**GREEDY, "repetition_penalty": 1.2}),
    ],
)
def test_what_a_task_says_of_generation(kwargs, until, new_tokens, options):
    wish = Wish.of(kwargs, 9)
    assert (wish.until, wish.new_tokens, wish.options) == (until, new_tokens, options)


def test_greedy_where_sampling_is_asked_for_at_temperature_0():
    assert not Wish.of({"do_sample": True, "temperature": 0}, 9).options["do_sample"]


def test_an_embedded_model_takes_a_dtype():
    assert PyquietLM("tiny-causal", dtype="float64", device="cpu").model.dtype == torch.float64
    with pytest.raises(ValueError, match="dtype must be a dtype of torch, such as float32, got 'float99'"):
        PyquietLM("tiny-causal", dtype="float99", device="cpu")


def test_a_prompt_leaves_room_for_what_is_written(harnessed, by_character):
    model = harnessed(max_length=20, max_gen_toks=15)
    whole, end = requests(("A bird sang", {}), ("sang.", {}))
    assert model._prompt("A bird sang", SimpleNamespace(new_tokens=15)) == ids(by_character, " sang")
    assert len(model.generate_until([whole, end], disable_tqdm=True)) == 2
    with pytest.raises(ValueError, match="20 new tokens leave no room for a prompt in max_length=20"):
        model.generate_until(requests(("A bird", {"max_new_tokens": 20})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": "auto"}, "batch_size must be a number of at least 1, got 'auto'"),
        ({"pretrained": "tiny-causal", "think": "always"}, 'think="always" needs a thinking model'),
        ({"tokenizer": None}, "tokenizer is missing"),
    ],
)
def test_bad_arguments_are_named(reader, by_character, options, words):
    with pytest.raises(ValueError, match=words):
        PyquietLM(**{"pretrained": reader, "tokenizer": by_character, **options})


def test_what_cannot_be_scored_is_named(harnessed, reader):
    with pytest.raises(ValueError, match="a continuation of 7 tokens cannot be scored"):
        harnessed(max_length=6).loglikelihood(requests(("The sea", " is big")), disable_tqdm=True)
    thinker, tokenizer = pyquiet.load("tiny-causal")
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="give prefix_token_id"):
        PyquietLM(thinker, tokenizer).loglikelihood(requests(("", "word")), disable_tqdm=True)
    model = PyquietLM(thinker, tokenizer, prefix_token_id=5)
    assert model.prefix_token_id == 5
    assert model.think == "never"


# -- through the harness

CHOICES = [
    {"question": "Once upon a time there was a", "choices": [" king", " qxz", " the"], "answer": 0},
    {"question": "The youngest of", "choices": [" them", " zzz", " is"], "answer": 2},
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
{more}
"""
MORE = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer',
    "generate_until": 'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs:\n  until: ["."]\n  max_gen_toks: 6',
    "loglikelihood_rolling": 'doc_to_target: "{{question}}"\nmetric_list:\n  - metric: word_perplexity',
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of each kind on the same two documents."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in CHOICES))
    for kind, more in MORE.items():
        text = TASK.format(name=f"quiet_{kind}", file=file, kind=kind, more=more)
        (tmp_path / f"{kind}.yaml").write_text(text)
    return tmp_path


def evaluated(tasks, model, arguments):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [f"quiet_{kind}" for kind in MORE]
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, task_manager=manager, device="cpu", bootstrap_iters=0
    )


def test_tasks_from_files(tasks):
    base, tokenizer = pyquiet.load("tiny-causal")
    torch.manual_seed(0)
    model = pyquiet.QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, thought_tokens=2)
    torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.1)
    for part in (model, tokenizer):
        part.save_pretrained(tasks / "thinker")
    found = evaluated(tasks, "pyquiet", f"pretrained={tasks / 'thinker'},thoughts_per_token=2,seed=3")
    direct = PyquietLM(model, tokenizer, thoughts_per_token=2, seed=3)
    pairs = [(item["question"], choice) for item in CHOICES for choice in item["choices"]]
    expected = [score for score, _ in direct.loglikelihood(requests(*pairs), disable_tqdm=True)]
    samples = sorted(found["samples"]["quiet_multiple_choice"], key=lambda sample: sample["doc_id"])
    answers = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    assert answers == pytest.approx(expected, abs=1e-4)
    written = [sample["resps"][0][0] for sample in found["samples"]["quiet_generate_until"]]
    prompts = [(item["question"], {"until": ["."], "max_gen_toks": 6}) for item in CHOICES]
    assert written == direct.generate_until(requests(*prompts), disable_tqdm=True)
    record = found["config"]["pyquiet"]
    assert record["models"]["model"]["fingerprint"] == fingerprint(model)
    assert (record["arguments"]["thoughts_per_token"], record["arguments"]["seed"]) == (2, 3)
    assert found["results"]["quiet_loglikelihood_rolling"]["word_perplexity,none"] > 1


def test_never_thinking_is_what_the_harness_finds_by_itself(tasks):
    folder = Path(pyquiet.zoo.__file__).parent / "tiny-causal"
    ours = evaluated(tasks, "pyquiet", f"pretrained={folder},think=never,batch_size=2,dtype=float32")["samples"]
    theirs = evaluated(tasks, "hf", f"pretrained={folder},dtype=float32")["samples"]
    for kind in ("multiple_choice", "generate_until"):
        for own, other in zip(ours[f"quiet_{kind}"], theirs[f"quiet_{kind}"], strict=True):
            if kind == "generate_until":
                assert own["resps"] == other["resps"]
            else:
                scores = [[float(response[0][0]) for response in sample["resps"]] for sample in (own, other)]
                assert scores[0] == pytest.approx(scores[1], abs=1e-3)
                assert own["acc"] == other["acc"]


def test_ranks_share_the_documents(tasks, monkeypatch):
    """Two of them, as threads."""
    model, tokenizer = pyquiet.load("tiny-causal")
    alone = evaluated(tasks, PyquietLM(model, tokenizer), None)
    meeting, told, scored = threading.Barrier(2), {}, Counter()

    class Thread(Ranks):
        def join(self):
            pass

        def wait(self):
            meeting.wait(60)

        def everyones(self, value):
            told[self.rank] = value
            self.wait()
            values = [told[0], told[1]]
            self.wait()
            return values

    def rank(number):
        monkeypatch.setattr(Ranks, "current", lambda: Thread(number, 2))
        return PyquietLM(model, tokenizer)

    def counted(self, rows, disable_tqdm):
        scored[self.rank] += len(rows)
        return true_scored(self, rows, disable_tqdm)

    true_scored = PyquietLM._scored
    monkeypatch.setattr(PyquietLM, "_scored", counted)
    ranks = [rank(0), rank(1)]
    with ThreadPoolExecutor(2) as pool:
        together, nothing = pool.map(lambda lm: evaluated(tasks, lm, None), ranks)
    assert nothing is None
    assert scored[0] == scored[1] > 0
    for name, samples in alone["samples"].items():
        found = sorted(together["samples"][name], key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in found] == [0, 1]
        for sample, one in zip(samples, found, strict=True):
            assert str(one["filtered_resps"]) == str(sample["filtered_resps"])
    for name, numbers in alone["results"].items():
        floats = {key: number for key, number in numbers.items() if isinstance(number, float)}
        assert floats == pytest.approx({key: together["results"][name][key] for key in floats})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_of_the_harness_knows_the_model(tasks, ranks):
    command = [sys.executable, *(["-m", "torch.distributed.run", "--nproc-per-node=2"] if ranks > 1 else [])]
    command += ["-m", "pyquiet.evaluation.lm_eval", "--model", "pyquiet"]
    command += ["--model_args", "pretrained=tiny-causal,think=never", "--tasks", "quiet_multiple_choice"]
    command += ["--include_path", str(tasks), "--output_path", str(tasks / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "quiet_multiple_choice" in done.stdout
    (file,) = (tasks / "out").rglob("results*.json")
    record = json.loads(file.read_text())["config"]["pyquiet"]
    assert record["models"]["model"]["class"] == "LlamaForCausalLM"


def test_the_harness_is_not_imported_until_it_is_asked_for():
    script = (
        "import sys, pyquiet, pyquiet.evaluation\n"
        "assert 'lm_eval' not in sys.modules\n"
        "sys.modules['lm_eval'] = None\n"
        "import pyquiet.evaluation.lm_eval\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip().endswith('ImportError: lm-evaluation-harness is missing: pip install "pyquiet[eval]"')
