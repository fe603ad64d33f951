"""Answers: found, brought to one spelling, compared, and voted on."""

import asyncio
import itertools
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyquiet.scaling import answers, symbolic
from pyquiet.scaling.answers import equal, extract, normalise
from pyquiet.scaling.votes import Vote, Votes, first, majority, pass_at_k, weighted

math_verify = pytest.importorskip("math_verify")
SLOW = ("9^{9^{9^{9}}}", "9^{9^{9^{9^9}}}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5} #### 6", "5"),
        (r"\boxed{} The answer is 7.", "7"),
        ("The answer is 3.\nNo: the final answer is: 4.5.\nBye", "4.5"),
        ("The answer is 4. Is it?", "4"),
        ("1 + 1\n#### 1,234\n", "1,234"),
        ("I do not know", None),
    ],
)
def test_an_answer_is_found(text: str, answer: str | None) -> None:
    assert extract(text) == answer


def test_a_text_that_goes_round_in_circles_costs_no_more_than_its_length() -> None:
    assert extract("\\boxed{" * 50_000) is None  # half an hour if it went as the square
    assert extract("the answer is 1" + " " * 100_000 + "apple") == "1" + " " * 100_000 + "apple"


@pytest.mark.parametrize(
    "answer",
    ["3" * 5000, "0." + "3" * 5000, "1/" + "7" * 5000, "(1," * 900 + "2" + ")" * 900, "1 " + "ab. " * 20_000 + "!"],
)
def test_an_answer_of_a_model_that_goes_round_in_circles_is_compared_as_it_stands(answer: str) -> None:
    assert equal(answer, f" {answer} ")
    assert not equal(answer, "3")
    assert majority([Vote("3", 0.5, 0), Vote(answer, 0.0, 1), Vote("3.0", 0.5, 2)]) == "3"


def test_the_longest_answers_are_compared_part_by_part() -> None:
    depth = answers.LONGEST // 3 - 1
    assert not equal("(," * depth + "1" + ")" * depth, "(," * depth + "2" + ")" * depth)


def test_declared_patterns_take_the_place_of_the_usual_ones() -> None:
    assert extract("Result> 5; Result> 6; the answer is 7", [r"Total> (\d)", r"Result> (\d)"]) == "6"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("$5$", "5.0"),
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        (r"\$1,234.50", "1234.5"),
        ("5 cm", "5"),
        (r"5\text{ cm}^2", "5"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"\dfrac{3}{6}", "1/2"),
        (r"\frac12", "0.5"),
        (r"-2\frac{1}{2}", "-2.5"),
        (r"3\times10^{2}", "300"),
        ("x = 7", "7"),
        (r"\text{(C)}", "C"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
        (r"\{2, 1\}", r"\{1,2\}"),
        ("2, 1", "1,2"),
        (r"\sqrt{8}", r"2\sqrt2"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\u22123", "-3"),
    ],
)
def test_two_spellings_of_one_answer(a: str, b: str) -> None:
    assert equal(a, b)
    assert equal(b, a)
    assert equal(a, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("5", "6"),
        ("0.333", "1/3"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "(1,2]"),
        ("(1,2)", "(1,2,3)"),
        (r"\{1,1\}", r"\{1,2\}"),
        (r"\sqrt{8}", r"2\sqrt3"),
        ("1/0", "1/2"),
        ("yes", "no"),
        ("", "5"),
        ("12", "1,2"),
    ],
)
def test_different_answers(a: str, b: str) -> None:
    assert not equal(a, b)
    assert not equal(b, a)


def test_normalising_twice_changes_nothing() -> None:
    for text in (r"\dfrac12", r"x=\text{5 cm}", "1,234", r"\left(1,2\right)", "The End."):
        assert normalise(normalise(text)) == normalise(text)


def test_an_expression_that_takes_too_long_is_killed_and_the_next_one_answered() -> None:
    assert not symbolic.same_expression(*SLOW, 0.2)
    assert symbolic._worker._process is None
    assert equal(r"\sqrt{18}", r"3\sqrt{2}", seconds=30)


def test_expressions_are_compared_in_threads_and_in_an_event_loop() -> None:
    pairs = [(rf"\sqrt{{{2 * n * n}}}", rf"{n}\sqrt{{2}}") for n in range(2, 10)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda pair: equal(*pair, seconds=30), pairs))

    async def in_loop() -> bool:
        return equal(r"\sqrt{800}", r"20\sqrt{2}", seconds=30)

    assert asyncio.run(in_loop())


