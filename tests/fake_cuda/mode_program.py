"""The waits that the fake device counts and the calls that it refuses: the program that test_mode.py starts.

    python -m tests.fake_cuda.mode_program CASES.json

CASES.json is not read. Prints a line of JSON: {case: {"waits": {kind: count}, "raised": class or null}}.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable

from tests.fake_cuda.device import start


def cases() -> dict[str, Callable[[], object]]:
    """Return what is tried."""
    import torch

    host = torch.arange(6.0)
    pinned = host.pin_memory()
    x = host.cuda()
    mask = x > 2
    into = torch.zeros(6)
    like = torch.empty_like(x, device="cpu", pin_memory=True)

    def write_by_mask() -> None:
        x[mask] = x[mask] + 1

    def multiply() -> None:
        weight = torch.ones(6, 6, device="cuda", requires_grad=True)
        (x @ weight).sum().backward()
        assert weight.grad is not None and weight.grad.is_cuda

    return {
        "real work on the host": lambda: (host + 1).sum().item(),
        "matrix product and its gradient": multiply,
        "item": lambda: x[0].item(),
        "condition": lambda: bool(x[0] > 0),
        "list of the values": lambda: x.tolist(),
        "list of tensors": lambda: torch.tensor([x[0], x[1]]),
        "blocking copy to the device": lambda: host.cuda(),
        "value made on the device": lambda: torch.tensor(3.0, device="cuda"),
        "blocking copy from pinned memory": lambda: pinned.cuda(),
        "non-blocking copy from pageable memory": lambda: host.to("cuda", non_blocking=True),
        "non-blocking copy from pinned memory": lambda: pinned.to("cuda", non_blocking=True),
        "non-blocking copy of a part of pinned memory": lambda: pinned[2:].to("cuda", non_blocking=True),
        "non-blocking copy into a tensor": lambda: x.copy_(pinned, non_blocking=True),
        "copy to the host": lambda: x.cpu(),
        "non-blocking copy to the host": lambda: x.to("cpu", non_blocking=True),
        "non-blocking copy into pageable memory": lambda: into.copy_(x, non_blocking=True),
        "non-blocking copy into pinned memory": lambda: like.copy_(x, non_blocking=True),
        "and back": lambda: like.to("cuda", non_blocking=True),
        "nonzero": lambda: mask.nonzero(),
        "read by a mask": lambda: x[mask],
        "write by a mask": write_by_mask,
        "one value by a mask": lambda: x.masked_fill_(mask, 0.0),
        "index on the host": lambda: x[torch.tensor([0, 1])],
        "synchronize": torch.cuda.synchronize,
        "event": torch.cuda.Event().synchronize,
        "mixed devices": lambda: x + host,
        "numpy": lambda: x.numpy(),
    }


def main() -> int:
    mode = start(world=1)
    import torch

    report = {}
    for name, case in cases().items():
        raised = None
        with mode.in_phase(name):
            try:
                case()
            except (RuntimeError, TypeError) as error:
                raised = type(error).__name__
        waits: Counter[str] = Counter()
        for (phase, kind, place), count in mode.waits.items():
            if phase == name:
                assert "mode_program.py" in place, place
                waits[kind] += count
        report[name] = {"waits": waits, "raised": raised}
    with mode.in_phase("memory"):
        before = mode.memory.now
        block = torch.zeros(1000, device="cuda")
        view = block[10:].view(-1)
        del block
        held = mode.memory.now - before
        del view
    report["memory"] = {"held": held, "left": mode.memory.now - before, "peak": mode.memory.peaks["memory"] - before}
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
