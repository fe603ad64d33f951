"""What another model thinks of texts, and the entropy of their tokens, without which that says little.

A text that repeats itself is probable: perplexity under a judge falls with the entropy, so no function here gives one
without the other.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyquiet.checks import check_count
from pyquiet.evaluation.estimates import Estimate
from pyquiet.tokens import opening_ids, padded, token_ids

Judge = tuple[PreTrainedModel, PreTrainedTokenizerBase]  # a causal model and its tokenizer


@dataclass(frozen=True)
class Judged:
    """Of each text, float64 [B]: perplexity under a judge, and entropy of the histogram of its tokens, in nats."""

    perplexity: Tensor
    entropy_nats: Tensor

    @property
    def entropy_bits(self) -> Tensor:
        return self.entropy_nats / math.log(2)

    def columns(self) -> dict[str, Tensor]:
        """All of it by name: perplexity, entropy_nats, entropy_bits."""
        return {name: getattr(self, name) for name in ("perplexity", "entropy_nats", "entropy_bits")}

    def __str__(self) -> str:
        perplexity, nats, bits = (
            Estimate.geometric(self.perplexity),
            *map(Estimate.of, (self.entropy_nats, self.entropy_bits)),
        )
        return f"gen. PPL {perplexity}, entropy {nats} nats = {bits} bits"


def judge_texts(judge: Judge, texts: Sequence[str], tokens: Iterable[Tensor], *, batch_size: int = 8) -> Judged:
    """Judges texts and takes the entropy of the tokens, [N] each, that they were written in.

    A text's perplexity is exp of its tokens' mean NLL under the judge, of what the judge's context holds; behind what
    its tokenizer opens a text with (BOS) all tokens count, without one all but the first. A text without any has nan.

    Args:
        texts: read by the judge's own tokenizer. batch_size: texts it reads at a time; it changes nothing else.

    Raises:
        ValueError: there are not as many texts as rows of tokens.
    """
    check_count("batch_size", batch_size, least=1)
    entropy = histogram_entropy(tokens)
    if len(entropy) != len(texts):
        raise ValueError(f"texts and tokens must be as many, got {len(texts)} texts and {len(entropy)} rows of tokens")
    parts = [_perplexity(*judge, texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    return Judged(torch.cat(parts), entropy)


def histogram_entropy(tokens: Iterable[Tensor]) -> Tensor:
    """Shannon entropy in nats of the histogram of each row's tokens [N], float64 [B]; at most log N."""
    shares = [row.unique(return_counts=True)[1].double().cpu() / len(row) for row in tokens]
    return torch.stack([-(share * share.log()).sum() for share in shares])


@torch.no_grad()
def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    opening = opening_ids(tokenizer)
    ids, mask = (
        x.to(model.device) for x in padded([(opening + token_ids(tokenizer, t))[:context] for t in texts], "right")
    )
    if ids.shape[1] < 2:
        return torch.full((len(texts),), float("nan"), dtype=torch.float64)
    logits = model(ids[:, :-1], attention_mask=mask[:, :-1]).logits.float()
    nll = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").double()
    counted = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1], device=ids.device) >= len(opening))
    return ((nll * counted).sum(1) / counted.sum(1)).exp().cpu()
