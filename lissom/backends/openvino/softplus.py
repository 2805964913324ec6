"""Softplus in other operators: OpenVINO computes log(1 + exp(x)) as written, which loses the bits of small results."""

from __future__ import annotations

import onnx_ir as ir

from lissom.backends.onnx.rewriting import Writer, nodes_of

_TERMS = 8
"""Of the series, whose terms fall by a factor of 9 at least; the first left out is 1e-9 of the sum."""


def write_out_softplus(exported: ir.Model) -> None:
    """Replace each float32 softplus by max(x, 0) + log(1 + u), u = exp(-|x|), with log(1 + u) = 2 artanh(u / (2 + u)).

    artanh(z) = z (1 + z²/3 + z⁴/5 + …), and z is at most 1/3.
    """
    for node in nodes_of(exported, "", "Softplus"):
        x = node.inputs[0]
        if x is None or x.dtype != ir.DataType.FLOAT:
            continue
        write = Writer(exported)
        call, number = write.call, write.number
        u = call("Exp", call("Neg", call("Abs", x)))
        z = call("Div", u, call("Add", u, number(2.0)))
        square = call("Mul", z, z)
        series = number(1.0 / (2 * _TERMS - 1))
        for term in reversed(range(_TERMS - 1)):
            series = call("Add", call("Mul", series, square), number(1.0 / (2 * term + 1)))
        log = call("Mul", call("Mul", z, number(2.0)), series)
        result = call("Add", call("Relu", x), log)
        write.replace(node, result)
