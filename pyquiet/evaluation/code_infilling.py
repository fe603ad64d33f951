"""Missing lines of code: the files of HumanEval infilling (arXiv 2207.14255), their completions, and their tests."""

import gzip
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pyquiet.checks import check_count
from pyquiet.evaluation.infilling import InfillingScores, fill_all, in_turns
from pyquiet.gaps import Codec, drops_white_space

_MEMORY = 1 << 32  # bytes that a tested program may use
# Reads the program and, once it has ended well, leaves a file whose name the program was not told.
_RUNNER = f"""
import resource, sys
program, passed = open("program.py").read(), sys.argv.pop()
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
exec(compile(program, "program.py", "exec"), {{"__name__": "__main__"}})
open(passed, "x").close()
"""


@dataclass(frozen=True)
class CodeProblem:
    """A program with a gap between prompt and suffix, what stands there, and the test of function `entry_point`."""

    task_id: str
    prompt: str
    suffix: str
    canonical_solution: str
    test: str
    entry_point: str


def read_code_problems(path: str | os.PathLike[str]) -> list[CodeProblem]:
    """The problems of a HumanEval infilling file, .jsonl or .jsonl.gz; HumanEval's own have an empty suffix.

    Raises:
        ValueError: naming file and line, for anything else.
    """
    fields, data, problems = CodeProblem.__dataclass_fields__, Path(path).read_bytes(), []
    lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = {"suffix": "", **json.loads(line)}
            problems.append(CodeProblem(**{name: str(record[name]) for name in fields}))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{os.fspath(path)}, line {number}: not a problem with {', '.join(fields)}") from None
    if not problems:
        raise ValueError(f"{os.fspath(path)} has no problems")
    return problems


def infill_code(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[CodeProblem],
    *,
    lengths: range | None = None,
    num_samples: int = 1,
    execute: bool = False,
    timeout: float = 5.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    **options: Any,
) -> InfillingScores:
    """Fills in the missing code of each problem; shares of exact matches and, with `execute`, pass@1.

    Code goes through `encode_code` where the tokenizer drops white space, as XLNet's does.

    Args:
        lengths: tokens of a gap; several are chosen between as in `fill_gaps`. None is the number that the canonical
            solution has, as in the paper: the model is told it.
        num_samples: of each problem.
        execute: run each completion with the problem's test, `passes` says how. A model wrote it, nobody has read it,
            and it runs with your rights: do this only where no harm can come of it, in a container without a network.
        timeout: seconds of a program.
        options: those of `pyquiet.infill`.

    Raises:
        ValueError, TypeError: an option is out of range; as `infill`.
    """
    check_count("num_samples", num_samples, least=1)
    codec, texts = Codec(tokenizer, drops_white_space(tokenizer)), []
    for problem in problems:
        true = len(codec.encode(problem.canonical_solution))
        gap = range(true, true + 1) if lengths is None else lengths
        texts += [codec.gapped([problem.prompt, problem.suffix], [gap])] * num_samples
    found, cost = fill_all(model, codec, texts, seed=seed, batch_size=batch_size, progress=progress, **options)
    pairs = list(zip([problem for problem in problems for _ in range(num_samples)], found, strict=True))
    measures = {"exact match": [text == problem.canonical_solution for problem, text in pairs]}
    if execute:
        bar = tqdm(pairs, "tested", disable=None if progress else True)
        measures["pass@1"] = [passes(problem, text, timeout) for problem, text in bar]
    table = {name: torch.tensor(row).double().view(-1, num_samples) for name, row in measures.items()}
    return InfillingScores(table, in_turns(found, num_samples), cost)


def passes(problem: CodeProblem, completion: str, timeout: float = 5.0) -> bool:
    """Whether the completed program passes its test, in a process of its own, an empty folder and `timeout` seconds.

    On Linux it may use 4 GiB of memory and write files of 1 MiB. It is not otherwise held back: see `infill_code`.
    """
    check = f"\n{problem.test}\ncheck({problem.entry_point})\n"
    passed = secrets.token_hex(16)
    with TemporaryDirectory() as folder:
        Path(folder, "program.py").write_text(problem.prompt + completion + problem.suffix + check, encoding="utf-8")
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = [sys.executable, "-I", "-c", _RUNNER, passed]
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and all that it started
        process.wait()
        return Path(folder, passed).exists()
