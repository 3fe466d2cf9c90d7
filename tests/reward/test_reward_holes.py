r"""Adversarial answers that a policy could be paid for by mistake, and honest answers that must stay right."""

import time

import pytest

from pctrain.config.tree import RewardConfig
from pctrain.reward import VerifierPool
from pctrain.reward.boxed import last_boxed
from pctrain.reward.verifiers import VERIFIERS


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(RewardConfig(workers=1, timeout=60)) as pool:
        yield pool


WRONG = [
    # An unevaluated expression, or several numbers, where the gold answer is a number.
    ("2+3", "5"),
    ("5+0", "5"),
    ("5 or 7", "5"),
    (r"5 \text{ or } 7", "5"),
    ("5,7", "5"),
    (r"\{5\}", "5"),
    ("[5]", "5"),
    ("(4,6)", "5"),
    ("[5, 5]", "5"),
    (r"5 \lor 7", "5"),
    (r"\pm 5", "5"),
    ("5 7", "5"),
    ("5!", "120"),
    ("x=5,x=7", "5"),
    ("x=4=5", "5"),
    ("x!=5", "5"),
    (r"x \neq 5", "5"),
    (r"x \ne = 5", "5"),
    ("5x", "5"),
    ("5i", "5"),
    ("5 x", "5"),
    ("5 ab", "5"),
    (r"5\pi", "5"),
    ("5 pi", "5"),
    (r"\sin 5", "5"),
    (r"\operatorname{sin} 5", "5"),
    (r"\sqrt{5}", "5"),
    ("5e0", "5"),
    ("--5", "5"),
    ("5-", "5"),
    (r"|-5|", "5"),
    # Prose and hidden signs.
    ("not 5", "5"),
    (r"\text{not } 5", "5"),
    (r"\text{less than } 5", "5"),
    (r"\text{-}5", "5"),
    (r"5\text{3}", "5"),
    (r"5\text{}^2", "5"),
    ("the answer is 5", "5"),
    (r"5 \text{ million}", "5"),
    ("5 million", "5"),
    ("5 squared", "5"),
    (r"5\text{ dozen}", "5"),
    # Percent, units, bases.
    (r"500\%", "5"),
    (r"50\%", "0.5"),
    ("0.5", r"50\%"),
    (r"5 \text{ cm}", r"5 \text{ m}"),
    ("5 km", "5 miles"),
    ("0x5", "5"),
    ("5_7", "5"),
    ("101_2", "5"),
    ("101_{2}", "101_{3}"),
    ("101_2", "101"),
    ("5", "101_2"),
    (r"101_{\text{two}}", "5"),
    # Numbers that are none.
    ("NaN", "5"),
    ("inf", "5"),
    (r"\infty", "5"),
    ("5/0", "5"),
    (r"\frac{0}{0}", "0"),
    ("", "5"),
    ("{}", "5"),
    ("-", "5"),
    (".", "0"),
    ("0", "0.0000001"),
    ("1000000.5", "1000000"),
    ("0.33", "1/3"),
    ("0.333334", "1/3"),
    ("1e3", "1000"),
    # Digits of other scripts, powers among them.
    ("\u0665", "5"),
    ("५", "5"),
    ("⑤", "5"),
    ("5²", "52"),
    ("5²", "5"),
    ("½", "0.5"),
    ("5\u200b0", "50"),
    ("\u2164", "5"),
    # Sizes that hurt.
    ("9" * 5000, "9"),
    ("9" * 5001, "9" * 5000),
    ("1" + "0" * 399 + "1", "1" + "0" * 400),
    ("5" + " " * 5000 + "x", "5"),
    ("{" * 200 + "5" + "}" * 200, "5"),
    (r"9^{9^{9^9}}", "5"),
    ("9^9^9^9", "5"),
    (r"5\times10^{999999999}", "5"),
    (r"5\times 10^{999}", "5"),
    ("(" * 1500, "5"),
    # The same, where the gold answer is an expression.
    (r"\sqrt{2} \text{ or } \sqrt{3}", r"\sqrt{2}"),
    (r"\sqrt{2},\sqrt{3}", r"\sqrt{2}"),
    (r"\{\sqrt{2}\}, 1", r"\sqrt{2}"),
    ("(0,10)", r"\sqrt{2}"),
    ("[1,2]", "(1,2)"),
    ("(1,2]", "(1,2)"),
    ("(2,1)", "(1,2)"),
    (r"[0,1]\cup[2,3]", "[0,1]"),
    ("1,2,3", r"\{1,2\}"),
    ("1", r"\{1,2\}"),
    (r"\pm\sqrt{2}", r"\sqrt{2}"),
    (r"\sqrt{2}=\sqrt{3}", r"\sqrt{3}"),
    (r"\sqrt{2}=\sqrt{3}", r"\sqrt{2}"),
    (r"1=2=\sqrt{2}", r"\sqrt{2}"),
    ("x+1=0", "x+1"),
    (r"x+1 \text{ is not }", "x+1"),
    (r"\neq x+1", "x+1"),
    (r"\int_0^1 2x\,dx\,\sqrt{2}", r"\sqrt{2}"),
    (r"\sum_{i=1}^{1} \sqrt{2}", r"\sqrt{2}"),
    (r"\lim_{x\to 2}\sqrt{x}", r"\sqrt{2}"),
    (r"\binom{2}{1}\sqrt{2}", r"2\sqrt{2}"),
    (r"\frac{d}{dx} x^2", "2x"),
    ("3!x", "6x"),
    (r"$\sqrt{3}$ $\sqrt{2}$", r"\sqrt{2}"),
    (r"\sqrt{2}%comment", r"\sqrt{2}"),
    (r"\text{nan}", r"\sqrt{2}"),
    ("0/0", "x"),
    (r"\frac{\sqrt{2}}{0}", r"\sqrt{2}"),
    ("x<6", "x<5"),
    (r"x\le5", "x<5"),
    ("x+9^{9^{9}}", "x+1"),
    ("x^{99999999}", "x+1"),
    ("x²", "x^2+1"),
    (r"\sqrt{2}\cdot\frac{0}{0}", r"\sqrt{2}"),
    ("{" * 300 + "x" + "}" * 300, "x+1"),
    (r"\frac{1}{" * 300 + "x" + "}" * 300, "x+1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"\text{Tuesday}", r"\text{Monday}"),
    (r"\left(" * 40 + "x", "x+1"),
    ("5", "x"),
    ("x+1 or x+2", "x+1"),
]

LENIENT_PAYS = {
    (r"500\%", "5"),
    (r"50\%", "0.5"),
    ("0.5", r"50\%"),
    ("{" * 200 + "5" + "}" * 200, "5"),
}  # its rules 2 and 3


@pytest.mark.parametrize("name", ["strict", "exact", "lenient"])
def test_no_hole_is_paid_for(pool, name):
    skip = LENIENT_PAYS if name == "lenient" else set()
    pairs = [(f"so \\boxed{{{answer}}}", gold) for answer, gold in WRONG if (answer, gold) not in skip]
    with VerifierPool(RewardConfig(verifier=name, workers=1, timeout=60)) as verifier:
        verdicts = verifier.score(pairs)
    paid = [(pair[0][-80:], pair[1][-80:]) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.reward]
    faults = [
        (pair[0][-80:], v)
        for pair, v in zip(pairs, verdicts, strict=True)
        if v.cause not in ("wrong", "parse_error", "no_box")
    ]
    assert paid == [] and faults == []


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("\uff15", "5"),
        ("\u22125", "-5"),
        (r"5^\circ", "5"),
        (r"\$5", "5"),
        (r"5\%", "5"),
        ("50", r"50\%"),
        (r"5\text{ cm}^2", "5"),
        ("5 apples", "5"),
        (r"x_1 = 5", "5"),
        ("f(x) = 5", "5"),
        (r"\angle ABC = 5", "5"),
        (r"\text{Answer: } 5", "5"),
        (r"\mathbf{5}", "5"),
        ("1{,}234", "1234"),
        (r"\frac12", "0.5"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"1\frac{1}{2}", "1.5"),
        ("0.333333", "1/3"),
        (r"\left(5\right)", "5"),
        (r"5\text{ m}", r"5\text{ meters}"),
        ("101", "101_2"),
        ("101_2", "101_{2}"),
        ("FF_{16}", "ff_{16}"),
        (r"3\times 10^{-2}", "0.03"),
        ("1" * 300, "1" * 300),
        ("1" * 5000, "1" * 5000),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("y = x+1", "x+1"),
        ("x=1,x=2", r"\{1,2\}"),
        (r"\pm 5", r"\pm5"),
        (r"x \in (0,1)", "(0,1)"),
        (r"\infty", r"\infty"),
        ("n!", "n!"),
        (r"\frac{\pi}{2}", r"\frac{1}{2}\pi"),
        (r"(5,\infty)", "x>5"),
    ],
)
def test_an_honest_way_to_write_it_stays_right(pool, answer, gold):
    assert pool.score([(f"so \\boxed{{{answer}}}", gold)])[0].cause == "right"


