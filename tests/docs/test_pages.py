"""The pages: links and anchors lead somewhere, the files they name exist, and the README has what a newcomer needs."""

import re

import pytest

from tests.helpers.doc_pages import GUIDES, PAGES, ROOT

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(page):
    """Return the anchors of its headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}; its headings are {sorted(anchors(there))}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"`((?:pctrain|docs|configs|launch|tests|kernels|benchmarks)/[\w./-]+)`", page.read_text(encoding="utf-8")
    )
    for name in named:
        assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [target.partition("#")[0] for target in LINK.findall(without_code(page.read_text(encoding="utf-8")))]
        todo += [
            there for there in ((page.parent / t).resolve() for t in targets if t.endswith(".md")) if there.exists()
        ]
    assert {str(page.relative_to(ROOT)) for page in set(PAGES) - reached} == set()


def test_the_readme_has_what_a_newcomer_looks_for():
    headings = re.findall(r"^## (.+)$", README, re.M)
    assert headings[:2] == ["Two commands", "What you get"] and "Measured, and not yet run" in headings
    first = README.split("```bash\n")[1].split("```")[0].splitlines()
    assert len(first) == 2 and all(line.startswith("bash launch/") for line in first)
    assert re.search(r"!\[[^\]]+\]\(docs/images/[\w.]+\.png\)", README)
    assert all(f"docs/your_own.md#{name}" in README for name in ("data", "model", "reward", "algorithm"))
    assert len(README.splitlines()) < 200  # longer texts belong on other pages
