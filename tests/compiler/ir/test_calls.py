"""Typed calls: their attributes are parameters of every operator that they stand for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from lissom.compiler.ir import calls, view_calls
from lissom.compiler.ir.calls import Call, Linear, Operand
from lissom.compiler.ir.view_calls import Item
from lissom.frontends.capture.export import capture

MEMBERS = {item for module in (calls, view_calls) for _, item in inspect.getmembers(module, inspect.isclass)}
CLASSES = sorted((item for item in MEMBERS if issubclass(item, Call) and item is not Call), key=lambda item: item.__name__)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_operands_are_parameters_of_every_operator(kind: type[Call]) -> None:
    operands = {name: item for name, item in vars(kind).items() if isinstance(item, Operand)}
    for target in kind.targets:
        schema: Any = target._schema  # pyright: ignore[reportAttributeAccessIssue]
        types = {argument.name: str(argument.type) for argument in schema.arguments}
        for name, item in operands.items():
            known = [one for one in item.names if one in types]
            assert len(known) == 1, f"{kind.__name__}.{name} is no parameter of {target}: {list(types)}"


def test_operands_are_read_by_name_with_defaults() -> None:
    program = capture(nn.Linear(4, 3, bias=False), (torch.zeros(2, 4),), {}).program
    (node,) = program.nodes(*Linear.targets)
    layer = Linear.of(node)
    assert layer is not None
    assert (layer.x.op, layer.weight.op, layer.bias) == ("placeholder", "get_attr", None)
    assert Linear.of(layer.x) is None
    assert Item.of(node) is None
