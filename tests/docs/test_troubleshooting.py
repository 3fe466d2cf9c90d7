"""docs/troubleshooting.md quotes messages: each of them is in the code."""

import re
from pathlib import Path

import pytest

from pctrain.config.help import reference

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# Strings that a line break of the source cuts in two are joined again.
CODE = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in (ROOT / "pctrain").rglob("*.py"))
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE, re.M)


def test_there_are_messages():
    assert len(MESSAGES) > 10


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_one_of_ours(message):
    assert message in CODE


def test_every_key_that_it_names_exists():
    keys = set(re.findall(r"`((?:run|model|parallel|data|sft|rl|rollout|reward|eval|ceiling|study)\.[a-z_.]+)`", PAGE))
    assert len(keys) > 8 and all(f"`{key}`" in reference() for key in keys - {"run.dir"}), keys
