"""A verifier process: it reads one question per line and answers each with a verdict.

Start it with `python -m pctrain.reward.worker OPTIONS`. OPTIONS is a JSON object: `function` (null for Math-Verify, or
the user's module:function), `timeout` (seconds, for an async function) and `memory_mb`. The process runs one verdict at
a time in its main thread, or those of an async function in its event loop. The parent keeps the deadlines and kills the
process.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

from pctrain.reward import strict, user
from pctrain.reward.verdict import Verdict

# Questions that an async function gets at once: enough to hide the latency of a remote judge, and few to ask again one
# by one.
IN_FLIGHT = 32
_PR_SET_PDEATHSIG = 1


def main(options: dict[str, Any]) -> None:
    """Serve until stdin ends, which is when the parent ends."""
    die_with_parent()
    # Output of libraries must not get between the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if options["function"] is None:
        serve_math_verify(options["memory_mb"], replies)
    else:
        serve_function(options["function"], options["timeout"], options["memory_mb"], replies)


def serve_math_verify(memory_mb: int, replies: IO[str]) -> None:
    """Answer with Math-Verify's verdicts."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
    # The first call costs a tenth of a second of lazy imports, which must not count towards the deadline of a verdict.
    strict.judge("1/2", "x")
    limit_memory(memory_mb)
    serve(strict.judge, replies)


def serve_function(name: str, timeout: float, memory_mb: int, replies: IO[str]) -> None:
    """Answer with the verdicts of a user's function."""
    try:
        function = user.load(name)
    except user.LoadError as error:
        reply(replies, {"error": str(error)})
        return
    limit_memory(memory_mb)
    if user.is_async(function):
        asyncio.run(serve_async(function, timeout, replies))
    else:
        serve(user.judge_with(function), replies, lambda question: user.extra_arguments(function, question))


def serve(
    judge: Callable[..., Verdict],
    replies: IO[str],
    extra_arguments: Callable[[dict[str, Any]], dict[str, str]] = lambda question: {},
) -> None:
    """Answer one question at a time. `extra_arguments` returns the judge's arguments besides response and answer."""
    reply(replies, {"ready": 1})
    for line in sys.stdin:
        question = json.loads(line)
        try:
            verdict = judge(question["response"], question["answer"], **extra_arguments(question))
        except MemoryError:  # raised while another MemoryError was being handled
            verdict = Verdict(0.0, "memory", "the verifier asked for more than reward.memory_mb")
        reply(replies, {"id": question["id"], **asdict(verdict)})


async def serve_async(function: Callable[..., Any], timeout: float, replies: IO[str]) -> None:
    """Answer up to IN_FLIGHT questions at once. Each has `timeout` seconds."""
    stdin = asyncio.StreamReader(limit=1 << 30)  # a line holds a whole response
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    reply(replies, {"ready": IN_FLIGHT})

    async def judge(question: dict[str, Any]) -> None:
        try:
            # `wait` rather than `wait_for`: a TimeoutError that the function raises is its own error, not our deadline.
            arguments = user.extra_arguments(function, question)
            task = asyncio.ensure_future(function(question["response"], question["answer"], **arguments))
            done, _ = await asyncio.wait([task], timeout=timeout)
            if done:
                verdict = user.verdict_of(task.result())
            else:
                task.cancel()
                verdict = Verdict(0.0, "timeout", f"no verdict within {timeout:g} s")
        except (Exception, asyncio.CancelledError) as error:
            verdict = user.verdict_of_error(error)
        reply(replies, {"id": question["id"], **asdict(verdict)})

    running = set()
    while line := await stdin.readline():
        task = asyncio.create_task(judge(json.loads(line)))
        running.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(running.discard)


def reply(stream: IO[str], message: dict[str, Any]) -> None:
    """Send one message to the parent."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def limit_memory(megabytes: int) -> None:
    """Let the address space grow by `megabytes` beyond what is mapped now.

    The kernel enforces the limit, because a power tower takes gigabytes within one C call, faster than anyone could
    react who polls the resident size. The limit is relative, because libraries map far more than they use (NumPy's BLAS
    maps a buffer per thread, torch several GB).
    """
    if sys.platform == "linux":
        with open("/proc/self/statm") as stream:
            mapped = int(stream.read().split()[0]) * resource.getpagesize()
        limit = mapped + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def die_with_parent() -> None:
    """Ask the Linux kernel to kill this process when its parent dies.

    The end of stdin is not noticed while a verdict hangs.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
