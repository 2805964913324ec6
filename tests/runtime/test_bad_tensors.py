"""What is wrong with the arguments of a compiled model's call is said in one sentence."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import lissom
from lissom.errors import InputError, UnsupportedError
from tests.support.refusals import Refusal, check, table

# What torch says of its own kinds of tensor when a test makes one.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}") for text in ("Sparse CSR", "torch.quantize_per", "The PyTorch API of nested")
]

IDS, X = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 8)


class Reader(nn.Module):
    """Ids looked up and added to vectors, a pair of masks, and constants of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)

    def forward(
        self,
        ids: torch.Tensor,
        x: torch.Tensor,
        masks: dict[str, torch.Tensor] | None = None,
        scale: float = 1.0,
        power: int = 1,
        double: bool = False,
        name: str = "mean",
        extra: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found = (self.table(ids) + x) * scale
        return found if masks is None else found * masks["left"] * masks["right"]


@cache
def compiled() -> lissom.CompiledModel:
    masks = {"left": torch.ones(2, 4, 1), "right": torch.ones(2, 4, 1)}
    inputs = {"ids": IDS, "x": X, "masks": masks, "scale": 2.0, "power": 2, "double": True, "name": "sum", "extra": None}
    return lissom.compile(Reader().eval(), inputs)


def call(**arguments: object) -> object:
    ones = torch.ones(2, 4, 1)
    return compiled()(**{"ids": IDS, "x": X, "masks": {"left": ones, "right": ones}, **arguments})


ONE = torch.ones(2, 4, 1)
TENSORS: dict[str, Refusal] = {
    "none": (InputError, "argument 'x' is a NoneType; the program takes a tensor", lambda: call(x=None)),
    "text": (InputError, "argument 'x' is a str; the program takes a tensor", lambda: call(x="a")),
    "number": (InputError, "argument 'x' is a float;", lambda: call(x=1.0)),
    "array": (InputError, "argument 'x' is a ndarray;", lambda: call(x=np.zeros((2, 4, 8), np.float32))),
    "list": (InputError, "argument 'x' is nested as [", lambda: call(x=X.tolist())),
    "tuple": (InputError, "argument 'x' is nested as (*)", lambda: call(x=(X,))),
    "mapping": (InputError, "argument 'x' is nested as {", lambda: call(x={"x": X})),
    "module": (InputError, "argument 'x' is a Linear;", lambda: call(x=nn.Linear(2, 2))),
    "class": (InputError, "argument 'x' is a ", lambda: call(x=torch.Tensor)),
    "double": (
        InputError,
        "argument 'x' is f64[2, 4, 8]; the program takes f32[batch, sequence, 8]",
        lambda: call(x=X.double()),
    ),
    "half": (InputError, "argument 'x' is f16[2, 4, 8];", lambda: call(x=X.half())),
    "bfloat": (InputError, "argument 'x' is bf16[2, 4, 8];", lambda: call(x=X.bfloat16())),
    "complex": (InputError, "argument 'x' is ", lambda: call(x=X.to(torch.complex64))),
    "conjugate": (InputError, "argument 'x' is ", lambda: call(x=X.to(torch.complex64).conj())),
    "whole numbers": (InputError, "argument 'x' is i64[2, 4, 8];", lambda: call(x=X.long())),
    "flags": (InputError, "argument 'x' is bool[2, 4, 8];", lambda: call(x=X.bool())),
    "quantized": (InputError, "argument 'x' is ", lambda: call(x=torch.quantize_per_tensor(X, 0.1, 0, torch.qint8))),
    "sparse": (InputError, "argument 'x' is a tensor that is of layout torch.sparse_coo", lambda: call(x=X.to_sparse())),
    "compressed": (InputError, "is of layout torch.sparse_csr", lambda: call(x=X.to_sparse_csr())),
    "nested": (InputError, "is nested; the program takes a dense", lambda: call(x=torch.nested.as_nested_tensor([X[0]] * 2))),
    "jagged": (
        InputError,
        "is nested; the program takes a dense",
        lambda: call(x=torch.nested.as_nested_tensor([X[0]] * 2, layout=torch.jagged)),
    ),
    "meta": (InputError, "argument 'x' is f32[2, 4, 8]", lambda: call(x=X.to("meta"))),
    "fewer dimensions": (InputError, "argument 'x' is f32[4, 8];", lambda: call(x=X[0])),
    "no dimension": (InputError, "argument 'x' is f32[];", lambda: call(x=torch.tensor(0.0))),
    "more dimensions": (InputError, "argument 'x' is f32[1, 2, 4, 8];", lambda: call(x=X[None])),
    "other width": (InputError, "argument 'x' has size 7 in dimension 2; allowed: 8", lambda: call(x=X[..., :7])),
    "no row": (InputError, "argument 'ids' has size 0 in dimension 0 (batch)", lambda: call(ids=IDS[:0], x=X[:0])),
    "no token": (InputError, "argument 'ids' has size 0 in dimension 1", lambda: call(ids=IDS[:, :0], x=X[:, :0])),
    "no width": (InputError, "argument 'x' has size 0 in dimension 2; allowed: 8", lambda: call(x=X[..., :0])),
    "rows that differ": (InputError, "argument 'x' has size 1 in dimension 0", lambda: call(x=X[:1])),
    "tokens that differ": (InputError, "argument 'x' has size 3 in dimension 1", lambda: call(x=X[:, :3])),
    "ids int32": (InputError, "argument 'ids' is i32[2, 4];", lambda: call(ids=IDS.int())),
    "ids int16": (InputError, "argument 'ids' is i16[2, 4];", lambda: call(ids=IDS.short())),
    "ids float": (InputError, "argument 'ids' is f32[2, 4];", lambda: call(ids=IDS.float())),
    "ids past the table": (InputError, "row 10 of 'table.weight', which has rows 0 to 9", lambda: call(ids=IDS + 10)),
    "ids below zero": (InputError, "row -1 of 'table.weight'", lambda: call(ids=IDS - 1)),
    "ids far below zero": (InputError, "of 'table.weight'", lambda: call(ids=IDS - 2**62)),
}


@table(TENSORS)
def test_a_tensor(refusal: Refusal) -> None:
    check(refusal)


STRUCTURES: dict[str, Refusal] = {
    "nothing": (InputError, "argument 'ids' is missing; the program takes (", lambda: compiled()()),
    "one alone": (InputError, "argument 'x' is missing;", lambda: compiled()(IDS)),
    "nine": (InputError, "9 positional arguments given;", lambda: compiled()(*[IDS] * 9)),
    "twice": (InputError, "argument 'ids' is given twice, by position and by name", lambda: compiled()(IDS, ids=IDS)),
    "unknown": (InputError, "there is no argument 'idz'; did you mean 'ids'?", lambda: call(idz=IDS)),
    "misspelled switch": (InputError, "there is no argument 'output_attention'", lambda: call(output_attention=True)),
    "masks a tensor": (InputError, "argument 'masks' is nested as *", lambda: call(masks=ONE)),
    "masks none": (InputError, "argument 'masks' is nested as *", lambda: call(masks=None)),
    "masks a pair": (InputError, "argument 'masks' is nested as (*, *)", lambda: call(masks=(ONE, ONE))),
    "masks empty": (InputError, "argument 'masks' is nested as {}", lambda: call(masks={})),
    "masks one": (InputError, "argument 'masks' is nested as {left: *}", lambda: call(masks={"left": ONE})),
    "masks three": (InputError, "argument 'masks' is nested", lambda: call(masks={"left": ONE, "right": ONE, "top": ONE})),
    "masks other names": (InputError, "argument 'masks' is nested as {a: *, b: *}", lambda: call(masks={"a": ONE, "b": ONE})),
    "masks numbered": (InputError, "argument 'masks' is nested as {0: *, 1: *}", lambda: call(masks={0: ONE, 1: ONE})),
    "masks a list inside": (InputError, "argument 'masks' is nested", lambda: call(masks={"left": [ONE], "right": ONE})),
    "masks a number inside": (
        InputError,
        "['left']' is a int; the program takes a tensor",
        lambda: call(masks={"left": 1, "right": ONE}),
    ),
    "masks none inside": (InputError, "['right']' is a NoneType;", lambda: call(masks={"left": ONE, "right": None})),
    "masks of ids": (InputError, "['right']' is i64[2, 4];", lambda: call(masks={"left": ONE, "right": IDS})),
}


@table(STRUCTURES)
def test_a_structure(refusal: Refusal) -> None:
    check(refusal)


CONSTANTS: dict[str, Refusal] = {
    "another float": (
        InputError,
        "argument 'scale' is 3.0; the program was captured with 2.0 fixed: pass 2.0",
        lambda: call(scale=3.0),
    ),
    "whole for float": (InputError, "argument 'scale' is 2; the program was captured with 2.0", lambda: call(scale=2)),
    "float for whole": (InputError, "argument 'power' is 2.0; the program was captured with 2", lambda: call(power=2.0)),
    "nan": (InputError, "argument 'scale' is nan;", lambda: call(scale=float("nan"))),
    "text for number": (InputError, "argument 'scale' is '2.0';", lambda: call(scale="2.0")),
    "none for number": (InputError, "argument 'scale' is None;", lambda: call(scale=None)),
    "tensor for number": (InputError, "argument 'scale' is a Tensor; the program was", lambda: call(scale=torch.tensor(2.0))),
    "two for number": (InputError, "argument 'scale' is a Tensor;", lambda: call(scale=torch.tensor([2.0, 2.0]))),
    "array for number": (InputError, "argument 'scale' is a ndarray;", lambda: call(scale=np.array([2.0, 2.0]))),
    "list for number": (InputError, "argument 'scale' is nested as [*]", lambda: call(scale=[2.0])),
    "another whole": (InputError, "argument 'power' is 3;", lambda: call(power=3)),
    "another flag": (InputError, "argument 'double' is False; the program was captured with True", lambda: call(double=False)),
    "none for flag": (InputError, "argument 'double' is None;", lambda: call(double=None)),
    "tensor for flag": (InputError, "argument 'double' is a Tensor;", lambda: call(double=torch.tensor(True))),
    "another text": (InputError, "argument 'name' is 'max'; the program was captured with 'sum'", lambda: call(name="max")),
    "bytes for text": (InputError, "argument 'name' is b'sum';", lambda: call(name=b"sum")),
    "tensor for none": (InputError, "argument 'extra' is a Tensor; the program was captured with None", lambda: call(extra=X)),
    "zero for none": (InputError, "argument 'extra' is 0;", lambda: call(extra=0)),
    "object for none": (InputError, "argument 'extra' is <object", lambda: call(extra=object())),
}


@table(CONSTANTS)
def test_a_constant(refusal: Refusal) -> None:
    check(refusal)


MODULE: dict[str, Refusal] = {
    "train": (UnsupportedError, "Reader is compiled for inference and cannot train", lambda: compiled().train()),
    "half": (UnsupportedError, "cannot be turned into torch.float16", lambda: compiled().half()),
    "double": (UnsupportedError, "cannot be turned into torch.float64", lambda: compiled().double()),
    "meta": (UnsupportedError, "cannot move to meta; compile it with device='meta'", lambda: compiled().to("meta")),
}


@table(MODULE)
def test_a_module(refusal: Refusal) -> None:
    check(refusal)


def test_calls_that_are_right_still_are() -> None:
    wanted = cast(torch.Tensor, call(ids=IDS + 1, x=X + 1))
    mirrored = (torch.ones(2, 4, 8, dtype=torch.complex64) * -1j).conj().imag
    assert mirrored.is_neg()
    for arguments in ({}, {"double": 1}, {"scale": np.float64(2.0)}, {"x": mirrored}):
        assert torch.equal(cast(torch.Tensor, call(**cast(Any, {"ids": IDS + 1, "x": X + 1, **arguments}))), wanted)


def test_head_is_trained_on_what_compiled_model_gives() -> None:
    head = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before = head.weight.detach().clone()
    features = cast(torch.Tensor, call(x=X + 1))
    assert not features.is_inference()
    head(features).square().sum().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)
    assert not cast(torch.Tensor, call(x=(X + 1).requires_grad_())).requires_grad


def test_outputs_are_inference_tensors_only_under_inference_mode() -> None:
    with torch.inference_mode():
        assert cast(torch.Tensor, call()).is_inference()
