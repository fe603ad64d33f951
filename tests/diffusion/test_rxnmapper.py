"""A real masked language model of chemical reactions fills in masked parts, with and without a callable energy."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pyquiet import MaskedDenoiser, diffuse

REACTIONS = {
    "esterification": "CC(=O)O.OCC>>CC(=O)OCC",
    "acylation": "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1",
    "Suzuki coupling": "OB(O)c1ccccc1.Brc1ccc(C(=O)OC)cc1>>COC(=O)c1ccc(-c2ccccc2)cc1",
    "reduction": "CC(C)(C)OC(=O)N1CCC(=O)CC1>>CC(C)(C)OC(=O)N1CCC(O)CC1",
    "substitution": "O=C(CBr)c1ccccc1.c1ccc2[nH]ccc2c1>>O=C(Cn1ccc2ccccc21)c1ccccc1",
    "amide coupling": "OC(=O)c1ccncc1.NC1CCCCC1>>O=C(NC1CCCCC1)c1ccncc1",
}
COPIES, CANDIDATES = 5, 16


def mistakes(tokens: list[str]) -> int:
    """Brackets that are not closed or opened, and ring numbers without a second one, molecule by molecule."""
    count, depth, rings = 0, 0, Counter()
    for token in [*tokens, "."]:
        if token == "(":
            depth += 1
        elif token == ")":
            count, depth = (count, depth - 1) if depth else (count + 1, 0)
        elif token.isdigit() or token.startswith("%"):
            rings[token] += 1
        elif token in (".", ">>"):
            count += depth + sum(number % 2 for number in rings.values())
            depth, rings = 0, Counter()
    return count


@pytest.fixture(scope="module")
def chemist():
    from ..conftest import SHARED

    path = SHARED / "models" / "rxnmapper-albert-mlm"
    if not path.is_dir():
        pytest.skip(f"no model at {path}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    return MaskedDenoiser(model, tokenizer.mask_token_id), tokenizer


@pytest.fixture(scope="module")
def problem(chemist):
    """Texts, their padding, what is masked (six tokens in ten, no special one), and the banned tokens."""
    _, tokenizer = chemist
    batch = tokenizer(list(REACTIONS.values()), padding=True, return_tensors="pt")
    special = torch.isin(batch["input_ids"], torch.tensor([*tokenizer.all_special_ids]))
    chance = torch.rand(special.shape, generator=torch.Generator().manual_seed(0))
    mask = (chance < 0.6) & ~special
    banned = torch.zeros(len(tokenizer), dtype=torch.bool)
    banned[: tokenizer.mask_token_id] = True  # [PAD], the unused ones, [UNK], [CLS] and [SEP]
    texts = (batch["input_ids"], batch["attention_mask"], mask)
    return *(x.repeat(COPIES, 1) for x in texts), banned


def filled(chemist, problem, energy, **options):
    denoiser, _ = chemist
    input_ids, attention_mask, mask, banned = problem
    texts = {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask, "banned": banned}
    return diffuse(denoiser, energy, **{**texts, "steps": 2, "candidates": CANDIDATES, **options})


def balanced(chemist, tokens: torch.Tensor) -> float:
    """The share of texts without mistakes."""
    _, tokenizer = chemist
    return sum(mistakes(tokenizer.convert_ids_to_tokens(row)) == 0 for row in tokens) / len(tokens)


@pytest.fixture(scope="module")
def unbalance(chemist):
    _, tokenizer = chemist

    def energy(candidates, input_ids, time, log_mu):
        rows = [mistakes(tokenizer.convert_ids_to_tokens(row)) for row in candidates.flatten(0, 1)]
        return 5.0 * torch.tensor(rows, dtype=torch.float32).view(candidates.shape[:2])

    return energy


@pytest.fixture(scope="module")
def both(chemist, problem, unbalance):
    return filled(chemist, problem, None), filled(chemist, problem, unbalance)


def test_the_counting_of_mistakes(chemist):
    _, tokenizer = chemist
    for text, expected in (
        *((reaction, 0) for reaction in REACTIONS.values()),
        ("CC(=O", 1),
        ("CC)C(", 2),
        ("c1ccccc1.C1CC", 1),
        ("c1ccccc1>>c1cc2", 2),
        ("C1.C1", 2),
    ):
        assert mistakes(tokenizer.tokenize(text)) == expected, text


def test_the_energy_balances_brackets_and_rings(chemist, both):
    plain, corrected = (balanced(chemist, result.tokens) for result in both)
    assert 0.1 < plain < 0.6
    assert corrected > plain + 0.2
    assert (both[0].energy_passes == 0).all()
    assert (both[1].energy_passes == CANDIDATES * both[1].denoiser_calls).all()
    assert (both[1].ess >= 1).all()
    assert (both[1].ess < CANDIDATES).any()


def test_what_is_given_stays_and_what_is_masked_is_filled(chemist, problem, both):
    denoiser, _ = chemist
    input_ids, _, mask, banned = problem
    for result in both:
        assert torch.equal(result.tokens[~mask], input_ids[~mask])
        new = result.tokens[mask]
        assert not (new == denoiser.mask_id).any()
        assert not banned[new].any()


def test_the_model_knows_its_chemistry(problem, both):
    """It finds again much more of what was masked than the commonest tokens would."""
    input_ids, _, mask, _ = problem
    commonest = (input_ids[mask] == input_ids[mask].mode().values).float().mean()
    for result in both:
        assert (result.tokens == input_ids)[mask].float().mean() > commonest + 0.2


def test_it_is_the_seeds_doing(chemist, problem, unbalance, both):
    again = filled(chemist, problem, unbalance)
    assert torch.equal(again.tokens, both[1].tokens)
    some = tuple(x[5:9] for x in problem[:3])
    part = filled(chemist, (*some, problem[3]), unbalance, sequence_ids=torch.arange(5, 9))
    assert torch.equal(part.tokens, both[1].tokens[5:9])
    other = filled(chemist, (*some, problem[3]), unbalance, sequence_ids=torch.arange(5, 9), seed=1)
    assert not torch.equal(other.tokens, part.tokens)
