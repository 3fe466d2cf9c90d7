"""A deadline for progress on every rank, and one message that names who failed, in which phase, and why.

Every rank says what it does (`phase`) and that it goes on (`beat`, from every micro-batch, engine step, verdict, weight, collective).
While a `watch` is open, a thread of each rank looks once a second: a rank without a beat for the deadline writes its phase and the stacks
of its threads into RUN/faults/TIME/rank-N.txt; so does a rank that raises. The others see the folder, write theirs, and all of them end:
within the deadline and a grace of seconds, however they hang. A rank that wrote nothing is dead, stopped or cut off.
Nothing here imports torch, and nothing is sent over the network: a network that hangs is one of the faults that must be told.
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
GRACE_SECONDS = 6.0  # for the other ranks to write down what they do, once one has
LOOK_SECONDS = 1.0
# A rank that stands in one of these packages waits for others; one that stands elsewhere is what they wait for.
_WAITING_IN = (os.sep + os.path.join("torch", "distributed") + os.sep,)
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout", "Broken pipe")

_STOP = {signal.SIGTERM, signal.SIGUSR1}

_step: int | None = None
_failed_in: str | None = None  # the innermost phase that an exception went through
_beat = time.monotonic()
_asked_to_stop = False


# ---- what a rank says ------------------------------------------------------------------------------------------------------


def beat() -> None:
    """This rank makes progress. Costs a tenth of a microsecond."""
    global _beat
    _beat = time.monotonic()


def at_step(step: int | None) -> None:
    """The step of the run that begins; None: what comes belongs to no step."""
    global _step
    _step = step
    beat()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What this rank does from now on; phases may lie in one another. Also a decorator."""
    global _failed_in
    _failed_in = None  # what failed before this was mended
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
    """Whether this rank got SIGTERM or SIGUSR1 since `watch` opened."""
    return _asked_to_stop


# ---- the watch -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What one rank wrote. `kind`: raised | silent (no beat within the deadline) | asked (another rank had written).

    `waiting`: it stood in a collective, or lost one; `where`: the innermost line of pctrain in its main thread.
    """

    rank: int
    kind: str
    phase: str
    step: int | None
    still_for: float  # seconds since its last beat
    waiting: bool
    where: str
    cause: str

    @property
    def place(self) -> str:
        return f"phase {self.phase}" + ("" if self.step is None else f" of step {self.step}")


@contextmanager
def watch(run: Path, deadline: float, rank: int, world: int, started: str) -> Iterator[None]:
    """While open: no rank hangs, or fails alone, for longer than `deadline` seconds without the others ending and saying so.

    `started`: the same text on all ranks, names this start's folder below RUN/faults. SIGTERM and SIGUSR1 are noted (`asked_to_stop`);
    a second one ends the process at once. An exception that is not for the user to mend becomes a RunFault.
    """
    global _failed_in, _asked_to_stop
    _failed_in, _asked_to_stop = None, False
    at_step(None)
    watcher = _Watcher(run / FOLDER / started, deadline, rank, world)
    give_back = _note_signals()
    watcher.start()
    try:
        yield
    except (UserError, RunFault, ToBeContinued):
        raise
    except Exception as error:
        raise watcher.fault_of(error) from error
    finally:
        watcher.stop()
        give_back()


def _note_signals() -> Callable[[], None]:
    """Makes SIGTERM and SIGUSR1 notes; returns what undoes that. Outside the main thread, which alone may set handlers, nothing is done.

    They are blocked too, and the watcher's thread waits for them: what this process starts inherits that, and schedulers send the signal
    to a whole family. A checkpoint's helper process that died of it would take the last checkpoint along. The handlers are for threads
    that were there before.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    handlers = {number: signal.signal(number, lambda number, _: _note(number)) for number in _STOP}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)

    def give_back() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    return give_back


def _note(number: int) -> None:
    global _asked_to_stop
    if _asked_to_stop:
        os._exit(128 + number)
    _asked_to_stop = True


