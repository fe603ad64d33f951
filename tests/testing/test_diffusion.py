"""The enumeration of diffusion samplers against loops over single texts and candidates."""

import itertools
import math

import pytest
import torch

from pyquiet.diffusion.schedule import Schedule
from pyquiet.testing import enumerate_diffusion, resampled_law

MASK, TOKENS = 1, (0, 2, 3)


class Table:
    """A denoiser with logits of its own for each text; far from any joint law."""

    mask_id, vocab_size, device, training = MASK, 4, torch.device("cpu"), False

    def hidden(self, input_ids, attention_mask=None):
        code = (input_ids * torch.tensor([1.0, 2.3, 5.9, 11.2])).sum(1)[:, None, None]
        return 2 * (code + torch.arange(4)[:, None] * 1.7 + torch.arange(4) * 2.9).sin()

    def head(self, rows):
        return rows.index_fill(1, torch.tensor([MASK]), -math.inf)


def energy(candidates, input_ids, time, log_mu):
    """Depends on everything that it is given; -inf is a weight that nothing has, inf one of zero."""
    e = (candidates * torch.tensor([3.0, 1.0, 2.0, 5.0])).sum(-1).sin() + input_ids.sum(1)[:, None].cos() * candidates[
        ..., 1
    ]
    return (e + time[:, None] * candidates[..., 3] / 2 + log_mu.sin()).masked_fill(candidates[..., 1] == 3, math.inf)


def by_hand(
    text,
    *,
    grid,
    schedule,
    k=None,
    tau=1.0,
    window=1.0,
    processing=lambda law: law,
    correct=True,
    mode="standard",
    banned=None,
):
    """{text: probability} by recursion: one text, one set of revealed positions, one tuple of candidates at a time."""
    out, seen = {}, {}

    def candidates_of(text, t, revealed):
        key = (text, t, revealed if mode == "reveal_set" else None)
        if key in seen:
            return seen[key]
        masked = [i for i, x in enumerate(text) if x == MASK]
        ids = torch.tensor([text])
        logits = Table().head(Table().hidden(ids)[0])
        mu = (logits if banned is None else logits.masked_fill(banned, -math.inf)).softmax(-1)
        q = [processing(law) for law in mu]
        words = list(itertools.product(TOKENS, repeat=len(masked)))
        whole = [tuple(w[masked.index(i)] if i in masked else x for i, x in enumerate(text)) for w in words]
        base = [math.prod(float(q[i][x[i]]) for i in masked) for x in whole]
        if t < 1 - window:
            seen[key] = dict(zip(whole, base, strict=True))
            return seen[key]
        log_mu = [sum(math.log(mu[i][x[i]]) if b else 0.0 for i in masked) for b, x in zip(base, whole, strict=True)]
        args = torch.tensor([whole]), ids, torch.tensor([t], dtype=torch.float64), torch.tensor([log_mu])
        weight = (-energy(*args)[0] / tau).exp().tolist()
        if correct:
            weight = [w * math.exp(m) / b if b else 0 for w, m, b in zip(weight, log_mu, base, strict=True)]
        kept = [i for i in masked if mode == "reveal_set" and i not in revealed]
        seen[key] = {}
        for rest in itertools.product(TOKENS, repeat=len(kept)):  # what the candidates have in common
            alike = [j for j, x in enumerate(whole) if tuple(x[i] for i in kept) == rest]
            p = sum(base[j] for j in alike)
            if p:
                law = resample_by_hand([base[j] / p for j in alike], [weight[j] for j in alike], k)
                seen[key].update({whole[j]: p * share for j, share in zip(alike, law, strict=True)})
        return seen[key]

    def walk(text, step, p):
        masked = [i for i, x in enumerate(text) if x == MASK]
        if step == len(grid) - 1 or not masked:
            out[text] = out.get(text, 0) + p
            return
        t, s = float(grid[step]), float(grid[step + 1])
        alpha_t, alpha_s = (float(schedule.alpha(torch.tensor(x, dtype=torch.float64))) for x in (t, s))
        rho = (alpha_s - alpha_t) / (1 - alpha_t)
        for opened in itertools.product((False, True), repeat=len(masked)):
            chance = math.prod(rho if o else 1 - rho for o in opened)
            revealed = frozenset(i for i, o in zip(masked, opened, strict=True) if o)
            if chance:
                arriving = {}
                for drawn, share in candidates_of(text, t, revealed).items():
                    then = tuple(drawn[i] if i in revealed else x for i, x in enumerate(text))
                    arriving[then] = arriving.get(then, 0) + share
                for then, share in arriving.items():
                    walk(then, step + 1, p * share * chance)

    walk(text, 0, 1.0)
    return out


def resample_by_hand(base, weight, k):
    if k is None:
        total = sum(b * w for b, w in zip(base, weight, strict=True))
        return [b * w / total for b, w in zip(base, weight, strict=True)] if total else base
    law = [0.0] * len(base)
    for draws in itertools.product(range(len(base)), repeat=k):
        p, total = math.prod(base[j] for j in draws), sum(weight[j] for j in draws)
        for j in draws:
            law[j] += p * (weight[j] / total if total else 1 / k)
    return law


def assert_laws_agree(law, expected, masked):
    assert float(law.exp().sum()) == pytest.approx(1, abs=1e-9)
    table = torch.zeros_like(law)
    for text, p in expected.items():
        table[tuple(text[i] for i in masked)] = p
    torch.testing.assert_close(law.exp(), table, rtol=0, atol=2e-7)  # an energy is float32


