"""Problems of three to six steps, drawn from a random.Random; the same one gives the same problem.

Each number lies in 1..999 and divisions leave no rest.
"""

from __future__ import annotations

import random

from problems import Problem, Step

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Mia", "Sam", "Zoe", "Leo", "Ida", "Kim", "Jon")
ITEMS = ("apples", "pens", "books", "coins", "cards", "stamps", "shells", "eggs", "nuts", "beads", "toys", "balls")
STEPS = (3, 6)
_TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


def draw_problem(rng: random.Random) -> Problem:
    """A problem of one of the stories."""
    story = _Story(rng)
    rng.choice((_count, _count, _compare, _shop, _work, _read, _save))(story)
    problem = Problem(" ".join(story.sentences), tuple(story.steps))
    numbers = [number for step in problem.steps for number in (step.left, step.right, step.result)]
    right = STEPS[0] <= len(problem.steps) <= STEPS[1] and all(1 <= number <= 999 for number in numbers)
    return problem if right else draw_problem(rng)


class _Story:
    """What has been told and reckoned so far."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sentences: list[str] = []
        self.steps: list[Step] = []

    def say(self, *ways: str) -> None:
        """One of these sentences."""
        self.sentences.append(self.rng.choice(ways))

    def reckon(self, words: str, left: int, sign: str, right: int) -> int:
        self.steps.append(Step(words, left, sign, right))
        return self.steps[-1].result

    def names(self, count: int) -> list[str]:
        return self.rng.sample(NAMES, count)

    def items(self, count: int) -> list[str]:
        return self.rng.sample(ITEMS, count)

    def divisor(self, number: int) -> int | None:
        """One of 2..9 that divides the number, if there is one and more than 1 comes out."""
        found = [d for d in range(2, 10) if number % d == 0 and number > d]
        return self.rng.choice(found) if found else None


def _count(story: _Story) -> None:
    """Things come and go."""
    rng, name, item = story.rng, story.names(1)[0], story.items(1)[0]
    total, wanted = rng.randint(5, 60), rng.randint(*STEPS)
    story.say(f"{name} has {total} {item}.", f"At first {name} has {total} {item}.")
    while len(story.steps) < wanted:
        events = [_gain, _gain, _lose, _lose, _double, _halve]
        if wanted - len(story.steps) > 1:
            events += [_gain_boxes, _give_each, _gain_boxes, _give_each]
        total = rng.choice(events)(story, name, total)
    story.say(f"How many {item} does {name} have now?", f"How many {item} are left?")


def _gain(story: _Story, name: str, total: int) -> int:
    more = story.rng.randint(2, 60)
    verb = story.rng.choice(("buys", "finds", "gets", "wins"))
    story.say(f"{name} {verb} {more} more.", f"Then {name} {verb} {more} more.")
    return story.reckon(f"{name} {verb} {more} more", total, "+", more)


def _lose(story: _Story, name: str, total: int) -> int:
    if total < 8:
        return _gain(story, name, total)
    fewer = story.rng.randint(2, min(total - 3, 60))
    verb = story.rng.choice(("sells", "loses", "gives away"))
    story.say(f"{name} {verb} {fewer}.", f"Then {name} {verb} {fewer}.")
    return story.reckon(f"{name} {verb} {fewer}", total, "-", fewer)


def _double(story: _Story, name: str, total: int) -> int:
    if total > 100:
        return _lose(story, name, total)
    times = story.rng.randint(2, 3)
    story.say(f"A friend makes it {_TIMES[times]} as many.")
    return story.reckon(f"Now it is {_TIMES[times]} as many", times, "*", total)


def _halve(story: _Story, name: str, total: int) -> int:
    parts = story.divisor(total)
    if parts is None or total < 10:
        return _gain(story, name, total)
    story.say(f"{name} puts them in {parts} equal heaps and keeps one heap.")
    return story.reckon("One heap is kept", total, "/", parts)


def _gain_boxes(story: _Story, name: str, total: int) -> int:
    boxes, size = story.rng.randint(2, 9), story.rng.randint(2, 12)
    story.say(f"{name} buys {boxes} boxes of {size} each.", f"{name} gets {boxes} boxes with {size} in each box.")
    more = story.reckon("The boxes hold", boxes, "*", size)
    return story.reckon(f"With the boxes {name} has", total, "+", more)


def _give_each(story: _Story, name: str, total: int) -> int:
    friends = story.rng.randint(2, 9)
    most = (total - 2) // friends
    if most < 2:
        return _gain_boxes(story, name, total)
    each = story.rng.randint(2, min(12, most))
    story.say(f"{name} gives {each} to each of {friends} friends.", f"Each of {friends} friends gets {each}.")
    fewer = story.reckon("The friends get", friends, "*", each)
    return story.reckon(f"Then {name} has", total, "-", fewer)


def _compare(story: _Story) -> None:
    """Each has more or fewer than another; all of them are counted."""
    rng, item = story.rng, story.items(1)[0]
    names = story.names(rng.choice((2, 3, 3, 4)))
    owned = [rng.randint(5, 40)]
    story.say(f"{names[0]} has {owned[0]} {item}.")
    for number, name in enumerate(names[1:], 1):
        other = rng.randrange(number)
        owned.append(_relate(story, name, names[other], owned[other]))
    total = owned[0]
    for number, name in enumerate(names[1:], 1):
        total = story.reckon(f"With {name} it is", total, "+", owned[number])
    heaps = story.divisor(total)
    if len(names) == 2 and heaps is not None:
        story.say(f"They put all {item} in {heaps} equal boxes.")
        story.reckon("One box holds", total, "/", heaps)
        story.say(f"How many {item} are in one box?")
    else:
        story.say(f"How many {item} do they have together?", f"How many {item} is that in all?")


def _relate(story: _Story, name: str, other: str, owned: int) -> int:
    rng = story.rng
    if rng.random() < 0.35:
        times = rng.randint(2, 5)
        story.say(f"{name} has {_TIMES[times]} as many as {other}.")
        return story.reckon(f"{name} has", times, "*", owned)
    if owned > 10 and rng.random() < 0.5:
        fewer = rng.randint(2, min(owned - 4, 40))
        story.say(f"{name} has {fewer} fewer than {other}.")
        return story.reckon(f"{name} has", owned, "-", fewer)
    more = rng.randint(2, 40)
    story.say(f"{name} has {more} more than {other}.")
    return story.reckon(f"{name} has", owned, "+", more)


def _shop(story: _Story) -> None:
    """Things are bought and paid, or the bill is shared."""
    rng, name = story.rng, story.names(1)[0]
    items = story.items(rng.choice((2, 2, 3)))
    costs = []
    for item in items:
        number, price = rng.randint(2, 9), rng.randint(2, 15)
        story.say(
            f"{name} buys {number} {item} for {price} dollars each.",
            f"{name} takes {number} {item} at {price} dollars each.",
        )
        costs.append(story.reckon(f"The {item} cost", number, "*", price))
    total = costs[0]
    for item, cost in zip(items[1:], costs[1:], strict=True):
        total = story.reckon(f"With the {item} it is", total, "+", cost)
    friends = story.divisor(total)
    if friends is not None and rng.random() < 0.5:
        story.say(f"The bill is shared by {friends} friends.")
        story.reckon("Each friend pays", total, "/", friends)
        story.say("How many dollars does each friend pay?")
    else:
        paid = total + rng.randint(2, 60)
        story.say(f"{name} pays with {paid} dollars.", f"{name} had {paid} dollars.")
        story.reckon(f"{name} keeps", paid, "-", total)
        story.say("How many dollars are left?", f"How many dollars does {name} keep?")


def _work(story: _Story) -> None:
    """Things are made, some are bad, the rest is packed and sold."""
    rng, item = story.rng, story.items(1)[0]
    names = story.names(rng.choice((1, 1, 2)))
    total = 0
    for name in names:
        rate, hours = rng.randint(3, 15), rng.randint(2, 9)
        story.say(
            f"{name} makes {rate} {item} an hour for {hours} hours.",
            f"{name} works {hours} hours and makes {rate} {item} an hour.",
        )
        made = story.reckon(f"{name} makes", hours, "*", rate)
        total = story.reckon(f"With {name} it is", total, "+", made) if total else made
    if total > 10:
        bad = rng.randint(2, min(total - 6, 30))
        story.say(f"Of these {bad} are bad.", f"Then {bad} break.")
        total = story.reckon("Good ones", total, "-", bad)
    size = story.divisor(total)
    if size is None:
        extra = rng.randint(2, 40)
        story.say(f"Then {extra} more are bought.")
        story.reckon("With those it is", total, "+", extra)
        story.say(f"How many {item} are there now?")
        return
    story.say(f"The rest is packed in bags of {size}.")
    bags = story.reckon("The bags are", total, "/", size)
    if len(story.steps) < STEPS[1] and bags < 60:
        price = rng.randint(2, 9)
        story.say(f"A bag is sold for {price} dollars.")
        story.reckon("The bags bring", bags, "*", price)
        story.say("How many dollars do the bags bring?")
    else:
        story.say("How many bags are there?")


def _read(story: _Story) -> None:
    """Pages are read day by day until some are left."""
    rng, name = story.rng, story.names(1)[0]
    daily, days, more = rng.randint(4, 20), rng.randint(2, 9), rng.randint(3, 40)
    pages = daily * days + more + rng.randint(6, 120)
    story.say(f"{name} has a book of {pages} pages.")
    story.say(
        f"{name} reads {daily} pages a day for {days} days.", f"For {days} days {name} reads {daily} pages a day."
    )
    done = story.reckon("In these days it is", days, "*", daily)
    story.say(f"Then {name} reads {more} more.", f"On one more day {name} reads {more} pages.")
    done = story.reckon(f"{name} reads {more} more", done, "+", more)
    left = story.reckon("Pages left", pages, "-", done)
    rest = story.divisor(left)
    if rest is not None:
        story.say(f"The rest takes {rest} days.", f"{name} reads the rest in {rest} equal days.")
        story.reckon("Each day it is", left, "/", rest)
        story.say("How many pages is that a day?")
    else:
        story.say("How many pages are left?")


def _save(story: _Story) -> None:
    """Money is saved, spent, and perhaps shared."""
    rng, name, item = story.rng, story.names(1)[0], story.items(1)[0]
    start, weekly, weeks = rng.randint(5, 60), rng.randint(3, 20), rng.randint(2, 9)
    story.say(f"{name} has {start} dollars.")
    story.say(
        f"{name} saves {weekly} dollars a week for {weeks} weeks.",
        f"For {weeks} weeks {name} saves {weekly} dollars a week.",
    )
    saved = story.reckon(f"{name} saves", weeks, "*", weekly)
    total = story.reckon(f"{name} then has", start, "+", saved)
    number = rng.randint(2, 6)
    price = rng.randint(2, 15)
    if number * price < total - 2:
        story.say(f"{name} buys {number} {item} for {price} dollars each.")
        cost = story.reckon(f"The {item} cost", number, "*", price)
        total = story.reckon(f"{name} keeps", total, "-", cost)
    if len(story.steps) < STEPS[0] or rng.random() < 0.5:
        gift = rng.randint(2, 40)
        story.say(f"An aunt gives {name} {gift} dollars.")
        story.reckon("With the gift it is", total, "+", gift)
    story.say(f"How many dollars does {name} have now?")
