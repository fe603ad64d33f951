"""The defects that public implementations have had: `diffuse` has none of them, and the tests would see them.

A reference sampler of a few lines is accepted by the exactness test, and rejected with each of the mistakes.
"""

import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from pyquiet.diffusion.ar_energy import AREnergy
from pyquiet.diffusion.likelihood import nll
from pyquiet.diffusion.sampling import diffuse
from pyquiet.diffusion.schedule import KINDS, Schedule
from pyquiet.diffusion.training import random_masks
from pyquiet.testing import enumerate_diffusion, exactness_test

from .toys import PROPOSAL, SOURCE, ExactMarginals, LawEnergy, Product, spread, tv

MASK, V, T = 1, 4, 3
EMPTY = torch.full((T,), MASK)
LAW = spread(SOURCE, MASK)
MARGINALS, PRODUCT, ENERGY = ExactMarginals(SOURCE, MASK), Product(PROPOSAL, MASK), LawEnergy(SOURCE, MASK)
STEPS, K, SAMPLES = 3, 4, 20_000


def reference(mistake=None, temperature=1.0, denoiser=MARGINALS):
    """The sampler of arXiv 2410.21357 on the linear schedule, with a mistake or without."""

    def draw(samples, seed):
        generator = torch.Generator().manual_seed(seed)
        x = EMPTY.repeat(samples, 1)
        for step in range(STEPS):
            masked = x == MASK
            logits = denoiser.head(denoiser.hidden(x).flatten(0, 1)).double()
            mu, q = logits.softmax(-1), (logits / temperature).softmax(-1)
            drawn = q.multinomial(K, True, generator=generator)  # [B T, k]
            log_mu, log_q = (p.gather(1, drawn).log().view(-1, T, K).transpose(1, 2) for p in (mu, q))
            log_mu, log_q = (x.where(masked[:, None], 0.0).sum(-1) for x in (log_mu, log_q))  # [B, k]
            drawn = drawn.view(-1, T, K).transpose(1, 2).where(masked[:, None], x[:, None])
            log_p = LAW.log()[drawn.unbind(-1)]
            if mistake == "the first position is not scored":
                log_p = log_p - LAW.sum((1, 2)).log()[drawn[..., 0]]
            log_w = log_p - (log_q if mistake == "the energy gets log q" else log_mu) + log_mu - log_q
            if mistake == "weights of +E":
                log_w = -log_w
            if mistake == "candidates laid out j B + b, read as [B, k]":
                log_w = log_w.T.reshape(samples, K)
            pick = log_w.softmax(-1).multinomial(1, generator=generator)
            if mistake == "the pick is thrown away":
                pick = torch.zeros_like(pick)
            chosen = drawn.gather(1, pick[..., None].expand(-1, -1, T))[:, 0]
            if mistake == "what is left at the end becomes the likeliest" and step == STEPS - 1:
                chosen = mu.view(-1, T, V).argmax(-1)
            opened = masked & (torch.rand(x.shape, generator=generator) < 1 / (STEPS - step))
            x = torch.where(opened, chosen, x)
        return x

    return draw


def of_the_package(energy=ENERGY, temperature=1.0, denoiser=MARGINALS, input_ids=EMPTY, **options):
    def draw(samples, seed):
        ids = input_ids.expand(samples, -1)
        options_ = {"steps": STEPS, "candidates": K, "temperature": temperature, "seed": seed} | options
        return diffuse(denoiser, energy, input_ids=ids, **options_).tokens

    return draw


