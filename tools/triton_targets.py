"""Compiles every Triton kernel for four generations of GPUs, on a machine without one: `python -m tools.triton_targets`.

Prints registers, stack and shared memory of each. A kernel that spills registers, or needs more shared memory than a block has
on the target, is a failure. Needs Triton, whose wheel has ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lissom.ops.triton_kernels import int4_product, int8_product, row_quantization

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a block may have, by compute capability: CUDA C++ Programming Guide, table of capabilities."""
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments, and its compile-time constants and options."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one target: registers of a thread, bytes of its stack, bytes of shared memory of a block."""

    name: str
    capability: int
    registers: int
    stack: int
    shared: int

    @property
    def fault(self) -> str | None:
        """The limit that it exceeds; None if it keeps all."""
        if self.stack:
            return f"{self.name} on sm_{self.capability} spills: {self.stack} bytes of stack"
        limit = SHARED_MEMORY[self.capability]
        if self.shared > limit:
            return f"{self.name} on sm_{self.capability} needs {self.shared} bytes of shared memory of {limit}"
        return None


def variants() -> Iterator[Variant]:
    """Each kernel at the tile sizes that launchers choose, with all that an epilogue may have."""
    sizes = dict.fromkeys(("rows", "features", "inputs"), "i32")
    for dtype, columns in (("fp32", 384), ("bf16", 4096)):
        block, warps = row_quantization.blocks_for(columns)
        types = {"x": f"*{dtype}", "q": "*i8", "scale": "*fp32", "offset": "*i32"}
        types |= dict.fromkeys(("columns", "x_row", "x_column"), "i32")
        kernel, options = row_quantization.quantize_rows_kernel, {"x_column": 1, "BLOCK": block, "num_warps": warps}
        yield Variant(f"quantize_rows {dtype} {columns}", kernel, types, options)
    for rows, dtype, activation in (
        (1, "bf16", "gelu"),
        (32, "fp16", "silu"),
        (4096, "bf16", "gelu"),
        (4096, "fp32", "gelu_tanh"),
    ):
        blocks = int8_product.blocks_for(rows, 4 if dtype == "fp32" else 2)
        ends = {"bias": f"*{dtype}", "other": f"*{dtype}", "result": f"*{dtype}"}
        types = {"q": "*i8", "weight": "*i8", "scale": "*fp32", "offset": "*i32", "weight_scale": "*fp32", "sums": "*i32"}
        types |= ends | sizes | dict.fromkeys(("q_row", "weight_row", "other_row"), "i32")
        constants = {"scale_row": 1, "offset_row": 1, "ACTIVATION": activation, "COMBINE": "mul", **blocks}
        yield Variant(f"int8_product {dtype} {rows} rows", int8_product.int8_product_kernel, types, constants)
    for rows, dtype, zero in ((1, "bf16", "integer"), (4096, "bf16", "none"), (32, "fp16", "float"), (4096, "fp16", "integer")):
        ends = {"bias": f"*{dtype}", "other": f"*{dtype}", "result": f"*{dtype}"}
        types = {"x": f"*{dtype}", "weight": "*u8", "scale": "*fp32", "zero_point": "*u8" if zero == "integer" else "*fp32"}
        types |= ends | sizes | dict.fromkeys(("group", "x_row", "other_row"), "i32")
        blocks = int4_product.blocks_for(rows)
        constants = {"SIGNED": zero == "none", "ZERO": zero, "ACTIVATION": "gelu", "COMBINE": "add", **blocks}
        if zero == "none":
            constants["zero_point"] = None
        yield Variant(f"int4_product {dtype} {rows} rows", int4_product.int4_product_kernel, types, constants)


def compile_for(variant: Variant, capability: int) -> Compiled:
    """Compiles one kernel for one target, with pointers and sizes aligned as they usually are."""
    constants = {name: value for name, value in variant.constants.items() if name not in OPTIONS}
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in constants}
    source = ASTSource(variant.kernel, signature, constants, aligned)
    options = {name: variant.constants[name] for name in OPTIONS if name in variant.constants} | {"enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(variant.name, capability, registers, stack, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the kernel of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell registers:\n{told.stdout}{told.stderr}")
    return int(found[1]), int(found[2])


def main() -> int:
    """Prints the table, then the faults; 1 where there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", choices=list(SHARED_MEMORY), help="a target; all by default")
    faults = list[str]()
    print(f"{'kernel':34}{'target':>8}{'registers':>11}{'stack':>7}{'shared':>9}")
    for capability in parser.parse_args().capability or SHARED_MEMORY:
        for variant in variants():
            compiled = compile_for(variant, capability)
            row = f"{compiled.registers:>11}{compiled.stack:>7}{compiled.shared:>9}"
            print(f"{compiled.name:34}{f'sm_{capability}':>8}{row}", flush=True)
            faults += [compiled.fault] if compiled.fault else []
    print("\n".join(faults) if faults else "no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
