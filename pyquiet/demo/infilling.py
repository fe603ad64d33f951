"""ASSD: gaps filled several tokens at a time, by exactly the law of one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import pyquiet
from pyquiet.demo.scene import Scene
from pyquiet.plotting import View, infilling_view
from pyquiet.zoo import held_out, load

_EACH, _LENGTH, _MASKED = 4, 64, 0.5  # texts of a kind, their tokens, the share of these that is missing
_METHODS: dict[str, Any] = {"sequential": "auto", "assd": 5, "one_call": 3}  # and their k
_WAYS = ("one by one", "with two calls a round", "with one")


def show(seed: int, progress: bool) -> Scene:
    """Takes some seconds."""
    model, tokenizer = load("tiny-any-subset")
    ids = _openings(tokenizer)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < _MASKED
    mask[:, 0] = False  # what opens a text
    with _one_thread():
        out = {
            method: pyquiet.infill(model, ids, mask=mask, method=method, k=k, coupling="gumbel", seed=seed)
            for method, k in _METHODS.items()
        }
    missing = int(mask.sum())
    calls = {method: int(sum(x.sum() for x in one.calls.values())) / missing for method, one in out.items()}
    seconds = {method: one.seconds for method, one in out.items()}
    equal = all(bool((one.tokens == out["sequential"].tokens).all()) for one in out.values())
    joint = pyquiet.joint_log_prob(model, out["assd"].tokens, known=~mask)
    gap = float((joint - out["assd"].log_probs.sum(1)).abs().max())

    def draw() -> tuple[View, ...]:
        drafted = out["assd"]
        refusals = (drafted.refused >= 0).sum(1)
        row = int((drafted.rounds + 100 * (refusals < 3)).argmin())  # the shortest to read that has some refusals
        return (infilling_view(drafted, tokenizer, row),)

    times = ", ".join(f"{one:.2f} s {way}" for one, way in zip(seconds.values(), _WAYS, strict=True))
    return Scene(
        "Gaps filled in parallel, exactly (ASSD)",
        "A model that can fill any part of a text drafts several missing tokens at once, checks them together, and "
        "draws anew what it refuses.",
        f"{calls['one_call']:.2f} calls of the model a missing token, 1 where they are drawn one by one; the texts are "
        f"{'the same, token by token' if equal else 'NOT the same'}, for the same seed.",
        (
            f"{missing} missing tokens of stories and books; {calls['assd']:.2f} calls a token where drafts are "
            "checked in a second call.",
            f"{times}. Fewer calls save time where a call costs more than the work around it, as in larger models.",
            f"The texts' probabilities agree with the model's own within {gap:.0e} nats.",
        ),
        {"tokens": missing, "calls_per_token": calls, "seconds": seconds, "same_texts": equal, "joint_gap": gap},
        draw,
        ("tiny-any-subset",),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads gain nothing in calls of a millisecond, and wait for each other where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _openings(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """As many stories as passages of books, their first tokens, [2 * _EACH, _LENGTH]."""
    rows: list[list[int]] = []
    for kind in ("stories", "passages"):
        texts = [tokenizer(row["text"], verbose=False).input_ids for row in held_out(kind)]
        long = [ids[:_LENGTH] for ids in texts if len(ids) >= _LENGTH]
        rows += long[:: len(long) // _EACH][:_EACH]
    return torch.tensor(rows)
