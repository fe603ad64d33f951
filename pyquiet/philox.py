"""Philox4x32-10 (Salmon et al., SC 2011) in torch: checked counters, their blocks, and uniforms made of these.

Native code has the same; where there is none, and on other devices, this serves.
"""

import torch
from torch import Tensor

LIMITS = {"sequence": 1 << 32, "position": 1 << 32, "step": 1 << 32, "index": 1 << 26}  # the words of a counter


def reference_uniforms(seed: int, purpose: int, words: list[Tensor | int], rows: int, device: torch.device) -> Tensor:
    """The uniforms, float64 [rows], of a purpose at the counters of these words, each an int or int64 [rows]."""
    counter = make_counter(words, rows, device)
    counter[3] |= purpose << 26
    block = philox(seed, counter)
    return uniform(block[0], block[1])


def make_counter(words: list[Tensor | int], rows: int, device: torch.device) -> Tensor:
    """The words of all rows, [4, R], their ranges checked."""
    counter = torch.stack(
        [w if isinstance(w, Tensor) else torch.full((rows,), w, dtype=torch.int64, device=device) for w in words]
    )
    limits = torch.tensor(list(LIMITS.values()), device=device).unsqueeze(-1)
    wrong = (counter < 0) | (counter >= limits)
    if wrong.any():
        field, row = wrong.nonzero()[0].tolist()
        name, limit = list(LIMITS.items())[field]
        value = int(counter[field, row])
        raise ValueError(f"stream.{name} must be in [0, {limit}), got {value} at row {row}")
    return counter


def uniform(low: Tensor, high: Tensor) -> Tensor:
    """The uniforms of two words of a block."""
    x = high << 32 | low
    return ((x >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52


def philox(seed: int, counter: Tensor) -> Tensor:
    """Ten rounds of Philox4x32: counter int64 [4, ...] of 32-bit words -> the same of the block."""
    low = (1 << 32) - 1
    key0, key1 = seed & low, seed >> 32 & low
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap modulo 2^64; the mask makes the arithmetic shift a logical one.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (odd >> 32 & low) ^ c1 ^ key0,
            odd & low,
            (even >> 32 & low) ^ c3 ^ key1,
            even & low,
        )
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return torch.stack([c0, c1, c2, c3])
