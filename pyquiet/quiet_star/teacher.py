"""What a thinking teacher predicts of a data set, asked once and kept: NLLs for `NextTokenTrainer`."""

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from pyquiet.datasets import NumberedTexts, TextCollator
from pyquiet.environment import fingerprint
from pyquiet.files import replacing
from pyquiet.quiet_star.distillation import mixed_nlls
from pyquiet.quiet_star.modeling import QuietStarForCausalLM
from pyquiet.randomness import epoch_seed

_SAVE_EVERY = 60.0  # seconds


def teacher_nlls(
    teacher: QuietStarForCausalLM,
    dataset: Any,
    *,
    seed: int,
    epoch: int = 0,
    thoughts_per_token: int | None = None,
    batch_size: int = 8,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """What `NextTokenTrainer` needs of a teacher, but for "kl": NLLs of each text's tokens but the first, in nats.

    The thoughts are those of an online teacher in that epoch of a run with that seed; with batches of the same texts
    the NLLs are the same bits. Give them to the trainer as a column:

    >>> nlls = teacher_nlls(teacher, dataset, seed=0, path="nlls.safetensors")  # doctest: +SKIP
    >>> dataset = dataset.add_column("teacher_nlls", nlls)  # doctest: +SKIP

    Args:
        dataset: of dicts with `input_ids` and, if need be, `attention_mask`; no text is cropped.
        path: a safetensors file in which finished texts are kept, every minute and at an interruption; what it holds
            of the same teacher and options already is not made again.

    Returns:
        float32 arrays [T - 1], one for each text without its padding.

    Raises:
        ValueError, TypeError: as `think_at_every_token`; the file at `path` is of something else.
    """
    texts, collate = NumberedTexts(dataset), TextCollator(max_length=sys.maxsize)
    about = {} if path is None else _about(teacher, texts, seed, epoch, thoughts_per_token)
    done = _read(path, about) if path is not None and Path(path).exists() else []
    options = (epoch_seed(seed, epoch), thoughts_per_token, 1.0, None, None)
    kept, saved = len(done), time.monotonic()
    try:
        for start in tqdm(range(len(done), len(texts), batch_size), "teacher", disable=None if progress else True):
            batch = collate([texts[i] for i in range(start, min(start + batch_size, len(texts)))])
            ids, mask, sequence_ids = (
                batch[name].to(teacher.device) for name in ("input_ids", "attention_mask", "sequence_ids")
            )
            nlls = mixed_nlls(teacher, ids, mask, (*options, sequence_ids)).float().cpu().numpy()
            done += [row[: n - 1] for row, n in zip(nlls, mask.sum(1).tolist(), strict=True)]
            if path is not None and time.monotonic() - saved >= _SAVE_EVERY:
                _write(path, done, about)
                kept, saved = len(done), time.monotonic()
    finally:
        if path is not None and len(done) > kept:
            _write(path, done, about)
    return done


def _about(
    teacher: QuietStarForCausalLM, texts: NumberedTexts, seed: int, epoch: int, thoughts: int | None
) -> dict[str, str]:
    """What a file of NLLs is of."""
    ids = hashlib.sha256()
    for i in range(len(texts)):
        example = texts[i]
        row = np.asarray(example["input_ids"], np.int64)
        if example.get("attention_mask") is not None:
            row = row[np.asarray(example["attention_mask"], bool)]
        ids.update(np.int64(len(row)).tobytes() + row.tobytes())
    thoughts = teacher.config.thoughts_per_token if thoughts is None else thoughts
    options = (seed, epoch, thoughts, teacher.config.thought_tokens)
    names = ("seed", "epoch", "thoughts_per_token", "thought_tokens", "teacher", "dataset")
    return dict(zip(names, (*map(str, options), fingerprint(teacher), ids.hexdigest()), strict=True))


def _write(path: str | os.PathLike[str], done: list[Any], about: dict[str, str]) -> None:
    lengths = np.array([len(row) for row in done])
    with replacing(path) as partial:
        save_file({"nlls": np.concatenate(done), "lengths": lengths}, partial, about)


def _read(path: str | os.PathLike[str], about: dict[str, str]) -> list[Any]:
    with safe_open(path, "np") as file:
        if (found := file.metadata()) != about:
            wrong = [name for name in about if (found or {}).get(name) != about[name]]
            raise ValueError(f"path: {path} holds NLLs of another {', '.join(wrong)}; remove it or name another file")
        nlls, lengths = file.get_tensor("nlls"), file.get_tensor("lengths")
    return np.split(nlls, lengths.cumsum()[:-1])
