"""Bilevel problems of language models with m domains, on cached features: the models themselves are left as they are.

A domain's own few numbers are fitted to its data under what all domains share, and what they share is chosen by how
well the fitted domains do on held-out data.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from pyquiet.bilevel.bsvrb import BSVRB
from pyquiet.bilevel.problem import Problem
from pyquiet.checks import check_count, check_positive
from pyquiet.heads import log_prob

_TEXTS = 8  # a pass of the model, while its thoughts are cached


@dataclass(frozen=True)
class Part:
    """Cached rows of a model: `logits` [n, V], the right ids `labels` int64 [n], `domains` int64 [n]; for mixing heads
    also the logits behind a thought [n, V] and the `features` [n, d] that say how much of it to take."""

    logits: Tensor
    labels: Tensor
    domains: Tensor
    thought_logits: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "domains", "thought_logits", "features"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.logits):
                raise ValueError(f"{name} must have a row for each of the {len(self.logits)} logits, got {len(value)}")


class Rows(NamedTuple):
    """Rows of each block's data int64 [I, B], and what each counts [I, B]; 0 at padding."""

    rows: Tensor
    weight: Tensor


class DomainData:
    """Which rows belong to which domain.

    Args:
        domains: int64 [n], the domain of each row, from 0 to m - 1.

    Raises:
        ValueError: a domain has no rows, or a row is of none of the m domains.
    """

    def __init__(self, domains: Tensor, m: int) -> None:
        others = domains[(domains < 0) | (domains >= m)].unique().tolist()
        if others:
            raise ValueError(f"domains must be in 0 .. {m - 1}, those of the rows to train on; got {others[:5]}")
        self.members = [(domains == i).nonzero()[:, 0] for i in range(m)]
        empty = [i for i, rows in enumerate(self.members) if not len(rows)]
        if empty:
            raise ValueError(f"domains: {empty[:5]} have no rows; number the domains from 0 on, without gaps")

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Rows:
        members = [self.members[i] for i in idx.tolist()]
        if samples is None:
            rows = pad_sequence(members, batch_first=True, padding_value=-1)
            return Rows(rows.clamp(min=0), (rows >= 0) / (rows >= 0).sum(1, keepdim=True))
        u = torch.rand(len(idx), samples, generator=generator, dtype=torch.float64)
        chosen = torch.stack([rows[(u[i] * len(rows)).long()] for i, rows in enumerate(members)])
        return Rows(chosen, torch.full(chosen.shape, 1 / samples))


class SharedPrior(Problem):
    """Domains whose numbers y_i are drawn to a shared mean: x = {"mean": [d], "log_strength": []}.

    g_i = mean NLL of the domain's rows under y_i + exp(log_strength) / 2 |y_i - mean|^2, f_i that of its held-out rows.
    Subclasses say what logits y_i makes of a row.
    """

    def __init__(self, train: Part, held_out: Part, dim_y: int) -> None:
        self.m, self.dim_y, self.parts = _domains(train), dim_y, (train, held_out)
        self.train, self.held_out = (DomainData(part.domains, self.m) for part in self.parts)

    @abstractmethod
    def logits(self, Y: Tensor, part: Part, rows: Tensor) -> Tensor:
        """The logits [I, B, V] of rows int64 [I, B] of a part under Y [I, d], in which their NLLs are convex."""

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Rows:
        return self.train.sample(idx, samples, generator)

    def sample_upper(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Rows:
        return self.held_out.sample(idx, samples, generator)

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Rows) -> Tensor:
        apart: Tensor = x["log_strength"].exp() / 2 * (Y - x["mean"]).square().sum(1)
        return self._nll(Y, self.parts[0], batch) + apart

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Rows) -> Tensor:
        return self._nll(Y, self.parts[1], batch)

    def _nll(self, Y: Tensor, part: Part, batch: Rows) -> Tensor:
        return (_nlls(self.logits(Y, part, batch.rows), part, batch.rows) * batch.weight).sum(1)


def _nlls(logits: Tensor, part: Part, rows: Tensor) -> Tensor:
    """The NLLs [I, B] of rows int64 [I, B] of a part by their logits [I, B, V]."""
    return cross_entropy(logits.flatten(0, 1), part.labels[rows].flatten(), reduction="none").view(rows.shape)


@dataclass(frozen=True)
class SharedFit:
    """Each domain's numbers [m, d], their shared `mean` [d] and the `strength` that draws them to it, and the mean
    held-out NLL in nats before (all domains at the starting mean) and after."""

    values: Tensor
    mean: Tensor
    strength: float
    before: float
    after: float


class _Temperatures(SharedPrior):
    """y_i is the inverse temperature, in which the NLL is convex."""

    def logits(self, Y: Tensor, part: Part, rows: Tensor) -> Tensor:
        return part.logits[rows] * Y[:, None]


class _Mixing(SharedPrior):
    """y_i are the weights w of log-linear mixing: logits + (w . features) (thought logits - logits)."""

    def logits(self, Y: Tensor, part: Part, rows: Tensor) -> Tensor:
        features, thought = cast(Tensor, part.features), cast(Tensor, part.thought_logits)
        share = (features[rows] * Y[:, None]).sum(-1, keepdim=True)
        return part.logits[rows] + share * (thought[rows] - part.logits[rows])


