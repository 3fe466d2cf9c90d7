"""Copy bandwidth and the bfloat16 matrix product, against the data sheet where the GPU is known."""

from __future__ import annotations

from typing import Any

from pctrain.core.peak import fastest, peak_flops
from pctrain.tools.gpu_check.check import Check

# Part of the GPU's name, bfloat16 FLOP/s (dense) and bytes/s of its data sheet; the first match counts.
DATA_SHEETS = (
    ("H200", 989e12, 4.8e12),
    ("H100 NVL", 835e12, 3.9e12),
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100", 989e12, 3.35e12),
    ("B200", 2250e12, 7.7e12),
    ("A100-SXM4-80GB", 312e12, 2.039e12),
    ("A100", 312e12, 1.555e12),
)
# An H200 reaches 0.78 to 0.81 and 0.9; a GPU at a low power limit, or one that others use too, falls below these.
PRODUCT_SHARE, COPY_SHARE = 0.65, 0.8
COPY_BYTES, CPU_COPY_BYTES = 4 << 30, 64 << 20


def run(check: Check) -> None:
    """Measure both rates."""
    import torch

    device = torch.device("cuda" if check.gpu else "cpu")
    sheet = next((s for s in DATA_SHEETS if check.gpu and s[0] in torch.cuda.get_device_name()), None)
    if check.gpu and sheet is None:
        check.skip("data sheet", f"{torch.cuda.get_device_name()} is not in the table: rates are only reported")

    copied = copy_rate(check, COPY_BYTES if check.gpu else CPU_COPY_BYTES, device)
    least = sheet[2] * COPY_SHARE / 1e12 if sheet else None
    check.measure("copy, read and written", copied / 1e12, "TB/s", at_least=least)
    product = peak_flops("bfloat16")
    name = "8192^3 bf16 product" if check.gpu else "768^3 bf16 product"
    check.measure(name, product / 1e12, "TFLOP/s", at_least=sheet[1] * PRODUCT_SHARE / 1e12 if sheet else None)
    check.measure(name.replace("bf16", "fp32"), peak_flops("float32") / 1e12, "TFLOP/s")


def copy_rate(check: Check, size: int, device: Any) -> float:
    """Return the bytes/s that a copy within the device's memory reads and writes."""
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source))
    check.expect("a copy has the bytes of its source", bool((target == 1).all()))
    return 2 * size / seconds
