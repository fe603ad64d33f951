"""Prompts from files: what they become, and that what is wrong is told with its line."""

import pytest

from pyquiet.prompts import Prompt, read_prompts


def written(tmp_path, data):
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    return path


def test_prompts_are_numbered_and_named(tmp_path):
    lines = b'\xef\xbb\xbf{"prompt":\r "one\xe2\x80\xa8two"}\r\n\n{"id": 7, "text": ""}\n{"text": "\\u00e9", "id": "b"}'
    path = written(tmp_path, lines)
    prompts, digest = read_prompts(path, ("prompt", "text"))
    assert prompts == [
        Prompt(0, None, "prompt", "one\u2028two", f"{path}, line 1"),
        Prompt(1, 7, "text", "", f"{path}, line 3"),
        Prompt(2, "b", "text", "\u00e9", f"{path}, line 4"),
    ]
    assert read_prompts(written(tmp_path, lines), ("prompt", "text"))[1] == digest
    assert read_prompts(written(tmp_path, lines.replace(b"7", b"8")), ("prompt", "text"))[1] != digest


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"text": "a\xff"}', "UTF-8"),
        (b'{"text": "\\ud83d"}', "UTF-8"),
        (b'{"text": "a", "id": "\\ud83d"}', "UTF-8"),
        (b"text", "no JSON"),
        (b'{"text": "a"} {}', r"no JSON \(Extra data, column 15\); write "),
        (b"[" * 100_000, "no JSON"),
        (b'["a"]', "must be an object"),
        (b'{"text": "a", "temperature": 1}', "unknown field 'temperature'"),
        (b'{"id": 3}', "no text"),
        (b'{"text": "a", "prompt": "b"}', "two texts"),
        (b'{"text": null}', "'text' must be a text, got null"),
        (b'{"text": 3}', "'text' must be a text, got 3"),
        (b'{"text": "a", "id": true}', "'id' must be"),
        (b'{"text": "a", "id": 1.5}', "'id' must be"),
    ],
)
def test_what_is_no_prompt_is_told_with_its_line(tmp_path, line, named):
    path = written(tmp_path, b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=named) as error:
        read_prompts(path, ("text", "prompt"))
    assert str(error.value).startswith(f"{path}, line 3: ")


def test_a_file_without_prompts_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(written(tmp_path, b"\n \n"), ("text",))
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none", ("text",))


def test_errors_of_a_block_name_the_prompt():
    prompt = Prompt(0, None, "text", "a", "file, line 3")
    with pytest.raises(ValueError, match=r"^file, line 3: too long$"), prompt.blamed():
        raise TypeError("too long")
