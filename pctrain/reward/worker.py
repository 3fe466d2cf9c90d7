"""A verifier process: reads one question a line, answers one verdict a line. `python -m pctrain.reward.worker`.

It imports Math-Verify and nothing else heavy, and calls it in its main thread. Math-Verify's own time-outs are off: they are alarms
that a long call in C can hold back, and they report a hang as a wrong answer. The parent holds the clock and kills.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

# A power tower can ask for any amount of memory well within the deadline. Sympy and Math-Verify need about 0.3 GiB.
ADDRESS_SPACE = 4 << 30
_PR_SET_PDEATHSIG = 1


def judge(answer: str, gold: str) -> str:
    """`right`, `wrong`, or `parse_error` where Math-Verify cannot read one of the two or fails to compare them."""
    from math_verify import parse, verify

    try:
        expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=True)
        given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)
        if not expected or not given or (_only_text(given) and not _only_text(expected)):
            return "parse_error"
        return "right" if verify(expected, given, timeout_seconds=None, raise_on_error=True) else "wrong"
    except Exception:  # Sympy raises nearly anything on nonsense (MemoryError and RecursionError too); the cause is counted by the parent.
        return "parse_error"


def _only_text(parsed: list) -> bool:
    """Where Math-Verify cannot make an expression of a string, it gives back the string alone."""
    return all(isinstance(item, str) for item in parsed)


def serve(judge: Callable[[str, str], str]) -> None:
    """Answers `{"answer": …, "gold": …}` lines on stdin with `{"cause": …}` lines on stdout, until stdin (the parent) ends."""
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    # Whatever a library prints must not get between the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    judge("1/2", "0.5")  # the first call costs a tenth of a second of lazy imports; the deadline of a verdict is not for that
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        _reply(replies, {"cause": judge(question["answer"], question["gold"])})


def _reply(stream, message: dict) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _die_with_parent() -> None:
    """End of stdin is not seen while a verdict hangs, so on Linux the kernel is asked to kill this process when its parent dies."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was in place
        os._exit(1)


if __name__ == "__main__":
    import math_verify  # noqa: F401  (a missing package fails here, before "ready", and the parent shows the message)

    serve(judge)
