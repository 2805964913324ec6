"""What is wrong with the arguments of `compile` and `optimize` is said in one sentence."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import lissom
from lissom.errors import ArtifactError, CaptureError, InputError, PipelineTextError, UnsupportedError
from lissom.passes.canonical.remove_no_ops import RemoveNoOps
from tests.support.refusals import Refusal, check, table

X = torch.zeros(2, 4)

# What torch says of its own kinds of tensor and module when a test makes one.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("`torch.jit", "Sparse CSR", "torch.quantize_per")]


class Scaled(nn.Module):
    """A layer with a number among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.linear(x) * scale


class Broken(nn.Module):
    """Raises what it was made with."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


class Pair(nn.Module):
    """Needs two arguments."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@dataclass
class Answer:
    """An output that is no tuple."""

    logits: torch.Tensor


class Answers(nn.Module):
    """Returns an object of a dataclass."""

    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(x + 1)


def tiny() -> Scaled:
    return Scaled().eval()


def compile_(model: object = None, inputs: object = X, **options: object) -> object:
    return lissom.compile(cast(nn.Module, tiny() if model is None else model), cast(Any, inputs), **cast(Any, options))


def on_meta() -> nn.Module:
    return tiny().to("meta")


MODELS: dict[str, Refusal] = {
    "none": (CaptureError, "the model is a NoneType; pass a torch.nn.Module", lambda: lissom.compile(cast(Any, None), X)),
    "text": (ArtifactError, "'bert' is neither a directory nor a packaged model", lambda: compile_("bert")),
    "number": (CaptureError, "the model is a int;", lambda: compile_(3)),
    "a list of layers": (CaptureError, "the model is a list;", lambda: compile_([nn.Linear(4, 4)])),
    "function": (CaptureError, "the model is a function;", lambda: compile_(lambda x: x)),
    "weights": (CaptureError, "the model is a OrderedDict;", lambda: compile_(tiny().state_dict())),
    "class": (CaptureError, "the model is the class Scaled; pass an object of it, Scaled(...)", lambda: compile_(Scaled)),
    "scripted": (CaptureError, "made by TorchScript; pass the torch.nn.Module", lambda: compile_(torch.jit.trace(tiny(), X))),
    "by torch.compile": (
        CaptureError,
        "made by torch.compile; pass the torch.nn.Module",
        lambda: compile_(torch.compile(tiny())),
    ),
    "compiled already": (CaptureError, "Scaled is compiled already; compile the model", lambda: compile_(compiled())),
    "on meta": (CaptureError, "weight 'linear.weight' is on the meta device", lambda: compile_(on_meta())),
    "lazy": (CaptureError, "weight 'weight' has no size before the model's first call", lambda: compile_(nn.LazyLinear(3))),
    "without forward": (CaptureError, "itself fails on the example inputs", lambda: compile_(nn.Module())),
    "raises ValueError": (CaptureError, "ValueError: ids are odd", lambda: compile_(Broken(ValueError("ids are odd")))),
    "raises KeyError": (CaptureError, "KeyError: 'ids'", lambda: compile_(Broken(KeyError("ids")))),
    "raises nothing to read": (CaptureError, "RuntimeError: RuntimeError", lambda: compile_(Broken(RuntimeError()))),
    "returns a dataclass": (CaptureError, "Answers returns a Answer", lambda: compile_(Answers())),
}


@table(MODELS)
def test_a_model(refusal: Refusal) -> None:
    check(refusal)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=torch.jagged)


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


