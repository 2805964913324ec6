"""Blocks of queries in chunks: a `Loop`, so that the memory for gathered keys is bounded at any length.

Chunks that fit a processor's cache are also faster. A GPU gets large chunks, since each is a synchronization.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.positions import Writer

CPU_BYTES, OTHER_BYTES = 2**21, 2**28
"""Bytes of keys and values gathered at a time; scores and transposes take two or three times as much."""


def in_chunks(
    write: Writer, rows: ir.Value, most: ir.Value, features: int, part: Callable[[Writer, ir.Value], ir.Value]
) -> ir.Value:
    """Apply `part` to all rows in chunks: [batch, rows or more, features].

    rows, most: the number of rows, and of rows per chunk, [1]. All chunks have the same size: the last row is repeated where
    needed. part: from the writer of its nodes and row numbers, [some], to [batch, some, features] of a known dtype.
    """
    call = write.call
    chunks = call("Div", call("Add", rows, call("Sub", most, 1)), most)
    size = call("Div", call("Add", rows, call("Sub", chunks, 1)), chunks)
    last = call("Sub", rows, 1)
    number, going = (
        ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(dtype))
        for name, dtype in (("chunk", ir.DataType.INT64), ("going", ir.DataType.BOOL))
    )
    inside = write.inside()
    row = inside.call("Min", inside.call("Add", inside.call("Mul", number, size), inside.counted(0, size)), last)
    goes_on, found = inside.call("Identity", going), part(inside, row)
    goes_on.type, goes_on.shape = going.type, going.shape
    body = ir.Graph([number, going], [goes_on, found], nodes=inside.tape.nodes, name="chunk_of_rows")
    stacked = write.tape.op("Loop", [call("Squeeze", chunks), write.constant(np.array(True))], {"body": body})
    # [chunks, batch, size, features]
    return write.shaped(call("Transpose", stacked, perm=(1, 0, 2, 3)), 0, -1, features)
