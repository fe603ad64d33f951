"""Sources of text whose every law is known, and the denoisers and energies that are exact for them.

Letters: B texts, T positions, V vocabulary with the mask token, S symbols without it, k candidates. A `law` is float64
[S, ..., S], one axis a position. Symbols are numbered without the mask token, `ids_of` gives their ids.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyquiet.diffusion.energy import Energy

_GENERATOR = np.random.default_rng(1)
SOURCE = torch.tensor(_GENERATOR.dirichlet(0.5 * np.ones(27))).view(3, 3, 3)
PROPOSAL = torch.tensor(_GENERATOR.dirichlet(np.ones(3), size=3))  # [T, S], a law a position
T, S = 3, 3


def ids_of(symbols: Tensor, mask_id: int) -> Tensor:
    """The ids of symbols in a vocabulary in which the mask token has been put in their midst."""
    return symbols + (symbols >= mask_id)


def symbols_of(ids: Tensor, mask_id: int) -> Tensor:
    """The inverse; what a mask token gives is not to be used."""
    return (ids - (ids > mask_id).long()).clamp(min=0)


def spread(law: Tensor, mask_id: int) -> Tensor:
    """The law over ids, [V, ..., V], zero where a mask token is."""
    wide = law.new_zeros([n + 1 for n in law.shape])
    wide[torch.meshgrid(*[ids_of(torch.arange(n), mask_id) for n in law.shape], indexing="ij")] = law
    return wide


def kl(p: Tensor, q: Tensor) -> float:
    """sum p log(p / q) of two laws, in nats."""
    return float((p * (p / q).log()).where(p > 0, 0.0).sum())


def tv(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def closed_up(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where texts are no padding, bool [B, T], and the places [B, T] that put what is none first, in its order."""
    attended = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    return attended, (~attended).long().argsort(dim=1, stable=True)


class Toy:
    """What all denoisers here share: hidden rows are log-probabilities of the symbols, and the head adds the mask."""

    device = torch.device("cpu")
    training = False

    def __init__(self, symbols: int, mask_id: int) -> None:
        self.vocab_size, self.mask_id = symbols + 1, mask_id
        self.calls = self.rows = 0  # texts seen by `hidden`, rows seen by `head`

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, S]; padding is closed up, so that a text's rows are the same wherever its padding is."""
        self.calls += len(input_ids)
        attended, place = closed_up(input_ids, attention_mask)
        masked = (input_ids == self.mask_id) | ~attended
        logits = self.log_marginals(symbols_of(input_ids, self.mask_id).gather(1, place), masked.gather(1, place))
        return torch.empty_like(logits).scatter(1, place[..., None].expand_as(logits), logits)

    def log_marginals(self, symbols: Tensor, masked: Tensor) -> Tensor:
        """Log-probabilities [B, T, S] of each position given the symbols [B, T] that are not masked."""
        raise NotImplementedError

    def head(self, rows: Tensor) -> Tensor:
        self.rows += len(rows)
        wide = rows.new_full((len(rows), self.vocab_size), -torch.inf)
        wide[:, ids_of(torch.arange(self.vocab_size - 1), self.mask_id)] = rows
        return wide.float()


class ExactMarginals(Toy):
    """The factorised denoiser at its optimum: the marginals of a law's posterior given what is observed."""

    def __init__(self, law: Tensor, mask_id: int = 1) -> None:
        super().__init__(law.shape[0], mask_id)
        n, t = law.shape[0], law.dim()
        digits = torch.cartesian_prod(*[torch.arange(n + 1)] * t).view(-1, t)  # [(S + 1)^T, T], S for a mask
        texts = torch.cartesian_prod(*[torch.arange(n)] * t).view(-1, t)
        agree = ((digits[:, None] == texts) | (digits[:, None] == n)).all(-1)  # [(S + 1)^T, S^T]
        weight = agree * law.flatten()
        shares = torch.nn.functional.one_hot(texts, n).double()  # [S^T, T, S]
        self.table = torch.einsum("sc,ctv->stv", weight / weight.sum(1, keepdim=True), shares).log()
        self.place = (n + 1) ** torch.arange(t - 1, -1, -1)

    def log_marginals(self, symbols: Tensor, masked: Tensor) -> Tensor:
        digits = symbols.where(~masked, self.vocab_size - 1)
        lacking = len(self.place) - digits.shape[1]  # a shorter text: the rest is summed over
        digits = torch.nn.functional.pad(digits, (0, lacking), value=self.vocab_size - 1)
        return self.table[(digits * self.place).sum(1)][:, : symbols.shape[1]]


class Product(Toy):
    """A denoiser that takes no notice of what is observed: one law a position, [T, S]."""

    def __init__(self, laws: Tensor = PROPOSAL, mask_id: int = 1) -> None:
        super().__init__(laws.shape[1], mask_id)
        self.laws = laws

    def log_marginals(self, symbols: Tensor, masked: Tensor) -> Tensor:
        return self.laws.log()[: symbols.shape[1]].expand(len(symbols), -1, -1)


