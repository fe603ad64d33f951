"""`pyquiet think`, `infill` and `diffuse` over files of prompts: one result whatever the batches, and errors."""

import json

import pytest
import torch

import pyquiet
from pyquiet import QuietStarForCausalLM
from pyquiet.cli import main
from pyquiet.diffusion import backbone
from pyquiet.diffusion.sampling import diffuse

from ..any_subset.models import random_xlnet
from ..processes import in_processes
from .one_line import error_line

TEXTS = [
    "Once upon a time there ___2___ a king who had three ___.",
    "The ___ sat.",
    "It was a ___1___ day, and ___3___ no one went out of the house but the old man and ___2___ dog.",
    "___",
    "They said that ___ would ___ come.",
]
LINES = {
    "think": [
        {"prompt": "Once upon a time"},
        {"prompt": "The king said to his three sons: go", "id": 7},
        {"id": "c", "prompt": "I"},
        {"prompt": "Once upon a time"},
        {"prompt": "A cold winter"},
    ],
    "infill": [{"text": text.replace("___.", "___1-3___."), "id": i} for i, text in enumerate(TEXTS)],
    "diffuse": [{"prompt": "A king"}, {"prompt": "", "id": "e"}] + [{"text": text} for text in TEXTS[:3]],
}
OPTIONS = {
    "think": ["--max-new-tokens", "5", "--temperature", "1", "--show-thoughts"],
    "infill": ["--num-samples", "2", "--method", "sequential"],
    "diffuse": ["--num-samples", "2", "--length", "6", "--steps", "4", "--energy", "FOLDER/causal", "--candidates=3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model for each command with a tokenizer, and its prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    lm, tokenizer = pyquiet.load("tiny-causal")
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = type(lm.config)(
        **sizes, vocab_size=2049, max_position_embeddings=32, initializer_range=0.5, bos_token_id=1, eos_token_id=None
    )
    causal = type(lm)(config)
    thinker = QuietStarForCausalLM.from_base(causal, thought_tokens=2)
    torch.nn.init.normal_(thinker.mixing_head[-1].weight)
    denoiser = backbone(2049, mask_token_id=2048, **sizes)
    models = {"think": thinker, "infill": random_xlnet(vocabulary=2049), "diffuse": denoiser, "causal": causal}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, lines in LINES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def words(folder, command, *more):
    options = [word.replace("FOLDER", str(folder)) for word in OPTIONS[command]]
    return [command, "--model", str(folder / command), *options, *map(str, more)]


def many(folder, command, output, *more):
    return words(folder, command, "--prompts", folder / f"{command}.jsonl", "--output", output, "--quiet", *more)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(a, b):
    """Whether values are equal, floats to the four digits that a file has."""
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-3, abs=1e-6)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(close, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("command", LINES)
def test_batches_change_nothing_and_the_first_row_is_that_of_the_prompt_alone(folder, command, tmp_path, capsys):
    for size in ("1", "4"):
        assert main(many(folder, command, tmp_path / size, "--batch-size", size, "--dtype", "float64")) == 0
    assert (tmp_path / "1").read_text() == (tmp_path / "4").read_text()
    found, samples = rows(tmp_path / "4"), 1 if command == "think" else 2
    assert [(row["index"], row["id"]) for row in found] == [
        (i, line.get("id")) for i, line in enumerate(LINES[command]) for _ in range(samples)
    ]
    assert len({row["text"] for row in found}) == len(found)
    capsys.readouterr()
    ((field, text),) = ((name, LINES[command][0][name]) for name in ("prompt", "text") if name in LINES[command][0])
    assert main(words(folder, command, f"--{field}", text, "--json")) == 0
    alone = json.loads(capsys.readouterr().out)["samples"]
    assert [row.pop("sample", 0) for row in found[:samples]] == list(range(samples))
    assert close([{k: v for k, v in row.items() if k not in ("index", "id")} for row in found[:samples]], alone)


def test_float64_is_that_of_all_networks(folder, tmp_path, monkeypatch):
    types = set()

    def spied(denoiser, energy, **options):
        types.update((denoiser.model.dtype, energy.lm.dtype))
        return diffuse(denoiser, energy, **options)

    monkeypatch.setattr("pyquiet.diffusion.sampling.diffuse", spied)
    assert main(many(folder, "diffuse", tmp_path / "out", "--dtype", "float64")) == 0
    assert types == {torch.float64}


def test_think_says_what_was_thought(folder, tmp_path, capsys):
    assert main(words(folder, "think", "--prompt", "Once upon a time")) == 0
    shown = capsys.readouterr().out.split("\n")
    assert main(words(folder, "think", "--prompt", "Once upon a time", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    (sample,) = report["samples"]
    assert (report["tokens"], report["thoughts"], sample["tokens"]) == (5, 5, 5)
    assert sample["text"] == "".join(part["text"] for part in sample["parts"])
    assert sample["parts"][0] == {"text": shown[0], "filled": False}
    assert "".join(step["token"] for step in sample["thoughts"]) == sample["parts"][1]["text"]
    weights = [thought["weight"] for step in sample["thoughts"] for thought in step["thoughts"]]
    assert sample["weight"] == pytest.approx(sum(weights) / 5)
    lines = [f"w {t['weight']:+.3f}  thought {t['text']!r}" for step in sample["thoughts"] for t in step["thoughts"]]
    assert all(line in text for line, text in zip(lines, shown[1:6], strict=True))


def test_without_thoughts_batches_change_nothing_either(folder, tmp_path, capsys):
    never = [
        "think",
        "--model",
        str(folder / "think"),
        "--max-new-tokens",
        "5",
        "--think",
        "never",
        "--temperature",
        "1",
    ]
    given = ["--prompts", str(folder / "think.jsonl"), "--quiet"]
    for size in ("1", "4"):
        assert main([*never, *given, "--output", str(tmp_path / size), "--batch-size", size]) == 0
    assert (tmp_path / "1").read_text() == (tmp_path / "4").read_text()
    found = rows(tmp_path / "1")
    assert found[0]["text"] != found[3]["text"]  # of the same prompt
    capsys.readouterr()
    assert main([*never, "--prompt", LINES["think"][0]["prompt"]]) == 0
    assert capsys.readouterr().out.strip() == found[0]["text"]
    assert "weight" not in found[0]


def test_an_answer_ends_where_the_text_ends(folder, tmp_path):
    model = QuietStarForCausalLM.from_pretrained(folder / "think").eval()
    tokenizer = pyquiet.load("tiny-causal")[1]
    prompt = tokenizer(LINES["think"][1]["prompt"], return_tensors="pt")["input_ids"]
    new = model.generate(prompt, max_new_tokens=5, do_sample=False, sequence_ids=torch.tensor([1]), seed=0)
    new = new[0, prompt.shape[1] :].tolist()
    model.generation_config.eos_token_id = new[2]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(many(folder, "think", tmp_path / "out", "--temperature", "0", "--model", tmp_path / "model")) == 0
    found = rows(tmp_path / "out")
    assert found[1]["tokens"] == new.index(new[2]) + 1 < 5
    assert found[1]["parts"][1]["text"] == tokenizer.decode(new[: found[1]["tokens"]])
    assert [len(row["thoughts"]) for row in found] == [row["tokens"] for row in found]
    assert max(row["tokens"] for row in found) == 5


@pytest.mark.parametrize(("command", "cost"), [("think", "thoughts"), ("infill", "calls"), ("diffuse", "passes")])
def test_what_it_took_is_told_and_a_finished_file_is_left_alone(folder, command, cost, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(many(folder, command, output)) == 0
    line, text = capsys.readouterr().out, output.read_bytes()
    assert line.startswith(f"5 prompts answered in {output}: ")
    assert cost in line
    assert main(many(folder, command, output, "--json", "--batch-size", "2")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.items() >= {"output": str(output), "prompts": 5}.items()
    assert f" {report['tokens']} tokens" in line
    assert output.read_bytes() == text
    assert main(many(folder, command, output, "--temperature", "0.3", "--seed", "3")) == 2
    line = error_line(capsys)
    assert all(words in line for words in (f"{output} was made with another", "seed", "temperature", "and another"))
    assert output.read_bytes() == text


@pytest.mark.parametrize(
    ("command", "lines", "more", "named"),
    [
        ("think", ['{"prompt": "a"}', '{"prompt": "%s"}' % ("word " * 40)], [], "line 2: input_ids too long"),
        ("think", ['{"text": "a"}'], [], "line 1: unknown field 'text'"),
        ("think", ['{"prompt": "a"}'], ["--max-new-tokens", "0"], "--max-new-tokens"),
        ("think", ['{"prompt": "a"}'], ["--batch-size", "0"], "--batch-size"),
        ("think", ['{"prompt": "a"}'], ["--top-k", "0"], "--top-k"),
        ("think", [], [], "holds no prompt"),
        ("infill", ['{"text": "a ___"}', '{"text": "none"}'], [], "line 2: text='none' has no gap"),
        ("infill", ['{"text": "a ___0___"}'], [], "line 1: a gap's length"),
        ("infill", ['{"text": "a ___1-9___ b ___1-9___"}'], [], "line 1: the gaps have 81 combinations"),
        ("infill", ['{"text": "a ___"}'], ["--num-samples", "0"], "--num-samples"),
        ("diffuse", ['{"prompt": "a"}', "", '{"text": "a"}'], [], "line 3: text='a' has no gap"),
        ("diffuse", ['{"text": "a ___2-3___"}'], [], "line 1: the gap ___2-3___ has several lengths"),
        ("diffuse", ['{"text": "a [MASK] ___"}'], [], "line 1: mask gives the token"),
        ("diffuse", ['{"prompt": "a", "text": "b ___"}'], [], "line 1: two texts"),
        ("diffuse", ['{"prompt": "%s"}' % ("word " * 99999)], [], "line 1: input_ids: texts of"),
        ("diffuse", ['{"prompt": "a"}', '{"prompt": "%s"}' % ("word " * 40)], [], "line 2: energy: candidates have 47"),
        ("diffuse", ['{"prompt": "a"}'], ["--steps", "0"], "--steps"),
    ],
)
def test_bad_prompts_and_options_are_told_before_anything_runs(
    folder, command, lines, more, named, tmp_path, capsys, monkeypatch
):
    def fail(*args, **options):
        raise AssertionError("something ran")

    monkeypatch.setattr("pyquiet.prompts.answer_prompts", fail)
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    given = ["--prompts", tmp_path / "bad.jsonl", "--output", tmp_path / "out.jsonl"]
    assert main(words(folder, command, *given, *more)) == 2
    assert named in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_token_that_the_model_does_not_know_is_told_with_its_line(folder, tmp_path, capsys):
    random_xlnet(vocabulary=100).save_pretrained(tmp_path / "model")
    more = ["--model", tmp_path / "model", "--tokenizer", folder / "infill"]
    assert main(many(folder, "infill", tmp_path / "out.jsonl", *more)) == 2
    assert "infill.jsonl, line 1: input_ids holds the token" in error_line(capsys)


def test_a_plain_model_is_the_same_each_time_and_has_a_context_too(folder, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 28}) + "\n")
    plain = ["think", "--model", str(folder / "causal"), "--max-new-tokens", "2", "--quiet", "--prompts"]
    for seed in range(2):  # a fresh mixing head is random, but no reason to refuse the second run
        torch.manual_seed(seed)
        assert main([*plain, str(folder / "think.jsonl"), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    never = ["--output", str(tmp_path / "other"), "--think", "never", "--max-new-tokens", "9"]
    assert main([*plain, str(tmp_path / "long.jsonl"), *never]) == 2
    assert "long.jsonl, line 1: " in (line := error_line(capsys))
    assert "exceed the model's 32" in line


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    calls = []

    def stopped_in_the_second_call(*given, **options):
        calls.append(options["sequence_ids"].tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return diffuse(*given, **options)

    monkeypatch.setattr("pyquiet.diffusion.sampling.diffuse", stopped_in_the_second_call)
    command = many(folder, "diffuse", tmp_path / "out", "--batch-size", "2")
    assert main(command) == 130
    assert capsys.readouterr().err == f"pyquiet: stopped; the same command goes on from {tmp_path / 'out'}\n"
    assert main(command) == 0
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9]]


def test_prompts_need_an_output(folder, tmp_path, capsys):
    given = ["--prompts", folder / "think.jsonl"]
    assert main(words(folder, "think", *given)) == 2
    assert "--output" in error_line(capsys)
    assert main(words(folder, "think", *given, "--output", tmp_path / "none" / "out.jsonl")) == 2
    assert "there is no folder" in error_line(capsys)
    assert main(words(folder, "think", *given, "--output", folder / "think.jsonl")) == 2
    assert "name another file" in error_line(capsys)
    assert main(words(folder, "think", *given, "--prompt", "a", "--output", tmp_path / "out.jsonl")) == 2
    assert "--prompt: not allowed with argument --prompts" in error_line(capsys)
    assert main(["think", "--prompt", "a", "--output", "x"]) == 2
    assert "--output has no use without --prompts" in error_line(capsys)


def test_other_weights_are_another_run(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(many(folder, "infill", output)) == 0
    model = random_xlnet(vocabulary=2049)
    with torch.no_grad():
        model.lm_loss.bias[3] += 1e-3
    model.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    more = ["--model", tmp_path / "model", "--tokenizer", folder / "infill"]
    assert main(many(folder, "infill", output, *more)) == 2
    assert "another model" in error_line(capsys)


@pytest.mark.slow
def test_four_processes_write_the_files_of_one(folder, tmp_path):
    commands = [many(folder, name, tmp_path / f"{name}-four", "--batch-size", "1") for name in LINES]
    (tmp_path / "commands").write_text(json.dumps(commands))
    in_processes(4, "prompts.runs", "commands", tmp_path / "commands")
    for name in LINES:
        assert main(many(folder, name, tmp_path / f"{name}-one", "--batch-size", "1")) == 0
        assert (tmp_path / f"{name}-four").read_text() == (tmp_path / f"{name}-one").read_text()
