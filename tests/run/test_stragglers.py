"""Which rank is slow: own work is distinguished from waiting for others, in real collectives and in a run."""

import io
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from pctrain.cli import main as cli
from pctrain.distributed import parallel
from pctrain.distributed.health import phases, watchdog
from pctrain.report import ledger_table
from pctrain.run import stragglers
from pctrain.run.stragglers import PHASES, WINDOW, WINDOW_SECONDS, RankTimes

STEPS = max(WINDOW, int(WINDOW_SECONDS / 2))  # steps of a window, with steps of two seconds
LATE = 0.1  # seconds by which rank 1 is late to a collective


def test_the_seconds_of_a_phase_are_its_own(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 9.0, 16.0, 25.0])
    phases.take()
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    with watchdog.phase("evaluation"):  # from 0 to 1, and from 4 to 9
        with watchdog.phase("swap"):
            pass
        phases.waited("evaluation", 2.0)
    assert phases.take() == {"evaluation": 4.0, "swap": 3.0}
    assert phases.take() == {}


def collectives():
    """Return {collective: this rank's own seconds in a phase in which rank 1 was late to it}."""
    import torch
    import torch.distributed as dist

    from pctrain.config.tree import ParallelConfig

    parallel.initialize(ParallelConfig(), 0)
    x, both = torch.ones(4), torch.ones(8)
    me, other = parallel.rank(), 1 - parallel.rank()

    def exchange():
        ops = [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, torch.empty(4), other)]
        for request in dist.batch_isend_irecv(ops):
            request.wait()

    acts = {
        "all_reduce": lambda: dist.all_reduce(x.clone()),
        "asynchronous": lambda: dist.all_reduce(x.clone(), async_op=True).wait(),
        "all_gather": lambda: dist.all_gather_into_tensor(both.clone(), x),
        "broadcast": lambda: dist.broadcast(x.clone(), src=1),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(x.clone(), both),
        "barrier": dist.barrier,
        "all_to_all": lambda: dist.all_to_all_single(x.clone(), x),
        "point to point": exchange,
        "objects": lambda: dist.all_gather_object([None, None], me),
    }
    found = {}
    for name, act in acts.items():
        act()  # connections are made in the first collective
        tries = []
        for _ in range(20):  # a busy machine may stop any rank for as long
            dist.barrier()
            phases.take()
            with watchdog.phase("update"):
                time.sleep(LATE * me)
                act()
            tries.append(phases.take()["update"])
            undisturbed = torch.tensor([me == 1 or tries[-1] < LATE / 2], dtype=torch.int32)
            dist.all_reduce(undisturbed, dist.ReduceOp.MIN)
            if undisturbed.item():
                break
        found[name] = min(tries)
    return found


def test_waiting_in_a_collective_is_not_counted_as_work(ranks):
    prompt, late = ranks.run(collectives)
    assert all(seconds < LATE / 2 for seconds in prompt.values()), prompt
    assert all(seconds >= LATE * 0.9 for seconds in late.values()), late


class Event:
    """Replaces a GPU event: `now` is the stream's clock, and an event after it has not finished."""

    now, over = 0.0, float("inf")

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def query(self):
        return self.at <= Event.over

    def elapsed_time(self, after):
        return 1000 * (after.at - self.at)