def calibrate_temperatures(
    train: Part, held_out: Part, *, steps: int = 400, seed: int = 0, **options: Any
) -> SharedFit:
    """An inverse temperature for each domain, and the mean that they share; 1 is the model as it is.

    Args:
        train, held_out: rows of the same domains.
        steps: of `BSVRB`, whose further `options` these are.

    Raises:
        ValueError: a domain has no rows in either part.
    """
    return _fit(_Temperatures(train, held_out, 1), torch.ones(1), steps, seed, options)


def domain_mixing_heads(
    train: Part, held_out: Part, *, start: Tensor | None = None, steps: int = 400, seed: int = 0, **options: Any
) -> SharedFit:
    """Log-linear mixing heads for each domain of a thinking model, and the mean that they share; 0 leaves thoughts out.

    A head w takes logits + (w . features) (thought_logits - logits).

    Args:
        start: [d], where all heads and their mean start (zeros). For `thought_part` (0, 1) is the model as it is.
        train, held_out, steps, seed, options: as `calibrate_temperatures`.

    Raises:
        ValueError: thought_logits or features are missing, start has another shape than a head, or a domain has no rows
            in either part.
    """
    for name, part in (("train", train), ("held_out", held_out)):
        if part.thought_logits is None or part.features is None:
            raise ValueError(f"{name} needs thought_logits [n, V] and features [n, d], to mix thoughts by")
    problem = _Mixing(train, held_out, cast(Tensor, train.features).shape[1])
    begin = torch.zeros(problem.dim_y) if start is None else start.float()
    if begin.shape != (problem.dim_y,):
        raise ValueError(f"start must be [{problem.dim_y}], a weight for each feature, got {list(begin.shape)}")
    return _fit(problem, begin, steps, seed, options)


