"""A verifier worker that hangs, dies or refuses to start on request; otherwise the real one.

Run by test_verifier_pool.py.
"""

import os
import sys
import time
from pathlib import Path

from pctrain.reward import strict, worker

MARK = Path(os.environ.get("FAULTY_MARK", "/nonexistent"))
if "FAULTY_STARTS" in os.environ:  # a line for each worker that was started
    with open(os.environ["FAULTY_STARTS"], "a") as starts:
        starts.write(f"{os.getpid()}\n")


def faulty(answer, gold):
    if answer == "x+hang":
        time.sleep(3600)
    if answer == "x+spin":
        while True:  # a hang that holds a core, as a long computation does
            pass
    if answer == "x+crash":
        os._exit(3)
    if answer == "x+once" and not MARK.exists():
        MARK.touch()
        os._exit(3)
    if answer == "x+child":
        os.system(f"sleep 3600 & echo $! > {MARK}; wait")
    if answer == "x+memory":
        len(bytearray(1 << 30))
    if answer == "x+print":
        print("noise on stdout", flush=True)
    return judge(answer, gold)


judge, strict.judge = strict.judge, faulty
if sys.argv[1] == "refuse":
    sys.exit("no such package")
worker.main({"function": None, "timeout": 1.0, "memory_mb": 512})