class _Watcher(threading.Thread):
    """Of one rank. Whoever comes first, this thread or an exception in the main one, ends the rank; the other waits for that."""

    def __init__(self, folder: Path, deadline: float, rank: int, world: int):
        super().__init__(name="pctrain-health", daemon=True)
        self.folder, self.deadline, self.rank, self.world = folder, deadline, rank, world
        self._stopped, self._ending = False, threading.Lock()

    def run(self) -> None:
        while True:
            signalled = signal.sigtimedwait(_STOP, min(LOOK_SECONDS, self.deadline / 4))
            if self._stopped:
                return
            if signalled is not None:
                _note(signalled.si_signo)
            asked = self.folder.exists()
            if (asked or time.monotonic() - _beat > self.deadline) and self._ending.acquire(blocking=False):
                self._end("asked" if asked else "silent")

    def stop(self) -> None:
        self._stopped = True
        signal.pthread_kill(self.ident, signal.SIGUSR1)  # it need not wait out its second
        self.join(timeout=2 * GRACE_SECONDS)

    def fault_of(self, error: Exception) -> RunFault:
        if not self._ending.acquire(blocking=False):
            time.sleep(10 * GRACE_SECONDS)  # the thread is at it, and ends the process
        beat()
        frames = traceback.extract_tb(error.__traceback__)
        stack = "".join(traceback.format_exception(error))
        cause = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", []), *_advice(error)])
        lost = _is_waiting(frames) or any(word in cause for word in _LOST)
        self._write(Report(self.rank, "raised", _failed_in or _now(), _step, 0.0, lost, _where(frames), cause), stack)
        return self._conclusion()

    def _end(self, kind: str) -> None:
        """Called by the thread: the main one hangs, or another rank has failed."""
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        still = time.monotonic() - _beat
        self._write(
            Report(self.rank, kind, _now(), _step, still, _is_waiting(frames), _where(frames), ""), _all_stacks()
        )
        fault = self._conclusion()
        if fault.speaker:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may stand in C for ever; what is on the disk is whole at any moment

    def _write(self, report: Report, stack: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"rank-{self.rank}.tmp"
            temporary.write_text(json.dumps(asdict(report)) + "\n\n" + stack, encoding="utf-8")
            temporary.rename(temporary.with_suffix(".txt"))
        except OSError as error:  # a full disk must not hide the fault
            print(
                f"error: rank {self.rank}, {report.place}: {report.cause or 'no progress'}; {self.folder} cannot be written ({error})\n"
                + stack,
                file=sys.stderr,
                flush=True,
            )

    def _conclusion(self) -> RunFault:
        """Waits for the other ranks' reports, and says what they tell together."""
        until = time.monotonic() + GRACE_SECONDS
        while len(reports := self._reports()) < self.world and time.monotonic() < until:
            time.sleep(0.05)
        message = (
            f"{conclude(reports, self.world)}\nStacks of the ranks: {self.folder}. Nothing that was finished is lost: start the "
            "same command again, and it goes on from its newest checkpoint."
        )
        return RunFault(message, speaker=self.rank == min(reports, default=self.rank))

    def _reports(self) -> dict[int, Report]:
        texts = [path.read_text(encoding="utf-8") for path in self.folder.glob("rank-*.txt")]
        return {report.rank: report for report in (Report(**json.loads(text.partition("\n")[0])) for text in texts)}


# ---- what the reports tell -------------------------------------------------------------------------------------------------


def conclude(reports: dict[int, Report], world: int) -> str:
    """Who failed, where and why: {rank: report} of those that answered, in a sentence or two."""
    answers = [reports[rank] for rank in sorted(reports)]
    missing = [rank for rank in range(world) if rank not in reports]
    raised = [r for r in answers if r.kind == "raised" and not r.waiting]
    stuck = [r for r in answers if r.kind != "raised" and not r.waiting]
    waited = [r for r in answers if r.waiting]
    if raised:
        first, others = raised[0], [str(r.rank) for r in raised[1:]]
        also = f" (and so did rank {', '.join(others)})" if others else ""
        return f"rank {first.rank} failed in {first.place}{also}: {first.cause}"
    if missing:
        text = f"rank {_listed(missing)} does not answer: dead, stopped, or cut off"
    elif stuck and (waited or any(r.kind == "silent" for r in stuck)):
        text = "; ".join(
            f"rank {r.rank} made no progress for {r.still_for:.0f} s in {r.place}, at {r.where}" for r in stuck
        )
    else:
        return (
            "the ranks wait for one another in collectives that do not match, or the network between them is cut: "
            + "; ".join(f"rank {r.rank} in {r.place}" + (f" ({r.cause})" if r.cause else "") for r in answers)
        )
    places = sorted({r.place for r in waited})
    return text + (
        f". Rank {_listed([r.rank for r in waited])} waited for it in {' and '.join(places)}" if waited else ""
    )


def _advice(error: Exception) -> Iterator[str]:
    """What to do, where the machine ran out of something."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        yield "the disk is full: make room, or keep fewer checkpoints (run.keep_last), and start again"
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        yield "the run folder cannot be written: mend that, or move it to where it can be (run.dir), and start again"
    elif (
        isinstance(error, MemoryError)
        or "out of memory" in str(error).lower()
        or "can't allocate memory" in str(error).lower()
    ):
        yield (
            "out of memory: lower sft.token_budget or rl.token_budget, recompute activations (parallel.recompute), shard more "
            "(parallel.tensor, parallel.pipeline), or give the engine less (rollout.gpu_memory, rollout.kv_cache_mb)"
        )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _now() -> str:
    return phases.current() or "start"


def _is_waiting(frames: traceback.StackSummary) -> bool:
    return any(part in frame.filename for frame in frames for part in _WAITING_IN)


def _where(frames: traceback.StackSummary) -> str:
    """The innermost line of this package, else of all."""
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
