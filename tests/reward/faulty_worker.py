"""A verifier worker that hangs, dies or refuses to start on request; otherwise the real one. Run by test_verifier_pool.py."""

import os
import sys
import time

from pctrain.reward.worker import judge, serve


def faulty(answer: str, gold: str) -> str:
    if answer == "x+hang":
        time.sleep(3600)
    if answer == "x+spin":
        while True:  # a hang that holds a core, as a long computation does
            pass
    if answer == "x+crash":
        os._exit(3)
    if answer == "x+print":
        print("noise on stdout", flush=True)
    return judge(answer, gold)


if sys.argv[1:] == ["refuse"]:
    sys.exit("no such package")
serve(faulty)
