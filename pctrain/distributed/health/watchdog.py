"""A deadline for progress on every rank, and one message that names who failed, in which phase, and why.

Every rank announces its current work (`phase`) and its progress (`beat`, from every micro-batch, engine step, verdict,
weight and collective). While a `watch` is open, a thread of each rank checks once a second. A rank without a beat for
the deadline writes its phase and the stacks of its threads into RUN/faults/TIME/rank-N.txt; so does a rank that raises.
The others see the folder, write their reports, and all ranks end, within the deadline and a few seconds of grace,
however they hang. A rank that wrote no report is dead, stopped or cut off.

Nothing here imports torch, and nothing is sent over the network: a network that hangs is one of the faults to report.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pctrain
from pctrain.common.errors import RunFault, ToBeContinued, UserError
from pctrain.distributed.health import phases

FOLDER = "faults"
GRACE_SECONDS = 6.0  # for the other ranks to write their reports after the first one
CHECK_SECONDS = 1.0
# A rank inside one of these packages waits for others; a rank anywhere else is the one that they wait for.
_WAITING_IN = (os.sep + os.path.join("torch", "distributed") + os.sep,)
_CONNECTION_LOST = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket Timeout",
    "Broken pipe",
)

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}

_step: int | None = None
_failed_in: str | None = None  # the innermost phase that an exception went through
_beat = time.monotonic()
_asked_to_stop = False


# ---- signs of progress -----------------------------------------------------------------------------------------------


def beat() -> None:
    """Record that this rank makes progress. It costs a tenth of a microsecond."""
    global _beat
    _beat = time.monotonic()


def at_step(step: int | None) -> None:
    """Record the step that begins, or None for work that belongs to no step."""
    global _step
    _step = step
    beat()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name this rank's current work. Phases may be nested. Also a decorator."""
    global _failed_in
    _failed_in = None  # an earlier failure was handled
    phases.enter(name)
    beat()
    try:
        yield
    except BaseException:
        _failed_in = _failed_in or name
        raise
    finally:
        phases.leave()
        beat()


def asked_to_stop() -> bool:
    """Return True if this rank got SIGTERM or SIGUSR1 since `watch` opened."""
    return _asked_to_stop


# ---- the watch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankReport:
    """The report of one rank.

    Attributes:
        rank: its global rank.
        kind: raised, silent (no beat within the deadline) or asked (another rank had written a report).
        phase: the innermost phase.
        step: the step of the run, if any.
        still_for: seconds since its last beat.
        waiting: True if it was inside a collective, or lost its connection to another rank.
        where: the innermost line of pctrain in its main thread.
        cause: the error, if it raised.
    """

    rank: int
    kind: str
    phase: str
    step: int | None
    still_for: float
    waiting: bool
    where: str
    cause: str

    @property
    def place(self) -> str:
        """Phase and step."""
        return f"phase {self.phase}" + ("" if self.step is None else f" of step {self.step}")


@contextmanager
def watch(run: Path, deadline: float, rank: int, world: int, started: str) -> Iterator[None]:
    """End all ranks with one message if a rank fails, or makes no progress for `deadline` seconds.

    SIGTERM and SIGUSR1 are noted (`asked_to_stop`); a second one ends the process at once. An exception that is not the
    user's to fix becomes a RunFault.

    Args:
        run: the run folder.
        deadline: seconds that a rank may be without a beat.
        rank: this process's rank.
        world: the number of ranks.
        started: names this start's folder in RUN/faults; the same on all ranks.
    """
    global _failed_in, _asked_to_stop
    _failed_in, _asked_to_stop = None, False
    at_step(None)
    watcher = _Watcher(run / FOLDER / started, deadline, rank, world)
    restore_signals = _note_signals()
    watcher.start()
    try:
        yield
    except (UserError, RunFault, ToBeContinued):
        raise
    except Exception as error:
        raise watcher.fault_of(error) from error
    finally:
        watcher.stop()
        restore_signals()


