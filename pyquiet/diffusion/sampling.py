"""`diffuse`: texts filled in parallel steps, each corrected by an energy (arXiv 2410.21357, 2406.07524)."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyquiet.checks import check_count
from pyquiet.diffusion import plan as plans
from pyquiet.diffusion.hooks import Order, Remask, Tokens
from pyquiet.diffusion.inputs import (
    Options,
    check_sampler,
    read_energy,
    read_options,
    read_schedule,
    read_texts,
)
from pyquiet.diffusion.modeling import as_denoiser
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.session import OnStep, Session, Trace
from pyquiet.diffusion.windows import check_texts, slide
from pyquiet.randomness import resolve_seed


@dataclass(frozen=True)
class Diffusion:
    """Filled texts, what they cost, and how well the candidates were weighed. B texts, T columns.

    Attributes:
        tokens: int64 [B, T].
        reveal_step: int64 [B, T], the number of the step that opened each position; -1 where it was given.
        denoiser_calls, energy_passes: int64 [B], forwards of the denoiser, and sequences given to the energy.
        depth: int64 [B], forwards of either kind that had to wait for each other: those of all candidates are one.
        ess: float64 [B], the mean over corrected steps of the weights' effective number, in [1, candidates]. Near 1 the
            pick is the best of k, near k the energy changes nothing. 1 where nothing is corrected (no energy, or one
            candidate), k where nothing was to be filled, and NaN where the window was never open.
        log_normalizer: float64 [B], the mean over corrected steps of the estimates of log Z; 0 where there are none.
        degenerate: int64 [B], steps in which all candidates had weight 0, so that the pick was uniform.
        steps_run: steps in which any text took part.
        trace: the figures of single steps.
        support_truncated: the proposal cannot draw some tokens of the denoiser, so no correction brings them back.
        seconds: of the whole call.
    """

    tokens: Tensor
    reveal_step: Tensor
    denoiser_calls: Tensor
    energy_passes: Tensor
    depth: Tensor
    ess: Tensor
    log_normalizer: Tensor
    degenerate: Tensor
    steps_run: int
    trace: Trace
    support_truncated: bool
    seconds: float


def diffuse(
    denoiser: Any,
    energy: Any = None,
    *,
    input_ids: Tensor | None = None,
    mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    length: int | None = None,
    num_samples: int = 1,
    steps: int = 64,
    candidates: int = 8,
    window: float = 1.0,
    energy_temperature: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    correct: bool = True,
    sampler: str = "schedule_first",
    schedule: Schedule | None = None,
    mode: str = "standard",
    ess_target: float | None = None,
    max_candidates: int = 64,
    context: int | None = None,
    stride: int | None = None,
    scheme: str = "systematic",
    order: Order | None = None,
    tokens: Tokens | None = None,
    remask: Remask | None = None,
    seed: int | None = 0,
    sequence_ids: Tensor | None = None,
    energy_microbatch: int | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Diffusion:
    """Fill the masked positions of texts by masked diffusion, each step corrected by an energy where there is one.

    A step opens some of the masked positions. Plain masked diffusion draws their tokens independently of each other.
    With an energy E, k candidates are drawn for all that is masked, one of them is picked with weight exp(-E / tau),
    and its tokens are written where the step opens; so a step draws from mu(x0 | x) exp(-E(x0, x, t) / tau) / Z as k
    grows. If that is the posterior of one joint law at every x, the texts follow this law for any number of steps; a
    reward or a constraint as energy holds step by step alone. A low energy is good.

    Samplers: all but the last have the same law, "first_hitting" that of infinitely many steps.

    - "schedule_first": draws first when each position opens, and calls the network only where something does;
    - "ancestral": a call in every one of the steps;
    - "cached": the same, but a text that has not changed since the last call is not computed again;
    - "first_hitting": one position a step, so as many calls as there are positions to fill; `steps` is not used;
    - "semi_autoregressive": "schedule_first" in a window of `context` positions that moves on by `stride` and keeps
      what is filled as its prompt. Denoiser and energy see the window alone.

    Args:
        denoiser: a `MaskedDenoiser`, a Hugging Face masked language model, or what has the same methods; in evaluation
            mode.
        energy: a `pyquiet.diffusion.Energy`, or a function of (candidates, input_ids, time, log_mu), and of
            attention_mask where it names that; None is plain masked diffusion.
        input_ids: int64 [B, T]; None fills `num_samples` texts of `length` tokens from nothing. No token is special: an
            end of text is drawn and kept like any other.
        mask: bool [B, T], True where a token is to be filled in; what stands there is ignored. None: where input_ids
            holds the mask token.
        attention_mask: [B, T], 0 at padding, on either side; it is neither seen nor filled. Never inferred from ids.
        num_samples: with one text in input_ids, how many times to fill it.
        steps: K, from time 1 to 0 in equal parts.
        candidates: k; 1 corrects nothing.
        window: steps are corrected that begin at a time of at least 1 - window; the others draw plainly. The first step
            always is.
        energy_temperature: tau; 1 is exact, the larger the less is corrected.
        temperature, top_k, top_p, banned: of the candidates, and of plain draws, as in `pyquiet.randomness.draw`;
            banned is bool [V].
        correct: give candidates the weight of mu / proposal besides, so that these options do not change the law that
            is aimed at, but for tokens that are never drawn. False leaves it out.
        mode: "standard"; "reveal_set": candidates differ only where the step opens, the rest being drawn once. Weights
            are then more even, and biased.
        ess_target: where the effective number of candidates is below this, as many are drawn again, and so on up to
            `max_candidates`. log_normalizer is then no unbiased estimate.
        context, stride: of "semi_autoregressive", in tokens; stride None is half of context.
        scheme: of `resample`; for one pick all have the same law.
        order: says what opens, see `pyquiet.diffusion.hooks`: `by_confidence`, `by_threshold`, `left_to_right_blocks`
            or yours. Takes the place of sampler and steps.
        tokens: says what tokens open, in place of the draw or pick.
        remask: says what is masked again: `remdm`, or yours. The sampler is then "ancestral" in its own way.
        seed: of all noise; None takes one number from torch's generator. What a text becomes depends on weights,
            prompt, options, seed and its sequence id alone, but for near ties where logits differ in their last bits.
        sequence_ids: int64 [B], name the noise of each text; None is its number in the batch.
        energy_microbatch: at most so many sequences in one call of the energy.
        on_step: called after each step with its number, the time at which it began and the tokens [B, T] so far.
        progress: show a progress bar.

    >>> from pyquiet import AREnergy, load
    >>> energy = AREnergy(load("tiny-causal")[0])
    >>> filled = diffuse(load("tiny-denoiser")[0], energy, length=12, num_samples=2, steps=4)
    >>> filled.tokens.shape
    torch.Size([2, 12])

    Raises:
        ValueError, TypeError: what is wrong with an argument, by its name and before anything is computed; logits or
            energies that are none (NaN), naming text and position or candidate; what a hook returns.
    """
    began = time.perf_counter()
    denoiser, energy, schedule = as_denoiser(denoiser), read_energy(energy), read_schedule(schedule)
    hooks = {"order": order, "tokens": tokens, "remask": remask, "on_step": on_step}
    check_sampler(sampler, hooks, energy, context, stride)
    check_count("steps", steps, least=1)
    texts = read_texts(denoiser, input_ids, mask, attention_mask, length, num_samples, sequence_ids)
    proposal = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "banned": banned}
    given = Options(
        energy, candidates, window, energy_temperature, proposal, correct, mode, ess_target, max_candidates, scheme,
        resolve_seed(seed), energy_microbatch,
    )  # fmt: skip
    options = read_options(denoiser, given)
    stride = stride or max(1, (context or 1) // 2)
    check_texts(denoiser, energy if options.weighs else None, texts, context, stride)
    # No gradients, and no autocast, which would change the law.
    autocast = torch.autocast(denoiser.device.type, enabled=False)
    with torch.no_grad(), autocast, tqdm(disable=None if progress else True, unit="step", desc="diffuse") as bar:
        session = Session(denoiser, texts, options, schedule, tokens=tokens, on_step=_reporting(bar, on_step))
        if remask is not None:
            session.remasked(remask, order, steps)
        elif order is not None:
            session.ordered(order)
        elif context is not None:
            slide(session, steps, context, stride)
        else:
            plan = _plan(sampler, session, steps)
            bar.total = len(plan)
            session.follow(plan, reuse=sampler == "cached")
    return _result(session, options, began)


def _reporting(bar: Any, on_step: OnStep | None) -> OnStep:
    """What a session calls after each step: moves the bar and hands the step on."""

    def report(step: int, time: float, tokens: Tensor) -> None:
        bar.update()
        if on_step is not None:
            on_step(step, time, tokens)

    return report


def _plan(sampler: str, session: Session, steps: int) -> plans.Plan:
    texts, schedule, seed = session.texts, session.schedule, session.options.seed
    if sampler == "first_hitting":
        return plans.first_hitting(texts, schedule, seed)
    draw = plans.schedule_first if sampler == "schedule_first" else plans.ancestral
    return draw(texts, schedule, steps, seed)


def _result(session: Session, options: Options, began: float) -> Diffusion:
    trace, batch = session.trace(), len(session.masked)
    corrected = trace.corrected
    rows, count = trace.rows[corrected], torch.zeros(batch, dtype=torch.float64)
    count.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
    ess, log_normalizer = (
        torch.zeros(batch, dtype=torch.float64).index_add_(0, rows, x[corrected]) / count
        for x in (trace.ess, trace.log_normalizer)
    )
    empty = ~session.texts.fill.any(1)
    ess = ess.where(~empty, options.candidates) if options.weighs else torch.ones_like(ess)
    degenerate = torch.zeros(batch, dtype=torch.int64)
    degenerate.index_add_(0, rows, (trace.log_normalizer[corrected] == -torch.inf).long())
    if degenerate.any():
        warnings.warn(
            f"in {int(degenerate.sum())} steps of {int((degenerate > 0).sum())} texts the energy made all candidates "
            "impossible, and one was picked uniformly; more candidates, or a softer energy, would help",
            stacklevel=3,
        )
    if session.tokens.is_cuda:
        torch.cuda.synchronize(session.tokens.device)  # the seconds are to be those of all work
    return Diffusion(
        session.tokens,
        session.reveal_step,
        session.denoiser_calls,
        session.energy_passes,
        session.depth,
        ess,
        log_normalizer.where(count > 0, 0.0),
        degenerate,
        session.steps_run,
        trace,
        options.truncates(session.denoiser.vocab_size),
        time.perf_counter() - began,
    )
