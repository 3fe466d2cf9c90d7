"""Every function that docs/rl_step.md names is in the file that the page links to."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rl_step.md"
# A link to a file, a colon, and one or more names: [rl/replay.py](../pctrain/rl/replay.py): `read_step`, `write_step`
REFERENCES = re.findall(r"\]\((\.\./[\w/]+\.py)\):\s+((?:`[\w.]+`(?:,\s+)?)+)", PAGE.read_text())


def test_the_page_has_references():
    assert len(REFERENCES) > 25


@pytest.mark.parametrize("file, names", REFERENCES)
def test_every_name_is_defined_in_the_file_that_it_is_linked_to(file, names):
    source = (PAGE.parent / file).read_text()
    for name in re.findall(r"`([\w.]+)`", names):
        for part in name.split("."):
            assert re.search(rf"^\s*(def|class) {part}\b", source, re.M), f"{file} does not define {name}"
