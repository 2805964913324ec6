"""Rewrites linear layers that are products of flattened rows, as in GPT-2, as `linear` calls.

    reshape(addmm(b, reshape(x, [-1, in]), W), [.., out])  ->  linear(x, Wᵀ, b)

In the flattened form batch and tokens are one dimension, so tokens have no axis of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import bias_of, input_of, second_factor
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import product_of, shape_of
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import RESHAPES

aten = torch.ops.aten


def unflatten_where(edit: Editor, helps: Callable[[Editor], bool]) -> None:
    """Rewrite such products as linear layers if that helps; `helps` gets the editor of a rewritten copy."""
    trial = Editor(edit.program.copy(), edit.pass_name)
    if _unflatten(trial) and helps(trial):
        _unflatten(edit)


def _unflatten(edit: Editor) -> bool:
    """Rewrite all such products; True when there were any."""
    reshapes = [node for node in edit.nodes(*RESHAPES) if _is_product_of_rows(node)]
    for node in reshapes:
        product = nodes.operand(node)
        with edit.before(node, like=[product]):
            turned = edit.call(aten.transpose.int, second_factor(product), 0, 1)
            layer = edit.call(aten.linear.default, nodes.operand(input_of(product)), turned, bias_of(product))
        edit.replace(node, layer)
    # The old reshapes and products still read their inputs.
    edit.program.drop_dead()
    return bool(reshapes)


def _is_product_of_rows(node: fx.Node) -> bool:
    product = nodes.operand(node)
    if not nodes.is_call(product, aten.addmm.default, aten.mm.default) or product.kwargs:
        return False
    flat, weight, bias = input_of(product), second_factor(product), bias_of(product)
    if not nodes.is_call(flat, *RESHAPES) or weight is None or weight.op != "get_attr":
        return False
    x, rows, result = shape_of(nodes.operand(flat)), shape_of(flat), shape_of(node)
    whole = len(x) > 2 and rows[-1] == x[-1] and product_of(rows[:1]) == product_of(x[:-1])
    return whole and result == (*x[:-1], shape_of(product)[-1]) and (bias is None or len(shape_of(bias)) == 1)