@pytest.mark.parametrize(
    ("response", "held", "cause"),
    [
        (r"\boxed{5} or \boxed{7}", "7", "wrong"),
        (r"\boxed{7} or \boxed{5}", "5", "right"),
        (r"\boxed{7 \boxed{5}}", "5", "right"),
        (r"\boxed{\boxed{7} 5}", "7", "wrong"),
        (r"\text{so \boxed{5}}", "5", "right"),
        (r"\boxed{5}</s> and then 7, or 8", "5", "right"),
        (r"</s>\boxed{7}<|im_end|>\boxed{5}", "5", "right"),
        (r"\boxed{5}\boxed{", "5", "right"),
        (r"\boxed{5}\boxed{}", "", "wrong"),
        ("5", None, "no_box"),
        (r"\boxed 5", None, "no_box"),
        (r"\boxed{5", None, "no_box"),
        (r"\fbox{5}", None, "no_box"),
        (r"boxed{5}", None, "no_box"),
        (r"\boxed{5\}", None, "no_box"),
        ("\x00\\boxed{5}\x00", "5", "right"),
        (r"\\boxed{5}", None, "no_box"),
    ],
)
def test_which_box_counts(response, held, cause):
    assert last_boxed(response) == held
    assert VERIFIERS["strict"](response, "5").cause == cause


def test_a_long_response_of_anything_is_settled_at_once():
    for unit in (
        r"\boxed{",
        "{",
        "}",
        "9",
        r"\boxed{9",
        r"\boxed{9}",
        "answer is A ",
        "answer: ",
        "\\",
        "$",
        " ",
        r"\text{a}",
        "((",
        "=",
        "\n A\n",
    ):
        text = unit * (200_000 // len(unit))
        for response in (text, f"\\boxed{{{text[:3000]}}}", f"\\boxed{{{text[:1990]}}}"):
            for name, verifier in VERIFIERS.items():
                for gold in ("5", "x+1", "C"):
                    began = time.process_time()
                    verifier.settle(response, gold)
                    assert time.process_time() - began < 1, (name, unit)  # 0.1 s at most; quadratic would be minutes
