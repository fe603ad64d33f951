"""`pyquiet scale` with servers: replicas behind one name, and tokenizers on this side, so that ids go over the wire."""

import json
import runpy
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pyquiet.cli import main
from pyquiet.scaling import read_journal

from ..scaling.loopback import Loopback, serving
from ..scaling.toy_language import NUMBERS, WORDS, ToyCodec
from .one_line import error_line

RECIPE = Path(__file__).parents[2] / "recipes" / "math_servers" / "run.py"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy language's tokenizer as a folder."""
    fast = Tokenizer(models.WordLevel(NUMBERS, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(ToyCodec._pattern.pattern), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:2]])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=WORDS[0], bos_token=WORDS[1]).save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(4)))
    return file


def prompts(server: Loopback) -> set[type]:
    return {type(body.get("prompt", body.get("input_ids", body.get("text")))) for _, body in server.bodies}


@pytest.mark.parametrize("given", [True, False])
def test_replicas_share_the_chains_and_tokenizers_make_them_ids(
    given: bool, tokenizer: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as one, serving() as other, serving("sglang", salt=1) as target:
        command = ["--draft", f"{one.url},{other.url}#toy", "--target", target.url, "--questions", str(questions)]
        if given:
            command += ["--draft-tokenizer", str(tokenizer), "--target-tokenizer", str(tokenizer)]
        command += ["--chains", "4", "--turns", "3", "--draft-tokens", "16", "--template", "Q: {question} A:"]
        assert main(["scale", *command, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        drafts = shown["report"]["cost"]["draft"]["requests"] + shown["report"]["calibration_cost"]["draft"]["requests"]
        assert one.account.good("generate") + other.account.good("generate") == drafts
        assert min(one.account.good("generate"), other.account.good("generate")) > drafts / 4
        for server in (one, other, target):
            server_asked = list(server.bodies)[-5:]
            server.bodies.clear()
            server.bodies.extend(server_asked)
            assert prompts(server) == {list if given else str}
    assert shown["bank"].startswith("first chunks drafted for each question beforehand")


def test_the_recipe_for_mathematics_answers_calibrates_and_goes_on(
    tokenizer: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps({"problem": f"How many is {i}?"}) + "\n" for i in range(3)))
    journal, bank = str(tmp_path / "run.jsonl"), str(tmp_path / "bank")
    with serving() as draft, serving("sglang", salt=1) as target:
        command = ["run.py", "math500", str(questions), journal, "--chains", "2", "--limit", "2", "--calibration", bank]
        for role, server in (("draft", draft), ("target", target)):
            command += [f"--{role}", server.url, f"--{role}-tokenizer", str(tokenizer)]
        monkeypatch.setattr("sys.argv", [*command, "--calibrate", str(others)])
        runpy.run_path(str(RECIPE), run_name="__main__")
        report = capsys.readouterr().out
        asked = draft.account.good("generate"), target.account.good("score")
        monkeypatch.setattr("sys.argv", command)
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert (draft.account.good("generate"), target.account.good("score")) == asked  # what was done is not done again
    header, records = read_journal(journal)
    assert header["config"]["turns"] == 12
    assert sum(record.key.stage == "end" for record in records) == 4
    assert "s to calibrate before" in report


def test_one_address_twice_is_named(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9/v1"
    assert main(["scale", "--draft", f"{url},{url}", "--questions", str(questions)]) == 2
    assert "none twice" in error_line(capsys)
