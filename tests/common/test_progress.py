"""Progress: plain lines when stdout is not a terminal, one live display on a terminal, silence on other ranks."""

import os
import pty
import subprocess
import sys

import pytest

from pctrain.common import progress as module
from pctrain.common.progress import progress, track


def test_without_a_terminal_there_is_one_line_at_the_end(capsys):
    with progress("SFT", total=200, start=100) as bar:
        for _ in range(100):
            bar.advance(loss=1.23456)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    assert shown.startswith("SFT: 200/200 steps (100%)") and "steps/s" in shown and shown.endswith("loss 1.235\n")


def test_lines_come_every_ten_seconds_with_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("RL", total=60, start=20) as bar:
        for _ in range(10):
            now[0] += 4.0
            bar.advance()
        shown = capsys.readouterr().out.splitlines()
    # 4 s per step; the 20 steps of an earlier start do not count towards the rate
    assert [line.split("  ")[0] for line in shown] == [
        "RL: 23/60 steps (38%)",
        "RL: 26/60 steps (43%)",
        "RL: 29/60 steps (48%)",
    ]
    assert "4 s/step, 0:02:28 left" in shown[0]


def test_short_inner_bars_stay_out_of_the_log(capsys):
    with progress("RL", total=2) as outer:
        for _ in range(2):
            for _ in track(range(5), "evaluation", 5):
                pass
            outer.advance()
    shown = capsys.readouterr().out
    assert shown.startswith("RL: 2/2") and "evaluation" not in shown


def test_an_error_is_reported_and_raised(capsys):
    with pytest.raises(ZeroDivisionError), progress("fit", total=3) as bar:  # noqa: PT012  the bar is inside too
        bar.advance()
        raise ZeroDivisionError
    assert "fit: 1/3" in (shown := capsys.readouterr().out) and "stopped by an error" in shown


def test_other_ranks_are_silent(capsys):
    with progress("SFT", total=1, rank=1) as bar:
        bar.advance(loss=1.0)
    assert capsys.readouterr() == ("", "")


NESTED = """
import time
from pctrain.common.progress import progress
with progress("outer", total=2) as outer:
    for _ in range(2):
        with progress("inner", total=3, unit="problem") as inner:
            for _ in range(3):
                time.sleep(0.1)
                inner.advance(score=12.5)
        outer.advance()
"""


def test_nested_bars_share_the_terminal():
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", NESTED],
        stdout=terminal,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "150"},
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 65536):
            shown += chunk
    except OSError:  # the terminal is closed: the process has ended
        pass
    assert process.wait() == 0
    assert (
        b"outer" in shown
        and b"inner" in shown
        and b"problems/s" in shown
        and b"score 12.5" in shown
        and b"2/2" in shown
    )
