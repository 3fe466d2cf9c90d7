r"""Which response is right, and by which cause it is not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pctrain.config.tree import RewardConfig
from pctrain.reward import Verdict, VerifierPool, last_boxed
from pctrain.reward.strict import compare


@pytest.fixture(scope="module")
def pool():
    # The deadline is generous: a shared machine may stall for seconds and no test below is about time.
    with VerifierPool(RewardConfig(workers=1, timeout=60)) as pool:
        yield pool


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{20}", "20"),
        (r"\boxed{1} then \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"stray } and { around \boxed{5}", "5"),
        (r"\boxed {6}", "6"),
        (r"\boxed{}", ""),
        (r"\boxed{7", None),
        ("the answer is 7", None),
        ("", None),
        (r"\boxed{" * 50_000, None),
    ],
)
def test_last_balanced_box(text, content):
    assert last_boxed(text) == content


braceless = st.text(alphabet=st.characters(exclude_characters="{}\\"))


@settings(deadline=None)  # a shared machine stalls
@given(braceless, braceless, braceless)
def test_what_is_put_into_a_box_comes_out(before, inside, after):
    assert last_boxed(f"{before}\\boxed{{9}}\\boxed{{{inside}}}{after}") == inside.strip()


@settings(deadline=None)  # a shared machine stalls
@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_integers_are_settled_without_a_worker(answer, gold):
    assert compare(str(answer), str(gold)).cause == ("right" if answer == gold else "wrong")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("20", "20"),
        ("+20", "20"),
        ("020", "20"),
        ("-0", "0"),
        ("$20$", "20"),
        ("20.", "20"),
        ("5.0", "5"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", "1/2"),
        (r"\frac{2}{4}", "1/2"),
        ("1/2", "0.5"),
        ("x = 5", "5"),
        (r"5\text{ apples}", "5"),
        ("1,234", "1234"),
        (r"5 \times 10^3", "5000"),
        ("(5)", "5"),
        (r"\{2,1\}", r"\{1,2\}"),
        ("x+1", "1+x"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("5", r"\boxed{5}"),
    ],
)
def test_right(pool, answer, gold):
    assert pool.score([(f"thus \\boxed{{{answer}}}", gold)])[0].cause == "right"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("21", "20"),
        ("5.1", "5"),
        (r"\frac{1}{3}", r"\frac{1}{2}"),
        ("x+2", "x+1"),
        # Unevaluated: the problem copied into the box.
        ("2+3", "5"),
        ("10-5", "5"),
        ("10/2", "5"),
        (r"\frac{10}{2}", "5"),
        (r"5\cdot1", "5"),
        ("(5)(1)", "5"),
        (r"\sqrt{25}", "5"),
        ("2^2", "4"),
        ("3!", "6"),
        (r"\binom{5}{1}", "5"),
        ("2+3", "5.0"),
        ("2+3=5", "5"),
        (r"\text{2+3}", "5"),
        (r"\frac{1}{4}+\frac{1}{4}", r"\frac{1}{2}"),
        (r"\frac{1+1}{4}", r"\frac{1}{2}"),
        # Several numbers in one box are no hedge.
        ("4,5", "5"),
        (r"\{4,5\}", "5"),
        ("4 or 5", "5"),
        ("5;6", "5"),
    ],
)
def test_wrong(pool, answer, gold):
    assert pool.score([(f"thus \\boxed{{{answer}}}", gold)])[0].cause in ("wrong", "parse_error")


def test_holes_of_a_policy(pool):
    pairs = [
        ("the answer is 5", "5"),  # a stray number, no box
        (r"\boxed{5} and \boxed{6}", "5"),  # boxes do not merge: the last one counts
        (r"\boxed{5} and \boxed{6}", r"\{5,6\}"),
        (r"\boxed{5", "5"),
        (r"\boxed{}", "5"),
    ]
    verdicts = pool.score(pairs)
    assert [v.cause for v in verdicts] == ["no_box", "wrong", "wrong", "no_box", "wrong"]
    assert all(v.reward == 0.0 for v in verdicts)


def test_unreadable_is_counted_as_such_and_text_can_be_an_answer(pool):
    pairs = [(r"\boxed{\frac{}{}}", "x+1"), (r"\boxed{+-}", "x+1"), (r"\boxed{\text{Monday}}", r"\text{Monday}")]
    assert [v.cause for v in pool.score(pairs)] == ["parse_error", "parse_error", "right"]


@settings(deadline=None)  # a shared machine stalls
@given(st.text(max_size=40))
def test_any_box_has_a_verdict_or_is_left_to_math_verify(answer):
    assert compare(answer, "5").cause in ("right", "wrong")
    assert isinstance(compare(answer, "x+1"), Verdict | tuple)
