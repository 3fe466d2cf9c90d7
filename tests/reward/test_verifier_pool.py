"""Deadlines, crashes and the end of the worker processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pctrain.config.tree import RewardConfig
from pctrain.reward import VerifierPool, cause_counts, fault_line

ROOT = Path(__file__).resolve().parents[2]
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_worker.py")))
GOOD = (r"\boxed{1+x}", "x+1")


def box(content: str) -> tuple[str, str]:
    return f"\\boxed{{{content}}}", "x+1"


def pids(pool: VerifierPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def alive(pid: int) -> bool:
    """Return whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.parametrize("hang", ["x+hang", "x+spin"])
def test_hang_is_a_timeout_and_the_next_verdict_is_right(hang, tmp_path, monkeypatch):
    starts = tmp_path / "starts"
    monkeypatch.setenv("FAULTY_STARTS", str(starts))
    with VerifierPool(RewardConfig(workers=1, timeout=4), command=FAULTY) as pool:
        assert pool.score([GOOD])[0].cause == "right"
        first = pids(pool)[0]
        # The hang is asked eight times over, as a group of rollouts would; it costs its deadline, and its worker, once.
        verdicts = pool.score([box(hang)] * 8 + [GOOD])
        assert [v.cause for v in verdicts] == ["timeout"] * 8 + ["right"]
        assert len(starts.read_text().splitlines()) == 2
        assert not alive(first)


def test_crash_is_counted_and_others_are_judged():
    with VerifierPool(RewardConfig(workers=2, timeout=60), command=FAULTY) as pool:
        verdicts = pool.score([box("x+crash"), GOOD, box("x+print"), (r"\boxed{7}", "7"), box("x+2")])
        assert [v.cause for v in verdicts] == ["crash", "right", "wrong", "right", "wrong"]
        assert [v.reward for v in verdicts] == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_a_sample_over_which_one_worker_died_is_asked_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FAULTY_MARK", str(tmp_path / "died"))
    with VerifierPool(RewardConfig(workers=1, timeout=60), command=FAULTY) as pool:
        assert [v.cause for v in pool.score([box("x+once"), GOOD])] == ["wrong", "right"]
        assert "x+once" in caplog.text
        verdict = pool.score([box("x+crash")])[0]
    assert verdict.cause == "crash" and "x+crash" in verdict.detail and "exit status 3" in verdict.detail
    assert caplog.text.count("x+crash") == 2  # given up after the second death


def test_asking_for_more_memory_than_allowed_is_memory():
    with VerifierPool(RewardConfig(workers=1, timeout=60), command=FAULTY) as pool:
        verdicts = pool.score([box("x+memory"), GOOD])
    assert [v.cause for v in verdicts] == ["memory", "right"]
    assert "memory_mb" in verdicts[0].detail


def test_what_a_verdict_started_is_killed_with_its_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTY_MARK", str(tmp_path / "child"))
    with VerifierPool(RewardConfig(workers=1, timeout=4), command=FAULTY) as pool:
        assert pool.score([box("x+child")])[0].cause == "timeout"
        assert wait_gone(int((tmp_path / "child").read_text()))


def test_the_line_for_the_log_counts_and_quotes():
    with VerifierPool(RewardConfig(workers=1, timeout=4), command=FAULTY) as pool:
        verdicts = pool.score([box("x+hang"), box("x+crash"), GOOD, (r"\boxed{4}", "5")])
    line = fault_line(verdicts)
    assert "\n" not in line and "2 of 4" in line and "1 timeout, 1 crash" in line and "x+hang" in line
    assert fault_line(verdicts[2:]) is None
    counts = cause_counts(verdicts)
    assert (
        counts["verdicts/timeout"]
        == counts["verdicts/crash"]
        == counts["verdicts/right"]
        == counts["verdicts/wrong"]
        == 1
    )
    assert counts["verdicts/memory"] == 0 and sum(counts.values()) == 4


def test_worker_killed_between_two_calls_costs_no_verdict():
    with VerifierPool(RewardConfig(workers=1, timeout=60)) as pool:
        pool.score([GOOD])
        os.kill(pids(pool)[0], 9)
        assert wait_gone(pids(pool)[0])
        assert [v.cause for v in pool.score([GOOD, box("x+2")])] == ["right", "wrong"]


def test_worker_that_does_not_start_is_an_error_with_its_message():
    with (
        pytest.raises(RuntimeError, match="no such package"),
        VerifierPool(RewardConfig(), command=(*FAULTY, "refuse")) as pool,
    ):
        pool.score([GOOD])


def test_integers_start_no_worker_and_take_no_time():
    pairs = [(f"work work so \\boxed{{{n % 7}}}", str(n % 5)) for n in range(1000)]
    with VerifierPool(RewardConfig()) as pool:
        begin = time.process_time()  # the machine may be busy with other tests
        verdicts = pool.score(pairs)
        assert time.process_time() - begin < 1.0
        assert pids(pool) == []
    assert sum(v.reward for v in verdicts) == sum(n % 7 == n % 5 for n in range(1000))


def test_leaving_the_pool_ends_its_workers():
    with VerifierPool(RewardConfig(workers=2)) as pool:
        pool.score([GOOD, box("x+2")])
        started = pids(pool)
        assert len(started) == 2
    assert not any(map(alive, started))


def test_workers_end_with_a_killed_parent_even_in_a_hang():
    program = f"""
import sys, threading
from pctrain.config.tree import RewardConfig
from pctrain.reward import VerifierPool
pool = VerifierPool(RewardConfig(workers=2, timeout=600), command={FAULTY!r})
pool.score([{GOOD!r}, {box("x+2")!r}])
print(*[worker.process.pid for worker in pool._workers], flush=True)
pool.score([{box("x+hang")!r}])
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    time.sleep(0.3)  # one of them is in the hang by now
    parent.kill()
    parent.wait()
    assert all(wait_gone(pid) for pid in workers)


def test_a_worker_imports_nothing_heavy():
    program = (
        "import pctrain.reward.worker, sys; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'vllm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "[]"
