"""How `diffuse` goes about its work: whom it calls, with what, how often; its laws are in test_exactness.py."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from pyquiet.diffusion import steps
from pyquiet.diffusion.hooks import by_confidence
from pyquiet.diffusion.likelihood import nll
from pyquiet.diffusion.sampling import diffuse
from pyquiet.diffusion.schedule import Schedule
from pyquiet.kernels.importance_resampling import draw_candidates, resample
from pyquiet.randomness import Purpose, Stream

from ..allocations import allocations
from .networks import MASK, PairEnergy, V, network
from .toys import Product

SAMPLERS = {
    "schedule_first": {"steps": 6},
    "ancestral": {"steps": 6},
    "cached": {"steps": 12},
    "first_hitting": {},
    "semi_autoregressive": {"steps": 4, "context": 6, "stride": 4},
}
LENGTHS = (9, 4, 7, 9, 6)


@pytest.fixture(scope="module", params=["modernbert", "bert"])
def denoiser(request):
    return network(request.param)


def ragged(side):
    """Five texts of several lengths, prompts and gaps: ids and attention mask [5, 9], padding on one side or both."""
    generator = torch.Generator().manual_seed(4)
    ids, real = torch.full((5, 9), 2), torch.zeros(5, 9, dtype=torch.int64)
    for row, n in enumerate(LENGTHS):
        text = torch.randint(8, V, (n,), generator=generator)
        text[torch.rand(n, generator=generator) < 0.7] = MASK
        if row == 3:
            text[:] = 11  # nothing to fill
        start = {"right": 0, "left": 9 - n, "both": (9 - n) // 2}[side]
        ids[row, start : start + n], real[row, start : start + n] = text, 1
    return ids, real


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_five_texts_together_are_five_alone(sampler, side):
    """15.3: candidates laid out text by text; rows of a batch never meet, padding and prompts never change."""
    denoiser, (ids, real) = network(), ragged(side)
    options = {"sampler": sampler, "candidates": 7, "window": 0.8, "seed": 3} | SAMPLERS[sampler]
    names = torch.tensor([4, 90, 2, 33, 5])
    out = diffuse(denoiser, PairEnergy(), input_ids=ids, attention_mask=real, sequence_ids=names, **options)
    fill = (ids == MASK) & (real == 1)
    assert torch.equal(out.tokens[~fill], ids[~fill])
    assert (out.tokens[fill] != MASK).all()
    assert ((out.reveal_step >= 0) == fill).all()
    corrected = 0
    for row in range(5):
        mine = real[row].bool()
        text = ids[row : row + 1, mine]
        alone = diffuse(denoiser, PairEnergy(), input_ids=text, sequence_ids=names[row : row + 1], **options)
        assert torch.equal(alone.tokens[0], out.tokens[row, mine])
        assert torch.equal(alone.reveal_step[0], out.reveal_step[row, mine])
        for counter in ("denoiser_calls", "energy_passes", "depth"):
            assert getattr(alone, counter)[0] == getattr(out, counter)[row]
        for figure in ("ess", "log_normalizer"):
            torch.testing.assert_close(
                getattr(alone, figure)[0], getattr(out, figure)[row], rtol=1e-4, atol=1e-4, equal_nan=True
            )
        entries = out.trace.rows == row
        assert torch.equal(alone.trace.steps, out.trace.steps[entries])
        assert torch.equal(alone.trace.opened, out.trace.opened[entries])
        corrected += int(out.trace.corrected[entries].sum())
    assert corrected > 5


@pytest.mark.parametrize("sampler", ["schedule_first", "semi_autoregressive"])
def test_a_function_that_reads_the_attention_mask_is_no_worse_than_an_energy(sampler):
    """Padding may hold anything; of a function that is told where it is, it has no say."""
    (ids, real), pairs = ragged("left"), PairEnergy()
    function = lambda c, x, t, m, attention_mask: pairs(c, x, t, m, attention_mask=attention_mask)  # noqa: E731
    options = {"attention_mask": real, "sampler": sampler, "candidates": 5} | SAMPLERS[sampler]
    found = [diffuse(network(), function, input_ids=ids.masked_fill(real == 0, pad), **options) for pad in (2, 9)]
    fill = (ids == MASK) & (real == 1)
    assert torch.equal(found[0].tokens[fill], found[1].tokens[fill])
    assert torch.equal(found[0].tokens, diffuse(network(), PairEnergy(), input_ids=ids, **options).tokens)


def test_texts_in_another_order_are_the_same_texts(denoiser):
    ids, real = ragged("left")
    order, names = torch.tensor([3, 0, 4, 2, 1]), torch.arange(5)
    options = {"steps": 5, "candidates": 4, "seed": 1}
    out = diffuse(denoiser, PairEnergy(), input_ids=ids, attention_mask=real, **options)
    shuffled = diffuse(
        denoiser, PairEnergy(), input_ids=ids[order], attention_mask=real[order], sequence_ids=names[order], **options
    )
    assert torch.equal(shuffled.tokens, out.tokens[order])
    again = diffuse(denoiser, PairEnergy(), input_ids=ids, attention_mask=real, **options | {"seed": 2})
    assert not torch.equal(again.tokens, out.tokens)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plain_diffusion_and_one_candidate_are_one(denoiser, sampler):
    ids, real = ragged("right")
    options = {"input_ids": ids, "attention_mask": real, "sampler": sampler, "seed": 1} | SAMPLERS[sampler]
    energy = PairEnergy()
    plain, one = diffuse(denoiser, **options), diffuse(denoiser, energy, candidates=1, **options)
    assert torch.equal(plain.tokens, one.tokens)
    assert energy.calls == []
    for out in (plain, one):
        assert (out.energy_passes == 0).all()
        assert (out.ess == 1).all()
        assert (out.log_normalizer == 0).all()
        assert torch.equal(out.depth, out.denoiser_calls)
        assert not out.trace.corrected.any()


def test_masked_positions_are_not_looked_at(denoiser):
    ids, _ = ragged("right")
    mask = ids == MASK
    mask[3, 2:5] = True  # a token that is there is replaced
    options = {"steps": 4, "candidates": 3, "seed": 1}
    out = diffuse(denoiser, PairEnergy(), input_ids=ids, mask=mask, **options)
    garbage = diffuse(denoiser, PairEnergy(), input_ids=ids.masked_fill(mask, -100), mask=mask, **options)
    assert torch.equal(garbage.tokens, out.tokens)
    assert torch.equal(out.tokens[~mask], ids[~mask])
    assert not (out.tokens[3, 2:5] == 11).all()
    assert torch.equal(ids[3], torch.full((9,), 11))  # the caller's stay


def test_padding_is_not_filled_whatever_stands_there():
    ids, real = ragged("both")
    options = {"attention_mask": real, "steps": 3, "candidates": 3, "seed": 1}
    expected = diffuse(network(), PairEnergy(), input_ids=ids, **options).tokens
    masks = ids.masked_fill(real == 0, MASK)
    for padded, mask in ((masks, None), (masks, masks == MASK), (ids, (ids == MASK) | (real == 0))):
        out = diffuse(network(), PairEnergy(), input_ids=padded, mask=mask, **options)
        assert torch.equal(out.tokens, torch.where(real == 1, expected, padded))
        assert (out.reveal_step[real == 0] == -1).all()


# -- calls and rows


def test_a_network_that_looks_at_its_input_gives_the_same_from_the_cache(denoiser):
    ids, real = ragged("left")
    options = {"input_ids": ids, "attention_mask": real, "steps": 20, "candidates": 5, "seed": 2}
    uncached, cached = (diffuse(denoiser, PairEnergy(), sampler=name, **options) for name in ("ancestral", "cached"))
    assert torch.equal(uncached.tokens, cached.tokens)
    assert (uncached.denoiser_calls == torch.tensor([20, 20, 20, 0, 20])).all()
    assert (cached.denoiser_calls < 12).all()
    assert torch.equal(uncached.energy_passes, cached.energy_passes)


@pytest.mark.parametrize("energy", [None, lambda c, x, t, m: torch.zeros(m.shape)], ids=["plain", "corrected"])
def test_rows_that_pass_the_head(energy):
    """A plain step: the rows that open. A corrected one: all that are masked. Never a given one."""
    denoiser = Product(torch.rand(12, 4, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1).exp())
    ids = torch.full((6, 12), denoiser.mask_id)
    ids[:, :3], ids[5] = 0, 0
    denoiser.rows = 0
    out = diffuse(denoiser, energy, input_ids=ids, steps=5, candidates=3, seed=1)
    rows = sum(
        int((out.reveal_step[row] >= step).sum()) for row, step in zip(out.trace.rows, out.trace.steps, strict=True)
    )
    assert denoiser.rows == (5 * 9 if energy is None else rows)
    assert int(out.trace.opened.sum()) == 5 * 9
    assert rows > 5 * 9


def test_nothing_to_fill_calls_nobody():
    denoiser, energy = Product(), PairEnergy()
    for sampler, options in SAMPLERS.items():
        out = diffuse(denoiser, energy, input_ids=torch.tensor([[0, 2, 3]]), sampler=sampler, candidates=5, **options)
        assert out.tokens.tolist() == [[0, 2, 3]]
        assert denoiser.calls == denoiser.rows == len(energy.calls) == out.steps_run == 0
        assert (out.ess == 5).all()
        assert (out.log_normalizer == 0).all()


# -- corrected steps


def test_random_numbers_are_at_their_addresses():
    """Candidates at (text's id, place, step, number), the pick at (text's id, step)."""
    denoiser, energy, names = network(), PairEnergy(), torch.tensor([9, 2**31])
    ids = torch.full((2, 8), MASK)
    real = torch.ones(2, 8, dtype=torch.int64)
    ids[:, 3], ids[1, :2], real[1, :2] = 11, 0, 0
    options = {"attention_mask": real, "sequence_ids": names, "steps": 4, "candidates": 5, "seed": 6}
    out = diffuse(denoiser, energy, input_ids=ids, **options)
    rows = out.trace.rows.split([len(given) for _, given, *_ in energy.calls])
    for (candidates, given, *told), row, step in zip(
        list(energy.calls), rows, out.trace.steps.unique().tolist(), strict=True
    ):
        hidden = real[row] == 0
        masked = (given == MASK) & ~hidden
        with torch.no_grad():
            logits = denoiser.head(denoiser.hidden(given, None if not hidden.any() else real[row])[masked])
        text, column = masked.nonzero(as_tuple=True)
        places = column - 2 * row[text]
        stream = Stream(6, Purpose.CANDIDATE, names[row][text], places, step)
        drawn = draw_candidates(logits, 5, stream=stream)
        assert torch.equal(candidates.transpose(1, 2)[masked], drawn.tokens)
        log_weights = -energy(candidates, given, *told, attention_mask=real[row]).double()
        pick = resample(log_weights, stream=Stream(6, Purpose.RESAMPLE, names[row], step=step)).indices[:, 0]
        opened = out.reveal_step[row] == step
        assert torch.equal(out.tokens[row][opened], candidates[torch.arange(len(row)), pick][opened])


@pytest.mark.parametrize(
    ("window", "steps", "times"),
    [
        (1.0, 4, [1, 0.75, 0.5, 0.25]),
        (0.0, 4, [1]),
        (0.2, 10, [1, 0.9, 0.8]),
        (0.3, 10, [1, 0.9, 0.8, 0.7]),
        (0.29, 10, [1, 0.9, 0.8]),
        (0.6, 5, [1, 0.8, 0.6, 0.4]),
        (0.45, 20, [1 - 0.05 * step for step in range(10)]),  # 1 - 0.45 is rounded up
    ],
)
def test_the_window_is_open_where_a_step_begins_in_it(window, steps, times):
    energy = PairEnergy()
    out = diffuse(network(), energy, length=12, num_samples=20, steps=steps, window=window, candidates=3, seed=1)
    seen = torch.cat([time for _, _, time, _ in energy.calls]).unique().flip(0)
    torch.testing.assert_close(seen, torch.tensor(times, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (out.trace.corrected == (out.trace.times >= times[-1] - 1e-9)).all()
    assert int(out.energy_passes.sum()) == 3 * int(out.trace.corrected.sum())
    assert torch.equal(out.depth - out.denoiser_calls, out.energy_passes // 3)


def test_a_window_that_was_never_open_leaves_no_figure():
    options = {"length": 1, "num_samples": 40, "steps": 40, "window": 0.0, "seed": 0}
    out = diffuse(network(), PairEnergy(), **options)
    late = (out.reveal_step > 0)[:, 0]
    assert late.any()
    assert out.ess[late].isnan().all()
    assert (out.log_normalizer[late] == 0).all()


def test_the_energy_is_called_with_texts_and_their_candidates(denoiser):
    ids, real = ragged("left")
    energy = PairEnergy()
    diffuse(denoiser, energy, input_ids=ids, attention_mask=real, steps=3, candidates=6, seed=1)
    for candidates, given, time, log_mu in energy.calls:
        b = len(given)
        assert candidates.shape == (b, 6, 9)
        assert candidates.dtype == given.dtype == torch.int64
        assert (time.dtype, time.shape) == (torch.float64, (b,))
        assert (log_mu.dtype, log_mu.shape) == (torch.float32, (b, 6))
    candidates, given, _, log_mu = energy.calls[0]
    shown = next(row for row in range(5) if (ids[row] == given[0]).all())
    masked = given[0] == MASK
    with torch.no_grad():
        log_probs = denoiser.log_probs(given[:1], real[shown : shown + 1])
    expected = log_probs[:, candidates[0, :, masked]].diagonal(dim1=0, dim2=2).sum(1)
    torch.testing.assert_close(log_mu[0], expected, rtol=1e-4, atol=1e-4)


def test_the_pick_is_used_in_the_step_that_made_it():
    """15.2: of one step, the whole text is one of the candidates; with a strong energy the best of them."""
    energy = PairEnergy(scale=50.0)
    out = diffuse(network(), energy, length=6, num_samples=8, steps=1, candidates=16, seed=1)
    ((candidates, *_),) = energy.calls
    best = energy(candidates, torch.full((8, 6), MASK), torch.ones(8), torch.zeros(8, 16)).argmin(1)
    assert torch.equal(out.tokens, candidates[torch.arange(8), best])
    assert (best > 0).any()


def test_a_low_energy_is_good():
    """15.1: softmax of -E; the released sign would write what the energy is against."""
    of = {}
    for sign in (1, -1):
        energy = PairEnergy(scale=0.5)
        energy.table *= sign
        tokens = diffuse(network(), energy, length=10, num_samples=60, steps=4, candidates=8, seed=1).tokens
        of[sign] = sign * energy.of(tokens)
    plain = PairEnergy(scale=0.5).of(diffuse(network(), length=10, num_samples=60, steps=4, seed=1).tokens)
    assert of[1].mean() + 1 < plain.mean() < of[-1].mean() - 1


def test_the_released_layout_mixes_rows_and_ours_does_not():
    """15.3: texts repeated as j B + b and read as [B, k] are those of other texts; the energy here sees it."""
    ids = torch.randint(8, V, (3, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 2:4] = MASK
    energy = PairEnergy()
    diffuse(network(), energy, input_ids=ids, steps=1, candidates=4, seed=1)
    (candidates, given, time, log_mu) = energy.calls[0]
    released = candidates.transpose(0, 1).reshape(candidates.shape)
    with pytest.raises(AssertionError, match="mixed"):
        energy(released, given, time, log_mu)


@pytest.mark.parametrize("microbatch", [1, 3, 5, 12, 1000])
@pytest.mark.parametrize("mode", ["standard", "reveal_set"])
def test_energies_come_in_portions_and_are_the_same(microbatch, mode):
    ids, real = ragged("right")
    options = {"input_ids": ids, "attention_mask": real, "steps": 3, "candidates": 5, "mode": mode, "seed": 1}
    whole, parts = PairEnergy(), PairEnergy()
    expected = diffuse(network(), whole, **options)
    out = diffuse(network(), parts, energy_microbatch=microbatch, **options)
    assert torch.equal(out.tokens, expected.tokens)
    assert torch.equal(out.energy_passes, expected.energy_passes)
    assert max(candidates[:, :, 0].numel() for candidates, *_ in parts.calls) <= microbatch
    assert sum(candidates[:, :, 0].numel() for candidates, *_ in parts.calls) == int(expected.energy_passes.sum())


def test_candidates_of_a_reveal_set_differ_where_the_step_opens():
    ids, real = ragged("left")
    energy = PairEnergy()
    out = diffuse(network(), energy, input_ids=ids, attention_mask=real, steps=3, candidates=12, mode="reveal_set")
    varied = 0
    for candidates, given, time, _ in energy.calls:
        step = round(3 * (1 - float(time[0])))
        rows = out.trace.rows[out.trace.steps == step]
        opened = out.reveal_step[rows] == step
        alike = (candidates == candidates[:, :1]).all(1)
        assert alike[~opened].all()
        varied += int((~alike[opened]).sum())
        assert ((given == MASK) >= opened).all()
    assert varied > 10


# -- more candidates where they are needed


def test_candidates_are_doubled_until_they_are_enough():
    options = {"length": 8, "num_samples": 30, "steps": 4, "seed": 1}
    energy = PairEnergy(scale=0.7)
    out = diffuse(network(), energy, candidates=3, ess_target=4.0, max_candidates=20, **options)
    trace = out.trace
    assert set(trace.candidates.tolist()) == {6, 12, 20}
    enough = trace.ess >= 4
    assert (enough | (trace.candidates == 20)).all()
    assert enough.any()
    assert int(out.energy_passes.sum()) == int(trace.candidates.sum())
    assert int(out.energy_passes.sum()) == sum(log_mu.numel() for *_, log_mu in energy.calls)
    rounds = torch.tensor([{3: 1, 6: 2, 12: 3, 20: 4}[k] for k in trace.candidates.tolist()])
    assert int((out.depth - out.denoiser_calls).sum()) == int(rounds.sum())


def test_candidates_drawn_later_are_those_drawn_at_once():
    options = {"length": 8, "num_samples": 30, "steps": 4, "seed": 1}
    for mode in ("standard", "reveal_set"):
        at_once = diffuse(network(), PairEnergy(), candidates=12, mode=mode, **options)
        later = diffuse(network(), PairEnergy(), candidates=3, ess_target=12.0, max_candidates=12, mode=mode, **options)
        assert torch.equal(later.tokens, at_once.tokens)
        torch.testing.assert_close(later.ess, at_once.ess)
        torch.testing.assert_close(later.log_normalizer, at_once.log_normalizer)
        assert torch.equal(later.energy_passes, at_once.energy_passes)


def test_the_impossible_is_looked_for_further():
    """All candidates impossible: more are drawn where there may be more, else the pick is uniform, and it is said."""

    def energy(candidates, input_ids, time, log_mu):
        return torch.where(candidates[..., 0] == 12, 0.0, torch.inf)

    denoiser = Product(torch.full((3, 22), 1 / 22).double(), mask_id=MASK)
    options = {"length": 3, "num_samples": 200, "steps": 1, "seed": 1}
    with pytest.warns(UserWarning, match="impossible"):
        few = diffuse(denoiser, energy, candidates=4, **options)
    hit = few.tokens[:, 0] == 12
    assert torch.equal(few.degenerate, (~hit).long())
    assert (few.log_normalizer[~hit] == -torch.inf).all()
    assert 0.05 < hit.double().mean() < 0.35
    first = few.tokens[~hit, 1]  # still a fair draw of the denoiser
    assert len(first.unique()) == 22
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = diffuse(denoiser, energy, candidates=4, ess_target=1.0, max_candidates=1024, **options)
    assert (more.tokens[:, 0] == 12).all()
    assert (more.degenerate == 0).all()


def test_energies_that_are_none_are_named(denoiser):
    ids = torch.full((4, 5), MASK)
    ids[1] = 9

    def broken(value, row, candidate):
        def energy(candidates, input_ids, time, log_mu):
            return torch.zeros(log_mu.shape).index_put_(
                (torch.tensor(row), torch.tensor(candidate)), torch.tensor(value)
            )

        return energy

    for value in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"energy gave .* for text 3, candidate 5"):
            diffuse(denoiser, broken(value, 2, 5), input_ids=ids, steps=1, candidates=6)
        options = {"candidates": 6, "ess_target": 12.0, "max_candidates": 12}
        with pytest.raises(ValueError, match=r"energy gave .* for text 3, candidate 7"):
            diffuse(denoiser, _later(broken(value, 2, 1)), input_ids=ids, steps=1, **options)
    with pytest.raises(ValueError, match="energy must return"):
        diffuse(denoiser, lambda c, x, t, m: m[0], input_ids=ids)


def _later(energy):
    """Zeros at first, then what the energy says."""
    calls = []

    def both(candidates, input_ids, time, log_mu):
        calls.append(0)
        return torch.zeros(log_mu.shape) if len(calls) == 1 else energy(candidates, input_ids, time, log_mu)

    return both


def test_a_broken_denoiser_is_named():
    ids = torch.full((3, 4), MASK)
    ids[0] = 9
    broken = network()
    head = broken.head
    broken.head = lambda rows: head(rows).index_fill_(0, torch.tensor([5]), math.nan)
    with pytest.raises(ValueError, match="text 2 has no law at 1"):
        diffuse(broken, PairEnergy(), input_ids=ids, steps=1)


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (lambda rows: torch.zeros(len(rows), V), f"its head must return -inf for the mask token {MASK}"),
        (lambda rows: torch.zeros(len(rows), V + 1), rf"must return logits \[R, V\] = \[4, {V}\], got \[4, {V + 1}\]"),
        (lambda rows: torch.zeros(1, V), rf"= \[4, {V}\], got \[1, {V}\]"),
    ],
)
def test_a_head_that_would_draw_what_is_no_token_is_named(head, named):
    broken = network()
    broken.head = head
    with pytest.raises(ValueError, match=named):
        diffuse(broken, length=4, steps=1)
    with pytest.raises(ValueError, match=named):
        nll(broken, torch.full((1, 4), 9), kind="K_step", steps=1)


def test_an_energy_may_write_into_what_it_gets(denoiser):
    """Padding set to 0, say: texts are the sampler's own."""
    ids, real = ragged("both")

    def careless(candidates, input_ids, time, log_mu, spoil=True):
        energies = log_mu + (candidates % 3).sum(-1)
        for x in (candidates, input_ids, time, log_mu) if spoil else ():
            x.fill_(0)
        return energies

    options = {"input_ids": ids, "attention_mask": real, "steps": 4, "temperature": 0.7, "mode": "reveal_set"}
    careful = diffuse(denoiser, lambda *given: careless(*given, spoil=False), **options)
    assert torch.equal(diffuse(denoiser, careless, **options).tokens, careful.tokens)


