"""Ranks that raise, hang, are stopped or die: all ranks end in time, and one of them says which, where and why."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pctrain.common.errors import RunFault, ToBeContinued, UserError
from pctrain.distributed.health import watchdog
from pctrain.distributed.health.watchdog import RankReport, conclude

ROOT = Path(__file__).resolve().parents[2]
DEADLINE, GRACE = 2.0, 3.0
# A rank without torch. `collective` stands where a collective of torch would: in a file of its package.
RANK = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from pctrain.distributed.health import watchdog as health
from pctrain.common.errors import RunFault

health.GRACE_SECONDS = {GRACE}
run, rank, world, act = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
source = "def collective():\\n    import time\\n    time.sleep(100)"
exec(compile(source, "/site-packages/torch/distributed/fake.py", "exec"))
try:
    with health.watch(run, {DEADLINE}, rank, world, "now"):
        health.at_step(7)
        with health.phase("update" if act == "wait" else "rollout"):
            (run / f"here-{{rank}}").touch()
            if act == "raise":
                raise ValueError("the engine is out of pages")
            if act == "lose":
                raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]")
            if act == "beat":
                for _ in range(30):
                    time.sleep(0.1)
                    health.beat()
            collective() if act == "wait" else time.sleep(0 if act == "beat" else 100)
except RunFault as fault:
    if fault.speaker:
        print(f"error: {{fault}}", file=sys.stderr)
    sys.exit(1)
"""


class Scene:
    """Ranks, one process each, that act; `signals`: what one gets when all have come to their act."""

    def __init__(self, folder, acts, signals):
        self.folder, self.signals = folder, signals
        folder.mkdir()
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(folder), str(rank), str(len(acts)), act],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, act in enumerate(acts)
        ]

    def interrupt(self):
        end = time.monotonic() + 60
        while not all((self.folder / f"here-{rank}").exists() for rank in range(len(self.ranks))):
            assert time.monotonic() < end
            time.sleep(0.01)
        for rank, number in self.signals.items():
            self.ranks[rank].send_signal(number)

    def end(self, *ranks):
        """(exit status, stderr) of each; it ends by itself."""
        found = []
        for rank in ranks:
            errors = self.ranks[rank].communicate(timeout=DEADLINE + GRACE + 20)[1]
            found.append((self.ranks[rank].returncode, errors))
        return found

    def report(self, rank):
        return json.loads((self.folder / f"faults/now/rank-{rank}.txt").read_text().partition("\n")[0])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """All at once: they sleep most of the time."""
    root = tmp_path_factory.mktemp("scenes")
    plans = {
        "raises": (["raise", "wait"], {}),
        "hangs": (["wait", "hang"], {}),
        "beats": (["beat", "beat"], {}),
        "stopped": (["hang", "wait", "wait"], {0: signal.SIGSTOP}),
        "killed": (["hang", "wait", "wait"], {0: signal.SIGKILL}),
        "lost": (["lose", "hang"], {1: signal.SIGKILL}),
    }
    found = {name: Scene(root / name, *plan) for name, plan in plans.items()}
    for scene in found.values():
        scene.interrupt()
    yield found
    for process in (process for scene in found.values() for process in scene.ranks):
        process.kill()
        process.communicate()


def test_a_rank_that_raises_ends_the_others_before_their_deadline(scenes):
    (status, told), (other, silent) = scenes["raises"].end(0, 1)
    assert (status, other) == (1, 1) and silent == ""
    assert "rank 0 failed in phase rollout of step 7: ValueError: the engine is out of pages" in told
    assert "out of pages" in (scenes["raises"].folder / "faults/now/rank-0.txt").read_text()
    assert (
        "in collective" in (scenes["raises"].folder / "faults/now/rank-1.txt").read_text()
    )  # the stack of the one that waited
    assert scenes["raises"].report(1)["kind"] == "asked"


def test_a_rank_that_hangs_is_distinguished_from_those_that_wait_for_it(scenes):
    (status, told), (other, silent) = scenes["hangs"].end(0, 1)
    assert (status, other) == (1, 1) and silent == ""
    assert re.search(r"rank 1 made no progress for \d+ s in phase rollout of step 7, at .*", told)
    assert "Rank 0 waited for it in phase update of step 7" in told


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_rank_that_does_not_answer_is_named(scenes, how):
    (_, told), (_, silent) = scenes[how].end(1, 2)
    assert (
        "rank 0 does not answer: dead, stopped, or cut off. Rank 1, 2 waited for it in phase update of step 7" in told
    )
    assert silent == ""  # one rank speaks


def test_a_lost_connection_is_not_the_cause(scenes):
    [(_, told)] = scenes["lost"].end(0)
    assert "rank 1 does not answer" in told and "Connection closed" not in told


