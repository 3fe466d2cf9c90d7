"""Start `pctrain` commands at once, as forks of one process that has imported everything.

    with Forked() as forked:
        run = forked.start(["sft", "--run.dir=..."], log)
        run.kill()                                        # SIGKILL
        assert forked.start(...).wait(60) == 0

Importing torch and megatron-core costs seconds; a test that kills a run twenty times pays them once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Forked:
    def __init__(self, **environment: str) -> None:
        """Server that forks commands; `environment` is added to this process's environment for all of them."""
        # Only processes that come from this server have this in their environment.
        self._mark = f"PCTRAIN_FORKED={uuid.uuid4().hex}"
        all_of_it = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}",
            **dict([self._mark.split("=")]),
            **environment,
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=all_of_it, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdin is not None and self._server.stdout is not None
        self._questions = self._server.stdin
        self._answers = self._server.stdout
        assert self._answers.readline() == "ready\n"

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self._questions.close()  # the server kills what still runs
        self._server.wait()

    def start(self, arguments: list[str], log: Path, hook: str = "", **environment: str) -> Run:
        """Start a command; `hook` is a function of hooks.py that is called before it."""
        pid = self.ask({"start": arguments, "log": str(log), "hook": hook, "environment": environment})
        assert pid is not None
        return Run(self, pid, log)

    def start_ranks(
        self, arguments: list[str], folder: Path, world: int, hook: str = "", **environment: str
    ) -> list[Run]:
        """Start one process per rank, as torchrun would; the output of rank r goes to `folder`/rank-r.log."""
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(probe.getsockname()[1]),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
            }
        return [
            self.start(
                arguments,
                folder / f"rank-{rank}.log",
                hook,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                **place,
                **environment,
            )
            for rank in range(world)
        ]

    def orphans(self) -> list[int]:
        """Return the surviving processes of killed runs: forks of the server whose parent is gone."""
        orphans = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                mine = self._mark.encode() in (entry / "environ").read_bytes()
            except OSError:
                continue  # the process has ended
            if (
                mine
                and __file__.encode() in command
                and int(entry.name) != self._server.pid
                and parent != self._server.pid
            ):
                orphans.append(int(entry.name))
        return orphans

    def ask(self, question: dict) -> int | None:
        self._questions.write(json.dumps(question) + "\n")
        self._questions.flush()
        return json.loads(self._answers.readline())


@dataclass
class Run:
    forked: Forked
    pid: int
    log: Path
    status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status (negative: killed by that signal), or None while the process runs."""
        if self.status is None:
            self.status = self.forked.ask({"poll": self.pid})
        return self.status

    def wait(self, deadline: float) -> int:
        end = time.monotonic() + deadline
        while (status := self.poll()) is None:
            assert time.monotonic() < end, f"still running after {deadline} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)
        return status

    def kill(self) -> int:
        """Send SIGKILL to this process alone, not to its children.

        Return the exit status; it is the run's own if the run ended first.
        """
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait(10)


def _serve() -> None:
    import pctrain.rl.loop
    import pctrain.sft.loop  # noqa: F401  imported before the forks
    from pctrain.cli.main import main

    print("ready", flush=True)
    running = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(log, stream)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                sys.argv[1:] = question["start"]
                os.environ.update(question["environment"])
                if question["hook"]:
                    from tests.helpers import hooks

                    getattr(hooks, question["hook"])()
                sys.exit(main(question["start"]))
            running.add(pid)
            print(pid, flush=True)
        else:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            running.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