@torch.no_grad()
def thought_part(
    model: Any,
    input_ids: Tensor,
    domains: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    seed: int = 0,
    **thoughts: Any,
) -> Part:
    """The rows of `domain_mixing_heads` from a thinking model's own thoughts, with the features (1, w); on the CPU.

    A head (a, b) on them weighs a thought by a + b w where the model itself has w: (0, 1) is the model as it is, and
    `mixed_by` the model with another head. Each thought before a token that the text has is a row.

    Args:
        model: a thinking model (`pyquiet.load("tiny-thinker")`, `QuietStarForCausalLM`).
        input_ids: int64 [B, T]. domains: int64 [B], of each text. attention_mask: [B, T], 0 at padding.
        positions: int64 [K], the columns to think after; None is all but the last. Two rows of the vocabulary's size
            are kept for each thought, so take some of a long text.
        seed, thoughts: as `think_at_every_token`.

    Raises:
        NotImplementedError: the model's logits are no mix of two logits (a softcap lies behind), so that losses are not
            convex in a head. ValueError: shapes do not fit; and as `think_at_every_token`.
    """
    B, T = input_ids.shape
    if domains.shape != (B,):
        raise ValueError(f"domains must be [{B}], one for each text, got {list(domains.shape)}")
    columns = torch.arange(check_count("the length of input_ids", T, least=2) - 1) if positions is None else positions
    columns, domains = columns.to(input_ids.device), domains.to(input_ids.device)
    if columns.ndim != 1:
        raise ValueError(f"positions must be [K], the same columns of all texts, got {list(columns.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    kept: list[tuple[Tensor, ...]] = []
    for rows in torch.arange(B).split(_TEXTS):
        pairs: list[Tensor] = []
        hook = model.mixing_head.register_forward_pre_hook(lambda _, given, pairs=pairs: pairs.append(given[0]))
        try:
            found = model.think_at_every_token(
                input_ids[rows], mask[rows], positions=columns, seed=seed, sequence_ids=rows, **thoughts
            )
        finally:
            hook.remove()
        following = (columns + 1).clamp_max(T - 1)
        ends = (mask[rows][:, columns] * mask[rows][:, following]).bool() & (columns < T - 1)
        N = found.weight.shape[-1]
        before, behind = pairs[0][ends].flatten(0, 1).chunk(2, -1)
        logits, thought = (model.finish(model.raw_logits(hidden)).float() for hidden in (before, behind))
        labels = input_ids[rows][:, following][ends].repeat_interleave(N)
        weight = found.weight[ends].flatten()
        mixed = log_prob(torch.lerp(logits, thought, weight[:, None]), labels)
        if not torch.allclose(mixed, found.mixed_log_probs[ends].flatten(), rtol=0, atol=1e-3):
            raise NotImplementedError(
                f"{type(model.base).__name__} does more to mixed logits than scale them (a softcap?), so mixing is not "
                "log-linear in a head"
            )
        domain = domains[rows][:, None].expand_as(ends)[ends].repeat_interleave(N)
        features = torch.stack([torch.ones_like(weight), weight], 1)
        kept.append(tuple(x.cpu() for x in (logits, labels, domain, thought, features)))
    return Part(*(torch.cat(pieces) for pieces in zip(*kept, strict=True)))


@contextmanager
def mixed_by(model: Any, head: Tensor) -> Iterator[None]:
    """Inside, the thinking model weighs each thought by head[0] + head[1] w in place of w, in all that it does."""
    if head.shape != (2,):
        raise ValueError(f"head must be [2], a row of a fit to a `thought_part`, got {list(head.shape)}")
    hook = model.mixing_head.register_forward_hook(lambda _, given, w: head[0].to(w) + head[1].to(w) * w)
    try:
        yield
    finally:
        hook.remove()


class DomainReweighting(Problem):
    """x = logits of source domains' weights; y_i is a linear head for target domain i, trained on the weighed sources.

    g_i = sum_k softmax(x)_k (mean cross entropy on source k) + l2 / 2 |y_i|^2, f_i that of the target's held-out rows.
    Targets differ by their upper loss alone, so each has the same lower problem, from its own start and samples.
    """

    def __init__(self, source: Part, target: Part, *, l2: float) -> None:
        features = cast(Tensor, source.features)
        self.sources, self.m = _domains(source), _domains(target)
        self.classes = int(max(source.labels.max(), target.labels.max())) + 1
        self.dim_y, self.l2 = self.classes * features.shape[1], check_positive("l2", l2)
        self.parts = source, target
        self.source, self.held_out = DomainData(source.domains, self.sources), DomainData(target.domains, self.m)

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> list[Rows]:
        """For each block, rows of every source: as many lists as blocks."""
        every = torch.arange(self.sources)
        if samples is None:
            return [self.source.sample(every, None, generator)] * len(idx)
        return [self.source.sample(every, max(1, samples // self.sources), generator) for _ in idx]

    def sample_upper(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Rows:
        return self.held_out.sample(idx, samples, generator)

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: list[Rows]) -> Tensor:
        rows, weight = (torch.stack([getattr(one, name) for one in batch]) for name in ("rows", "weight"))  # [I, k, B]
        losses = self._losses(self.parts[0], Y, rows.flatten(1)).view(rows.shape)
        fit: Tensor = ((losses * weight).sum(2) * x.softmax(0)).sum(1)
        return fit + self.l2 / 2 * Y.square().sum(1)

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Rows) -> Tensor:
        return (self._losses(self.parts[1], Y, batch.rows) * batch.weight).sum(1)

    def _losses(self, part: Part, Y: Tensor, rows: Tensor) -> Tensor:
        heads = Y.view(len(Y), self.classes, -1)
        return _nlls(cast(Tensor, part.features)[rows] @ heads.mT, part, rows)


def reweight_domains(
    source: Part, target: Part, *, l2: float = 1e-2, steps: int = 600, seed: int = 0, eta: float = 1.0, **options: Any
) -> Tensor:
    """How much each source domain should count, [domains], summing to 1, for heads that do well on the target rows.

    Heads are linear in `features`; the `logits` of the parts are not looked at.

    Args:
        source: rows to train on, their `domains` the ones to weigh. target: held-out rows, each of its domains a block.
        l2: of the heads. steps, eta: of `BSVRB`, whose further `options` these are.

    Raises:
        ValueError: features are missing, or a domain has no rows.
    """
    for name, part in (("source", source), ("target", target)):
        if part.features is None:
            raise ValueError(f"{name} needs features [n, d], which its head reads")
    problem = DomainReweighting(source, target, l2=l2)
    method = _run(problem, torch.zeros(problem.sources), steps, seed, {"eta": eta, "variant": "v2"} | options)
    return cast(Tensor, method.x).softmax(0)


def _domains(part: Part) -> int:
    return int(part.domains.max()) + 1


def _run(problem: Problem, x: Any, steps: int, seed: int, options: dict[str, Any], y: Tensor | None = None) -> BSVRB:
    defaults: dict[str, Any] = {
        "blocks_per_step": min(8, problem.m),
        "samples_per_block": 32,
        "eta": 0.02,
        "floor": 0.1,
    }
    check_count("steps", steps, least=1)
    method = BSVRB(problem, x, seed=seed, y=y, **defaults | options)
    for _ in range(steps):
        method.step()
    return method


@torch.no_grad()
def _held_out(problem: SharedPrior, Y: Tensor) -> float:
    every = torch.arange(problem.m)
    return float(problem.upper({}, Y, every, problem.sample_upper(every, None, torch.Generator())).mean())


def _fit(problem: SharedPrior, start: Tensor, steps: int, seed: int, options: dict[str, Any]) -> SharedFit:
    x = {"mean": start, "log_strength": torch.zeros(())}
    at_start = start.expand(problem.m, -1)
    method = _run(problem, x, steps, seed, options, at_start)
    found, values = cast(dict[str, Tensor], method.x), method.flush().clone()
    strength = float(found["log_strength"].exp())
    return SharedFit(values, found["mean"], strength, _held_out(problem, at_start), _held_out(problem, values))