INPUTS: dict[str, Refusal] = {
    "none": (InputError, "example_inputs= is missing; give a tuple", lambda: compile_(inputs=None)),
    "text": (InputError, "example_inputs is a str;", lambda: compile_(inputs="a text")),
    "number": (InputError, "example_inputs is a int;", lambda: compile_(inputs=1)),
    "array": (InputError, "example_inputs is a ndarray;", lambda: compile_(inputs=np.zeros((2, 4)))),
    "generator": (InputError, "example_inputs is a generator;", lambda: compile_(inputs=(x for x in [X]))),
    "set": (InputError, "example_inputs is a set;", lambda: compile_(inputs={1})),
    "keys of numbers": (InputError, "example_inputs has the key 0; keys are the names", lambda: compile_(inputs={0: X})),
    "empty tuple": (CaptureError, "the example inputs do not fit Scaled.forward", lambda: compile_(inputs=())),
    "empty mapping": (CaptureError, "missing a required argument: 'x'", lambda: compile_(inputs={})),
    "too many": (CaptureError, "too many positional arguments", lambda: compile_(inputs=(X, 1.0, X))),
    "unknown name": (CaptureError, "got an unexpected keyword argument 'z'", lambda: compile_(inputs={"x": X, "z": X})),
    "one of two": (CaptureError, "missing a required argument: 'y'", lambda: compile_(Pair(), X)),
    "array in a tuple": (
        CaptureError,
        "example input [0] is a ndarray; inputs are tensors",
        lambda: compile_(inputs=(np.zeros(4),)),
    ),
    "object in a mapping": (CaptureError, "example input ['x'] is a object;", lambda: compile_(inputs={"x": object()})),
    "a set in a tuple": (CaptureError, "example input [0] is a set;", lambda: compile_(inputs=({1},))),
    "a generator in a tuple": (CaptureError, "is a generator;", lambda: compile_(inputs=((x for x in [X]),))),
    "a dtype in a tuple": (CaptureError, "example input [1] is a dtype;", lambda: compile_(inputs=(X, torch.float32))),
    "sparse": (CaptureError, "example input [0] is a sparse_coo tensor; a program", lambda: compile_(inputs=X.to_sparse())),
    "compressed": (CaptureError, "is a sparse_csr tensor;", lambda: compile_(inputs=(torch.eye(4).to_sparse_csr(),))),
    "nested": (CaptureError, "is a nested tensor;", lambda: compile_(inputs=(nested(),))),
    "quantized": (CaptureError, "is a quantized tensor;", lambda: compile_(inputs=(quantized(),))),
    "meta": (CaptureError, "is a meta tensor;", lambda: compile_(inputs=X.to("meta"))),
    "of other width": (
        CaptureError,
        "itself fails on the example inputs",
        lambda: compile_(inputs=torch.zeros(2, 5)),
    ),
    "of other dtype": (CaptureError, "mat1 and mat2 must have the same dtype", lambda: compile_(inputs=X.double())),
    "of whole numbers": (
        CaptureError,
        "itself fails on the example inputs",
        lambda: compile_(inputs=torch.zeros(2, 4, dtype=torch.int64)),
    ),
    "complex": (CaptureError, "itself fails on the example inputs", lambda: compile_(inputs=X.to(torch.complex64))),
    "a text for a number": (CaptureError, "itself fails on the example inputs", lambda: compile_(inputs=(X, "twice"))),
    "no ids": (CaptureError, "itself fails on the example inputs", lambda: compile_(nn.Embedding(5, 4), X)),
    "ids outside": (CaptureError, "IndexError: index out of range", lambda: compile_(nn.Embedding(5, 4), torch.tensor([7]))),
}


@table(INPUTS)
def test_example_inputs(refusal: Refusal) -> None:
    check(refusal)


def dynamic(value: object) -> object:
    return compile_(dynamic=value)


