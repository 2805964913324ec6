"""Linear layers of which three quarters of the blocks are zero, beside the same layers dense.

    python benchmarks/zero_blocks.py --update

Blocks of 4 inputs by 32 output features, chosen at random. Lissom's kernels multiply with the zeros and without them, in one
process with PyTorch's `linear` (float32, bfloat16) and `quantized::linear_dynamic` (int8), call by call in turn. Both int8
layers quantize x in each call. Sparse results are compared with the dense kernel's first. Prints a Markdown table; `--update`
puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from quality import conditions
from readme import put_table
from torch.nn import functional

from lissom.measure.timing import time_calls
from lissom.ops.block_sparse_linear import (
    BLOCK,
    block_sparse_linear,
    block_sparse_quantized_linear,
    pack_nonzero_blocks,
)
from lissom.ops.epilogue import PANEL
from lissom.ops.native import load_kernels
from lissom.ops.packed_linear import pack, packed_linear
from lissom.ops.quantized_linear import fill_panels, pack_bytes, quantized_linear

LAYERS = ((768, 3072), (3072, 768))
"""in_features and out_features."""
ROWS = (1, 32, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
Calls = dict[str, Callable[[], object]]


def calls_of(dtype: str, inputs: int, features: int, rows: int, keep: float) -> Calls:
    """PyTorch's product, and ours with the zeros and without; raises where ours differ."""
    torch.manual_seed(0)
    kept = torch.rand(features // PANEL, inputs // BLOCK) < keep
    kept = kept.repeat_interleave(PANEL, 0).repeat_interleave(BLOCK, 1)
    if dtype == "int8":
        x, weight = torch.randn(rows, inputs), torch.randint(-127, 128, kept.shape, dtype=torch.int8).masked_fill(~kept, 0)
        grid = fill_panels(torch.rand(features) / 100, features), fill_panels(weight.sum(1, dtype=torch.int32), features)
        packed, options = pack_bytes(weight), {"features": features}
        dense = partial(quantized_linear, x, packed, *grid, **options)
        sparse = partial(block_sparse_quantized_linear, x, *pack_nonzero_blocks(packed), *grid, **options)
        scales, zeros = torch.rand(features) / 100, torch.zeros(features, dtype=torch.int64)
        theirs = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)
        other = partial(torch.ops.quantized.linear_dynamic, x, torch.ops.quantized.linear_prepack(theirs, None))
    else:
        x, weight = (values.to(DTYPES[dtype]) for values in (torch.randn(rows, inputs), torch.randn(kept.shape) * kept))
        packed = pack(weight)
        dense = partial(packed_linear, x, packed, features=features)
        sparse = partial(block_sparse_linear, x, *pack_nonzero_blocks(packed), features=features)
        other = partial(functional.linear, x, weight)
    # Sums in another order; in bfloat16 a result may round to the number beside it.
    torch.testing.assert_close(sparse(), dense(), rtol=8e-3 if dtype == "bfloat16" else 1e-4, atol=1e-3)
    return {"other": other, "dense": dense, "sparse": sparse}


def table(dtypes: list[str], keep: float, seconds: float) -> str:
    """Every layer, dtype and number of rows, as Markdown."""
    lines = [
        "| layer | rows | dtype | PyTorch, ms | Lissom dense, ms | Lissom sparse, ms | × |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for dtype in dtypes:
        for inputs, features in LAYERS:
            for rows in ROWS:
                calls = calls_of(dtype, inputs, features, rows, keep)
                timings = time_calls(calls, seconds)
                ratio = timings["dense"].median_ms / timings["sparse"].median_ms
                cells = [f"{inputs}→{features}", f"{rows:,}", dtype, *(str(timings[name]) for name in calls), f"{ratio:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    return (
        "\n".join([*lines, "", f"×: Lissom dense over Lissom sparse, {keep:.0%} of the blocks stored. {conditions()}."]) + "\n"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--keep", type=float, default=0.25, help="fraction of the blocks that are not zero; %(default)s by default"
    )
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product; %(default)s by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if missing := load_kernels():
        raise SystemExit(missing)
    with torch.inference_mode():
        printed = table(options.dtypes, options.keep, options.seconds)
    print(printed)
    if options.update:
        put_table("zero blocks", printed, by_processor=True)


if __name__ == "__main__":
    main()
