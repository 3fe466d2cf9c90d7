r"""Fuzzed answers through every part of the verifier: no exception, no hang, and no reward for a wrong answer."""

import random
from fractions import Fraction

import pytest

from pctrain.config.tree import RewardConfig
from pctrain.reward import VerifierPool
from pctrain.reward.verdict import FAULTS
from pctrain.reward.verifiers import VERIFIERS

PIECES = [
    *"0123456789xyzabeiAC+-*/^_=<>!()[]{}|,.;:$%&~\\ '\"",
    *"\uff10\u0665²½\u2212∞≠",
    "\\frac",
    "\\frac{1}{2}",
    "\\sqrt{2}",
    "\\sqrt",
    "\\boxed{",
    "\\boxed{5}",
    "\\text{",
    "\\text{ or }",
    "\\left(",
    "\\right)",
    "\\pi",
    "\\infty",
    "\\cdot",
    "\\times",
    "10^{3}",
    "^{",
    "_{2}",
    "\\{",
    "\\}",
    "\\cup",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "\\int_0^1",
    "\\sum",
    "\\pm",
    "\\%",
    "\\circ",
    "x+1",
    "5",
    "nan",
    " or ",
    "not ",
    "\n",
    "\x00",
    "answer is ",
    "\u200b",
]


def garbage(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 24)))


def golds(rng: random.Random) -> tuple[str, list[str]]:
    """A gold answer, and answers that are known to be wrong for it."""
    n, m = rng.randint(2, 999), rng.randint(2, 40)
    kind = rng.randrange(6)
    if kind == 0:
        return str(n), [
            str(n + rng.randint(1, 9)),
            str(-n),
            f"{n}0",
            f"{n}.5",
            f"{n + m}-{m}",
            f"{n} or {n + m}",
            f"{n},{n + m}",
            f"\\{{{n}\\}}",
            f"[{n - 1},{n + 1}]",
            f"{n}x",
            f"{n}^2",
            f"\\sqrt{{{n}}}",
            f"{n}\\text{{ million}}",
            f"\\frac{{{2 * n}}}{{2}}",
            f"{n}_8",
            f"\\pm {n}",
            f"\\neq {n}",
            f"{n * 100}\\%",
            f"{n}+0",
            f"{n}!",
            f"{n}i",
            f"{n} {m}",
        ]
    if kind == 1:
        f = Fraction(n, m)
        return f"\\frac{{{n}}}{{{m}}}", [
            f"\\frac{{{n + 1}}}{{{m}}}",
            f"{float(f) + 0.001:.6f}",
            f"-\\frac{{{n}}}{{{m}}}",
            f"{n}",
            f"\\frac{{{n}}}{{0}}",
            f"\\frac{{{n}}}{{{m}}}+0",
            f"\\frac{{{n}}}{{{m}}},1",
            f"\\frac{{{n}}}{{{m}}} x",
        ]
    if kind == 2:
        return f"{n}.25", [f"{n}.26", f"{n}25", f"{n},25", f"{n}", f"-{n}.25", f"{n}.25+0", f"{n}.2 5", f"{n}.25x"]
    if kind == 3:
        return f"{n}x+{m}", [
            f"{n}x-{m}",
            f"{n + 1}x+{m}",
            f"{n}x+{m}=0",
            f"{n}x+{m} \\text{{ or }} {n}x",
            f"\\{{{n}x+{m}, 1\\}}",
            f"{n}y+{m}",
            f"\\pm({n}x+{m})",
            f"\\int ({n}x+{m}) dx",
            f"{n}x^2+{m}",
            f"{n}x+{m}+9^{{9^9}}",
            f"\\neq {n}x+{m}",
        ]
    if kind == 4:
        return f"({n},{n + m})", [
            f"[{n},{n + m}]",
            f"({n},{n + m}]",
            f"({n + m},{n})",
            f"({n},{n + m + 1})",
            f"{n}",
            f"({n},{n + m})\\cup(0,1)",
        ]
    return f"\\{{{n},{n + m}\\}}", [
        f"{n}",
        f"\\{{{n},{n + m},{n + m + 1}\\}}",
        f"\\{{{n}\\}}",
        f"\\{{{n},{n + m + 1}\\}}",
        f"{n} \\text{{ and not }} {n + m}",
    ]


def wrapped(rng: random.Random, answer: str) -> str:
    """A response that commits to `answer`: prose and boxes around it change nothing."""
    before = rng.choice(
        [
            "",
            "so ",
            "\\boxed{5} no, ",
            "{ } \\text{a} ",
            "the answer is 7. ",
            garbage(rng).replace("\\boxed{", "") + " ",
        ]
    )
    after = rng.choice(["", ".", " \\boxed{1", "</s> 5", "\n\nDone, or 7?", " } }"])
    return (
        before
        + rng.choice(["\\boxed{%s}", "\\boxed{ %s }", "\\boxed{%s.}", "\\boxed{$%s$}", "\\boxed {%s}"]) % answer
        + after
    )


def fuzz(seed: int, count: int) -> None:
    rng = random.Random(seed)
    wrong, odd = [], []
    while len(wrong) < count // 2:
        gold, answers = golds(rng)
        wrong += [(wrapped(rng, answer), gold) for answer in rng.sample(answers, min(4, len(answers)))]
    for _ in range(count - len(wrong)):
        gold = rng.choice(["5", "\\frac{1}{2}", "x+1", "\\sqrt{2}", "(0,1)", "\\{1,2\\}", "C", garbage(rng)])
        odd.append((rng.choice(["\\boxed{%s}", "%s", "answer: %s", "\\boxed{\\text{%s}}"]) % garbage(rng), gold))
    for response, gold in odd:
        for verifier in VERIFIERS.values():
            verifier.settle(response, gold)
    with VerifierPool(RewardConfig(workers=2, timeout=20)) as pool:
        paid = [pair for pair, verdict in zip(wrong, pool.score(wrong), strict=True) if verdict.reward]
        assert paid == []
        verdicts = pool.score(odd)
    faults = [(pair, verdict) for pair, verdict in zip(odd, verdicts, strict=True) if verdict.cause in FAULTS]
    assert faults == []
    assert {verdict.cause for verdict in verdicts} == {
        "right",
        "wrong",
        "no_box",
        "parse_error",
    }  # the garbage reaches every part


def test_fuzzed_answers():
    fuzz(seed=0, count=1_500)


@pytest.mark.full
def test_many_fuzzed_answers():
    fuzz(seed=1, count=10_000)