def law(temperature=1.0, denoiser=MARGINALS, **options):
    options = {"steps": STEPS, "candidates": K, "temperature": temperature} | options
    return enumerate_diffusion(denoiser, ENERGY, input_ids=EMPTY, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("sampler", [reference, of_the_package], ids=["reference", "package"])
def test_without_a_mistake_draws_follow_the_law(sampler, temperature):
    result = exactness_test(sampler(temperature=temperature), law(temperature), samples=SAMPLES)
    assert result.p_value > 1e-4, result


MISTAKES = {
    "weights of +E": 1.0,
    "the pick is thrown away": 1.0,
    "candidates laid out j B + b, read as [B, k]": 1.0,
    "the first position is not scored": 1.0,
    "what is left at the end becomes the likeliest": 1.0,
    "the energy gets log q": 0.5,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_seen(mistake):
    temperature = MISTAKES[mistake]
    result = exactness_test(reference(mistake, temperature), law(temperature), samples=SAMPLES)
    assert result.p_value < 1e-20, result
    assert result.tv > 2 * result.floor


def test_a_high_energy_is_never_taken_for_a_low_one():
    result = exactness_test(of_the_package(LawEnergy(SOURCE, MASK, sign=-1)), law(), samples=SAMPLES)
    assert result.p_value < 1e-20
    assert result.tv > 10 * result.floor


@pytest.mark.filterwarnings("ignore:.*made all candidates impossible")
def test_candidates_of_rows_with_other_prompts_do_not_mix():
    """Rows whose prompts rule out each other's tokens; the energy sees each with its own, in order."""
    ids = torch.tensor([[0, MASK, MASK], [2, MASK, MASK], [3, MASK, MASK]])

    def energy(candidates, input_ids, time, log_mu):
        assert candidates.shape == (3, K, T)
        assert (candidates[..., 0] == ids[:, :1]).all()
        wanted = (candidates[..., 1] == ids[:, :1]) & (candidates[..., 2] == ids[:, :1])
        return torch.where(wanted, 0.0, math.inf)

    for seed in range(20):
        out = diffuse(PRODUCT, energy, input_ids=ids, steps=1, candidates=K, seed=seed)
        # A row is a wish come true, or none of its candidates was.
        fulfilled = (out.tokens == ids[:, :1]).all(1)
        assert torch.equal(fulfilled, out.degenerate == 0)


def test_the_energy_never_gets_log_q():
    """With it the law is off by far, whatever the number of candidates; with log mu it is exact in their limit."""
    exact = law(0.5, PRODUCT, candidates=None).exp()
    assert tv(LAW, exact) < 1e-6
    table = (PROPOSAL.log() / 0.5).log_softmax(-1)

    def given_log_q(candidates, input_ids, time, log_mu):
        cells = (candidates - (candidates > MASK).long()).clamp(min=0)
        log_q = table[torch.arange(T), cells].where((input_ids == MASK)[:, None], 0.0).sum(-1)
        return (log_q - LAW.log()[candidates.unbind(-1)]).float()

    wrong = enumerate_diffusion(PRODUCT, given_log_q, input_ids=EMPTY, steps=1, temperature=0.5).exp()
    assert tv(LAW, wrong) > 0.2
    seen = []

    def energy(candidates, input_ids, time, log_mu):
        seen.append((candidates, log_mu))
        return torch.zeros_like(log_mu)

    diffuse(PRODUCT, energy, input_ids=EMPTY.expand(50, -1), steps=1, temperature=0.5, top_p=0.9)
    ((candidates, log_mu),) = seen
    cells = candidates - (candidates > MASK).long()
    torch.testing.assert_close(log_mu, PROPOSAL.log()[torch.arange(T), cells].sum(-1).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_sampling_have_one_schedule(kind):
    """What noise leaves at a time is what the sampler has opened by then, for one object."""
    schedule, length, rows, steps = Schedule(kind), 50, 1000, 8
    denoiser = Product(torch.full((length, 2), 0.5).double(), 0)
    empty = torch.zeros(rows, length, dtype=torch.long)
    opened = diffuse(denoiser, input_ids=empty, steps=steps, schedule=schedule).reveal_step
    grid = schedule.grid(steps)
    for step in range(1, steps):
        alpha = float(schedule.alpha(grid[step]))
        error = 4 * (alpha * (1 - alpha) / (rows * length)) ** 0.5
        level = torch.full((rows,), float(grid[step]), dtype=torch.float64)
        noise = random_masks(
            level,
            empty,
            seed=0,
            sequence_ids=torch.arange(rows),
            objective="continuous",
            schedule=schedule,
            min_time=0.0,
        )
        assert abs(float((opened < step).double().mean()) - alpha) < error + 1e-12
        assert abs(float((~noise.masked).double().mean()) - alpha) < error + 1e-12
        torch.testing.assert_close(noise.weight.double(), schedule.weight(level), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("linear", 1e-3), Schedule("cosine")], ids=str)
@pytest.mark.parametrize("sampler", ["schedule_first", "ancestral", "cached", "first_hitting"])
def test_the_last_step_draws_and_leaves_nothing(schedule, sampler):
    denoiser = Product(torch.tensor([[0.6, 0.4]] * 4).double(), 0)
    empty = torch.zeros(5000, 4, dtype=torch.long)
    out = diffuse(denoiser, input_ids=empty, steps=5, schedule=schedule, sampler=sampler)
    assert (out.tokens != 0).all()
    last = out.reveal_step == out.reveal_step.max()
    share = float((out.tokens[last] == 2).double().mean())  # the argmax is 1
    assert int(last.sum()) > 500
    assert abs(share - 0.4) < 4 * (0.24 / int(last.sum())) ** 0.5


def test_rare_tokens_are_drawn_with_many_steps():
    """A race in float32 that folds in the mask damps a token of mass p by x / (e^x - 1), x = 2^-24 t K / p."""
    steps, rare, mass, rows, length = 512, 256, 3e-5, 32000, 4
    laws = torch.tensor([mass] * rare + [1 - rare * mass], dtype=torch.float64).expand(length, -1)
    empty = torch.full((rows, length), rare + 1)
    tokens = diffuse(Product(laws, rare + 1), input_ids=empty, steps=steps).tokens
    hits, expected = int((tokens < rare).sum()), rows * length * rare * mass
    assert abs(hits - expected) < 4 * expected**0.5
    x = 2**-24 * steps / mass * torch.linspace(0.001, 1, 1000)
    damped = expected * float((x / x.expm1()).mean())
    assert hits - damped > 5 * expected**0.5  # such a race would be seen


def tiny_bert(**options):
    config = BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        mask_token_id=MASK, pad_token_id=0, max_position_embeddings=8, **options,
    )  # fmt: skip
    return BertForMaskedLM(config)


def tiny_lm():
    """A causal LM over the four ids and a BOS, with an opinion."""
    config = LlamaConfig(
        vocab_size=V + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        bos_token_id=V, max_position_embeddings=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.7)
    return model.eval()


@pytest.mark.parametrize("run", [diffuse, nll], ids=["diffuse", "nll"])
def test_a_denoiser_or_energy_with_dropout_switched_on_is_refused(run):
    arguments = {"input_ids": EMPTY[None]} if run is diffuse else {"input_ids": torch.tensor([[0, 2, 3]])}
    with pytest.raises(ValueError, match=r"denoiser.*training mode"):
        run(tiny_bert().train(), **arguments)
    with pytest.raises(ValueError, match="training mode"):
        run(MARGINALS, energy=AREnergy(tiny_lm().train()), **arguments)
    run(tiny_bert().eval(), **arguments)


@torch.no_grad()
def test_every_position_of_an_autoregressive_energy_is_scored_the_first_too():
    """Draws follow a real causal LM behind its BOS, given the tokens that occur; steps and observed tokens or none."""
    lm = tiny_lm()
    texts = torch.cartesian_prod(*[torch.tensor([0, 2, 3])] * T)
    whole = torch.cat([torch.full((27, 1), V), texts], 1)
    each = lm(whole).logits.double().log_softmax(-1)[:, :-1].gather(2, whole[:, 1:, None])[..., 0]
    p = each.sum(1).softmax(0)
    law = torch.zeros(V, V, V, dtype=torch.float64).index_put(tuple(texts.T), p)
    unscored = torch.zeros_like(law).index_put(tuple(texts.T), each[:, 1:].sum(1).softmax(0))
    assert tv(law, unscored) > 0.1
    independent = torch.einsum("a,b,c->abc", *(law.sum([j for j in range(3) if j != i]) for i in range(3)))
    assert tv(law, independent) > 0.1
    energy, denoiser = AREnergy(lm, mask_id=MASK), Product(torch.full((T, 3), 1 / 3).double(), MASK)
    for ids in (EMPTY, torch.tensor([MASK, MASK, 3])):
        target = law if ids is EMPTY else law[:, :, 3] / law[:, :, 3].sum()
        exact = enumerate_diffusion(denoiser, energy, input_ids=ids, steps=2)
        torch.testing.assert_close(exact.exp(), target, rtol=0, atol=1e-5)
        draw = of_the_package(energy, denoiser=denoiser, input_ids=ids, steps=2, candidates=16)
        expected = enumerate_diffusion(denoiser, energy, input_ids=ids, steps=2, candidates=16)
        result = exactness_test(draw, expected, samples=4000, input_ids=ids, known=ids != MASK)
        assert result.p_value > 1e-4, result


@pytest.mark.parametrize("n", [0, 1])
def test_log_z_from_a_single_draw_is_refused(n):
    """The released evaluation's; no estimate from one draw can say how far off it is."""
    with pytest.raises(ValueError, match=f"n must be at least 2, got {n}"):
        nll(MARGINALS, torch.tensor([[0, 2, 3]]), ENERGY, n=n)
