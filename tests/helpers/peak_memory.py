"""Measure the peak of host memory of a pctrain command: `measure`, and the program that it starts on every rank."""

from __future__ import annotations

import importlib
import json
import os
import resource
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Memory of one rank, in bytes."""

    base: int  # resident after the imports
    # Most that was resident after that, in the rank or in one of its writing processes with the pages they share.
    peak: int


def measure(*command: object, world: int = 1) -> list[Memory]:
    """Run `pctrain COMMAND` on `world` ranks, a process each; return the memory of each.

    Raises AssertionError with the output if the command fails.
    """
    return on_ranks(__file__, *command, f"--parallel.tensor={world}", world=world)


def on_ranks(program: str, *arguments: object, world: int = 1) -> list[Memory]:
    """Do as `measure` for any program whose last line is a `Memory` as JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, program, *map(str, arguments)],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=800)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(outputs)
    return [Memory(**json.loads(output.splitlines()[-1])) for output in outputs]


def status(key: str) -> int:
    """Return a size in bytes from /proc/self/status: VmRSS is resident now, VmHWM is the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def main() -> int:
    from pctrain.cli import main as cli

    importlib.import_module("pctrain.tools.convert")  # torch and megatron-core belong to the base

    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restart VmHWM
    code = cli.main(sys.argv[1:])
    writers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"base": base, "peak": max(status("VmHWM"), writers)}))
    return code


if __name__ == "__main__":  # megatron-core starts a process that imports this file again
    sys.exit(main())