OPTIONS: dict[str, Refusal] = {
    "passes a number": (UnsupportedError, "passes= is 3;", lambda: compile_(passes=3)),
    "passes a class": (UnsupportedError, "passes= is the class RemoveNoOps;", lambda: compile_(passes=RemoveNoOps)),
    "passes a mapping": (UnsupportedError, "passes= is {'exact': 1};", lambda: compile_(passes={"exact": 1})),
    "passes of text": (UnsupportedError, "passes= holds 'exact', which is not a pass", lambda: compile_(passes=["exact"])),
    "passes of classes": (UnsupportedError, "holds the class RemoveNoOps, which is no", lambda: compile_(passes=[RemoveNoOps])),
    "passes of none": (UnsupportedError, "passes= holds None, which is not a pass", lambda: compile_(passes=[None])),
    "passes bytes": (UnsupportedError, "passes= holds 101, which is not a pass", lambda: compile_(passes=b"exact")),
    "passes unknown": (PipelineTextError, "did you mean 'remove-no-ops'?", lambda: compile_(passes="remove-no-op")),
    "passes open brace": (PipelineTextError, "quantize{scheme=int8", lambda: compile_(passes="quantize{scheme=int8")),
    "passes unknown option": (PipelineTextError, "shceme", lambda: compile_(passes="quantize{shceme=int8}")),
    "passes bad value": (PipelineTextError, "int9", lambda: compile_(passes="quantize{scheme=int9}")),
    "passes empty part": (PipelineTextError, "", lambda: compile_(passes="exact,,exact")),
    "backend none": (UnsupportedError, "backend= is None; give a name, eager", lambda: compile_(backend=None)),
    "backend a class": (UnsupportedError, "backend= is <class", lambda: compile_(backend=lissom.OnnxRuntime)),
    "backend a number": (UnsupportedError, "backend= is 1; give a name", lambda: compile_(backend=1)),
    "backend a list": (UnsupportedError, "backend= is ['eager']; give a name", lambda: compile_(backend=["eager"])),
    "backend unknown": (UnsupportedError, "did you mean 'onnxruntime'?", lambda: compile_(backend="onnxruntim")),
    "backend empty": (UnsupportedError, "there is no backend ''; choose eager", lambda: compile_(backend="")),
    "world_size text": (
        UnsupportedError,
        "world_size= is '2'; give the number of ranks",
        lambda: compile_(world_size="2", backend="distributed"),
    ),
    "world_size a fraction": (UnsupportedError, "world_size= is 2.0;", lambda: compile_(world_size=2.0, backend="distributed")),
    "world_size true": (UnsupportedError, "world_size= is True;", lambda: compile_(world_size=True, backend="distributed")),
    "world_size zero": (UnsupportedError, "world_size= is 0;", lambda: compile_(world_size=0, backend="distributed")),
    "world_size one": (UnsupportedError, "world_size= is 1;", lambda: compile_(world_size=1, backend="distributed")),
    "world_size of eager": (UnsupportedError, "world_size=2 goes with backend='distributed'", lambda: compile_(world_size=2)),
    "world_size of none": (UnsupportedError, "and backend is 'None'", lambda: compile_(world_size=2, backend=None)),
    "no world_size": (UnsupportedError, "needs the number of ranks", lambda: compile_(backend="distributed")),
    "device a fraction": (UnsupportedError, "device 1.5 is not known to PyTorch", lambda: compile_(device=1.5)),
    "device a list": (UnsupportedError, "device [] is not known to PyTorch", lambda: compile_(device=[])),
    "device a mapping": (UnsupportedError, "device {'': 0} is not known", lambda: compile_(device={"": 0})),
    "device unknown": (UnsupportedError, "device 'gpu' is not known to PyTorch", lambda: compile_(device="gpu")),
    "device empty": (UnsupportedError, "device '' is not known to PyTorch", lambda: compile_(device="")),
    "device absent": (UnsupportedError, "is not on this machine; it has cpu", lambda: compile_(device="cuda:99")),
    "device of others": (UnsupportedError, "device 'mps' is not on this machine", lambda: compile_(device="mps")),
    "device meta": (UnsupportedError, "device 'meta' is not on this machine", lambda: compile_(device="meta")),
    "device below zero": (UnsupportedError, "device 'cuda:-2' is not known", lambda: compile_(device="cuda:-2")),
    "dynamic none": (CaptureError, "dynamic= is None; give True, False, or a mapping", lambda: dynamic(None)),
    "dynamic text": (CaptureError, "dynamic= is 'batch'; give True, False", lambda: dynamic("batch")),
    "dynamic a list": (CaptureError, "dynamic= is ['x']; give True, False", lambda: dynamic(["x"])),
    "dynamic a number": (CaptureError, "dynamic= is 1; give True, False", lambda: dynamic(1)),
    "dynamic keyed by number": (CaptureError, "dynamic has the key 0; keys are the names", lambda: dynamic({0: {0: "b"}})),
    "dynamic unknown": (CaptureError, "dynamic names 'z', which is not an argument", lambda: dynamic({"z": {0: "b"}})),
    "dynamic of text": (CaptureError, "dynamic gives 'batch' for 'x'; give the dimensions", lambda: dynamic({"x": "batch"})),
    "dynamic of a list": (CaptureError, "dynamic gives ['batch'] for 'x';", lambda: dynamic({"x": ["batch"]})),
    "dynamic of none": (CaptureError, "dynamic gives None for 'x';", lambda: dynamic({"x": None})),
    "dynamic of a set": (CaptureError, "dynamic gives {0} for 'x';", lambda: dynamic({"x": {0}})),
    "dimension text": (
        CaptureError,
        "names the dimension 'batch' of 'x'; dimensions are",
        lambda: dynamic({"x": {"batch": "b"}}),
    ),
    "dimension true": (CaptureError, "names the dimension True of 'x';", lambda: dynamic({"x": {True: "b"}})),
    "dimension a fraction": (CaptureError, "names the dimension 0.5 of 'x';", lambda: dynamic({"x": {0.5: "b"}})),
    "dimension below zero": (CaptureError, "names dimension -1 of 'x', which has 2", lambda: dynamic({"x": {-1: "b"}})),
    "dimension too high": (CaptureError, "names dimension 2 of 'x', which has 2", lambda: dynamic({"x": {2: "b"}})),
    "name a number": (CaptureError, "dynamic gives 3 for dimension 0 of 'x'; give a name", lambda: dynamic({"x": {0: 3}})),
    "name none": (CaptureError, "dynamic gives None for dimension 0", lambda: dynamic({"x": {0: None}})),
    "name empty": (CaptureError, "dynamic gives '' for dimension 0", lambda: dynamic({"x": {0: ""}})),
    "name no word": (CaptureError, "dynamic gives 'a b' for dimension 0", lambda: dynamic({"x": {0: "a b"}})),
    "example outside": (CaptureError, "outside of the range dynamic= gives", lambda: dynamic({"x": {0: Dim("b", min=4)}})),
    "fixed by the model": (CaptureError, "the model fixes it at 4", lambda: dynamic({"x": {1: "width"}})),
    "checks none": (UnsupportedError, "checks=None is not known; choose numeric", lambda: compile_(checks=None)),
    "checks true": (UnsupportedError, "checks=True is not known", lambda: compile_(checks=True)),
    "checks a list": (UnsupportedError, "checks=['off'] is not known", lambda: compile_(checks=["off"])),
    "checks unknown": (UnsupportedError, "checks='all' is not known", lambda: compile_(checks="all")),
    "goal of another type": (
        UnsupportedError,
        "goal=True is not known; choose latency, memory, or None",
        lambda: compile_(goal=True),
    ),
    "goal text": (UnsupportedError, "goal='fast' is not known; choose latency", lambda: compile_(goal="fast")),
    "simulate a number": (UnsupportedError, "simulate= is 1; give True or False", lambda: compile_(simulate=1)),
    "progress text": (UnsupportedError, "progress= is 'bar'; give a callable", lambda: compile_(progress="bar")),
    "progress true": (UnsupportedError, "progress= is True;", lambda: compile_(progress=True)),
}