# -- proposals


def test_what_the_proposal_leaves_out_is_said_and_kept():
    banned = torch.zeros(V, dtype=torch.bool)
    banned[[0, 9]] = True
    options = {"length": 8, "num_samples": 10, "steps": 3, "seed": 1}
    out = diffuse(network(), PairEnergy(), banned=banned, **options)
    assert not torch.isin(out.tokens, torch.tensor([0, 9, MASK])).any()
    assert out.support_truncated
    for truncating in ({"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        assert diffuse(network(), PairEnergy(), **options, **truncating).support_truncated
    for whole in ({}, {"temperature": 0.7}, {"top_p": 1.0}, {"top_k": V}, {"banned": torch.zeros(V, dtype=torch.bool)}):
        assert not diffuse(network(), PairEnergy(), **options, **whole).support_truncated


def test_log_mu_is_of_the_denoiser_and_the_weights_make_up_for_the_proposal():
    energy = PairEnergy(scale=0.0)
    options = {"length": 6, "num_samples": 4, "steps": 1, "candidates": 400, "temperature": 3.0, "seed": 1}
    out = diffuse(network(), energy, **options)
    ((candidates, given, _, log_mu),) = energy.calls
    with torch.no_grad():
        log_probs = network().log_probs(given[:1])
    expected = log_probs[torch.arange(6)[:, None], candidates.transpose(1, 2)].sum(1)
    torch.testing.assert_close(log_mu, expected, rtol=1e-4, atol=1e-3)
    cooled = (log_probs / 3.0).log_softmax(-1)
    log_q = cooled[torch.arange(6)[:, None], candidates.transpose(1, 2)].sum(1)
    lw = (log_mu - log_q).double()
    torch.testing.assert_close(out.ess, (2 * lw.logsumexp(1) - (2 * lw).logsumexp(1)).exp(), rtol=1e-3, atol=0)
    assert (diffuse(network(), energy, correct=False, **options).ess > 399).all()
    assert (out.ess < 350).all()


# -- windows, samples, callbacks


def test_windows_slide_over_a_text():
    denoiser, widths = network(), []
    hidden = denoiser.hidden
    denoiser.hidden = lambda ids, mask=None: widths.append(ids.shape[1]) or hidden(ids, mask)
    ids = torch.full((2, 20), MASK)
    ids[:, 0] = 3
    options = {"steps": 5, "candidates": 4, "seed": 1, "sampler": "semi_autoregressive"}
    out = diffuse(denoiser, PairEnergy(), input_ids=ids, context=8, stride=3, **options)
    assert max(widths) == 8
    window = out.reveal_step // 5  # steps are numbered on through the windows
    assert (window[:, 1:8] == 0).all()
    assert torch.equal(window[:, 8:], ((torch.arange(8, 20) - 8) // 3 + 1).expand(2, -1))
    assert (out.tokens != MASK).all()
    # Of one window it is the sampler inside.
    short = diffuse(denoiser, PairEnergy(), input_ids=ids[:, :8], context=8, **options)
    inside = diffuse(denoiser, PairEnergy(), input_ids=ids[:, :8], **options | {"sampler": "schedule_first"})
    assert torch.equal(short.tokens, inside.tokens)
    assert torch.equal(out.tokens[:, :8], inside.tokens)
    # What is filled is the prompt of what follows.
    follows = ids.clone()
    follows[:, :8] = out.tokens[:, :8]
    again = diffuse(denoiser, PairEnergy(), input_ids=follows, context=8, stride=3, **options)
    assert torch.equal(again.tokens, out.tokens)
    follows[:, 4:8] = 12
    other = diffuse(denoiser, PairEnergy(), input_ids=follows, context=8, stride=3, **options)
    assert not torch.equal(other.tokens[:, 8:], out.tokens[:, 8:])


def test_samples_of_one_text_and_of_none():
    denoiser = network()
    prompt = torch.tensor([[9, 10, MASK, MASK, MASK, 12]])
    options = {"steps": 4, "candidates": 3, "seed": 1}
    several = diffuse(denoiser, PairEnergy(), input_ids=prompt, num_samples=6, **options).tokens
    repeated = diffuse(denoiser, PairEnergy(), input_ids=prompt.repeat(6, 1), **options).tokens
    assert torch.equal(several, repeated)
    assert len(several.unique(dim=0)) > 3
    assert (several[:, [0, 1, 5]] == torch.tensor([9, 10, 12])).all()
    fresh = diffuse(denoiser, PairEnergy(), length=6, num_samples=6, **options).tokens
    assert torch.equal(fresh, diffuse(denoiser, PairEnergy(), input_ids=torch.full((6, 6), MASK), **options).tokens)
    ids = torch.tensor([70, 3, 5, 6, 2**32 - 1, 0])
    named = diffuse(denoiser, PairEnergy(), length=6, num_samples=6, sequence_ids=ids, **options).tokens
    assert torch.equal(named[5], fresh[0])
    assert torch.equal(named[1], fresh[3])
    torch.manual_seed(0)
    first, second = (diffuse(denoiser, length=6, steps=4, seed=None).tokens for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, diffuse(denoiser, length=6, steps=4, seed=None).tokens)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_callback_sees_the_text_fill_in(sampler):
    seen = []
    ids, real = ragged("left")
    options = {"input_ids": ids, "attention_mask": real, "sampler": sampler, "seed": 2, "progress": True}
    out = diffuse(
        network(), PairEnergy(), on_step=lambda *told: seen.append(told), **options | SAMPLERS[sampler]
    )  # fmt: skip
    assert len(seen) == out.steps_run
    fill, left = (ids == MASK) & real.bool(), None
    for step, time, tokens in seen:
        assert 0 < time <= 1
        assert (((tokens != MASK) & fill) <= ((out.reveal_step <= step) & fill)).all()
        assert torch.equal(tokens[~fill], ids[~fill])
        left = tokens[fill] == MASK
    assert not left.any()
    assert torch.equal(seen[-1][2], out.tokens)
    assert [told[0] for told in seen] == sorted(told[0] for told in seen)


def test_neither_gradients_nor_autocast_nor_training_reach_it():
    denoiser, energy = network(), PairEnergy()
    options = {"length": 6, "num_samples": 3, "steps": 3, "seed": 1}
    clean = diffuse(denoiser, energy, **options)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = diffuse(denoiser, energy, **options)
    assert torch.equal(mixed.tokens, clean.tokens)
    assert torch.equal(mixed.ess, clean.ess)
    assert not clean.ess.requires_grad
    denoiser.model.train()
    with pytest.raises(ValueError, match="training mode"):
        diffuse(denoiser, **options)
    denoiser.eval()
    with pytest.raises(ValueError, match="energy is in training mode"):
        diffuse(denoiser, torch.nn.Linear(3, 3), **options)


def test_other_schedules_and_generators_of_models():
    model = network().model
    out = diffuse(model, length=6, steps=3, seed=1, schedule=Schedule("cosine"))
    assert torch.equal(out.tokens, diffuse(network(), length=6, steps=3, seed=1, schedule=Schedule("cosine")).tokens)
    assert out.seconds > 0


@pytest.mark.parametrize("order", [None, by_confidence(2)], ids=["plain", "after a hook's look"])
@pytest.mark.parametrize("chunk", [3 * V, 1 << 22], ids=["portions", "whole"])
def test_half_precision_is_not_widened_to_be_drawn_from(order, chunk, monkeypatch):
    """A copy of the logits in float32 is made for who computes with them alone; the texts are the same."""
    denoiser = network()
    denoiser.model.bfloat16()
    options = {"length": 6, "num_samples": 3, "steps": 3, "candidates": 4, "order": order, "seed": 2}
    names = ("mask_id", "vocab_size", "device", "training", "hidden", "head")
    expected = diffuse(SimpleNamespace(**{name: getattr(denoiser, name) for name in names}), PairEnergy(), **options)
    dtypes = set()
    monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", chunk)
    monkeypatch.setattr(
        steps, "draw_candidates", lambda logits, *a, **k: dtypes.add(logits.dtype) or draw_candidates(logits, *a, **k)
    )
    found = diffuse(denoiser, PairEnergy(), **options)
    assert torch.equal(found.tokens, expected.tokens)
    # What a hook has looked at, all in one portion, is drawn from as it is.
    assert dtypes == {torch.float32 if order and chunk > 3 * V else torch.bfloat16}


def test_no_tensor_of_all_candidates_over_the_vocabulary():
    """13: the logits once, and never k of them."""
    words, length, k = 20_000, 200, 16
    weight = torch.randn(8, words, generator=torch.Generator().manual_seed(0))

    class Wide(Product):
        def hidden(self, input_ids, attention_mask=None):
            return torch.ones(*input_ids.shape, 8)

        def head(self, rows):
            return (rows @ weight).index_fill_(1, torch.tensor([5]), -torch.inf)

    denoiser = Wide(mask_id=5)
    denoiser.vocab_size = words
    peak, _ = allocations(
        lambda: diffuse(denoiser, lambda c, x, t, m: torch.zeros(m.shape), length=length, steps=1, candidates=k)
    )
    logits = 4 * length * words
    assert logits < peak < 4 * logits
