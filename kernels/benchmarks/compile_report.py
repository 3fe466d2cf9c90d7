"""Compile every Triton kernel of the package, without a GPU: registers, stack and spills of each specialisation.

    python kernels/benchmarks/compile_report.py [--tier fast|full] [--markdown FILE] [--json FILE]

Triton specialises a kernel by the arguments of a call: pointers and integers divisible by 16 or not, integers equal to
1 as constants, strides beyond 2^31. The exit status is 1 if a kernel spills registers, does not compile, or has no
entry here. For another version of Triton, put it first in PYTHONPATH (`pip install --no-deps --target DIR
triton==3.6.0`).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pctrain_kernels of this checkout, installed or not

PROCESSES = 2
HOPPER, BLACKWELL = 90, 100
# Columns of a shard: the vocabularies of Qwen 2.5 and Llama 3 over 1 to 8 ranks.
REAL_COLUMNS = tuple(vocab // shards for vocab in (152064, 128256) for shards in (1, 2, 4, 8))
SMALL_COLUMNS = (1, 127, 320, 1003, 2048)
MEASURED = ("registers", "stack", "spills", "reloads", "shared")


@dataclass(frozen=True)
class Specialisation:
    """Properties of the arguments for which Triton compiles separate code."""

    name: str
    aligned: bool  # pointers divisible by 16
    integers: str  # "any", "16" (divisible by it), "1" (equal to it) or "wide" (strides int64)


SPECIALISATIONS = (
    Specialisation("generic", True, "any"),
    Specialisation("divisible by 16", True, "16"),
    Specialisation("not divisible", False, "any"),
    Specialisation("equal to 1", True, "1"),
    Specialisation("stride int64", True, "wide"),
)


@dataclass(frozen=True)
class KernelEntry:
    """The calls of a kernel: argument types of each variant, constants, and its caller's launch shape.

    Pointers are "*fp32" and so on; "stride" is an integer that may be int64; "columns" is the width of a row.
    """

    module: str
    variants: Sequence[Mapping[str, str]]  # argument -> type, in the order of the kernel's parameters
    constants: Sequence[Mapping[str, Any]]
    launch: Callable[[int], tuple[Mapping[str, int], int]]  # columns -> constants that depend on it, warps


def _launch_shape(columns: int) -> tuple[Mapping[str, int], int]:
    from pctrain_kernels.triton_softmax import launch_shape

    block, warps = launch_shape(columns)
    return {"block": block}, warps


def _statistics(logits: str) -> Mapping[str, str]:
    outputs = dict.fromkeys(("out_max", "out_rest", "out_shifted", "out_target"), "*fp32")
    return {
        "logits": logits,
        "column": "*i64",
        **outputs,
        "stride": "stride",
        "columns": "columns",
        "temperature": "fp32",
        "inverse_temperature": "fp32",
    }


def _gradient(logits: str, gradient: str) -> Mapping[str, str]:
    rows = dict.fromkeys(("row_max", "row_constant", "row_slope", "row_target"), "*fp32")
    return {
        "logits": logits,
        "gradient": gradient,
        "column": "*i64",
        **rows,
        "stride": "stride",
        "gradient_stride": "stride",
        "columns": "columns",
        "inverse_temperature": "fp32",
    }


ENTROPY = ({"want_entropy": True}, {"want_entropy": False})
ENTRIES = {
    "statistics_kernel": KernelEntry(
        "pctrain_kernels.triton_softmax",
        [_statistics(f"*{dtype}") for dtype in ("fp32", "bf16", "fp16")],
        ENTROPY,
        _launch_shape,
    ),
    "gradient_kernel": KernelEntry(
        "pctrain_kernels.triton_softmax",
        [
            _gradient(f"*{logits}", f"*{gradient}")
            for logits, gradient in (
                ("fp32", "fp32"),
                ("fp32", "bf16"),
                ("fp32", "fp16"),
                ("bf16", "bf16"),
                ("fp16", "fp16"),
            )
        ],
        ENTROPY,
        _launch_shape,
    ),
}


@dataclass(frozen=True)
class Compilation:
    """One compilation of a kernel."""

    kernel: str
    module: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    specialisation: Specialisation
    capability: int

    def label(self) -> str:
        """Return a description of the compilation in one line."""
        constants = ", ".join(f"{name} {value}" for name, value in self.constants)
        how = f"{self.warps} warps, {self.specialisation.name}, sm_{self.capability}"
        return f"{self.kernel} {self.dtypes()}, {constants}, {how}"

    def dtypes(self) -> str:
        """Return the dtypes of logits and gradient."""
        return " -> ".join(kind[1:] for name, kind in self.types if name in ("logits", "gradient"))


def launched_kernels() -> set[str]:
    """Return the names of the package's `@triton.jit` functions that no other of them calls."""
    import pctrain_kernels

    called: set[str] = set()
    names: set[str] = set()
    for module in pkgutil.walk_packages(pctrain_kernels.__path__, "pctrain_kernels."):
        tree = ast.parse(Path(importlib.util.find_spec(module.name).origin).read_text(encoding="utf-8"))
        for function in [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_jit(node)]:
            names.add(function.name)
            used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            called |= used | {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return names - called


def _is_jit(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def cases(tier: str, capabilities: Sequence[int]) -> list[Compilation]:
    """Return the compilations of a tier.

    full: every specialisation of every variant at real sizes, and every variant at small ones and for the newer GPU.
    fast: every variant at real sizes with the specialisations in turn, and one of each kernel for the newer GPU.
    """
    chosen: dict[Compilation, None] = {}
    for kernel, entry in ENTRIES.items():
        variants = [(types, constants) for types in entry.variants for constants in entry.constants]
        for i, (types, constants) in enumerate(variants):
            in_turn = SPECIALISATIONS[i % len(SPECIALISATIONS)]
            for specialisation in SPECIALISATIONS if tier == "full" else (in_turn,):
                for columns in REAL_COLUMNS:
                    chosen[_case(kernel, entry, types, constants, columns, specialisation, HOPPER)] = None
            if tier == "full":
                for columns in SMALL_COLUMNS:
                    chosen[_case(kernel, entry, types, constants, columns, in_turn, HOPPER)] = None
            if BLACKWELL in capabilities and (tier == "full" or i == 0):
                chosen[_case(kernel, entry, types, constants, REAL_COLUMNS[0], in_turn, BLACKWELL)] = None
    return [*chosen]


def _case(
    kernel: str,
    entry: KernelEntry,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    columns: int,
    specialisation: Specialisation,
    capability: int,
) -> Compilation:
    of_columns, warps = entry.launch(1 if specialisation.integers == "1" else columns)
    return Compilation(
        kernel,
        entry.module,
        tuple(types.items()),
        (*constants.items(), *of_columns.items()),
        warps,
        specialisation,
        capability,
    )


def source(case: Compilation) -> Any:
    """Return Triton's description of the call, as its launcher would make it."""
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    kinds, constants = dict(case.types), dict(case.constants)
    if list(kernel.arg_names) != [*kinds, *constants]:
        raise ValueError(
            f"the entry of {case.kernel} has arguments {[*kinds, *constants]}, the kernel {list(kernel.arg_names)}"
        )
    how = case.specialisation
    signature = {}
    constexprs = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        kind = kinds.get(name, "constexpr")
        integer = kind in ("stride", "columns")
        if integer:
            wide = kind == "stride" and how.integers == "wide"
            kind = "constexpr" if how.integers == "1" else "i64" if wide else "i32"
        signature[name] = kind
        if kind == "constexpr":
            constexprs[(i,)] = constants.get(name, 1)
        elif (kind.startswith("*") and how.aligned) or (integer and how.integers == "16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def measure(case: Compilation, **options: int) -> dict[str, Any]:
    """Compile, and return registers per thread, bytes of stack, and spill and reload instructions, or the error.

    `options` go to Triton's compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    row = {
        "kernel": case.kernel,
        "label": case.label(),
        "dtypes": case.dtypes(),
        "constants": dict(case.constants),
        "warps": case.warps,
        "specialisation": case.specialisation.name,
        "capability": case.capability,
    }
    try:
        options |= {"num_warps": case.warps, "enable_fp_fusion": True}
        compiled = triton.compile(source(case), target=GPUTarget("cuda", case.capability, 32), options=options)
    except Exception as error:  # the report lists whatever the compiler raises
        return row | {"error": f"{type(error).__name__}: {error}"[:1000]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    counts = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if counts is None or "EXIT" not in listing:
        return row | {"error": f"cuobjdump or nvdisasm printed nothing readable: {usage[:300]}"}
    return row | {
        "registers": int(counts[1]),
        "stack": int(counts[2]),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\bSTL\b", listing)),
        "reloads": len(re.findall(r"\bLDL\b", listing)),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def known_capabilities() -> tuple[int, ...]:
    """Return sm_90, and sm_100 if this Triton has an assembler for it."""
    import triton

    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return (HOPPER, BLACKWELL) if (binaries / "ptxas-blackwell").exists() else (HOPPER,)


def measure_all(chosen: Sequence[Compilation]) -> Iterator[dict[str, Any]]:
    """Yield the measurements in order, from several processes."""
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        yield from pool.imap(measure, chosen, chunksize=4)


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for every kernel that does not compile, spills, or lacks an entry, and for every stale entry."""
    kernels = launched_kernels()
    lines = [f"{row['label']}: {row['error']}" for row in rows if "error" in row]
    compiled = [row for row in rows if "error" not in row]
    lines += [
        f"{row['label']}: {row['spills']} spills, {row['reloads']} reloads, {row['stack']} bytes of stack"
        for row in compiled
        if row["spills"] or row["reloads"] or row["stack"]
    ]
    lines += [f"{name} has no entry in compile_report.py" for name in sorted(kernels - ENTRIES.keys())]
    lines += [f"{name} is in compile_report.py but not in the package" for name in sorted(ENTRIES.keys() - kernels)]
    return lines


def markdown(rows: Sequence[Mapping[str, Any]], triton_version: str) -> str:
    """Return the rows as a Markdown table."""
    columns = ("kernel", "logits -> gradient", "constants", "warps", "specialisation", "GPU", *MEASURED)
    lines = [
        f"Triton {triton_version}; registers per thread, bytes of stack and of shared memory, instructions that spill "
        "(STL) and reload (LDL). `python kernels/benchmarks/compile_report.py --tier full` makes this table.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        constants = ", ".join(f"{name} {value}" for name, value in row["constants"].items())
        if "error" in row:
            measured = [f"does not compile: {row['error'].splitlines()[0]}", *[""] * (len(MEASURED) - 1)]
        else:
            measured = [row[key] for key in MEASURED]
        cells = [
            row["kernel"],
            row["dtypes"],
            constants,
            row["warps"],
            row["specialisation"],
            f"sm_{row['capability']}",
            *measured,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, print the report, and fail if it lists a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=["fast", "full"], default="fast", help="full: minutes")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--json", type=Path, help="write the rows to this file, with version and path of Triton")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    import triton

    rows = [*measure_all(cases(options.tier, known_capabilities()))]
    table = markdown(rows, triton.__version__)
    print(table, end="")
    if options.markdown:
        options.markdown.write_text(table)
    if options.json:
        where = str(Path(triton.__file__).resolve())
        options.json.write_text(json.dumps({"triton": triton.__version__, "triton_path": where, "rows": rows}))
    lines = faults(rows)
    if lines:
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
