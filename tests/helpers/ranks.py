"""Gloo ranks that stay alive over many tests: starting a rank takes seconds, a call takes milliseconds.

`RankPool(world).run(fn, *args)` runs a module-level function on every rank and returns the results by rank. Each rank
is a separate process with RANK, WORLD_SIZE, MASTER_ADDR... as torchrun would set them. Every call has new process
groups, with the default group over the whole world. They are destroyed after the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

START_SECONDS = 180.0  # allows for importing torch on a busy machine
GRACE_SECONDS = (
    15.0  # seconds for the other ranks to answer after a failure: they may hang in a collective with the failed rank
)


class RanksFailed(AssertionError):
    """One or more ranks raised or did not answer; `causes` is {rank: exception}, where it can be pickled."""

    def __init__(self, message: str, causes: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.causes = causes


class RankPool:
    """`world` processes; the first call starts them, and so does a call after they were left in an unknown state."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, fn: Callable[..., Any], *args: Any, deadline: float = 120.0, **kwargs: Any) -> list[Any]:
        """Run `fn(*args, **kwargs)` on every rank; return the results by rank or raise RanksFailed."""
        if not self._processes:
            self._start()
        call = pickle.dumps((fn, args, kwargs))
        for pipe in self._pipes:
            pipe.send((sys.path, call))
        answers = self._collect(deadline)
        failed = {rank: answer for rank, answer in answers.items() if not answer["ok"]}
        silent = [rank for rank in range(self.world) if rank not in answers]
        if not failed and not silent:
            return [answers[rank]["result"] for rank in range(self.world)]
        # Some ranks may be a collective ahead of the others, or one is gone and the others have noticed.
        if silent or len(failed) < self.world or any(not process.is_alive() for process in self._processes):
            self.stop()
        raise RanksFailed(
            _describe(fn, failed, silent, deadline),
            {rank: answer["exception"] for rank, answer in failed.items() if answer["exception"] is not None},
        )

    def _collect(self, deadline: float) -> dict[int, dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + deadline
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while open_pipes and (left := end - time.monotonic()) > 0:
            ready = wait(list(open_pipes), timeout=left)
            for pipe in [pipe for pipe in open_pipes if pipe in ready]:
                rank = open_pipes.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(GRACE_SECONDS)
                    code = self._processes[rank].exitcode
                    answers[rank] = {
                        "ok": False,
                        "exception": None,
                        "traceback": f"the process died (exit code {code})",
                    }
                if not answers[rank]["ok"]:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        return answers

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = get_context("spawn")
        for rank in range(self.world):
            own_end, rank_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, rank_end, os.getpid()))
            process.start()
            rank_end.close()
            self._processes.append(process)
            self._pipes.append(own_end)
        answers = self._collect(START_SECONDS)
        failed = {rank: answer for rank, answer in answers.items() if not answer["ok"]}
        silent = [rank for rank in range(self.world) if rank not in answers]
        if failed or silent:
            self.stop()
            raise RanksFailed(_describe(_serve, failed, silent, START_SECONDS), {})

    def stop(self) -> None:
        """Kill every rank together with its children; each rank leads a separate process group."""
        for process in self._processes:
            # It may have died before it led a group, or be gone already.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


class Ranks:
    """Pools by world size; the `ranks` fixture."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def run(
        self, fn: Callable[..., Any], *args: Any, world: int = 2, deadline: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Run a module-level function on `world` ranks (1, 2 or 4); return results by rank, or raise RanksFailed."""
        if world not in (1, 2, 4):
            raise ValueError(f"world {world}: expected 1, 2 or 4")
        return self._pools.setdefault(world, RankPool(world)).run(fn, *args, deadline=deadline, **kwargs)

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()


def _describe(fn: Callable[..., Any], failed: dict[int, dict[str, Any]], silent: list[int], deadline: float) -> str:
    parts = [f"rank {rank} failed:\n{failed[rank]['traceback']}" for rank in sorted(failed)]
    if silent:
        after = f"{GRACE_SECONDS:.0f} s after another failed" if failed else f"within {deadline:.0f} s"
        parts.append(f"no answer {after} from rank(s) {', '.join(map(str, silent))}")
    return f"{fn.__qualname__}: " + "\n".join(parts)


def _serve(rank: int, world: int, port: int, pipe: Connection, parent: int) -> None:
    """Run a rank: join the world, then answer calls until the pipe closes."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed pytest leaves no ranks behind
    if os.getppid() != parent:
        return
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )

    store = None

    def join() -> None:
        nonlocal store
        import torch

        torch.set_num_threads(1)
        store = torch.distributed.TCPStore("127.0.0.1", port, world, is_master=rank == 0)

    pipe.send_bytes(_answer(join))
    number = 0
    while True:
        try:
            path, call = pipe.recv()
        except EOFError:
            return
        sys.path.extend(folder for folder in path if folder not in sys.path)
        number += 1
        pipe.send_bytes(_answer(partial(_call, call, store, f"call {number}", rank, world)))


def _call(call: bytes, store: Any, name: str, rank: int, world: int) -> Any:
    """Run the call in new process groups, and destroy them afterwards.

    A gloo group keeps polling threads, and megatron-core makes some forty groups per call.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world)
    # A rank that returns at once would close its connections while another rank still makes its own.
    store.set(f"{name} joined {rank}", "")
    store.wait([f"{name} joined {other}" for other in range(world)])
    fn, args, kwargs = pickle.loads(call)
    try:
        return fn(*args, **kwargs)
    finally:
        state = sys.modules.get("megatron.core.parallel_state")
        if state is not None and state.model_parallel_is_initialized():
            state.destroy_model_parallel()
        dist.destroy_process_group()
        gc.collect()


def _answer(work: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps({"ok": True, "result": work()})
    except BaseException as error:
        answer = {"ok": False, "exception": error, "traceback": traceback.format_exc()}
        try:
            data = pickle.dumps(answer)
            pickle.loads(data)  # some exceptions pickle but cannot be unpickled
            return data
        except Exception:
            return pickle.dumps(answer | {"exception": None})