def test_a_pair_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(symbolic._worker, "ask", lambda *pair: asked.append(pair))
    for a, b in itertools.permutations((r"\sqrt{72}", r"\sqrt{73}")):
        assert not equal(a, b)
    assert len(asked) == 1


def test_without_the_library_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "available", lambda: False)
    answers._can_compare.cache_clear()
    pairs = ((r"\sqrt{50}", r"5\sqrt2"), (r"\sqrt{98}", r"7\sqrt2"), ("1/2", "0.5"))
    with pytest.warns(UserWarning, match="pip install") as caught:
        assert [equal(*pair) for pair in pairs] == [False, False, True]
    answers._can_compare.cache_clear()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("file", "solution", "answer", "agree"),
    [
        ("math/math500.jsonl", "solution", "answer", 500),
        ("math/aime24.jsonl", "solution", "answer", 29),  # one solution boxes nothing
        ("gsm8k/test.jsonl", "answer", None, 1319),
    ],
)
def test_gold_solutions_give_the_answers_of_their_files(
    shared: Path, file: str, solution: str, answer: str | None, agree: int
) -> None:
    rows = [json.loads(line) for line in (shared / "data" / file).read_text(encoding="utf-8").splitlines()]
    pairs = [(extract(r[solution]), str(r[answer] if answer else r[solution].rpartition("#### ")[2])) for r in rows]
    assert sum(found is not None and equal(found, gold) for found, gold in pairs) == agree


def test_majority_and_its_ties() -> None:
    ballot = [Vote("5", 0.9, 0), Vote("6", 0.2, 1), Vote("5.0", 0.5, 2), Vote("6", 0.4, 3), Vote(None, 0.0, 4)]
    assert majority(ballot) == "6"  # two each; mean scores 0.7 and 0.3
    assert majority([*ballot, Vote("5", 9.0, 5)]) == "5"
    assert majority([Vote("7", 0.5, 1), Vote("8", 0.5, 0)]) == "8"
    assert majority([Vote("7", 0.0, 2), Vote("7.0", 0.0, 1), Vote("8", 0.5, 0)]) == "7.0"
    assert majority([Vote(None, 0.0, 0)]) is None
    assert all(majority(order) == "6" for order in itertools.permutations(ballot))


def test_weights() -> None:
    ballot = [Vote("5", 3.0, 0), Vote("5", 3.0, 1), Vote("6", 0.1, 2)]
    assert majority(ballot) == "5"
    assert weighted(ballot) == "6"  # exp(-0.1) > 2 exp(-3)
    assert weighted(ballot, lambda vote: 1 - (0.2 if vote.chain == 2 else 0.5)) == "5"
    assert first([Vote("5", 0, 0, ended=2.0), Vote(None, 0, 1, ended=0.5), Vote("6", 0, 2, ended=1.0)]) == "6"
    assert first([]) is None


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n, k in ((4, 1), (5, 2), (6, 6)):
        for correct in range(n + 1):
            subsets = list(itertools.combinations(range(n), k))
            assert math.isclose(pass_at_k(n, correct, k), sum(min(s) < correct for s in subsets) / len(subsets))
    for bad in ((4, 5, 1), (4, 1, 5), (0, 0, 1), (4, 1, 0)):
        with pytest.raises(ValueError, match="must be at"):
            pass_at_k(*bad)


def streams(count: int) -> "itertools.chain[list[Vote]]":
    """Random votes of up to 9 chains of three answers, some without one, in the order in which they end."""
    rng = random.Random(0)
    for _ in range(count):
        ballot = [Vote(rng.choice(["1", "1", "2", "3", None]), rng.random(), i) for i in range(rng.randint(1, 9))]
        rng.shuffle(ballot)
        yield ballot


def changed(rule: type[Votes]) -> tuple[int, int]:
    """How often the winner changes after the rule said it could not, and how many chains it would have saved."""
    wrong = saved = 0
    for ballot in streams(10_000):
        running, early = rule(), None
        for place, vote in enumerate(ballot, 1):
            running.take(vote)
            if running.decided(len(ballot) - place):
                early, saved = running.leader, saved + len(ballot) - place
                break
        wrong += early is not None and not equal(early, majority(ballot) or "")
    return wrong, saved


def test_early_majority_never_changes_the_winner() -> None:
    class Hasty(Votes):
        """Ends at a possible tie."""

        def decided(self, open_chains: int) -> bool:
            return super().decided(open_chains - 1)

    wrong, saved = changed(Votes)
    assert wrong == 0
    assert saved > 3000
    assert changed(Hasty)[0] > 100
