"""What texts cost under masked diffusion, with or without an energy (arXiv 2410.21357).

A step that opens the positions U of a noisy text x costs -log p_U(x0_U | x), p_U the marginal of the corrected law
mu exp(-E) / Z on U. It is mu_U(x0_U) times a ratio of means of exp(-E): over completions drawn from mu that have x0 at
U, and over all. A ratio of the same draws, its bias is taken down by the jackknife.

Letters: B texts, T columns, b texts of a step, n draws.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from pyquiet.checks import check_count, check_word
from pyquiet.diffusion import plan as plans
from pyquiet.diffusion.energy import Energy
from pyquiet.diffusion.inputs import (
    Options,
    Texts,
    check_clean,
    check_context,
    check_energy,
    read_energy,
    read_schedule,
    read_texts,
)
from pyquiet.diffusion.modeling import Denoiser, as_denoiser
from pyquiet.diffusion.partition import Side, log_z
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.steps import Chooser, Laws, State
from pyquiet.randomness import Purpose, Stream, epoch_seed, resolve_seed, uniforms

Kind = Literal["marginal", "K_step", "joint_paper"]

_TOKENS = 1 << 15  # of texts that go through the denoiser at once
_PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None, "banned": None}


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihoods of B texts, float64 [B] in nats, one for each way to estimate log Z.

    `lower` errs to the optimistic side (log Z too small), `upper` to the conservative one, `jackknife` is in between;
    without an energy all are the same. `nats` is the one that was asked for. Of `kind` "joint_paper" none bounds
    anything.
    """

    kind: str
    log_z: Side
    lower: Tensor
    jackknife: Tensor
    upper: Tensor
    tokens: Tensor
    """int64 [B], the tokens that were counted."""
    denoiser_calls: Tensor
    energy_passes: Tensor
    """int64 [B]: forwards of the denoiser, and sequences given to the energy."""
    draws_error: Tensor
    """float64 [B]: the standard error of `nats` by the noises and draws of a text, from what its noises differ by; nan
    of a single one. Noises are spread evenly, so it is rather too large."""

    @property
    def nats(self) -> Tensor:
        """float64 [B], by the `log_z` that was asked for."""
        nats: Tensor = getattr(self, self.log_z)
        return nats

    @property
    def nats_per_token(self) -> float:
        """Over all tokens of all texts."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def nats_per_token_error(self) -> float:
        """The standard error of `nats_per_token` as that of the law that the texts are from; nan of a single text.

        Over the texts, whose noises and draws are independent and thereby in it.
        """
        B, rest = len(self.nats), self.nats - self.nats_per_token * self.tokens
        return math.sqrt(B / (B - 1) * float(rest.square().sum())) / int(self.tokens.sum()) if B > 1 else math.nan

    @property
    def nats_per_token_draws_error(self) -> float:
        """The part of it that noises and draws make: the standard error as the figure of these texts."""
        return float(self.draws_error.square().sum().sqrt() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the nats a token."""
        return math.exp(self.nats_per_token)

    def bits_per_character(self, characters: int) -> float:
        """Of texts that have so many characters together."""
        check_count("characters", characters, least=1)
        return float(self.nats.sum()) / math.log(2) / characters

    def __str__(self) -> str:
        total = int(self.tokens.sum())
        sides = ", ".join(f"{side} {float(getattr(self, side).sum() / total):.4f}" for side in get_args(Side))
        note = " (compatibility, not a bound)" if self.kind == "joint_paper" else ""
        over, draws = self.nats_per_token_error, self.nats_per_token_draws_error
        return (
            f"{self.kind}{note}: {sides} nats a token of {total} (standard error {over:.2g}, by draws alone "
            f"{draws:.2g}); perplexity {self.perplexity:.3f} by {self.log_z}"
        )


