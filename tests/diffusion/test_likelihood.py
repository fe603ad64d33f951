"""What texts cost: exactly, with draws that are all completions, and with draws by chance."""

from __future__ import annotations

import functools
import itertools
import math
import re
import warnings

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyquiet.diffusion import likelihood
from pyquiet.diffusion.ar_energy import AREnergy
from pyquiet.diffusion.energy import Energy
from pyquiet.diffusion.inputs import read_texts
from pyquiet.diffusion.likelihood import StepCosts, nll
from pyquiet.diffusion.modeling import MaskedDenoiser
from pyquiet.diffusion.nce_energy import NCEEnergy
from pyquiet.diffusion.schedule import Schedule
from pyquiet.evaluation.estimates import Estimate
from pyquiet.kernels.importance_resampling import Candidates

from .networks import network
from .toys import SOURCE, ExactMarginals, LawEnergy, Product, ids_of

MASK, T, S = 1, 3, 3
SYMBOLS = torch.cartesian_prod(*[torch.arange(S)] * T)  # [27, T], all texts
TEXTS = ids_of(SYMBOLS, MASK)
LAW = SOURCE.flatten()
ENTROPY = -float((LAW * LAW.log()).sum())
SHARES = torch.tensor([[1, 2, 1], [1, 1, 2], [2, 1, 1]])  # quarters: a law is what four equal atoms say
ATOMS = torch.stack([torch.arange(S).repeat_interleave(row) for row in SHARES])
SUBSETS = [torch.tensor(bits).bool() for bits in itertools.product((0, 1), repeat=T)]


class InDouble:
    def head(self, rows: Tensor) -> Tensor:
        wide = rows.new_full((len(rows), self.vocab_size), -torch.inf)
        wide[:, ids_of(torch.arange(S), self.mask_id)] = rows
        return wide


class Quarters(InDouble, Product):
    """A denoiser that looks at nothing, in float64."""

    def __init__(self) -> None:
        super().__init__(SHARES.double() / 4, MASK)


class Posterior(Energy):
    """`LawEnergy` in float64."""

    needs_log_mu = time_free = True

    def __init__(self, carry_over: bool = False) -> None:
        self.self_normalized = self.carry_over = carry_over
        sums = [SOURCE.sum((1, 2)), SOURCE.sum(2), SOURCE]
        self.factors = [sums[0].log(), (sums[1] / sums[0][:, None]).log(), (sums[2] / sums[1][..., None]).log()]

    def __call__(self, candidates, input_ids, time, log_mu, *, attention_mask=None):
        x = (candidates - (candidates > MASK).long()).unbind(-1)
        each = torch.stack([self.factors[i][x[: i + 1]] for i in range(T)], -1)
        return log_mu - (each.where((input_ids == MASK)[:, None], 0.0) if self.carry_over else each).sum(-1)


def weight(masked: Tensor) -> float:
    """The integral over time of the NELBO's weight, times the probability of these masks: Beta(n, T - n + 1)."""
    n = int(masked.sum())
    return math.factorial(n - 1) * math.factorial(T - n) / math.factorial(T)


@pytest.fixture
def all_completions(monkeypatch):
    """In the place of draws: each completion of the atoms once, 4^n of them, which is what many draws tend to."""

    def enumerate_completions(logits, k, *, stream, **_):
        n = len(logits)
        assert k == 4**n
        digits = torch.cartesian_prod(*[torch.arange(4)] * n).view(-1, n).T  # [n, 4^n]
        tokens = ids_of(ATOMS[stream.position[:, None].expand_as(digits), digits], MASK)
        log_base = logits.log_softmax(-1).gather(-1, tokens)
        return Candidates(tokens, log_base, log_base, logits.logsumexp(-1))

    monkeypatch.setattr("pyquiet.diffusion.steps.draw_candidates", enumerate_completions)


class Means(StepCosts):
    """With the means of all completions there is no bias to take down."""

    def _sides(self, state, tokens, log_base):
        return super()._sides(state, tokens, log_base)[:1].expand(3, -1)


def exact_cost(energy: Energy | None, masked: Tensor, opened: Tensor) -> Tensor:
    """E[-log p(what opens | what is observed)] over the source, by all completions; []."""
    n, time = 4 ** int(masked.sum()), torch.full((1,), 0.5, dtype=torch.float64)
    texts = read_texts(Quarters(), TEXTS, torch.ones_like(TEXTS).bool(), None, None, 1, None)
    costs = Means(Quarters(), energy, texts, TEXTS, n, seed=0)
    return LAW @ torch.cat([costs(0, time, torch.tensor([b]), masked[None], opened[None]) for b in range(27)], 1)[1]


