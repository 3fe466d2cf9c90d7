r"""Generated arithmetic problems with worked solutions: chains of additions and subtractions.

    prompt    7-1+9+5=
    response  7-1=6;6+9=15;15+5=20 so \boxed{20}
    answer    20

The number of terms and the size of the operands set the difficulty. The words that join the steps are random and cannot
be predicted. So the validation loss has a floor, and a model that memorizes its training set visibly overfits.

The sets are disjoint by prompt. Each set has its own generator, seeded by (seed, name), and they are drawn in the order
test, validation, rl, train. Asking for more training data therefore does not change the problems that are used for
measuring.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.config.tree import ProblemsConfig
from pctrain.data.records import Record
from pctrain.files.durable import write_atomically

SETS = ("test", "validation", "rl", "train")  # the order in which they are drawn
WITH_RESPONSE = ("validation", "train", "rl")  # in rl, only algorithms that learn from experts read the response
BETWEEN_STEPS = (";", ", ", " then ", " and ")
BEFORE_ANSWER = (" so ", " thus ", " hence ", " giving ")


def generate(problems: ProblemsConfig, seed: int) -> dict[str, list[Record]]:
    """Return the four sets by name (train, validation, test, rl). They depend only on (problems, seed).

    Raises:
        UserError: fewer different problems of this difficulty exist than the config asks for.
    """
    terms = range(problems.min_terms, problems.max_terms + 1)
    space = {n: problems.max_operand**n * 2 ** (n - 1) for n in terms}
    asked = sum(getattr(problems, name) for name in SETS)
    if asked > sum(space.values()):
        raise UserError(
            f"data.problems: {asked} records asked for (train + validation + test + rl), "
            f"but only {sum(space.values())} different problems have {problems.min_terms} to {problems.max_terms} "
            f"terms with operands 1 to {problems.max_operand}. "
            "Ask for fewer records, or raise data.problems.max_operand or data.problems.max_terms."
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
    """Write `folder`/{train,validation,test,rl}.jsonl and return their paths.

    The same arguments give the same bytes.
    """
    sets = generate(problems, seed)  # before the first file is written, so an impossible request leaves nothing behind
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return {name: _write(folder / f"{name}.jsonl", records) for name, records in sets.items()}
    except OSError as error:
        raise UserError(f"{folder}: the problems cannot be written: {error.strerror}") from None


def _shares(count: int, room: dict[int, int]) -> dict[int, int]:
    """Deal `count` records equally over the numbers of terms, none above its room."""
    shares = {}
    # The narrowest first: the wider ones take what it has no room for.
    for left, n in zip(range(len(room), 0, -1), sorted(room, key=room.__getitem__), strict=True):
        shares[n] = min(room[n], count // left)
        count -= shares[n]
    return dict(sorted(shares.items()))


def _draw(rng: random.Random, space: int, taken: set[int], count: int) -> list[int]:
    """Draw `count` different numbers below `space` that are not taken."""
    if space < 4 * (count + len(taken)):
        return rng.sample([number for number in range(space) if number not in taken], count)
    drawn: dict[int, None] = {}  # keeps the order; the space is large, so at most every fourth draw is rejected
    while len(drawn) < count:
        number = rng.randrange(space)
        if number not in taken:
            drawn[number] = None
    return list(drawn)


def _expression(number: int, terms: int, max_operand: int) -> tuple[list[int], str]:
    """Decode a number into a problem: `terms` operands from 1 to `max_operand`, and a sign before all but the first."""
    number, signs = divmod(number, 2 ** (terms - 1))
    operands = []
    for _ in range(terms):
        number, digit = divmod(number, max_operand)
        operands.append(digit + 1)
    return operands, "".join("+-"[signs >> i & 1] for i in range(terms - 1))


def _record(name: str, expression: tuple[list[int], str], rng: random.Random, with_response: bool) -> Record:
    operands, signs = expression
    signed = list(zip(signs, operands[1:], strict=True))
    prompt = str(operands[0]) + "".join(f"{sign}{operand}" for sign, operand in signed) + "="
    total, steps = operands[0], []
    for sign, operand in signed:
        result = total + operand if sign == "+" else total - operand
        steps.append(f"{total}{sign}{operand}={result}")
        total = result
    response = _solution(steps, total, rng) if with_response else None
    return Record(id=name, prompt=prompt, response=response, answer=str(total))


def _solution(steps: Sequence[str], answer: int, rng: random.Random) -> str:
    text = steps[0]
    for step in steps[1:]:
        text += rng.choice(BETWEEN_STEPS) + step
    return f"{text}{rng.choice(BEFORE_ANSWER)}\\boxed{{{answer}}}"


def _write(path: Path, records: list[Record]) -> Path:
    lines = [{"prompt": record.prompt, "response": record.response, "answer": record.answer} for record in records]
    write_atomically(
        path, "".join(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n" for line in lines)
    )
    return path