def test_on_a_gpu_the_stream_is_timed(monkeypatch):
    from pctrain.distributed import waits

    def collective(seconds):
        Event.now += seconds
        return "work"

    monkeypatch.setattr(waits.torch.cuda, "Event", Event)
    monkeypatch.setattr(waits.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(phases.time, "perf_counter", lambda: Event.now)
    timed = waits._timed(collective, waits._on_stream)
    phases.take()
    timed(100.0)  # outside a phase: not measured
    with watchdog.phase("update"):
        Event.now += 1.0
        assert timed(2.0) == "work"
        Event.now += 1.0
        Event.over = Event.now
        timed(4.0)
    waits.settle()
    assert phases.take() == {"update": 6.0}  # 2 of 8 seconds; the other collective is still under way
    Event.over = Event.now
    waits.settle()
    assert phases._waits == {"update": 4.0} and waits._pairs == []
    phases.take()


def test_events_do_not_pile_up_where_nobody_settles(monkeypatch):
    """An evaluation has collectives and no steps."""
    from pctrain.distributed import waits

    monkeypatch.setattr(waits.torch.cuda, "Event", Event)
    monkeypatch.setattr(waits.torch.cuda, "is_current_stream_capturing", lambda: False)
    timed = waits._timed(lambda: None, waits._on_stream)
    phases.take()
    with watchdog.phase("eval"):
        for _ in range(5 * waits.SETTLE_EVERY):
            Event.over = Event.now
            timed()
            assert len(waits._pairs) < waits.SETTLE_EVERY
    waits.settle()
    assert waits._pairs == []
    phases.take()


def test_a_captured_stream_is_not_timed(monkeypatch):
    """An event that is recorded into a CUDA graph cannot be asked afterwards."""
    from pctrain.distributed import waits

    def refuse(**options):
        raise AssertionError("an event in a captured stream")

    monkeypatch.setattr(waits.torch.cuda, "Event", refuse)
    monkeypatch.setattr(waits.torch.cuda, "is_current_stream_capturing", lambda: True)
    with watchdog.phase("rollout"):
        assert waits._timed(lambda: "work", waits._on_stream)() == "work"
    assert waits._pairs == []
    phases.take()


# ---- reports ---------------------------------------------------------------------------------------------------------


class Run:
    """A run folder that keeps the log lines."""

    def __init__(self, path):
        self.path, self.writes, self.said = path, True, []

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def times(tmp_path, monkeypatch):
    """Return RankTimes of four ranks; `times.at(step, seconds [world, phases])` adds a step as end_step does."""
    monkeypatch.setattr(
        stragglers.parallel, "gather", lambda place: [{"host": f"node{rank // 2}", "data": rank} for rank in range(4)]
    )
    monkeypatch.setattr(stragglers.parallel, "coordinates", dict)
    found = RankTimes(Run(tmp_path))
    found.at = lambda step, own: found._add(step, own, 2.0)
    return found


def own(update, rollout=(1.0, 1.0, 1.0, 1.0)):
    rows = np.zeros((4, len(PHASES)))
    rows[:, PHASES.index("update")], rows[:, PHASES.index("rollout")] = update, rollout
    return rows


def test_a_rank_that_keeps_lagging_is_reported_once_until_it_recovers(times):
    for step in range(1, 4 * STEPS + 1):
        times.at(step, own([1.0, 1.02, 1.5, 0.98]))
        assert len(times.run.said) == (step >= 2 * STEPS)
    [text] = times.run.said
    assert text.startswith(
        f"step {2 * STEPS} rank 2 (node1, data 2) holds up the others in phase update: 1.5 s of work per step, "
        "the others 1 s"
    )
    for step in range(STEPS):
        times.at(step, own([1.0, 1.02, 1.0, 0.98]))
    for step in range(2 * STEPS):
        times.at(step, own([1.0, 1.02, 1.5, 0.98]))
    assert len(times.run.said) == 2


def test_one_slow_window_is_not_reported(times):
    for step in range(1, 10 * STEPS + 1):
        slow = (step - 1) // STEPS % 2  # every other minute
        times.at(step, own([1.0, 1.02, 1.0 + 0.5 * slow, 0.98]))
    assert times.run.said == []


def test_lags_not_worth_fixing_are_not_reported(times):
    rng = np.random.default_rng(0)
    for step in range(1, 150):
        uneven = np.ones(4)
        uneven[step % 4] = 1.6  # another rank is slow each time, as with prompts of different lengths
        times.at(step, own(1 + 0.05 * rng.random(4), uneven))
    for step in range(100, 250):
        times.at(step, own([0.01, 0.01, 0.05, 0.01]))  # five times the others, and 2% of the step
    for step in range(250, 400):
        times.at(step, own([1.0, 1.15, 1.0, 1.0]))  # 7% of the step, and 15% more than the others
    assert times.run.said == []


def test_the_table_has_the_slowest_rank_of_every_phase(times):
    for step in range(1, 5):
        times.at(step, own([1.0, 1.0, 1.5, 1.0], [2.0, 1.0, 1.0, 1.0]))
    summary = times.summary()["slowest rank"]
    assert summary == "rollout rank 0, 2 s per step (the others 1); update rank 2, 1.5 s per step (the others 1)"
    written = json.loads((times.run.path / "ranks.json").read_text())
    assert written["steps"] == 4 and written["own_seconds"]["update"] == [1.0, 1.0, 1.5, 1.0]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ledger_table._ranks(SimpleNamespace(runs=[SimpleNamespace(name="rl", folder=times.run.path)])))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["rl", "rollout", "0", "(node0,", "data", "0)", "2", "1", "2.00"] in rows and [
        "update",
        "2",
        "(node1,",
        "data",
        "2)",
        "1.5",
        "1",
        "1.50",
    ] in rows


def test_a_spoilt_file_is_one_clear_error(tmp_path, capsys):
    from tests.helpers.study_folders import make_study

    root = make_study(tmp_path / "study")
    for text in (
        "{",
        "{}",
        '{"slowest": 3}',
        '{"slowest": [{"phase": "update", "rank": 0, "place": "x", "seconds": "y", "others": 1}]}',
    ):
        (root / "sft" / "ranks.json").write_text(text)
        assert cli.main(["report", str(root), "--ledger"]) == 2
        error = capsys.readouterr().err
        assert "ranks.json" in error and "Traceback" not in error


def test_a_single_rank_has_nothing_to_report(tmp_path, monkeypatch):
    monkeypatch.setattr(stragglers.parallel, "coordinates", dict)
    times = RankTimes(Run(tmp_path))
    assert [times.end_step(step) for step in range(3)] == [False] * 3
    assert times.summary() == {} and not list(tmp_path.iterdir())