def by_masks(energy: Energy | None, kind: str) -> float:
    total = 0.0
    for masked in SUBSETS[1:]:
        parts = [masked] if kind == "joint" else [torch.arange(T) == i for i in masked.nonzero()[:, 0]]
        total += weight(masked) * sum(float(exact_cost(energy, masked, opened)) for opened in parts)
    return total


def by_steps(energy: Energy | None, K: int) -> float:
    """The NELBO of K linear steps: all that may be masked when a step begins, and open in it."""
    total, cost = 0.0, functools.cache(lambda *bits: float(exact_cost(energy, *map(torch.tensor, bits))))
    for step in range(K):
        open_before, now = step / K, 1 / K
        for masked in SUBSETS[1:]:
            for opened in SUBSETS[1:]:
                if bool((opened & ~masked).any()):
                    continue
                chance = 1.0
                for i in range(T):
                    chance *= now if opened[i] else (1 - open_before - now if masked[i] else open_before)
                if chance > 0:
                    total += chance * cost(tuple(masked.tolist()), tuple(opened.tolist()))
    return total


def test_the_marginal_cost_of_the_posterior_is_the_entropy(all_completions):
    assert by_masks(Posterior(), "marginal") == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_so_is_that_of_any_number_of_steps(all_completions, K):
    assert by_steps(Posterior(), K) == pytest.approx(ENTROPY, abs=1e-9)


def test_the_joint_cost_is_no_bound(all_completions):
    """What the released evaluation computes with the posterior itself is less than the entropy."""
    found = by_masks(Posterior(), "joint")
    assert found == pytest.approx(2.199, abs=5e-4)
    assert found < ENTROPY - 0.3
    assert pytest.approx(2.547, abs=5e-4) == ENTROPY


def test_the_joint_cost_with_carry_over_is_the_causal_models_nll(all_completions):
    """By linearity, so it says nothing of the sampler, whose own cost is higher."""
    assert by_masks(Posterior(carry_over=True), "joint") == pytest.approx(ENTROPY, abs=1e-9)
    assert by_masks(Posterior(carry_over=True), "marginal") == pytest.approx(2.853, abs=5e-4)


def test_without_an_energy_steps_cost_more_than_one_at_a_time(all_completions):
    """A product law costs the same in any order: its cross-entropy."""
    cross = -float(LAW @ (SHARES / 4).double().log()[torch.arange(T), SYMBOLS].sum(1))
    for found in (by_masks(None, "marginal"), by_masks(None, "joint"), by_steps(None, 2)):
        assert found == pytest.approx(cross, abs=1e-9)


def table(energy: Energy | None, kind: str) -> Tensor:
    """The cost of each text, [27], of mask noise; by sums over the law, or the denoiser's exact marginals."""
    cost = torch.zeros(27, dtype=torch.float64)
    for masked in SUBSETS[1:]:
        agree = (SYMBOLS[:, None, ~masked] == SYMBOLS[:, ~masked]).all(-1).double()  # [27, 27]
        posterior = agree * LAW / (agree @ LAW)[:, None]  # [text, completion]
        each = [(posterior * (SYMBOLS[:, None, i] == SYMBOLS[:, i])).sum(1).log() for i in masked.nonzero()[:, 0]]
        joint = posterior.diagonal().log() if energy is not None else torch.stack(each).sum(0)
        cost -= weight(masked) * (joint if kind == "joint_paper" else torch.stack(each).sum(0))
    return cost


