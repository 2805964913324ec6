"""The roofline: the minimum time of a cost under a machine's ceilings.

Williams, Waterman and Patterson, Roofline: an insightful visual performance model for multicore architectures, 2009.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from lissom.compiler.analysis.cost import Cost
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import INT8_LINEARS
from lissom.errors import UnsupportedError
from lissom.measure.machine import Ceiling, Ceilings, Machine

_CPU = torch.device("cpu")


def roofline_seconds(cost: Cost, machine: Machine, dtype: torch.dtype, *, device: torch.device = _CPU) -> float:
    """max(operations / peak of the dtype, bytes / memory bandwidth): the minimum time, if every byte comes from memory.

    float16 uses the ceiling of bfloat16; other dtypes without a ceiling use that of float32.

    Raises:
        UnsupportedError: if the cost is symbolic.
    """
    if isinstance(cost.flops, sympy.Expr) or isinstance(cost.bytes, sympy.Expr):
        raise UnsupportedError(
            f"a cost of {cost.flops} operations and {cost.bytes} bytes takes no known time; give numbers for its sizes"
        )
    ceilings = machine.on(device)
    return max(cost.flops / _peak(ceilings, dtype).median, cost.bytes / ceilings.memory_gb_per_second.median) / 1e9


def _peak(ceilings: Ceilings, dtype: torch.dtype) -> Ceiling:
    if dtype in (torch.bfloat16, torch.float16):
        return ceilings.bf16_gflops or ceilings.fp32_gflops
    if dtype in (torch.int8, torch.uint8):
        return ceilings.int8_gops or ceilings.fp32_gflops
    return ceilings.fp32_gflops


def node_seconds(node: fx.Node, cost: Cost, machine: Machine) -> float:
    """The roofline of a node with this cost, on its own device, in the dtype of its first input tensor.

    int8 layers that quantize their input themselves have the roofline of int8.
    """
    typed = next((operand for operand in node.all_input_nodes if nodes.is_tensor(operand)), node)
    if not nodes.is_tensor(typed):
        return 0.0
    type_ = nodes.tensor_type(typed)
    dtype = torch.int8 if node.target in INT8_LINEARS else type_.dtype
    return roofline_seconds(cost, machine, dtype, device=type_.device)
