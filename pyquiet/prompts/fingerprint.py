"""What tells whether a run that was stopped is the one that goes on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of all weights and buffers, by name; the same on every device and for any number of threads."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            bits = value.detach().contiguous().view(_INTEGERS[value.element_size()])
            # A sum of integers, which wraps, is exact in every order, and no copy of the weights has to be hashed.
            digest.update(f"{name} {value.dtype} {list(value.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_same(found: Mapping[str, Any], now: Mapping[str, Any], what: str, remedy: str) -> None:
    """ValueError with the names of all that differs, as JSON knows it, and the values of the first."""
    now = json.loads(json.dumps(now))
    names = [name for name in {**found, **now} if found.get(name) != now.get(name)]
    if names:
        was, becomes = (json.dumps(values.get(names[0]))[:80] for values in (found, now))
        more = f" (and another {', '.join(names[1:])})" if names[1:] else ""
        raise ValueError(f"{what} another {names[0]}: {was}, now {becomes}{more}; {remedy}")
