"""The device of a model, and moving a program to another device: weights, device arguments, signature."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.fx.node import Argument as CallArgument
from torch.utils import _pytree as pytree

from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import Argument, TensorArgument
from lissom.errors import UnsupportedError
from lissom.frontends.checkpoints.stored_weights import keep_stored, stored_form


def device_of(model: object, inputs: object = ()) -> torch.device:
    """The device of a model's first weight, else of its first input, else the CPU."""
    weights = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    tensors = (leaf for leaf in (*weights, *pytree.tree_leaves(inputs)) if isinstance(leaf, torch.Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def move(program: Program, device: torch.device) -> Program:
    """The program on `device`, with copied weights under the same names; the program itself if it is there already."""
    if all(leaf.type.device == device for leaf in program.signature.tensors):
        return program
    moved = program.copy()
    for name, weight in program.weights().items():
        tensor = weight.detach().to(device)
        trainable = isinstance(weight, nn.Parameter)
        placed = nn.Parameter(tensor, requires_grad=weight.requires_grad) if trainable else tensor
        moved.set_weight(name, keep_stored(placed, stored_form(weight)))
    for node in moved.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(_placed(argument, device) for argument in node.args)
            node.kwargs = {key: _placed(argument, device) for key, argument in node.kwargs.items()}
            nodes.set_value(node, fake.fake_call(moved.fake_mode, node))
        elif node.op != "output":
            with fake.typing_scope(moved.fake_mode):
                nodes.set_value(node, nodes.tensor_value(node).to(device))
    signature = program.signature
    moved.signature = replace(
        signature,
        positional=tuple(_argument(argument, device) for argument in signature.positional),
        keyword=tuple(_argument(argument, device) for argument in signature.keyword),
    )
    return moved


def _placed(argument: CallArgument, device: torch.device) -> CallArgument:
    """The argument; the new device if the argument is a device."""
    return device if isinstance(argument, torch.device) else argument


def _argument(argument: Argument, device: torch.device) -> Argument:
    leaves = tuple(
        replace(leaf, type=replace(leaf.type, device=device)) if isinstance(leaf, TensorArgument) else leaf
        for leaf in argument.leaves
    )
    return replace(argument, leaves=leaves)


def check_device(device: str | torch.device | None) -> torch.device | None:
    """The device, if this machine has it. Raises UnsupportedError if it does not."""
    if device is None:
        return None
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(f"device {device!r:.80} is not known to PyTorch; write 'cpu' or 'cuda:0'") from error
    if parsed.type == "cpu":
        # `cpu:1` is the same device, and its tensors report `cpu`.
        return torch.device("cpu")
    count = torch.cuda.device_count() if parsed.type == "cuda" else 0
    if (parsed.index or 0) >= count:
        have = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise UnsupportedError(f"device '{device}' is not on this machine; it has {have}")
    return torch.device("cuda", parsed.index or 0)