def _note_signals() -> Callable[[], None]:
    """Note SIGTERM and SIGUSR1 rather than end; return a function that undoes this.

    Outside the main thread, which alone may set handlers, this does nothing. The signals are also blocked, and the
    watcher's thread waits for them. Child processes inherit the block: schedulers signal a whole process group, and a
    checkpoint's helper process that died of it would take the last checkpoint along. The handlers serve threads that
    were started earlier.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    handlers = {number: signal.signal(number, lambda number, _: _note(number)) for number in _STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    return restore


def _note(number: int) -> None:
    global _asked_to_stop
    if _asked_to_stop:
        os._exit(128 + number)
    _asked_to_stop = True


class _Watcher(threading.Thread):
    """The thread that watches one rank.

    The first to act, this thread or an exception in the main one, ends the rank; the other waits for that.
    """

    def __init__(self, folder: Path, deadline: float, rank: int, world: int) -> None:
        super().__init__(name="pctrain-health", daemon=True)
        self.folder = folder
        self.deadline = deadline
        self.rank = rank
        self.world = world
        self._stopped = False
        self._ending = threading.Lock()

    def run(self) -> None:
        """Check the deadline and the other ranks' reports until `stop`."""
        while True:
            signalled = signal.sigtimedwait(_STOP_SIGNALS, min(CHECK_SECONDS, self.deadline / 4))
            if self._stopped:
                return
            if signalled is not None:
                _note(signalled.si_signo)
            asked = self.folder.exists()
            if (asked or time.monotonic() - _beat > self.deadline) and self._ending.acquire(blocking=False):
                self._end("asked" if asked else "silent")

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        if self.ident is not None:
            signal.pthread_kill(self.ident, signal.SIGUSR1)  # wakes it before its second is over
        self.join(timeout=2 * GRACE_SECONDS)

    def fault_of(self, error: Exception) -> RunFault:
        """Report this rank's exception and return what all reports say."""
        if not self._ending.acquire(blocking=False):
            time.sleep(10 * GRACE_SECONDS)  # the thread is about to end the process
        beat()
        frames = traceback.extract_tb(error.__traceback__)
        stack = "".join(traceback.format_exception(error))
        cause = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", []), *_advice(error)])
        waiting = _is_waiting(frames) or any(words in cause for words in _CONNECTION_LOST)
        phase = _failed_in or _current_phase()
        self._write(RankReport(self.rank, "raised", phase, _step, 0.0, waiting, _where(frames), cause), stack)
        return self._conclusion()

    def _end(self, kind: str) -> None:
        """Report and end this process, from the thread: the main thread hangs, or another rank has failed."""
        main_frame = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = traceback.extract_stack(main_frame)
        still_for = time.monotonic() - _beat
        waiting = _is_waiting(frames)
        report = RankReport(self.rank, kind, _current_phase(), _step, still_for, waiting, _where(frames), "")
        self._write(report, _all_stacks())
        fault = self._conclusion()
        if fault.speaker:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may be in C code forever; the files on disk are complete at any moment

    def _write(self, report: RankReport, stack: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"rank-{self.rank}.tmp"
            temporary.write_text(json.dumps(asdict(report)) + "\n\n" + stack, encoding="utf-8")
            temporary.rename(temporary.with_suffix(".txt"))
        except OSError as error:  # a full disk must not hide the fault
            message = f"error: rank {self.rank}, {report.place}: {report.cause or 'no progress'}"
            print(f"{message}; {self.folder} cannot be written ({error})\n{stack}", file=sys.stderr, flush=True)

    def _conclusion(self) -> RunFault:
        """Wait for the other ranks' reports, and return the fault that they describe together."""
        until = time.monotonic() + GRACE_SECONDS
        while len(reports := self._reports()) < self.world and time.monotonic() < until:
            time.sleep(0.05)
        message = (
            f"{conclude(reports, self.world)}\nStacks of the ranks: {self.folder}. Finished work is saved: start the "
            "same command again to resume from the newest checkpoint."
        )
        return RunFault(message, speaker=self.rank == min(reports, default=self.rank))

    def _reports(self) -> dict[int, RankReport]:
        headers = [path.read_text(encoding="utf-8").partition("\n")[0] for path in self.folder.glob("rank-*.txt")]
        reports = [RankReport(**json.loads(header)) for header in headers]
        return {report.rank: report for report in reports}


# ---- conclusions from the reports ------------------------------------------------------------------------------------


def conclude(reports: dict[int, RankReport], world: int) -> str:
    """Return who failed, where and why, in a sentence or two, from the reports by rank."""
    in_order = [reports[rank] for rank in sorted(reports)]
    waiting = [report for report in in_order if report.waiting]
    at_work = [report for report in in_order if not report.waiting]
    raised = [report for report in at_work if report.kind == "raised"]
    stuck = [report for report in at_work if report.kind != "raised"]
    if raised:
        return _describe_raised(raised)
    missing = sorted(set(range(world)) - set(reports))
    if missing:
        return f"rank {_listed(missing)} does not answer: dead, stopped, or cut off" + _describe_waiting(waiting)
    if stuck and (waiting or _has_silent(stuck)):
        return _describe_stuck(stuck) + _describe_waiting(waiting)
    return _describe_mismatch(in_order)


def _has_silent(reports: list[RankReport]) -> bool:
    return any(report.kind == "silent" for report in reports)


def _describe_raised(raised: list[RankReport]) -> str:
    first, others = raised[0], [str(report.rank) for report in raised[1:]]
    also = f" (and so did rank {', '.join(others)})" if others else ""
    return f"rank {first.rank} failed in {first.place}{also}: {first.cause}"


def _describe_stuck(stuck: list[RankReport]) -> str:
    return "; ".join(
        f"rank {report.rank} made no progress for {report.still_for:.0f} s in {report.place}, at {report.where}"
        for report in stuck
    )


def _describe_waiting(waiting: list[RankReport]) -> str:
    if not waiting:
        return ""
    places = sorted({report.place for report in waiting})
    return f". Rank {_listed([report.rank for report in waiting])} waited for it in {' and '.join(places)}"


def _describe_mismatch(reports: list[RankReport]) -> str:
    ranks = [
        f"rank {report.rank} in {report.place}" + (f" ({report.cause})" if report.cause else "") for report in reports
    ]
    return (
        "the ranks wait for each other in collectives that do not match, or the network between them is cut: "
        + "; ".join(ranks)
    )


def _advice(error: Exception) -> Iterator[str]:
    """Yield advice for an error that says that the machine ran out of something."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        yield "the disk is full: make room, or keep fewer checkpoints (run.keep_last), and start again"
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        yield "the run folder cannot be written: make it writable, or name another one (run.dir), and start again"
    elif (
        isinstance(error, MemoryError)
        or "out of memory" in str(error).lower()
        or "can't allocate memory" in str(error).lower()
    ):
        yield (
            "out of memory: lower sft.token_budget or rl.token_budget, recompute activations (parallel.recompute), "
            "shard more (parallel.tensor, parallel.pipeline), or give the engine less "
            "(rollout.gpu_memory, rollout.kv_cache_mb)"
        )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _current_phase() -> str:
    return phases.current() or "start"


def _is_waiting(frames: traceback.StackSummary) -> bool:
    return any(part in frame.filename for frame in frames for part in _WAITING_IN)


def _where(frames: traceback.StackSummary) -> str:
    """Return the innermost line of this package, or of any code if there is none."""
    own = os.path.dirname(os.path.abspath(pctrain.__file__)) + os.sep
    frame = next(
        (f for f in reversed(frames) if f.filename.startswith(own) and f.filename != __file__),
        frames[-1] if frames else None,
    )
    return "no frame" if frame is None else f"{frame.filename}:{frame.lineno} in {frame.name}"


def _all_stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )
