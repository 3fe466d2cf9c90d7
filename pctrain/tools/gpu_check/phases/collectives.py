"""The collectives of a run on a world of one rank, their waits, and the stream of weights to an engine."""

from __future__ import annotations

from pctrain.tools.gpu_check import learning
from pctrain.tools.gpu_check.check import Check

TIMEOUT = 60.0  # seconds of one collective
ELEMENTS = 1 << 20


def run(check: Check) -> None:
    """Call every collective that a run makes; then compare the weight stream with the model's files."""
    import torch
    import torch.distributed as dist

    from pctrain.common.device import device
    from pctrain.distributed import parallel, waits
    from pctrain.distributed.health import phases

    parallel.join(TIMEOUT)
    check.expect("backend", dist.get_backend() == ("nccl" if check.gpu else "gloo"), dist.get_backend())
    waits.measure()
    phases.enter("check")
    values = torch.arange(ELEMENTS, dtype=torch.float32, device=device())
    out = torch.empty_like(values)
    for name, call in {
        "all_reduce": lambda: dist.all_reduce(out.copy_(values)),
        "broadcast": lambda: dist.broadcast(out.copy_(values), src=0),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(out, values),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(out, values),
        "all_to_all_single": lambda: dist.all_to_all_single(out, values),
    }.items():
        out.fill_(-1)
        call()
        check.expect(name, torch.equal(out, values))
    gathered: list = [None]
    dist.all_gather_object(gathered, {"rank": 0})
    check.expect("all_gather_object", gathered == [{"rank": 0}])
    dist.barrier()
    if check.gpu:
        torch.cuda.synchronize()
    waits.settle()
    phases.leave()
    own = phases.take()["check"]
    check.measure("own seconds of the phase, without its waits", own, "s", at_least=0.0, at_most=TIMEOUT)
    _stream(check)


def _stream(check: Check) -> None:
    import torch
    from safetensors import safe_open

    directory = learning.model(check, shallow=True)
    with (
        learning.learner(check, directory, "torch", "float32", train=False) as learner,
        safe_open(directory / "model.safetensors", framework="pt") as file,
    ):
        names = set(file.keys())
        differs = []
        for name, tensor in learner.hf_weights():
            names.discard(name)
            if not torch.equal(tensor.cpu(), file.get_tensor(name)):
                differs.append(name)
    check.expect("the weight stream has every tensor", not names, ", ".join(sorted(names)[:3]))
    check.expect("the weight stream has the bits of the files", not differs, ", ".join(differs[:3]))
