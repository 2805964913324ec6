"""Blocks of queries a few at a time: a `Loop`, so that what is copied for them stays small whatever the length.

Chunks that fit a processor's cache are faster than all at once too. A GPU is given large ones, since each costs it a wait.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.positions import Writer

CPU_BYTES, OTHER_BYTES = 2**21, 2**28
"""Keys and values that are copied at a time; scores and what is exchanged of it take two or three times as much."""


def in_chunks(
    write: Writer, rows: ir.Value, most: ir.Value, features: int, part: Callable[[Writer, ir.Value], ir.Value]
) -> ir.Value:
    """What `part` writes of some rows, written of all of them: [batch, rows or more, features].

    rows, most: how many there are, and how many may be treated at a time, [1]. All chunks have one size: the last row is
    there several times where it has to be. part: from what records its nodes and numbers of rows, [some], to [batch, some,
    features], its dtype known.
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
