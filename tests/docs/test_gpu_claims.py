"""The README and docs/gpu.md make the same claim about each feature on a GPU, in one of three states."""

import re

from tests.helpers.doc_pages import ROOT

STATES = ("real package", "stand-in")


def rows(page, heading):
    """Return the cells of each row of the table that starts with `heading`."""
    table = (ROOT / page).read_text().split(heading)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_readme_and_gpu_page_claim_the_same():
    readme = {row[0]: row[1].removeprefix("not yet run; ") for row in rows("README.md", "| on a GPU | state |")}
    page = {row[0]: row[1] for row in rows("docs/gpu.md", "| on a GPU | checked |")}
    assert readme == page and len(page) > 10


def test_a_claim_is_one_of_three_and_names_what_the_tests_run():
    for feature, state, *_, tested in rows("docs/gpu.md", "| on a GPU | checked |"):
        assert state in STATES or re.fullmatch(r"run on .+, driver .+, \d{4}-\d\d-\d\d", state), (feature, state)
        assert tested, feature