CASES = {
    "one step": {"steps": 1},
    "three steps": {"steps": 3},
    "two candidates": {"steps": 2, "candidates": 2},
    "three candidates, cosine": {"steps": 1, "candidates": 3, "schedule": Schedule("cosine")},
    "window": {"steps": 4, "window": 0.5},
    "tau": {"steps": 2, "energy_temperature": 2.5, "schedule": Schedule("cosine_squared", 0.1)},
    "temperature": {"steps": 2, "temperature": 0.6},
    "top-k, two candidates": {"steps": 1, "top_k": 2, "candidates": 2},
    "not corrected": {"steps": 2, "temperature": 2.0, "correct": False},
    "reveal set": {"steps": 2, "candidates": 2, "mode": "reveal_set"},
    "reveal set, top-k, limit": {"steps": 2, "top_k": 2, "mode": "reveal_set"},
    "banned": {"steps": 1, "banned": torch.tensor([True, False, False, False])},
}


def processing_of(case):
    temperature, top_k, banned = case.get("temperature", 1.0), case.get("top_k"), case.get("banned")

    def processing(law):
        law = law ** (1 / temperature)
        law = law.masked_fill(banned, 0) if banned is not None else law
        law = law * (law >= law.topk(top_k).values[-1]) if top_k else law
        return law / law.sum()

    return processing


@pytest.mark.parametrize("case", CASES)
def test_the_enumeration_is_the_recursion(case):
    options, schedule = CASES[case], CASES[case].get("schedule", Schedule())
    text, masked = (MASK, MASK, 2, MASK) if options["steps"] < 3 else (3, MASK, 2, MASK), [0, 1, 3]
    masked = [i for i in masked if text[i] == MASK]
    law = enumerate_diffusion(Table(), energy, input_ids=torch.tensor(text), **options)
    expected = by_hand(
        text,
        grid=schedule.grid(options["steps"]),
        schedule=schedule,
        k=options.get("candidates"),
        tau=options.get("energy_temperature", 1.0),
        window=options.get("window", 1.0),
        processing=processing_of(options),
        correct=options.get("correct", True),
        mode=options.get("mode", "standard"),
        banned=options.get("banned"),
    )
    assert law.shape == (4,) * len(masked)
    assert_laws_agree(law, expected, masked)


def test_without_an_energy_it_is_the_denoiser():
    law = enumerate_diffusion(Table(), input_ids=torch.tensor([3, MASK, 2, MASK]), steps=1)
    mu = Table().head(Table().hidden(torch.tensor([[3, MASK, 2, MASK]]))[0]).double().softmax(-1)
    torch.testing.assert_close(law.exp(), torch.outer(mu[1], mu[3]))


def test_given_tokens_are_looked_at_and_those_to_fill_are_not():
    mask = torch.tensor([False, True, False, True])
    laws = [
        enumerate_diffusion(Table(), energy, input_ids=torch.tensor(ids), mask=mask, steps=2)
        for ids in ([3, MASK, 2, MASK], [3, 0, 2, 2], [3, MASK, 0, MASK])
    ]
    assert torch.equal(laws[0], laws[1])
    assert (laws[0].exp() - laws[2].exp()).abs().sum() > 0.1


def test_ever_more_steps_tend_to_one_position_at_a_time():
    def free_of_time(candidates, input_ids, time, log_mu):
        return energy(candidates, input_ids, torch.zeros_like(time), log_mu)

    ids = torch.tensor([MASK, MASK, 2, MASK])
    limit = enumerate_diffusion(Table(), free_of_time, input_ids=ids, steps=None, candidates=2).exp()
    off = [
        float(
            (enumerate_diffusion(Table(), free_of_time, input_ids=ids, steps=K, candidates=2).exp() - limit).abs().sum()
        )
        for K in (4, 8, 16)
    ]
    assert off[0] > 1.7 * off[1] > 2.9 * off[2] > 0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_law_of_a_pick_is_the_sum_over_all_candidates(k):
    base = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    weight = torch.tensor([[1e-9, 2.0, 5.0, 1e4], [0.0, 1.0, 0.0, 3.0]], dtype=torch.float64)
    law = resampled_law(base.log(), weight.log() + 700, k)  # a constant in the weights cancels
    expected = [resample_by_hand(b.tolist(), w.tolist(), k) for b, w in zip(base, weight, strict=True)]
    torch.testing.assert_close(law, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)


def test_a_pick_tends_to_the_target_as_one_over_k():
    base = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    weight = torch.tensor([[0.1, 2.0, 9.0]], dtype=torch.float64)
    target = base * weight / (base * weight).sum()
    off = [float((resampled_law(base.log(), weight.log(), k) - target).abs().sum()) * k for k in (500, 1000, 2000)]
    assert off == pytest.approx([off[-1]] * 3, rel=0.02)
    assert off[-1] > 0.1
    dead = resampled_law(base.log(), torch.full((1, 3), -math.inf), 7)
    torch.testing.assert_close(dead, base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([0, 2, 3, 3])}, "mask leaves 0 positions"),
        ({"input_ids": torch.full((30,), MASK)}, r"mask leaves 30 positions, 4\^30"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "one shape"),
        ({"mask": torch.ones(4)}, "mask .bool.*torch.float32"),
        ({"steps": None, "window": 0.5}, "window must be 1 where steps is None, got 0.5"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        enumerate_diffusion(Table(), **{"input_ids": torch.tensor([MASK, MASK, 2, MASK]), "steps": 2, **arguments})
