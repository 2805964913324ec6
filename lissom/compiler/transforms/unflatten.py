"""Rewrites linear layers that are products of flattened rows, as in GPT-2, as `linear` calls.

    reshape(addmm(b, reshape(x, [-1, in]), W), [.., out])  ->  linear(x, Wᵀ, b)

In the flattened form batch and tokens are one dimension, so tokens have no axis of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lissom.compiler.ir.dimension_map import product_of, shape_of
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula, Match

aten = torch.ops.aten

_PRODUCT = Formula(
    """
    flat = RESHAPES(x, ...)
    product = addmm(bias, flat, weight) | mm(flat, weight)
    RESHAPES(product, ...)
    """,
    lambda found: _keeps_rows(found),
)


def unflatten_where(edit: Editor, helps: Callable[[Editor], bool]) -> None:
    """Rewrite such products as linear layers if that helps; `helps` gets the editor of a rewritten copy."""
    trial = Editor(edit.program.copy(), edit.pass_name)
    if _unflatten(trial) and helps(trial):
        _unflatten(edit)


def _unflatten(edit: Editor) -> bool:
    """Rewrite all such products; True when there were any."""
    before = edit.rewritten
    for reshapes in edit.matches(_PRODUCT):
        with edit.before(reshapes.root, like=[reshapes["product"]]):
            turned = edit.call(aten.transpose.int, reshapes["weight"], 0, 1)
            layer = edit.call(aten.linear.default, reshapes["x"], turned, reshapes.values.get("bias"))
        edit.replace(reshapes.root, layer)
    # The old reshapes and products still read their inputs.
    edit.program.drop_dead()
    return edit.rewritten > before


def _keeps_rows(found: Match) -> bool:
    """True for the product of all rows of x with a weight, apart again as in x."""
    x, rows, product, result = map(shape_of, (found["x"], found["flat"], found["product"], found.root))
    whole = len(x) > 2 and rows[-1] == x[-1] and product_of(rows[:1]) == product_of(x[:-1])
    plain = found["weight"].op == "get_attr" and ("bias" not in found.values or len(shape_of(found["bias"])) == 1)
    return plain and whole and result == (*x[:-1], product[-1])