@pytest.mark.parametrize("kind", ["marginal", "joint_paper"])
@pytest.mark.parametrize("with_energy", [False, True])
def test_draws_by_chance_give_the_expected_cost(kind, with_energy):
    copies = 400
    texts = TEXTS.repeat(copies, 1)
    energy = LawEnergy(SOURCE, MASK) if with_energy else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = nll(ExactMarginals(SOURCE, MASK), texts, energy, kind=kind, n=48, seed=3)
    each = found.nats.view(copies, 27) @ LAW
    error = float(each.std()) / copies**0.5
    expected = float(LAW @ table(energy, kind))
    assert abs(float(each.mean()) - expected) < 4 * error + 0.004  # what the jackknife leaves
    assert error < 0.02
    if kind == "joint_paper":  # the two kinds are told apart by this
        assert float(each.mean()) < ENTROPY - 0.3 or not with_energy
    assert (found.tokens == T).all()
    lower, upper = (x.view(copies, 27) @ LAW for x in (found.lower, found.upper))
    assert bool(((lower <= each + 1e-9) & (each <= upper + 1e-9)).all())
    assert (float((upper - lower).mean()) > 0.01) == with_energy


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_by_chance_cost_what_they_cost_exactly(steps, all_completions, monkeypatch):
    expected = {e: by_steps(None if e is None else Posterior(), steps) for e in (None, "posterior")}
    monkeypatch.undo()
    copies = 100
    texts = TEXTS.repeat(copies, 1)
    for name, energy in ((None, None), ("posterior", LawEnergy(SOURCE, MASK))):
        found = nll(Quarters(), texts, energy, kind="K_step", n=64, steps=steps, seed=1)
        each = found.nats.view(copies, 27) @ LAW
        error = float(each.std()) / copies**0.5
        assert abs(float(each.mean()) - expected[name]) < 4 * error + 0.01
        assert bool((found.denoiser_calls <= min(steps, T)).all())
        assert (found.energy_passes > 0).all() == (name is not None)


def test_one_step_is_the_exact_joint_cost_whatever_the_noise():
    energy = LawEnergy(SOURCE, MASK, carry_over=True)
    found = nll(ExactMarginals(SOURCE, MASK), TEXTS, energy, kind="K_step", steps=1)
    torch.testing.assert_close(found.nats, -LAW.log(), rtol=0, atol=1e-5)
    assert torch.equal(found.lower, found.upper)  # Z is 1
    assert (found.energy_passes == 1).all()


@pytest.mark.filterwarnings("ignore:kind=")
def test_noises_are_spread_over_the_numbers_of_masked_tokens():
    """With as many noises as tokens, each number of masked ones comes once; and which they are is drawn anew."""
    seen = [[] for _ in TEXTS]

    class Spy(Quarters):
        def hidden(self, input_ids, attention_mask=None):
            for row, masked in zip(seen, (input_ids == MASK).tolist(), strict=True):
                row.append(tuple(masked))
            return super().hidden(input_ids, attention_mask)

    nll(Spy(), TEXTS, kind="joint_paper", samples=4 * T)
    for row in seen:
        assert sorted(map(sum, row)) == [1] * 4 + [2] * 4 + [3] * 4
    assert len({masked for row in seen for masked in row}) == 7
    assert sum(len(set(row)) > T for row in seen) > 20


def test_the_time_of_a_noise_is_what_its_masks_say():
    """Given n of T masked, 1 - alpha is Beta(n, T - n + 1): of what the weighted times are, no other."""
    times = {n: [] for n in range(1, T + 1)}

    def energy(candidates, input_ids, time, log_mu):
        for n, t in zip((input_ids == MASK).sum(1).tolist(), time.tolist(), strict=True):
            times[n].append(t)
        return torch.zeros(candidates.shape[:2])

    nll(Quarters(), TEXTS.repeat(200, 1), energy, n=2, schedule=Schedule("cosine"))
    for n, found in times.items():
        shares = 1 - Schedule("cosine").alpha(torch.tensor(found[::2], dtype=torch.float64))
        assert len(shares) > 500
        expected, spread = n / (T + 1), (n * (T + 1 - n) / ((T + 1) ** 2 * (T + 2))) ** 0.5
        assert abs(float(shares.mean()) - expected) < 4 * spread / len(shares) ** 0.5


