r"""exact, choice and lenient: their own rules, side by side with strict."""

import pytest

from pctrain.config.tree import RewardConfig
from pctrain.reward import VerifierPool
from pctrain.reward.lenient import settle_with_similarity, similarity
from pctrain.reward.verifiers import VERIFIERS


@pytest.mark.parametrize(
    ("response", "gold", "cause"),
    [
        (r"\boxed{ a  b }", "a b", "right"),
        (r"\boxed{a b}", r"\boxed{a  b}", "right"),
        (r"\boxed{a\nb}".replace(r"\n", "\n"), "a b", "right"),
        (r"\boxed{ab}", "a b", "wrong"),
        (r"\boxed{A}", "a", "wrong"),
        (r"\boxed{5.0}", "5", "wrong"),
        ("5", "5", "no_box"),
        ("\\boxed{\uff15}", "5", "wrong"),
        (r"\boxed{5}\boxed{6}", "5", "wrong"),
        (r"\boxed{}", "5", "wrong"),
    ],
)
def test_exact(response, gold, cause):
    assert VERIFIERS["exact"](response, gold).cause == cause


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        (r"\boxed{C}", "right"),
        (r"\boxed{(c)}", "right"),
        (r"\boxed{\text{C}}", "right"),
        (r"\boxed{\textbf{(C)}}", "right"),
        (r"\boxed{C.}", "right"),
        (r"\boxed{\mathrm{C}}", "right"),
        (r"\boxed{ C ) }", "right"),
        (r"\boxed{C} or \boxed{D}", "wrong"),
        (r"\boxed{D} no, \boxed{C}", "right"),
        (r"\boxed{C or D}", "wrong"),
        (r"\boxed{C, D}", "wrong"),
        (r"\boxed{CD}", "wrong"),
        (r"\boxed{C: 5}", "wrong"),
        (r"\boxed{}", "wrong"),
        (r"\boxed{5} so the answer is C", "wrong"),
        ("\\boxed{\uff23}", "right"),
        # No box: the last stated choice.
        ("The answer is C.", "right"),
        ("the answer is (C)", "right"),
        ("Answer: C", "right"),
        ("**Answer: (C)**", "right"),
        ("Final answer: **C**", "right"),
        ("Option C is correct.", "right"),
        ("The answer is C because of D.", "right"),
        ("I say the answer is D. No, the answer is C.", "right"),
        ("The answer is C. No, the answer is D.", "wrong"),
        ("so it must be:\nC\n", "right"),
        ("so it must be:\n(C).", "right"),
        ("C", "right"),
        ("The answer is C or D.", "wrong"),
        ("Answer: C, D", "wrong"),
        ("Answer: D or C", "wrong"),
        ("The answer is not C.", "no_box"),
        ("A, B, C and D are given", "no_box"),
        ("C is a language", "no_box"),
        ("The answer is A bit long", "no_box"),
        ("the answer is I think", "no_box"),
        ("The answer is complicated", "no_box"),
        ("the answer is c", "no_box"),
        ("", "no_box"),
        (r"\boxed{C", "no_box"),
    ],
)
def test_choice(response, cause):
    assert VERIFIERS["choice"](response, "C").cause == cause


@pytest.mark.parametrize("gold", ["C", "(C)", r"\boxed{C}", "c", r"\text{C}"])
def test_choice_golds(gold):
    assert VERIFIERS["choice"](r"\boxed{C}", gold).cause == "right"


@pytest.mark.parametrize("gold", ["K", "5", "", "CD"])
def test_a_gold_that_is_no_choice_is_a_parse_error(gold):
    assert VERIFIERS["choice"](r"\boxed{C}", gold).cause == "parse_error"


@pytest.mark.parametrize(
    ("response", "gold", "strict", "lenient"),
    [
        (r"\boxed{5}", "5", "right", "right"),
        ("The answer is 5.", "5", "no_box", "right"),
        ("#### 5", "5", "no_box", "right"),
        ("Answer: $x+1$", "1+x", "no_box", "right"),
        ("5", "5", "no_box", "no_box"),
        ("I get 5 here", "5", "no_box", "no_box"),
        ("the answer is 5 or 7", "5", "no_box", "wrong"),
        ("the answer is 5. No, the answer is 7", "5", "no_box", "wrong"),
        (r"\boxed{7} so the answer is 5", "5", "wrong", "wrong"),
        (r"\boxed{3.14159}", "3.14", "wrong", "right"),
        (r"\boxed{3.15}", "3.14", "wrong", "wrong"),
        (r"\boxed{50\%}", "0.5", "wrong", "right"),
        (r"\boxed{5.4}", "5", "wrong", "wrong"),
        (r"\boxed{\text{monday}}", r"\text{Monday}", "right", "right"),
        ("The answer is C.", "C", "no_box", "right"),
        (r"\boxed{(C)}", "C", "right", "right"),
        (r"\boxed{C or D}", "C", "wrong", "wrong"),
        (r"\boxed{2+3}", "5", "wrong", "wrong"),
        (r"\boxed{1234567}", "1234568", "wrong", "wrong"),
    ],
)
def test_strict_and_lenient_side_by_side(response, gold, strict, lenient):
    assert VERIFIERS["strict"](response, gold).cause == strict
    assert VERIFIERS["lenient"](response, gold).cause == lenient


def test_lenient_pays_wherever_strict_does():
    for response, gold in [
        (r"\boxed{x+1}", "1+x"),
        (r"\boxed{\frac{2}{4}}", "1/2"),
        (r"\boxed{5 \text{ cm}}", "5"),
        (r"\boxed{1,2}", r"\{1,2\}"),
    ]:
        assert VERIFIERS["strict"](response, gold).cause == VERIFIERS["lenient"](response, gold).cause == "right"


def test_similarity_is_a_hole_that_is_off_by_default():
    near = (r"\boxed{1234567}", "1234568")
    with VerifierPool(RewardConfig(verifier="lenient")) as pool:
        assert pool.score([near])[0].cause == "wrong"
    with VerifierPool(RewardConfig(verifier="lenient", levenshtein=True)) as pool:
        assert [v.cause for v in pool.score([near, (r"\boxed{999}", "123"), ("no answer", "123")])] == [
            "right",
            "wrong",
            "no_box",
        ]
    assert settle_with_similarity("the answer is 12345", "12344").cause == "right"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("abc", "abc", 1.0),
        ("abc", "xyz", 0.0),
        ("", "abc", 0.0),
        ("ab", "abcd", 0.5),
        ("a" * 201, "a" * 201, 0.0),
    ],
)
def test_similarity(a, b, expected):
    assert similarity(a, b) == pytest.approx(expected)