@table(OPTIONS)
def test_options(refusal: Refusal) -> None:
    check(refusal)


def scored(metric: object) -> object:
    return compile_(metric=metric)


def dropped(max_drop: object) -> object:
    return compile_(metric=lambda call: 1.0, max_drop=max_drop)


METRICS: dict[str, Refusal] = {
    "a number": (UnsupportedError, "metric= is 0.5; give a callable", lambda: scored(0.5)),
    "text": (UnsupportedError, "metric= is 'accuracy'; give a callable", lambda: scored("accuracy")),
    "a list": (UnsupportedError, "metric= is []; give a callable", lambda: scored([])),
    "gives none": (InputError, "metric returned a NoneType; it returns one number", lambda: scored(lambda call: None)),
    "gives text": (InputError, "metric returned a str;", lambda: scored(lambda call: "0.5")),
    "gives an array": (InputError, "returned a ndarray of shape [2];", lambda: scored(lambda call: np.zeros(2))),
    "gives many": (InputError, "returned a Tensor of shape [2, 3];", lambda: scored(lambda call: torch.zeros(2, 3))),
    "gives no number": (InputError, "returned a Tensor of shape [0];", lambda: scored(lambda call: torch.zeros(0))),
    "gives a list": (InputError, "metric returned a list;", lambda: scored(lambda call: [1.0])),
    "gives a complex": (InputError, "metric returned a complex;", lambda: scored(lambda call: 1j)),
    "gives nan": (InputError, "metric returned nan for the model as it is", lambda: scored(lambda call: float("nan"))),
    "gives a nan tensor": (InputError, "metric returned nan", lambda: scored(lambda call: torch.tensor(float("nan")))),
    "drop text": (UnsupportedError, "max_drop= is '0.1'; give a number, 0 or more", lambda: dropped("0.1")),
    "drop below zero": (UnsupportedError, "max_drop= is -0.1;", lambda: dropped(-0.1)),
    "drop nan": (UnsupportedError, "max_drop= is nan;", lambda: dropped(float("nan"))),
    "drop true": (UnsupportedError, "max_drop= is True;", lambda: dropped(True)),
    "drop a list": (UnsupportedError, "max_drop= is [];", lambda: dropped([])),
    "drop alone": (UnsupportedError, "max_drop needs a metric", lambda: compile_(max_drop=0.1)),
}


