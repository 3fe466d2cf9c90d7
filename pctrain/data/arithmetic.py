r"""Generated arithmetic problems with worked solutions: chains of additions and subtractions.

    prompt    7-1+9+5=
    response  7-1=6;6+9=15;15+5=20 so \boxed{20}
    answer    20

Difficulty is the number of terms and the size of the operands. The words that join the steps are drawn at random: nobody can predict
them, so the validation loss has a floor, and a model that learns its training set by heart is seen to overfit.

The sets are disjoint by prompt. Each has a generator of its own, seeded by (seed, name), and they are drawn in the order test,
validation, rl, train: asking for more training data leaves the problems one measures on as they were.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.config.tree import ProblemsConfig
from pctrain.data.records import Record
from pctrain.files.durable import write_beside

SETS = ("test", "validation", "rl", "train")  # the order in which they are drawn
WITH_RESPONSE = ("validation", "train", "rl")  # of rl, the algorithms that learn from experts read it
BETWEEN_STEPS = (";", ", ", " then ", " and ")
BEFORE_ANSWER = (" so ", " thus ", " hence ", " giving ")


def generate(problems: ProblemsConfig, seed: int) -> dict[str, list[Record]]:
    """The four sets by name (train, validation, test, rl), a function of (problems, seed) alone.

    Raises:
        UserError: there are fewer different problems of this difficulty than records asked for.
    """
    terms = range(problems.min_terms, problems.max_terms + 1)
    space = {n: problems.max_operand**n * 2 ** (n - 1) for n in terms}
    asked = sum(getattr(problems, name) for name in SETS)
    if asked > sum(space.values()):
        raise UserError(
            f"data.problems: {asked} records asked for (train + validation + test + rl), but only {sum(space.values())} different problems "
            f"have {problems.min_terms} to {problems.max_terms} terms with operands 1 to {problems.max_operand}; "
            "ask for fewer, or raise data.problems.max_operand or data.problems.max_terms"
        )
    taken: dict[int, set[int]] = {n: set() for n in terms}
    sets = {}
    for name in SETS:
        rng = random.Random(f"{seed}/{name}")
        drawn = []
        for n, count in _shares(getattr(problems, name), {n: space[n] - len(taken[n]) for n in terms}).items():
            numbers = _draw(rng, space[n], taken[n], count)
            taken[n].update(numbers)
            drawn += [_expression(number, n, problems.max_operand) for number in numbers]
        rng.shuffle(drawn)
        sets[name] = [
            _record(f"{name}-{i}", expression, rng, name in WITH_RESPONSE) for i, expression in enumerate(drawn)
        ]
    return sets


def write_sets(problems: ProblemsConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Writes `folder`/{train,validation,test,rl}.jsonl and returns their paths. The same arguments give the same bytes."""
    sets = generate(problems, seed)  # all of them before the first file: an impossible request leaves nothing behind
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return {name: _write(folder / f"{name}.jsonl", records) for name, records in sets.items()}
    except OSError as error:
        raise UserError(f"{folder}: the problems cannot be written: {error.strerror}") from None


def _shares(count: int, room: dict[int, int]) -> dict[int, int]:
    """`count` records dealt equally over the lengths, none above its room."""
    shares = {}
    # The narrowest length first: the wider ones take what it has no room for.
    for left, n in zip(range(len(room), 0, -1), sorted(room, key=room.__getitem__)):
        shares[n] = min(room[n], count // left)
        count -= shares[n]
    return dict(sorted(shares.items()))


def _draw(rng: random.Random, space: int, taken: set[int], count: int) -> list[int]:
    """`count` different numbers below `space` that are not taken."""
    if space < 4 * (count + len(taken)):
        return rng.sample([number for number in range(space) if number not in taken], count)
    drawn: dict[int, None] = {}  # keeps the order; the space is wide, so at most every fourth draw is in vain
    while len(drawn) < count:
        number = rng.randrange(space)
        if number not in taken:
            drawn[number] = None
    return list(drawn)


def _expression(number: int, terms: int, max_operand: int) -> tuple[list[int], str]:
    """The number as one problem: `terms` operands from 1 to `max_operand` and a sign before each but the first."""
    number, signs = divmod(number, 2 ** (terms - 1))
    operands = []
    for _ in range(terms):
        number, digit = divmod(number, max_operand)
        operands.append(digit + 1)
    return operands, "".join("+-"[signs >> i & 1] for i in range(terms - 1))


def _record(name: str, expression: tuple[list[int], str], rng: random.Random, with_response: bool) -> Record:
    operands, signs = expression
    prompt = str(operands[0]) + "".join(f"{sign}{operand}" for sign, operand in zip(signs, operands[1:])) + "="
    total, steps = operands[0], []
    for sign, operand in zip(signs, operands[1:]):
        result = total + operand if sign == "+" else total - operand
        steps.append(f"{total}{sign}{operand}={result}")
        total = result
    return Record(
        id=name, prompt=prompt, response=_solution(steps, total, rng) if with_response else None, answer=str(total)
    )


def _solution(steps: Sequence[str], answer: int, rng: random.Random) -> str:
    text = steps[0]
    for step in steps[1:]:
        text += rng.choice(BETWEEN_STEPS) + step
    return f"{text}{rng.choice(BEFORE_ANSWER)}\\boxed{{{answer}}}"


def _write(path: Path, records: list[Record]) -> Path:
    lines = [{"prompt": record.prompt, "response": record.response, "answer": record.answer} for record in records]
    write_beside(path, "".join(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n" for line in lines))
    return path
