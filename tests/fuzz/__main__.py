"""`python -m tests.fuzz TARGET --minutes M`: a campaign; `--replay FILE`: one case.

Exit status 1 where something was found.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from tests.helpers import environment  # noqa: F401  settings of the tests, before torch is imported

TARGETS = ("config", "data", "checkpoints", "curves")


def target_named(name: str):
    return import_module(f"tests.fuzz.{name}_target")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--examples", type=int, help="in place of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next ones count on")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    parser.add_argument("--replay", type=Path, help="a file of --findings")
    options = parser.parse_args()
    target = target_named(options.target)
    if options.replay:
        return replay(target, options.replay)
    from tests.fuzz.campaign import campaign

    minutes = None if options.examples else options.minutes
    outcome = campaign(target, options.findings, seed=options.seed, examples=options.examples, minutes=minutes)
    for name, path in outcome.findings.items():
        print(f"found: {name}\n  replay: python -m tests.fuzz {options.target} --replay {path}")
    print(outcome.line(), flush=True)
    return 1 if outcome.findings or not outcome.examples else 0


def replay(target, file: Path) -> int:
    from tests.fuzz.campaign import attempt
    from tests.fuzz.case import Case

    with tempfile.TemporaryDirectory() as scratch:
        case = Case.read(file.resolve())
        print(case)
        print({b"a": "accepted", b"r": "refused"}[attempt(target, target.prepare(Path(scratch)), case, Path(scratch))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