@table(METRICS)
def test_metric(refusal: Refusal) -> None:
    check(refusal)


def calibrated(data: object) -> object:
    return compile_(data=data)


DATA: dict[str, Refusal] = {
    "none": (InputError, "data= is a NoneType; give a list of batches", lambda: calibrated(None)),
    "number": (InputError, "data= is a int;", lambda: calibrated(8)),
    "text": (InputError, "data= is a str;", lambda: calibrated("texts.txt")),
    "one tensor": (InputError, "data= is a Tensor;", lambda: calibrated(X)),
    "one mapping": (InputError, "data= is a dict;", lambda: calibrated({"x": X})),
    "read before": (InputError, "an iterator that yields no batch; it may have been read", lambda: calibrated(iter(()))),
    "of none": (InputError, "batch 0 of data= is a NoneType; a tuple", lambda: calibrated([None])),
    "of text": (InputError, "batch 1 of data= is a str;", lambda: calibrated([X, "b"])),
    "of arrays": (InputError, "batch 0 of data= is a ndarray;", lambda: calibrated([np.zeros((2, 4))])),
    "of arrays in a tuple": (
        InputError,
        "batch 0 of data= does not fit: argument 'x' is a ndarray",
        lambda: calibrated([(np.zeros(4),)]),
    ),
    "of an unknown name": (
        InputError,
        "batch 0 of data= does not fit: there is no argument 'z'",
        lambda: calibrated([{"z": X}]),
    ),
    "of a number as name": (InputError, "batch 0 of data= has the key 0;", lambda: calibrated([{0: X}])),
    "of another width": (
        InputError,
        "batch 1 of data= does not fit: argument 'x' has size 5",
        lambda: calibrated([X, torch.zeros(2, 5)]),
    ),
    "of another dtype": (InputError, "batch 0 of data= does not fit: argument 'x' is f64", lambda: calibrated([X.double()])),
    "of another rank": (InputError, "batch 0 of data= does not fit: argument 'x' is f32[4]", lambda: calibrated([X[0]])),
    "of nothing": (InputError, "batch 0 of data= does not fit: argument 'x' is missing", lambda: calibrated([()])),
    "of too many": (InputError, "batch 0 of data= does not fit: 3 positional", lambda: calibrated([(X, X, X)])),
    "sparse": (InputError, "batch 0 of data= does not fit: argument 'x' is a tensor that", lambda: calibrated([X.to_sparse()])),
}


@table(DATA)
def test_data(refusal: Refusal) -> None:
    check(refusal)


@cache
def compiled() -> lissom.CompiledModel:
    return lissom.compile(tiny(), X)


def test_one_pass_needs_no_list() -> None:
    found = lissom.optimize(tiny(), X, passes=RemoveNoOps())
    assert found.report.history.pipeline.endswith("remove-no-ops")


def test_a_refused_model_is_left_as_it_was() -> None:
    model = Scaled().train()
    before = copy.deepcopy(model.state_dict())
    check((CaptureError, "itself fails on the example inputs", lambda: compile_(model, torch.zeros(2, 5))))
    assert model.training
    assert model.linear.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@dataclass
class Registered:
    """An output that PyTorch knows the fields of."""

    logits: torch.Tensor
    hidden: torch.Tensor


class RegisteredAnswers(nn.Module):
    """Returns an object of a dataclass that is registered."""

    def forward(self, x: torch.Tensor) -> Registered:
        return Registered(x + 1, x * 2)


def test_a_registered_dataclass_is_returned() -> None:
    torch.export.register_dataclass(Registered)
    found = lissom.compile(RegisteredAnswers(), X)(X + 1)
    assert isinstance(found, Registered)
    assert torch.equal(found.hidden, (X + 1) * 2)
