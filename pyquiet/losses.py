"""The negative log-likelihood of tokens without a large tensor of logits."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 23  # that exist at a time: 32 MB


def token_nlls(head: Callable[[Tensor], Tensor], rows: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """NLLs in nats of tokens int64 [n] by hidden states [n, ..., d]: [n, ...], float32 (float64 of float64 logits).

    `head` makes logits of rows. Those that would take more than 32 MB are computed twice instead of kept.
    """
    each = rows[0, ..., 0].numel() if len(rows) else 1
    size = max(1, LOGITS // (each * vocab_size))

    def grade(part: Tensor, token: Tensor) -> Tensor:
        logits = head(part.flatten(0, -2))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(logits, token.repeat_interleave(each), reduction="none").view(part.shape[:-1])

    if len(rows) <= size:
        return grade(rows, tokens)
    parts = zip(rows.split(size), tokens.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([grade(part, token) for part, token in parts])
    return torch.cat([checkpoint(grade, part, token, use_reentrant=False) for part, token in parts])
