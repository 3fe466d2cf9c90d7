"""Kinds of GPU, with memory and rates. `cpu` is this machine, measured."""

from __future__ import annotations

from dataclasses import dataclass

from pctrain.common.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, in bytes, FLOP/s and bytes/s. `link` and `network` are for one GPU, in one direction."""

    name: str
    memory: float  # what CUDA reports (torch's total_memory), not the nominal size
    bf16: float  # matrix products, dense
    fp32: float  # without TF32, as torch multiplies by default
    bandwidth: float  # of the GPU's memory
    link: float  # to the GPUs of its node
    network: float  # to other nodes
    source: str

    @property
    def is_cpu(self) -> bool:
        """Return whether this is the machine's CPU."""
        return self.name == "cpu"

    def flops(self, dtype: str) -> float:
        """Return the FLOP/s of dense matrix products."""
        return self.bf16 if dtype == "bfloat16" else self.fp32


# Memory: the smallest "total capacity of ... GiB" seen in torch's out-of-memory messages on such a GPU. Rates: NVIDIA's
# data sheets, dense figures; their NVLink figures are for both directions together. Network: one adapter per GPU, as in
# NVIDIA's DGX of that kind.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 139.7 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9, "H200 SXM data sheet; DGX H200: 400 Gb/s per GPU"),
        Gpu("h100", 79.1 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9, "H100 SXM data sheet; DGX H100: 400 Gb/s per GPU"),
        Gpu(
            "a100-80",
            79.1 * GIB,
            312e12,
            19.5e12,
            2.039e12,
            300e9,
            25e9,
            "A100 80GB SXM data sheet; DGX A100: 200 Gb/s per GPU",
        ),
        Gpu(
            "a100-40",
            39.4 * GIB,
            312e12,
            19.5e12,
            1.555e12,
            300e9,
            25e9,
            "A100 40GB SXM data sheet; DGX A100: 200 Gb/s per GPU",
        ),
        Gpu(
            "b200", 178.3 * GIB, 2250e12, 75e12, 7.7e12, 900e9, 50e9, "HGX B200 data sheet; DGX B200: 400 Gb/s per GPU"
        ),
    )
}


def find(name: str, ranks: int) -> Gpu:
    """Return a kind of GPU; `cpu` is measured now, and shared by the ranks. UserError for an unknown name."""
    if name == "cpu":
        return _this_machine(ranks)
    if name not in GPUS:
        raise UserError(
            f"--gpu {name}: this kind of GPU is not known; known: {', '.join(GPUS)}, and cpu for this machine"
        )
    return GPUS[name]


def _this_machine(ranks: int) -> Gpu:
    """Return this machine as a GPU. Its ranks exchange data through memory."""
    import os

    from pctrain.core.peak import peak_flops
    from pctrain.tools.doctor.measures import copy_bandwidth, memory_left

    share = min(1.0, (os.cpu_count() or 1) / ranks)  # more ranks than cores take turns
    copied = copy_bandwidth() * share
    return Gpu(
        "cpu",
        memory=(memory_left() or 0) / ranks,
        bf16=peak_flops("bfloat16") * share,
        fp32=peak_flops("float32") * share,
        bandwidth=copied,
        link=copied / 4,
        network=copied / 4,
        source="measured now: matrix products, a copy in memory; exchange: a quarter of the copy, assumed",
    )