def nll(
    denoiser: Any,
    input_ids: Tensor,
    energy: Any = None,
    *,
    kind: Kind = "marginal",
    n: int = 16,
    log_z: Side = "jackknife",
    samples: int = 1,
    steps: int = 64,
    schedule: Schedule | None = None,
    mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int | None = 0,
    sequence_ids: Tensor | None = None,
    energy_microbatch: int | None = None,
    progress: bool = True,
) -> NLL:
    """What texts cost: an estimate, by sampled noise, of a bound of -log p under the sampler's own law.

    - "marginal": of the sampler that opens one position at a time, the limit of many steps, whatever the schedule. One
      masked position, chosen uniformly, is graded for each noise and counts as all of the text's tokens.
    - "K_step": of `diffuse` with so many steps: the sum over them of what the opened positions cost together.
    - "joint_paper": the released evaluation's. All masked positions of a noisy text are graded at once and weighted as
      if each were opened alone. No bound: of dependent tokens it counts too little, even less than their entropy. For
      comparison with published figures; it warns once.

    Without an energy, the first and the last are the plain NELBO, and "K_step" is that of K steps. The estimate of a
    text depends on the seed and its id, not on the batch or the padding, but for near ties of draws where logits differ
    in their last bits.

    Args:
        denoiser: a `MaskedDenoiser`, a masked LM, or what passes for a denoiser; in evaluation mode.
        input_ids: int64 [B, T], clean texts.
        energy: an `Energy` or any function that `as_energy` takes; in evaluation mode.
        n: draws for each estimate of log Z, at least 2.
        log_z: which estimate `NLL.nats` takes; see the function of this name.
        samples: noises a text, spread evenly over the numbers of masked tokens; their mean is returned. From two on
            `NLL.draws_error` is known.
        steps, schedule: K and the noise schedule ("K_step" alone; the others give their times to the energy).
        mask: bool [B, T], True at tokens that are graded, given the others; None grades all.
        attention_mask: [B, T], 0 at padding, on either side.
        seed: of noise and draws; None takes one from torch's default generator.
        sequence_ids: int64 [B], names of the texts for their noise; None counts them.
        energy_microbatch: sequences a call of the energy gets; None: as many as there are.
        progress: show a bar of the noises.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong shape, a graded token is the mask's or none
            of the vocabulary, a model is in training mode.
    """
    denoiser, energy = as_denoiser(denoiser), read_energy(energy)
    _check(kind, n, log_z, samples, energy_microbatch)
    texts = _read(denoiser, input_ids, mask, attention_mask, sequence_ids)
    _check_energy(energy, texts, input_ids)
    if kind == "joint_paper":
        _warn_of_joint()
    schedule, seed = read_schedule(schedule), resolve_seed(seed)
    check_count("steps", steps, least=1)
    offset = uniforms(Stream(seed, Purpose.REVEAL, texts.sequences, index=1), len(input_ids))
    costs = torch.zeros(samples, 3, len(input_ids), dtype=torch.float64)
    counts = torch.zeros(2, len(input_ids), dtype=torch.int64)
    # No gradients, and no autocast, which would change the law.
    with torch.no_grad(), torch.autocast(denoiser.device.type, enabled=False):
        for sample in tqdm(range(samples), "noises", disable=None if progress else True):
            noise = epoch_seed(seed, sample)
            law = StepCosts(denoiser, energy, texts, input_ids, n, noise, energy_microbatch)
            if kind == "K_step":
                turns = _all_steps(texts, plans.schedule_first(texts, schedule, steps, noise))
            else:
                level = (offset + sample / samples) % 1
                turns = _one_step(texts, plans.first_hitting(texts, schedule, noise), level, kind == "joint_paper")
            for turn in turns:
                for part in torch.arange(len(turn.rows)).split(max(1, _TOKENS // input_ids.shape[1])):
                    some = _Turn(turn.step, *(x[part] for x in turn[1:]))
                    found = law(some.step, some.time, some.rows, some.masked, some.opened)
                    costs[sample][:, some.rows] += found * some.weight
                    counts[:, some.rows] += law.calls
    lower, jackknife, upper = costs.mean(0)
    error = costs[:, get_args(Side).index(log_z)].std(0) / math.sqrt(samples) if samples > 1 else lower * math.nan
    return NLL(kind, log_z, lower, jackknife, upper, texts.fill.sum(1), counts[0], counts[1], error)


class _Turn(NamedTuple):
    """A step of b texts: time float64 [b], rows int64 [b], masked and opened bool [b, T], weight float64 [b]."""

    step: int
    time: Tensor
    rows: Tensor
    masked: Tensor
    opened: Tensor
    weight: Tensor


def _all_steps(texts: Texts, plan: plans.Plan) -> Iterator[_Turn]:
    """All steps of a plan, each of weight 1."""
    for turn in plan.turns():
        masked = plan.reveal_step[turn.rows] >= turn.step
        yield _Turn(turn.step, turn.time, turn.rows, masked, turn.opened, torch.ones_like(turn.time))


def _one_step(texts: Texts, plan: plans.Plan, level: Tensor, joint: bool) -> Iterator[_Turn]:
    """One step of each text, of a plan that opens one position at a time; the share of its steps before it is `level`.

    It weighs as many as there are; graded `joint`, for all positions that are still masked, each a part of it.
    """
    total = texts.fill.sum(1)
    rows = (total > 0).nonzero().flatten()
    number = (level * total).long()[rows].clamp(max=total[rows] - 1)
    reveal_step, time = plan.reveal_step[rows], plan.times[rows].gather(1, number[:, None])[:, 0]
    masked = reveal_step >= number[:, None]
    opened = masked if joint else reveal_step == number[:, None]
    yield _Turn(0, time, rows, masked, opened, total[rows] / opened.sum(1).double())


class StepCosts:
    """-log p_U(x0_U | x) of what a step opens, estimated with n draws of the denoiser.

    `calls`, int64 [2, 1], is what the last step cost each of its texts: forwards of the denoiser, passes of the energy.
    """

    def __init__(
        self, denoiser: Denoiser, energy: Energy | None, texts: Texts, targets: Tensor, n: int, seed: int,
        energy_microbatch: int | None = None,
    ) -> None:  # fmt: skip
        """targets: int64 [B, T], the clean texts."""
        self.denoiser, self.energy, self.texts, self.targets, self.n = denoiser, energy, texts, targets, n
        options = Options(energy, n, 1.0, 1.0, _PLAIN, True, "standard", None, n, "systematic", seed, energy_microbatch)
        self._chooser = Chooser(options, texts)
        self.calls = torch.zeros(2, 1, dtype=torch.int64)

    def __call__(self, step: int, time: Tensor, rows: Tensor, masked: Tensor, opened: Tensor) -> Tensor:
        """float64 [3, b] on the CPU: by too small a log Z, the jackknifed one and too large a one.

        time: float64 [b]; rows: int64 [b], the texts' numbers; masked, opened: bool [b, T], `opened` a part of it.
        """
        device = self.targets.device
        targets = self.targets[rows.to(device)]
        tokens = targets.masked_fill(masked.to(device), self.denoiser.mask_id)
        real = self.texts.real[rows]
        attention = None if bool(real.all()) else real.long().to(device)
        laws = Laws(self.denoiser, lambda _: self.denoiser.hidden(tokens, attention), rows)
        log_mu = self._log_mu(laws, masked, targets)
        costs = -log_mu.where(opened.to(device), 0.0).sum(1, dtype=torch.float64).expand(3, -1)
        self.calls = torch.tensor([[1], [0]])
        if self.energy is not None:
            costs = costs - self._log_ratio(State(step, time, rows, tokens, masked, opened, laws), targets, log_mu)
        return costs.cpu()

    def _log_mu(self, laws: Laws, masked: Tensor, targets: Tensor) -> Tensor:
        """The denoiser's log-probabilities of the clean tokens at masked positions, [b, T]; elsewhere 0."""
        row, column = (x.to(targets.device) for x in masked.nonzero(as_tuple=True))
        chosen = []
        for part, logits in laws.chunks(masked):
            tokens = targets[row[part], column[part], None]
            chosen.append(logits.gather(-1, tokens)[:, 0] - logits.logsumexp(-1))
        out = chosen[0].new_zeros(targets.shape)
        out[row, column] = torch.cat(chosen)
        return out

    def _log_ratio(self, state: State, targets: Tensor, log_mu: Tensor) -> Tensor:
        """log of mean exp(-E) over draws with x0 where the step opens, less that over draws; float64 [3, b].

        Least first log Z: that makes most of the ratio.
        """
        assert self.energy is not None
        here = state.opened.to(targets.device)[:, None]
        whole = (state.opened == state.masked).all(1).to(targets.device)
        known = whole & self.energy.self_normalized  # Z is 1
        if bool(known.all()):
            return self._sides(state, targets[:, None], log_mu[:, None])
        drawn, log_base, _ = self._chooser._draw(state, state.masked, self.n)
        z = self._sides(state, drawn, log_base).masked_fill(known, 0.0)
        forced, base = torch.where(here, targets[:, None], drawn), torch.where(here, log_mu[:, None], log_base)
        some = slice(1 if bool(whole.all()) else self.n)  # with all opened, every draw is the text itself
        found = self._sides(state, forced[:, some], base[:, some])
        ratio = found.flip(0) - z
        # Where one draw has all the weight, of both, the ratio of the means is all that is known.
        ratio = torch.where(ratio.isnan(), found[0] - z[0], ratio)
        return torch.where(z[0] == -torch.inf, -torch.inf, ratio)

    def _sides(self, state: State, tokens: Tensor, log_base: Tensor) -> Tensor:
        """log of the mean of exp(-E) over candidates [b, k, T]: too small, jackknifed and too large, float64 [3, b]."""
        self.calls[1] += tokens.shape[1]
        log_mu = log_base.sum(-1, dtype=torch.float64).to(log_base.dtype)
        log_weights = -self._chooser._energies(state, tokens, log_mu)
        if tokens.shape[1] == 1:
            return log_weights[:, 0].expand(3, -1)
        return torch.stack([log_z(log_weights, side) for side in get_args(Side)])


def _read(
    denoiser: Denoiser,
    input_ids: Tensor,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    sequence_ids: Tensor | None,
) -> Texts:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    graded = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    texts = read_texts(denoiser, input_ids, graded, attention_mask, None, 1, sequence_ids)
    check_context(denoiser, input_ids.shape[1])
    tokens = input_ids[texts.fill.to(input_ids.device)]
    if not len(tokens):
        raise ValueError("mask leaves no token of any text to be graded; set it where one is")
    check_clean(denoiser, tokens, " where a token is to be graded")
    return texts


def _check_energy(energy: Energy | None, texts: Texts, targets: Tensor) -> None:
    """Asks an energy whether it takes the texts, some of which is masked, and their clean tokens."""
    rows = texts.fill.any(1).nonzero().flatten()
    if energy is not None:
        columns = torch.arange(targets.shape[1]).expand(len(rows), -1)
        for some in (texts, replace(texts, tokens=targets, fill=torch.zeros_like(texts.fill))):
            check_energy(energy, some, rows, columns)


def _check(kind: str, n: int, log_z: str, samples: int, energy_microbatch: int | None) -> None:
    check_word("kind", kind, Kind)
    check_word("log_z", log_z, Side)
    check_count("samples", samples, least=1)
    check_count("n", n, least=2)
    if energy_microbatch is not None:
        check_count("energy_microbatch", energy_microbatch, least=1)


@functools.cache
def _warn_of_joint() -> None:
    warnings.warn(
        'kind="joint_paper" is for compatibility, not a bound: it can be less than the texts\' entropy; "marginal" and '
        '"K_step" are what the sampler costs',
        stacklevel=3,
    )