def test_who_makes_progress_is_left_alone(scenes):
    assert scenes["beats"].end(0, 1) == [(0, ""), (0, "")]
    assert not (scenes["beats"].folder / "faults").exists()


def report(rank, kind="asked", phase="update", waiting=True, still=3.0, cause=""):
    return RankReport(rank, kind, phase, 7, still, waiting, "loop.py:1 in train", cause)


def test_conclusions():
    several = {
        0: report(0, "raised", waiting=False, cause="E: a"),
        1: report(1),
        2: report(2, "raised", waiting=False, cause="E: b"),
    }
    assert conclude(several, 3) == "rank 0 failed in phase update of step 7 (and so did rank 2): E: a"
    lost = report(0, "raised", cause="E: gloo")
    assert conclude({0: lost, 1: report(1)}, 3).startswith("rank 2 does not answer")
    mismatch = conclude({0: report(0, "silent"), 1: report(1, phase="rollout")}, 2)
    assert "do not match" in mismatch and "rank 0 in phase update" in mismatch and "rank 1 in phase rollout" in mismatch
    assert "rank 8, 9, 10, 11, 12, 13, 14, 15 and 984 more does not" in conclude(
        {rank: report(rank) for rank in range(8)}, 1000
    )


def test_a_user_error_passes_and_any_other_becomes_a_fault(tmp_path):
    for error in (UserError("a key"), ToBeContinued("later"), KeyboardInterrupt()):
        with pytest.raises(type(error)), watchdog.watch(tmp_path, 60, 0, 1, "now"):
            raise error
    assert not (tmp_path / "faults").exists()
    with (
        pytest.raises(RunFault, match="rank 0 failed in phase reward: ZeroDivisionError: division by zero") as caught,
        watchdog.watch(tmp_path, 60, 0, 1, "now"),
        watchdog.phase("rollout"),
        watchdog.phase("reward"),
    ):
        raise ZeroDivisionError("division by zero")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    header = json.loads((tmp_path / "faults/now/rank-0.txt").read_text().partition("\n")[0])
    assert header["phase"] == "reward" and header["where"].endswith(
        "test_a_user_error_passes_and_any_other_becomes_a_fault"
    )


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "keep fewer checkpoints (run.keep_last)"),
        (PermissionError(errno.EACCES, "Permission denied"), "name another one (run.dir)"),
        (OSError(errno.EROFS, "Read-only file system"), "name another one (run.dir)"),
        (MemoryError(), "lower sft.token_budget"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "parallel.recompute"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "rollout.kv_cache_mb",
        ),
    ],
)
def test_what_ran_out_comes_with_advice(tmp_path, error, advice):
    with pytest.raises(RunFault) as caught, watchdog.watch(tmp_path, 60, 0, 1, "now"), watchdog.phase("checkpoint"):
        raise error
    assert "rank 0 failed in phase checkpoint" in str(caught.value) and advice in str(caught.value)


def _handle_a_failure_and_fail_later():
    with pytest.raises(ValueError, match="in a rollout"), watchdog.phase("rollout"):
        raise ValueError("in a rollout")
    with watchdog.phase("checkpoint"):
        raise OSError("disk full")


def test_a_handled_failure_is_not_blamed(tmp_path):
    with pytest.raises(RunFault, match="in phase checkpoint:"), watchdog.watch(tmp_path, 60, 0, 1, "now"):
        _handle_a_failure_and_fail_later()


def test_signals_are_noted_and_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with watchdog.watch(tmp_path, 60, 0, 1, "now"):
            assert not watchdog.asked_to_stop()  # of this watch
            os.kill(os.getpid(), number)
            end = time.monotonic() + 10
            while not watchdog.asked_to_stop():
                assert time.monotonic() < end
                time.sleep(0.01)
    assert before == (signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_what_a_watched_process_starts_survives_the_signal(tmp_path):
    """A scheduler sends it to the whole family."""
    sleep = "import time; print('there', flush=True); time.sleep(60)"
    with watchdog.watch(tmp_path, 60, 0, 1, "now"):
        child = subprocess.Popen([sys.executable, "-c", sleep], stdout=subprocess.PIPE)
        try:
            assert child.stdout.readline() == b"there\n"
            for number in (signal.SIGTERM, signal.SIGUSR1):
                child.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.5)
        finally:
            child.kill()
            child.communicate()


def test_one_process_that_waits_for_its_own_work_beats():
    """As a job of a study does that waits for another, and a tokenisation of hours."""
    from pctrain.distributed import parallel

    before = watchdog._beat
    parallel.follow_rank_zero(lambda: iter(range(3)))
    assert watchdog._beat > before
