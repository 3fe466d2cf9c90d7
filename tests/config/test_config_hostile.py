"""Config values and files found by fuzzing: each is refused with a short message."""

import pytest

from pctrain.common.errors import UserError
from pctrain.config.load import load

LAUGHS = (
    "[&a0 [x, x, x, x, x, x, x, x, x, x], "
    + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))
    + "]"
)


@pytest.mark.parametrize(
    "value, words",
    [
        ("!!int x", "x cannot be read as int"),
        ("!!bool maybe", "maybe cannot be read as bool"),
        ("!!timestamp x", "cannot be read as timestamp"),
        ("0b_", "0b_ cannot be read as int"),
        ("9" * 5000, "cannot be read as int"),
        ("9" * 400, "at most 64 bits"),
        ("0x" + "f" * 5000, "at most 64 bits"),
        ('"\\U00110000"', "not valid YAML"),
        ('"a\\0b"', "a zero byte"),
        ('"\\ud800"', "not UTF-8"),
        ("!!binary aGk=", "kind bytes; leave out its tag"),
        ("{? !!timestamp 2001-01-01 : a}", "leave out its tag"),
        ("&a [*a]", "an alias names what contains it"),
        ("[" * 60 + "]" * 60, "nested deeper than 50"),
        ("[" * 3000 + "]" * 3000, "nested deeper than 50"),
        (LAUGHS, "more than 100000 values"),
        ("[.nan]", "a finite number, got nan"),
        ("[" + "1, " * 500 + "1]", "and 471 more of this kind"),
        ("[3, " + "x" * 5000 + "]", "expected"),
    ],
)
def test_values_that_yaml_can_express_and_no_option_accepts(write, value, words):
    """Cases found by fuzzing: each ended in a traceback, in gigabytes of memory or in a message pages long."""
    path = write(f"data:\n  train: {value}\n")
    for arguments in ((path, []), (None, [f"--study.sets={value}"])):
        with pytest.raises(UserError) as error:
            load(*arguments)
        assert words in str(error.value) or arguments[0] is None, error.value
        assert len(str(error.value)) < 5000


def test_hostile_keys_and_bases(write, tmp_path):
    for text, words in (
        ("? [a]\n: b\n", "expected the name of a key, found a list"),
        ('base: "a\\0b"\n', "base: expected a config file"),
        ("run: {dir: a\x00b}\n", "not valid YAML"),
        ("base: &a [*a]\n", "an alias names what contains it"),
    ):
        with pytest.raises(UserError, match=words):
            load(write(text), [])
    for number in range(12):  # each file names the next one twice: 4096 files at the end of the chain
        (tmp_path / f"{number}.yaml").write_text(f"base: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "12.yaml").write_text("")
    with pytest.raises(UserError, match="more than 100 files are read for one config"):
        load(tmp_path / "0.yaml", [])
