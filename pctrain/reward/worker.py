"""A verifier process: reads questions, a line each, and answers each with a verdict. `python -m pctrain.reward.worker OPTIONS`.

OPTIONS is a JSON object: `function` (null for Math-Verify, or the user's module:function), `timeout` (seconds, for an async function),
`memory_mb`. It runs one verdict at a time in its main thread, or an async function's in its event loop. The parent holds the clock and
kills.
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

from pctrain.reward import strict, user
from pctrain.reward.verdict import Verdict

IN_FLIGHT = 32  # questions that an async function is given at once: enough to hide the latency of a remote judge, few to ask again alone
_PR_SET_PDEATHSIG = 1


def main(options: dict) -> None:
    """Serves until stdin (the parent) ends."""
    with_parent()
    # Whatever a library prints must not get between the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if options["function"] is None:
        judge: Callable = strict.judge
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
        judge(
            "1/2", "x"
        )  # the first call costs a tenth of a second of lazy imports; the deadline of a verdict is not for that
    else:
        try:
            judge = user.load(options["function"])
        except user.LoadError as error:
            reply(replies, {"error": str(error)})
            return
        if user.is_async(judge):
            limit_memory(options["memory_mb"])
            asyncio.run(serve_async(judge, options["timeout"], replies))
            return
        function, judge = judge, user.judge_with(judge)
        limit_memory(options["memory_mb"])
        serve(judge, replies, lambda question: user.asked_with(function, question))
        return
    limit_memory(options["memory_mb"])
    serve(judge, replies)


def serve(judge: Callable[..., Verdict], replies, more: Callable[[dict], dict[str, str]] = lambda question: {}) -> None:
    """One question at a time. `more`: what the judge is called with beside response and answer."""
    reply(replies, {"ready": 1})
    for line in sys.stdin:
        question = json.loads(line)
        try:
            verdict = judge(question["response"], question["answer"], **more(question))
        except MemoryError:  # raised where it was being handled
            verdict = Verdict(0.0, "memory", "the verifier asked for more than reward.memory_mb")
        reply(replies, {"id": question["id"], **asdict(verdict)})


async def serve_async(function: Callable, timeout: float, replies) -> None:
    """Up to IN_FLIGHT questions at once; each has `timeout` seconds."""
    stdin = asyncio.StreamReader(limit=1 << 30)  # a line is a whole response
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    reply(replies, {"ready": IN_FLIGHT})

    async def judge(question: dict) -> None:
        try:
            # A name of its own: a TimeoutError that the function raises is its error, not the deadline.
            task = asyncio.ensure_future(
                function(question["response"], question["answer"], **user.asked_with(function, question))
            )
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


def reply(stream, message: dict) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def limit_memory(megabytes: int) -> None:
    """Lets the address space grow by `megabytes` beyond what is mapped now.

    A limit of the kernel's: a power tower takes gigabytes within one call in C, faster than anyone who watches the resident size looks.
    Counted from here, because libraries map far more than they use (NumPy's BLAS a buffer for each thread, torch several GB).
    """
    if sys.platform == "linux":
        with open("/proc/self/statm") as stream:
            mapped = int(stream.read().split()[0]) * resource.getpagesize()
        limit = mapped + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def with_parent() -> None:
    """End of stdin is not seen while a verdict hangs, so on Linux the kernel is asked to kill this process when its parent dies."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was in place
        os._exit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
