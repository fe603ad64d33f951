"""Hooks of `diffuse`: what opens, with what tokens, and what is masked again."""

import pytest
import torch

from pyquiet.diffusion.hooks import RULES, by_confidence, by_threshold, left_to_right_blocks, remdm
from pyquiet.diffusion.sampling import diffuse
from pyquiet.diffusion.schedule import Schedule

from .networks import MASK, PairEnergy, V, network
from .toys import Product

T = 12


@pytest.fixture(scope="module")
def denoiser():
    return network("bert")  # where nothing is given, positions alone tell its laws apart


def texts():
    ids = torch.full((4, T), MASK)
    ids[0, :5], ids[1, 6:], ids[2] = 9, 10, 11
    return ids


def confidences(denoiser, tokens):
    """The probability of the likeliest token, 0 where nothing is masked, [B, T]."""
    out = torch.zeros(tokens.shape)
    with torch.no_grad():
        out[tokens == MASK] = denoiser.log_probs(tokens).exp().amax(-1)
    return out


def states(out, ids):
    """Before each step: its number, the texts [B, T] with masks, and what it opened, bool [B, T]."""
    for step in range(out.steps_run):
        later = out.reveal_step >= step
        yield step, torch.where(later, MASK, out.tokens), out.reveal_step == step


@pytest.mark.parametrize("energy", [None, PairEnergy()], ids=["plain", "corrected"])
@pytest.mark.parametrize("per_step", [1, 3])
def test_the_surest_positions_open_first(denoiser, energy, per_step):
    ids = texts()
    out = diffuse(denoiser, energy, input_ids=ids, order=by_confidence(per_step), candidates=3, seed=1)
    assert (out.denoiser_calls == torch.tensor([-(-7 // per_step), -(-6 // per_step), 0, T // per_step])).all()
    for _, tokens, opened in states(out, ids):
        best = confidences(denoiser, tokens).topk(per_step).indices
        expected = torch.zeros_like(opened).scatter_(1, best, True) & (tokens == MASK)
        assert torch.equal(opened, expected)
    assert (out.tokens != MASK).all()
    assert torch.equal(out.tokens[ids != MASK], ids[ids != MASK])


def test_all_that_is_sure_enough_opens(denoiser):
    ids, counts = texts(), []
    out = diffuse(denoiser, input_ids=ids, order=by_threshold(0.3), seed=1)
    for _, tokens, opened in states(out, ids):
        sure = confidences(denoiser, tokens)
        expected = sure >= 0.3
        left = (tokens == MASK).any(1)
        expected[left, sure.argmax(1)[left]] = True
        assert torch.equal(opened, expected)
        counts += opened.sum(1)[left].tolist()
    assert {1, 2} <= set(counts)
    everything = diffuse(denoiser, input_ids=ids, order=by_threshold(0.0), seed=1)
    assert everything.steps_run == 1


def test_blocks_are_filled_from_left_to_right(denoiser):
    ids = texts()
    out = diffuse(denoiser, input_ids=ids, order=left_to_right_blocks(5), seed=1)
    block = torch.arange(T).expand(4, -1) // 5
    first = block.where(ids == MASK, 99).amin(1, keepdim=True)
    assert torch.equal(out.reveal_step, torch.where(ids == MASK, block - first, -1))
    inside = diffuse(denoiser, input_ids=ids, order=left_to_right_blocks(5, by_confidence(2)), seed=1)
    assert int(inside.denoiser_calls[3]) == 3 + 3 + 1
    assert (inside.reveal_step[3].view(1, -1)[0, :5].amax()) < inside.reveal_step[3, 5:10].amin()
    for _, tokens, opened in states(inside, ids):
        sure = confidences(denoiser, tokens)
        now = block == block.where(tokens == MASK, 99).amin(1, keepdim=True)
        sure = sure.where(now, 0.0)
        expected = torch.zeros_like(opened).scatter_(1, sure.topk(2).indices, True) & (sure > 0)
        assert torch.equal(opened, expected)


def test_places_do_not_count_padding():
    denoiser, ids = network(), torch.full((1, T), MASK)
    ids[0, 2] = 9
    padded = torch.cat([torch.full((1, 3), 2), ids], 1)
    real = torch.cat([torch.zeros(1, 3), torch.ones(1, T)], 1)
    options = {"order": left_to_right_blocks(5, by_confidence(2)), "seed": 1}
    out = diffuse(denoiser, input_ids=padded, attention_mask=real, **options)
    assert torch.equal(out.tokens[:, 3:], diffuse(denoiser, input_ids=ids, **options).tokens)


def test_one_by_one_from_left_to_right_is_the_chain(denoiser):
    """Each token from its conditional given all before it: the rows that were drawn from are those of the network."""
    out = diffuse(denoiser, length=6, num_samples=3000, order=left_to_right_blocks(1), seed=1)
    tokens = torch.full((1, 6), MASK)
    with torch.no_grad():
        law = denoiser.log_probs(tokens)[0].exp()
    counts = torch.bincount(out.tokens[:, 0], minlength=V).double()
    error = (law.double() * (1 - law) / 3000).sqrt()
    assert ((counts / 3000 - law).abs() <= 4.5 * error + 1e-9).all()
    likely = int(law.argmax())
    tokens[0, 0] = likely
    with torch.no_grad():
        second = denoiser.log_probs(tokens)[0].exp()
    chosen = out.tokens[out.tokens[:, 0] == likely, 1]
    share = torch.bincount(chosen, minlength=V).double() / len(chosen)
    assert ((share - second).abs() <= 4.5 * (second.double() / len(chosen)).sqrt() + 1e-9).all()


def test_the_head_is_asked_once_for_a_row(denoiser):
    """A hook that looks at logits, and the draw after it, share them; one that does not look costs what opens."""

    class Counted(Product):
        pass

    laws = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).double()
    counted = Counted(laws / laws.sum(1, keepdim=True))
    zero = lambda c, x, t, m: torch.zeros(m.shape)  # noqa: E731
    for order, energy, rows in (
        (by_confidence(2), None, 8 + 6 + 4 + 2),
        (by_confidence(2), zero, 8 + 6 + 4 + 2),
        (left_to_right_blocks(2), None, 8),
        (left_to_right_blocks(2), zero, 8 + 6 + 4 + 2),
    ):
        counted.rows = 0
        diffuse(counted, energy, length=8, num_samples=5, order=order, candidates=3)
        assert counted.rows == 5 * rows


@pytest.mark.parametrize("order", [by_confidence(3), by_threshold(0.3)], ids=["surest", "sure enough"])
def test_logits_of_many_positions_never_exist_at_once(denoiser, order, monkeypatch):
    whole = diffuse(denoiser, input_ids=texts(), order=order, seed=1)
    monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", 4 * V)
    rows, head = [], denoiser.head
    monkeypatch.setattr(denoiser, "head", lambda given: rows.append(len(given)) or head(given))
    parts = diffuse(denoiser, input_ids=texts(), order=order, seed=1)
    assert max(rows) == 4
    assert torch.equal(parts.tokens, whole.tokens)


def test_a_hook_is_told_everything_and_can_spoil_nothing(denoiser):
    ids, seen = texts(), []

    def order(context):
        seen.append(context)
        assert torch.equal(context.masked, context.tokens == MASK)
        assert torch.equal(context.fill, (ids == MASK)[context.rows])
        alpha = 1 - context.masked.sum(1) / context.fill.sum(1).double()
        torch.testing.assert_close(context.alpha, alpha)
        torch.testing.assert_close(Schedule("cosine").alpha(context.time), alpha)
        assert context.logits.shape == (int(context.masked.sum()), V)
        assert torch.equal(context.log_probs < 0, context.fill & ~context.masked)
        drafts = context.candidates(3)
        assert (drafts != MASK).all()
        assert ((drafts == context.tokens[:, None]) | context.masked[:, None]).all()
        opened = left_to_right_blocks(4)(context)
        for tensor in (context.logits, context.tokens, context.masked, context.fill, context.places, context.rows):
            tensor.zero_()
        return opened

    options = {"input_ids": ids, "schedule": Schedule("cosine"), "seed": 1}
    out = diffuse(denoiser, order=order, **options)
    assert [context.step for context in seen] == [0, 1, 2]
    assert torch.equal(out.tokens, diffuse(denoiser, order=left_to_right_blocks(4), **options).tokens)


def test_a_hook_may_narrow_what_is_masked_in_place(denoiser):
    """After it looked at logits, of which the draw takes its rows."""

    def first_half(context, narrow):
        assert len(context.logits) == int(context.masked.sum())
        masked = context.masked if narrow else context.masked.clone()
        masked &= masked.cumsum(1) <= (masked.sum(1, keepdim=True) + 1) // 2
        return masked

    options = {"input_ids": texts(), "seed": 1}
    narrowed, copied = (diffuse(denoiser, order=lambda c, n=n: first_half(c, n), **options) for n in (True, False))
    assert torch.equal(narrowed.tokens, copied.tokens)


def test_tokens_of_a_hook(denoiser):
    ids = texts()

    def best_of(k):
        energy = PairEnergy()

        def tokens(context, opened):
            assert opened.dtype == torch.bool
            assert (opened <= context.masked).all()
            drafts = context.candidates(k)
            best = energy(drafts, context.tokens, context.time, torch.zeros(drafts.shape[:2])).argmin(1)
            return drafts[torch.arange(len(drafts)), best]

        return tokens

    by_hook = diffuse(denoiser, input_ids=ids, tokens=best_of(6), steps=4, seed=1)
    by_energy = diffuse(denoiser, PairEnergy(), input_ids=ids, candidates=6, energy_temperature=1e-6, steps=4, seed=1)
    assert torch.equal(by_hook.tokens, by_energy.tokens)
    both = diffuse(denoiser, input_ids=ids, tokens=best_of(6), order=by_confidence(3), seed=1)
    assert (both.tokens != MASK).all()


# -- remasking


class Oracle(Product):
    """Knows the text: token 0 everywhere, with a confidence of its own at each position."""

    def __init__(self, length, sure=0.999):
        laws = torch.full((length, 2), 1 - sure)
        laws[:, 0] = sure
        super().__init__(laws.double())


def clean_shares(remask, *, steps, length=50, samples=400, seed=3, **options):
    """After each step the share of positions that are clean, float64 [K], and its standard error."""
    denoiser, shares = Oracle(length), []

    def note(step, time, tokens):
        clean = (tokens != denoiser.mask_id).double().mean(1)
        shares.append((float(clean.mean()), float(clean.std() / samples**0.5)))

    out = diffuse(
        denoiser, length=length, num_samples=samples, remask=remask, steps=steps, seed=seed, on_step=note, **options
    )
    assert (out.tokens != denoiser.mask_id).all()
    return out, *(torch.tensor(x, dtype=torch.float64) for x in zip(*shares, strict=True))


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine")], ids=str)
@pytest.mark.parametrize(("rule", "eta"), [("cap", 0.2), ("rescale", 0.5), ("conf", 1.0), ("loop", 0.1), ("cap", None)])
def test_remasking_keeps_the_share_of_clean_tokens(rule, eta, schedule):
    """14.10: after each step a token is clean with probability alpha(s), whatever the rule."""
    remask, grid = remdm(rule, eta=eta), schedule.grid(20)
    out, shares, errors = clean_shares(remask, steps=20, schedule=schedule)
    expected = remask.alphas(schedule, grid)[1:]
    assert ((shares - expected).abs() <= 4.5 * errors + 1e-12).all()
    if rule != "loop":
        torch.testing.assert_close(expected, schedule.alpha(grid)[1:])
    else:
        on = (grid <= 0.55) & (grid >= 0.05)
        torch.testing.assert_close(remask.alphas(schedule, grid)[on], torch.full((int(on.sum()),), 0.9).double())

    class Uncompensated(type(remask)):
        """Masks again what it may, but tells the sampler that masked positions would not be: they open as ever."""

        def __call__(self, context):
            return super().__call__(context).masked_fill(context.masked, 0.0)

    _, fewer, errors = clean_shares(Uncompensated(**vars(remask)), steps=20, schedule=schedule)
    assert (fewer - expected < -4.5 * errors).any()


def test_remasking_really_masks_again(denoiser):
    def run(remask):
        closed = [torch.full((30, T), MASK)]
        count = 0

        def note(step, time, tokens):
            nonlocal count
            count += int(((tokens == MASK) & (closed[-1] != MASK)).sum())
            closed.append(tokens)

        diffuse(denoiser, length=T, num_samples=30, remask=remask, steps=12, seed=1, on_step=note)
        return count

    none = remdm("cap", eta=0.0)
    assert run(none) == 0
    for rule in RULES:
        assert run(remdm(rule, eta=0.5)) > 20


def test_the_least_confident_go_first():
    laws = torch.full((40, 3), 0.05, dtype=torch.float64)
    laws[:, 0] = 0.9
    laws[20:] = torch.tensor([0.4, 0.3, 0.3])
    denoiser, before, closed = Product(laws), [None], torch.zeros(2)

    def note(step, time, tokens):
        if before[0] is not None:
            gone = (tokens == 1) & (before[0] != 1)
            closed.add_(torch.stack([gone[:, :20].sum(), gone[:, 20:].sum()]))
        before[0] = tokens

    diffuse(denoiser, length=40, num_samples=200, remask=remdm("conf"), steps=30, seed=1, on_step=note)
    # softmax of minus the confidence: exp(-0.9) to exp(-0.35) of the tokens that stand there
    assert 1.3 < float(closed[1] / closed[0]) < 2.2


def test_remasking_with_an_energy_an_order_and_prompts(denoiser):
    ids, energy = texts(), PairEnergy()
    out = diffuse(denoiser, energy, input_ids=ids, remask=remdm("rescale", eta=0.5), steps=10, candidates=4, seed=1)
    assert torch.equal(out.tokens[ids != MASK], ids[ids != MASK])
    assert (out.tokens != MASK).all()
    assert int(out.trace.opened.sum()) > int((ids == MASK).sum())  # some opened twice
    assert int(out.denoiser_calls[2]) == 0

    def worst(context):
        """Masks the least likely token again, half of the time."""
        assert ((context.log_probs < 0) == (context.fill & ~context.masked)).all()
        low = context.log_probs.masked_fill(~context.fill | context.masked, 1.0).argmin(1, keepdim=True)
        return torch.zeros(context.masked.shape).scatter_(1, low, 0.5)

    both = diffuse(denoiser, energy, input_ids=ids, remask=worst, order=by_confidence(2), steps=9, candidates=4, seed=1)
    assert both.steps_run == 9
    assert (both.tokens != MASK).all()
    assert int(both.trace.opened.sum()) > int((ids == MASK).sum())


def test_a_text_does_not_depend_on_its_batch(denoiser):
    ids, names = texts(), torch.tensor([8, 6, 4, 2])
    for hooks in (
        {"order": by_confidence(2)},
        {"order": by_threshold(0.3)},
        *({"remask": remdm(rule, eta=0.3), "steps": 8} for rule in RULES),
    ):
        options = {"candidates": 3, "seed": 1} | hooks
        out = diffuse(denoiser, PairEnergy(), input_ids=ids, sequence_ids=names, **options)
        for row in range(4):
            alone = diffuse(
                denoiser, PairEnergy(), input_ids=ids[row : row + 1], sequence_ids=names[row : row + 1], **options
            )
            assert torch.equal(alone.tokens[0], out.tokens[row])
            assert int(alone.energy_passes) == int(out.energy_passes[row])


# -- what is wrong


@pytest.mark.parametrize(
    ("hooks", "named"),
    [
        ({"order": lambda c: c.masked.long()}, "order must return bool"),
        ({"order": lambda c: c.masked[:, 1:]}, "order must return bool"),
        ({"order": lambda c: None}, "order must return bool"),
        ({"order": lambda c: torch.ones_like(c.masked)}, "order opens what is not masked in text 0"),
        ({"order": lambda c: c.masked & (c.rows != 1)[:, None]}, "order opens nothing in text 1"),
        ({"tokens": lambda c, o: c.tokens}, "tokens returned 7 for text "),
        ({"tokens": lambda c, o: torch.full_like(c.tokens, V)}, f"tokens returned {V}"),
        ({"tokens": lambda c, o: torch.full_like(c.tokens, -1)}, "tokens returned -1"),
        ({"tokens": lambda c, o: c.tokens[:, 0]}, "tokens must return int64"),
        ({"tokens": lambda c, o: c.tokens.double()}, "tokens must return int64"),
        ({"remask": lambda c: c.alpha}, "remask must return a tensor"),
        ({"remask": lambda c: torch.full(c.masked.shape, 1.5)}, "remask gave sigma 1.5 for text 0 at 5"),
        ({"remask": lambda c: torch.full(c.masked.shape, -0.1)}, "remask gave sigma"),
        ({"remask": lambda c: torch.full(c.masked.shape, torch.nan)}, "remask gave sigma nan"),
        ({"remask": lambda c: torch.ones(c.masked.shape)}, r"in step 2 it must be in \[0, 0.5"),
    ],
)
def test_what_a_hook_returns_is_checked(denoiser, hooks, named):
    ids = texts()
    ids[:, 5] = MASK
    with pytest.raises(ValueError, match=named):
        diffuse(denoiser, input_ids=ids, steps=4, **hooks)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: by_confidence(0), "per_step"),
        (lambda: by_threshold(1.1), "probability"),
        (lambda: left_to_right_blocks(0), "size"),
        (lambda: remdm("best"), "rule"),
        (lambda: remdm(eta=-0.1), "eta"),
        (lambda: remdm(eta=2.0), "eta"),
        (lambda: remdm("loop", t_on=0.1, t_off=0.2), "t_off and t_on"),
        (lambda: remdm("loop", alpha_on=1.0), "alpha_on"),
    ],
)
def test_what_makes_a_hook_is_checked(make, named):
    with pytest.raises(ValueError, match=named):
        make()
    with pytest.raises(TypeError, match="t_on must be a number, got NoneType"):
        remdm("loop", t_on=None)
