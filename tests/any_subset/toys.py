"""Any-subset decoding on tables: the reference sampler, the mistakes that a test must see, and exact expectations.

Letters: G tokens to fill, V vocabulary, K = V^G completions, M samples, k drafts a round; p is the draft law, q the
target law. `laws[x, n, r]`, [K, G, G, V], is the law of slot r given the first n slots of completion x, n <= r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyquiet.any_subset import Context, as_engine, order_from_mask
from pyquiet.randomness import process_logits
from pyquiet.testing import TabularEngine


class ContraryEngine(TabularEngine):
    """A network whose drafts are never right: a law allows the tokens of one parity, that of how much it sees."""

    def rows(self, cache, content, content_ranks, content_sees, ranks, sees):
        logits = super().rows(cache, content, content_ranks, content_sees, ranks, sees)
        allowed = (torch.arange(self.vocab_size) + sees.masked_fill(ranks < 0, 0)[..., None]) % 2 == 0
        return logits.masked_fill(~allowed, -torch.inf)


def stubborn_drafter(vocab_size: int):
    """Sure of one token by position and number of known tokens, whatever the model thinks."""

    def draft(context: Context) -> None:
        token = (3 * context.positions + context.known.sum(1, keepdim=True)) % vocab_size
        logits = torch.full((*token.shape, vocab_size), -torch.inf).scatter(-1, token[..., None], 0.0)
        for j in range(token.shape[1]):
            context.draw(logits[:, j])

    return draft


def capricious_drafter(vocab_size: int):
    """Laws of its own, with much weight on few tokens and none on some; drawn by the sampler."""

    def draft(context: Context) -> Tensor:
        known = (context.tokens.masked_fill(~context.known, 0) * torch.arange(context.tokens.shape[1])).sum(1)
        phase = (known[:, None] + 5 * context.positions)[..., None] + 2.1 * torch.arange(vocab_size)
        logits = 3 * phase.sin()
        return logits.masked_fill(logits < -2.5, -torch.inf)

    return draft


@torch.no_grad()
def conditionals(model, input_ids: Tensor, known: Tensor, **processing) -> Tensor:
    """The laws float64 [K, G, G, V] of a text [N]."""
    engine, (order, m) = as_engine(model), order_from_mask(known)
    V, G = engine.vocab_size, len(order) - m
    K = V**G
    tokens = input_ids.repeat(K, 1)
    tokens[:, order[m:]] = torch.cartesian_prod(*[torch.arange(V)] * G).view(-1, G)
    slots = torch.arange(G)
    ranks, sees = (x.flatten().expand(K, -1) for x in torch.meshgrid(m + slots, m + slots, indexing="xy"))
    cache = engine.start(order.expand(K, -1), torch.full((K,), m))
    hidden = engine.forward(cache, tokens, torch.full((K,), len(order) - 1), ranks, sees)
    logits = process_logits(engine.head(hidden).flatten(0, 1), **processing)
    return logits.double().softmax(-1).view(K, G, G, V)


def sample(laws: Tensor, k: int, samples: int, seed: int, *, drawn_from: Tensor | None = None, rejected="residual"):
    """The algorithm of arXiv 2504.20456 without bonus: tokens int64 [M, G], and the calls [M].

    Its mistakes: `drawn_from`, other laws that the drafts come from than those of the ratio; `rejected`, what happens
    to a rejected draft: it is replaced from the "residual" or from the "target", or it is left to the next round.
    """
    G, V = laws.shape[2:]
    place = V ** torch.arange(G - 1, -1, -1)
    generator = torch.Generator().manual_seed(seed)
    drawn_from = laws if drawn_from is None else drawn_from
    x, n, calls = torch.zeros(samples, G).long(), torch.zeros(samples).long(), torch.zeros(samples).long()
    while len(rows := (n < G).nonzero()[:, 0]):
        begin, known = n[rows], (x[rows] * place).sum(1)
        calls[rows] += 1 + ((begin < G - 1) & (k > 1))  # the last token alone needs no verification
        going = torch.ones(len(rows), dtype=torch.bool)
        for j in range(k):
            going &= begin + j < G
            slot = (begin + j).clamp(max=G - 1)
            p, q = laws[known, begin, slot], laws[(x[rows] * place).sum(1), slot, slot]
            draft = drawn_from[known, begin, slot].multinomial(1, generator=generator)
            u = torch.rand(len(rows), 1, generator=generator).double()
            kept = (u * p.gather(1, draft) < q.gather(1, draft))[:, 0] | (j == 0)
            residual = (q - p).clamp(min=0)
            residual = torch.where(residual.any(1, keepdim=True), residual, q) if rejected == "residual" else q
            other = residual.multinomial(1, generator=generator)
            committed = going & (kept | (rejected != "later"))
            x[rows[committed], slot[committed]] = torch.where(kept, draft[:, 0], other[:, 0])[committed]
            n[rows] += committed
            going &= kept
    return x, calls


def expected(laws: Tensor, k: int, *, bonus: bool, one_call: bool = False) -> tuple[float, Tensor, Tensor, Tensor]:
    """Of one text: the mean calls, the mean number of tried and kept drafts by rank [k], and the law [K] of the tokens.

    By dynamic programming: `reached[n]` [V^n] is the probability that a round begins after n tokens, by these tokens.
    The drafts of a round are given what is known, the first of them accepted; with `one_call` (k = the drafts that are
    tested) they are given all but the last token, and the first call gives the first token.
    """
    G, V = laws.shape[2:]
    reached = [torch.zeros(V**n).double() for n in range(G + 1)]
    reached[one_call] += laws[0, 0, 0] if one_call else 1
    calls, tried, kept = float(one_call), torch.zeros(k).double(), torch.zeros(k).double()
    for n in range(one_call, G):
        drafts = min(k, G - n)
        calls += float(reached[n].sum()) * (1 if one_call or drafts == 1 else 2)
        going = reached[n]  # [V^(n+j)], the first j drafts kept
        for j in range(drafts + bool(bonus and n + drafts < G)):
            prefix = torch.arange(V ** (n + j))
            q = laws[prefix * V ** (G - n - j), n + j, n + j]
            p = laws[prefix // V**j * V ** (G - n), n - one_call, n + j] if j < drafts else torch.zeros_like(q)
            alike = q if j == 0 and not one_call else torch.minimum(p, q)
            if j < drafts:
                tried[j] += going.sum()
                kept[j] += (going[:, None] * alike).sum()
            reached[n + j + 1] += (going[:, None] * (q - alike)).flatten()
            going = (going[:, None] * alike).flatten()
        if len(going) == V ** (n + drafts):
            reached[n + drafts] += going
    return calls, tried, kept, reached[G]