class LawEnergy(Energy):
    """E = log mu - log p of a law p: the residual model is the law's posterior given all that is observed.

    `carry_over` scores the masked positions alone, each given what is left of it, as coAR does.
    """

    needs_log_mu = True
    time_free = True

    def __init__(self, law: Tensor, mask_id: int = 1, *, carry_over: bool = False, sign: int = 1) -> None:
        self.self_normalized = carry_over
        self.mask_id, self.sign = mask_id, sign
        t = law.dim()
        prefixes = [law.sum(tuple(range(i, t))).clamp(min=0) if i < t else law for i in range(1, t + 1)]
        self.log_conditionals = [  # i: [S, ..., S], i + 1 axes: log p(x_i | x_<i)
            (prefixes[i] / (prefixes[i - 1][..., None] if i else 1)).log() for i in range(t)
        ]
        self.carry_over = carry_over

    def __call__(self, candidates, input_ids, time, log_mu, *, attention_mask=None):
        b, k, t = candidates.shape
        assert log_mu.shape == (b, k)
        assert time.shape == (b,)
        attended, place = closed_up(input_ids, attention_mask)
        masked = (input_ids == self.mask_id) & attended
        for j in range(k):  # what a sampler must never hand over
            assert (candidates[:, j] == input_ids)[attended & ~masked].all(), "an observed token was changed"
            assert (candidates[:, j] != self.mask_id)[attended].all(), "a candidate is masked"
        symbols = symbols_of(candidates, self.mask_id).gather(2, place[:, None].expand(-1, k, -1)).unbind(-1)
        each = torch.stack([self.log_conditionals[i][symbols[: i + 1]] for i in range(t)], -1)  # [B, k, T]
        scored = (masked if self.carry_over else attended).gather(1, place)
        return self.sign * (log_mu - each.where(scored[:, None], 0.0).sum(-1)).float()


def bigrams(text: str) -> Tensor:
    """Transition probabilities [27, 27] of a text's letters and spaces, each pair having been seen 0.02 times more."""
    letters = re.sub("[^a-z]+", " ", text.lower())
    symbols = torch.tensor([0 if c == " " else ord(c) - ord("a") + 1 for c in letters])
    counts = torch.bincount(symbols[:-1] * 27 + symbols[1:], minlength=27 * 27).view(27, 27).double() + 0.02
    return counts / counts.sum(1, keepdim=True)


def english() -> tuple[Tensor, bool]:
    """The bigrams of the licences that Debian ships, and True; without them those of the project's own, and False."""
    names = ("GPL-3", "GPL-2", "LGPL-2.1", "MPL-2.0", "Apache-2.0", "GFDL-1.3", "Artistic")
    paths = [Path("/usr/share/common-licenses", name) for name in names]
    complete = all(path.is_file() for path in paths)
    if not complete:
        paths = [Path(__file__).parents[2] / "LICENSE"]
    return bigrams(" ".join(path.read_text("utf8", "ignore") for path in paths)), complete


class MarkovChain:
    """A stationary chain of symbols, by its transition probabilities [S, S]."""

    def __init__(self, transition: Tensor, length: int = 64) -> None:
        self.transition, self.length = transition, length
        self.start = torch.linalg.matrix_power(transition, 4096)[0]  # [S]
        powers = [torch.eye(len(transition), dtype=transition.dtype)]
        for _ in range(length):
            powers.append(powers[-1] @ transition)
        self.log_powers = torch.stack(powers).log()  # [T + 1, S, S]

    def entropy(self) -> float:
        """Of a text, in bits a symbol."""
        first = -(self.start * self.start.log2()).sum()
        rest = -(self.start[:, None] * self.transition * self.transition.log2()).sum()
        return float(first + (self.length - 1) * rest) / self.length

    def log_prob(self, symbols: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Of texts [..., T], or of their first tokens, [..., 1] of them; in nats."""
        steps = self.log_powers[1][symbols[..., :-1], symbols[..., 1:]]
        if lengths is not None:
            steps = steps.where(torch.arange(1, symbols.shape[-1]) < lengths, 0.0)
        return self.start.log()[symbols[..., 0]] + steps.sum(-1)

    def bits(self, symbols: Tensor) -> tuple[float, float]:
        """The mean negative log-probability of texts [B, T] in bits a symbol, and its standard error."""
        each = -self.log_prob(symbols) / (self.length * np.log(2))
        return float(each.mean()), float(each.std() / len(each) ** 0.5)


class MarkovDenoiser(Toy):
    """The exact marginals of a chain given what is observed; these depend on the nearest neighbours alone."""

    def __init__(self, chain: MarkovChain, mask_id: int = 13) -> None:
        super().__init__(len(chain.start), mask_id)
        self.chain = chain

    def log_marginals(self, symbols: Tensor, masked: Tensor) -> Tensor:
        t = symbols.shape[1]
        place = torch.arange(t).expand_as(symbols)
        left = place.where(~masked, -1).cummax(1).values
        right = place.where(~masked, t).flip(1).cummin(1).values.flip(1)
        before = self.chain.log_powers[place - left.clamp(min=0), symbols.gather(1, left.clamp(min=0))]  # [B, T, S]
        before = torch.where((left < 0)[..., None], self.chain.start.log(), before)
        last = right.clamp(max=t - 1)
        after = self.chain.log_powers.transpose(1, 2)[last - place, symbols.gather(1, last)]
        after = torch.where((right == t)[..., None], 0.0, after)
        return (before + after).log_softmax(-1)


class MarkovEnergy(Energy):
    """E = log mu - log p of a chain; `sign` -1 is the mistake of the released sampler."""

    needs_log_mu = True
    self_normalized = False
    time_free = True

    def __init__(self, chain: MarkovChain, mask_id: int = 13, *, sign: int = 1) -> None:
        self.chain, self.mask_id, self.sign = chain, mask_id, sign

    def __call__(self, candidates, input_ids, time, log_mu, *, attention_mask=None):
        attended, place = closed_up(input_ids, attention_mask)
        symbols = symbols_of(candidates, self.mask_id).gather(2, place[:, None].expand_as(candidates))
        lengths = attended.sum(1)[:, None, None]
        return self.sign * (log_mu - self.chain.log_prob(symbols, lengths)).float()