def real_problem(seed: int = 0):
    """Texts of 5 to 8 tokens for networks, padded on either side."""
    texts = torch.randint(8, 23, (3, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(texts)
    mask[0, 6:] = mask[1, :3] = 0
    return texts, mask


def networks() -> tuple[MaskedDenoiser, list[Energy | None]]:
    mu = network().double()
    config = LlamaConfig(
        vocab_size=mu.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = LlamaForCausalLM(config).double().eval()
    trained = NCEEnergy.from_denoiser(mu).double().eval()
    trained.head[-1].weight.data.fill_(0.3)
    return mu, [None, AREnergy(lm, bos_id=0), AREnergy(lm, bos_id=0, mask_id=mu.mask_id, carry_over=True), trained]


@pytest.mark.parametrize("kind", ["marginal", "K_step", "joint_paper"])
@pytest.mark.filterwarnings("ignore:kind=")
def test_a_text_alone_costs_what_it_costs_in_a_batch(kind):
    mu, energies = networks()
    texts, mask = real_problem()
    ids = torch.tensor([5, 900, 7])
    options = {"kind": kind, "n": 4, "samples": 2, "steps": 3, "seed": 11}
    for energy in energies:
        found = nll(mu, texts, energy, attention_mask=mask, sequence_ids=ids, **options)
        split = nll(mu, texts, energy, attention_mask=mask, sequence_ids=ids, energy_microbatch=3, **options)
        torch.testing.assert_close(split.nats, found.nats, rtol=0, atol=1e-5)
        assert found.tokens.tolist() == mask.sum(1).tolist()
        for b in range(3):
            alone = nll(mu, texts[b : b + 1, mask[b].bool()], energy, sequence_ids=ids[b : b + 1], **options)
            for name in ("lower", "jackknife", "upper"):
                torch.testing.assert_close(getattr(alone, name)[0], getattr(found, name)[b], rtol=0, atol=1e-5)
            assert alone.denoiser_calls[0] == found.denoiser_calls[b]
    other = nll(mu, texts, attention_mask=mask, **{**options, "seed": 12})
    assert not torch.equal(other.nats, nll(mu, texts, attention_mask=mask, **options).nats)


def test_given_tokens_are_not_graded():
    """A causal model's carry-over cost in one step: the sum over graded tokens of its own conditional costs."""
    mu, energies = networks()
    texts, _ = real_problem()
    mask = torch.zeros_like(texts, dtype=torch.bool)
    mask[:2, 3:6] = True
    found = nll(mu, texts, energies[2], kind="K_step", steps=1, mask=mask)
    logits = energies[2].lm(torch.nn.functional.pad(texts, (1, 0))).logits[:, :-1]
    expected = -logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0].where(mask, 0).sum(1)
    torch.testing.assert_close(found.nats, expected.detach(), rtol=0, atol=1e-6)
    assert found.tokens.tolist() == [3, 3, 0]
    assert found.nats[2] == 0
    assert found.denoiser_calls[2] == 0


def test_it_prints_all_sides_and_converts():
    found = nll(Quarters(), TEXTS, LawEnergy(SOURCE, MASK), n=4)
    text = str(found)
    assert text.startswith("marginal: lower ")
    figures = [float(x) for x in re.findall(r"(?:lower|jackknife|upper) ([-\d.]+)", text)]
    expected = [float(x.sum()) / 81 for x in (found.lower, found.jackknife, found.upper)]
    assert figures == pytest.approx(expected, abs=6e-5)
    assert figures[0] < figures[1] < figures[2]
    assert found.nats_per_token == pytest.approx(expected[1])
    assert found.perplexity == pytest.approx(math.exp(expected[1]))
    assert found.bits_per_character(100) == pytest.approx(float(found.jackknife.sum()) / 100 / math.log(2))
    assert f"perplexity {found.perplexity:.3f} by jackknife" in text
    assert nll(Quarters(), TEXTS, LawEnergy(SOURCE, MASK), n=4, log_z="upper").nats_per_token == pytest.approx(
        expected[2]
    )


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_the_error_by_draws_is_how_much_an_estimate_of_a_text_varies(side):
    """Noises of "K_step" are independent of each other, so that nothing is spread evenly and the error is no bound."""
    copies, energy = 500, LawEnergy(SOURCE, MASK)
    options = {"kind": "K_step", "steps": 2, "n": 4, "samples": 6, "log_z": side}
    found = nll(ExactMarginals(SOURCE, MASK), TEXTS[5:6].repeat(copies, 1), energy, **options)
    spread = float(found.nats.std())
    assert float(found.draws_error.square().mean()) ** 0.5 == pytest.approx(spread, rel=0.15)
    assert spread > 0.02
    assert found.nats_per_token_draws_error == pytest.approx(spread / T / copies**0.5, rel=0.15)
    # Copies of one text differ by their draws alone.
    assert found.nats_per_token_error == pytest.approx(found.nats_per_token_draws_error, rel=0.15)
    assert f"by draws alone {found.nats_per_token_draws_error:.2g}" in str(found)


def test_the_error_over_texts_is_what_leaving_one_out_says():
    mu, _ = networks()
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(8, 23, (40, 8), generator=generator)
    mask = (torch.arange(8) < torch.randint(3, 9, (40, 1), generator=generator)).long()
    found = nll(mu, texts, attention_mask=mask, samples=2)
    without = (found.nats.sum() - found.nats) / (found.tokens.sum() - found.tokens)
    assert found.nats_per_token_error == pytest.approx(Estimate.jackknife(0.0, without).error, rel=0.05)
    assert found.nats_per_token_error > 1.2 * found.nats_per_token_draws_error > 0
    one = nll(mu, texts[:1])
    assert math.isnan(one.nats_per_token_error)
    assert one.draws_error.isnan().all()
    assert len(nll(mu, texts[:3], mask=torch.arange(8).expand(3, -1) < 2).draws_error) == 3


def test_what_an_energy_cannot_read_is_found_before_anything_is_computed():
    mu, energies = networks()
    mu.hidden = None
    texts = torch.full((2, 9), 9)
    energies[1]._context = 8
    with pytest.raises(ValueError, match="9 tokens to score, but lm was made for 8"):
        nll(mu, texts, energies[1])
    energies[1].vocab_size = 9
    for mask in (None, torch.arange(8).expand(2, -1) > 3):  # a graded token, and a given one
        with pytest.raises(ValueError, match="candidates hold the id 9, no token of lm"):
            nll(mu, texts[:, :8], energies[1], mask=mask)


def test_the_joint_cost_says_that_it_is_no_bound_once():
    likelihood._warn_of_joint.cache_clear()
    with pytest.warns(UserWarning, match="for compatibility, not a bound"):
        found = nll(Quarters(), TEXTS, kind="joint_paper")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nll(Quarters(), TEXTS, kind="joint_paper")
    assert str(found).startswith("joint_paper (compatibility, not a bound): ")


def test_what_the_energy_forbids_costs_everything():
    def never(candidates, input_ids, time, log_mu):
        return torch.where((candidates == TEXTS[0]).all(-1), torch.inf, 0.0)

    found = nll(Quarters(), TEXTS, never, kind="K_step", steps=1, n=32)
    assert (found.nats == torch.inf).tolist() == [True] + [False] * 26
    found = nll(Quarters(), TEXTS, lambda c, *_: torch.full(c.shape[:2], torch.inf), n=4)
    assert (found.nats == torch.inf).all()


def test_bad_arguments_are_named():
    mu = Quarters()
    for options, message in (
        ({"kind": "exact"}, "kind must be one of marginal, K_step, joint_paper, got 'exact'"),
        ({"log_z": "best"}, "log_z must be one of lower, jackknife, upper, got 'best'"),
        ({"n": 1}, "n must be at least 2, got 1"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"attention_mask": TEXTS[:, 1:]}, "attention_mask must have the shape of input_ids"),
        ({"mask": TEXTS}, "mask must have the shape of input_ids"),
        ({"sequence_ids": torch.tensor([1])}, "sequence_ids must be int64"),
        ({"mask": torch.zeros_like(TEXTS, dtype=torch.bool)}, "mask leaves no token of any text to be graded"),
        ({"schedule": "linear"}, "schedule must be a Schedule, got str"),
        ({"energy_microbatch": 0}, "energy_microbatch must be at least 1, got 0"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            nll(mu, TEXTS, LawEnergy(SOURCE, MASK), **options)
    for wrong in (MASK, 4, -1):
        with pytest.raises(ValueError, match=f"input_ids hold {wrong} where a token is to be graded"):
            nll(mu, TEXTS.clone().index_fill_(1, torch.tensor([2]), wrong))
    with pytest.raises(TypeError, match="input_ids must be a tensor"):
        nll(mu, [[1, 2]])
    network, energies = networks()
    network.context = 2
    with pytest.raises(ValueError, match="3 columns are longer than the 2"):
        nll(network, torch.full((1, 3), 9))
    network.context = None
    with pytest.raises(ValueError, match="energy is in training mode"):
        nll(network, torch.full((1, 3), 9), energies[3].train())
    with pytest.raises(ValueError, match="denoiser is in training mode"):
        nll(network.train(), torch.full((1, 3), 9))
    with pytest.raises(ValueError, match="characters must be at least 1"):
        nll(mu, TEXTS).bits_per_character(0)
