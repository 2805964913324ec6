"""Mutated ONNX files, read with `lissom.from_onnx`: each must become a program or raise a LissomError.

    python -m tools.fuzz_onnx --count 2000 --seed 0

Bytes and fields of small ONNX files are changed at random. Files are read in child processes with limits on memory and
time, so a crash or a hang is an outcome like any other. With --compare, programs are compared with ONNX Runtime.
A case is reproduced by its number: --seed SEED --first NUMBER --count 1.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

from lissom.errors import LissomError
from lissom.frontends.capture.export import capture
from lissom.frontends.onnx.model import OnnxModel, read
from tools.children import Tell, run_apart

MEMORY_BYTES, SECONDS, CHUNK = 8 << 30, 30, 50
INTEGERS = (0, 1, -1, 2, 3, 9, -9, 255, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63))
TEXTS = ("", "x", "w", "../x", "/etc/hostname", "9**9**9", "__import__('os')", "a" * 5000, "[" * 500, "\n", "Relu", "com.acme")
FLOATS = (0.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38)
_LIKELY = (onnx.AttributeProto, TensorProto, onnx.TensorShapeProto.Dimension)
"""Fields that are changed more often than others, because a file with another value may still follow the standard."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: `program`, `refused`, or a fault, which starts with neither."""

    case: int
    text: str

    @property
    def is_fault(self) -> bool:
        return not self.text.startswith(("program", "refused"))


def originals() -> list[onnx.ModelProto]:
    """The files that are mutated: graphs of the operators in text and image models."""
    node, generator = helper.make_node, np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)

    def numbers(name: str, *values: int) -> TensorProto:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    encoder = [
        node("Gather", ["table", "ids"], ["e"], axis=0, name="/layer/gather"),
        node("LayerNormalization", ["e", "scale", "shift"], ["n"], axis=-1, epsilon=1e-5, name="/layer/norm"),
        node("MatMul", ["n", "w"], ["m"], name="/layer/q/MatMul"),
        node("Add", ["m", "shift"], ["q"], name="/layer/q/Add"),
        node("Shape", ["q"], ["s"], start=0, end=2),
        node("Concat", ["s", "heads"], ["t"], axis=0),
        node("Reshape", ["q", "t"], ["r"], allowzero=0),
        node("Transpose", ["r"], ["h"], perm=[0, 2, 1, 3]),
        node("Transpose", ["h"], ["k"], perm=[0, 1, 3, 2]),
        node("MatMul", ["h", "k"], ["a"]),
        node("Softmax", ["a"], ["p"], axis=-1),
        node("MatMul", ["p", "h"], ["y"]),
    ]
    picture = [
        node("Conv", ["x", "c", "b"], ["v"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], group=1),
        node("Pad", ["v", "pads"], ["z"], mode="constant"),
        node("Slice", ["z", "starts", "ends", "axes"], ["l"]),
        node("Split", ["l"], ["one", "two"], axis=1, num_outputs=2),
        node("Mul", ["one", "two"], ["o"]),
        node("ReduceMean", ["o", "axes"], ["g"], keepdims=1),
        node("CumSum", ["g", "axis"], ["u"], exclusive=1),
        node("Tile", ["u", "repeats"], ["i"]),
        node("Gemm", ["flat", "w", "shift"], ["y"], alpha=1.0, transB=1),
    ]
    picture.insert(-1, node("Flatten", ["i"], ["flat"], axis=1))
    called = helper.make_function(
        "own", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )  # fmt: skip
    branch = [
        helper.make_graph([node(kind, ["f"], [f"out_{kind}"])], kind, [], [_value(f"out_{kind}", ["n", 4])])
        for kind in ("Relu", "Neg")
    ]
    flow = [
        node("Twice", ["x"], ["f"], domain="own"),
        node("If", ["flag"], ["j"], then_branch=branch[0], else_branch=branch[1]),
        node("Sigmoid", ["j"], ["y"]),
    ]
    simple = [
        node("Twice", ["x"], ["f"], domain="own"),
        node("Where", ["flag", "x", "f"], ["d"]),
        node("Expand", ["d", "shape"], ["v"]),
        node("GatherND", ["v", "places"], ["g"], batch_dims=1),
        node("TopK", ["g", "count"], ["t", "i"], axis=-1, largest=1),
        node("Unsqueeze", ["t", "zero"], ["u"]),
        node("ArgMax", ["u"], ["m"], axis=2, keepdims=0),
        node("Cast", ["m"], ["c"], to=1),
        node("Clip", ["c", "", "most"], ["y"]),
    ]
    places = numpy_helper.from_array(np.array([[0], [1], [1]]), "places")
    most = numpy_helper.from_array(np.array(1, np.float32), "most")
    flag = _value("flag", [], TensorProto.BOOL)
    ids = _value("ids", ["batch", "past + new"], TensorProto.INT64)
    layer = [weight("table", 7, 8), weight("scale", 8), weight("shift", 8), weight("w", 8, 8), numbers("heads", 2, 4)]
    return [
        _model(encoder, [ids], layer),
        _model(
            picture,
            [_value("x", ["batch", 3, 8, 8])],
            [
                *(weight("c", 4, 3, 3, 3), weight("b", 4), weight("w", 5, 8), weight("shift", 5), numbers("axes", 2, 3)),
                *(numbers("pads", 0, 0, 1, 1, 0, 0, 1, 1), numbers("starts", 1, 1), numbers("ends", 5, -1)),
                *(numpy_helper.from_array(np.array(1), "axis"), numbers("repeats", 1, 2, 2, 1)),
            ],
        ),
        _model(flow, [_value("x", ["n", 4]), flag], [], [called]),
        _model(
            simple,
            [_value("x", ["n", 4]), flag],
            [numbers("shape", 3, 1, 4), places, numbers("count", 2), numbers("zero", 0), most],
            [called],
        ),
    ]  # fmt: skip


def _value(name: str, shape: list[int | str] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    weights: list[TensorProto],
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, [_value("y", None)], weights)
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid("own", 1)] if functions else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions or [])
    scopes = model.graph.node[0].metadata_props.add()
    scopes.key, scopes.value = "pkg.torch.onnx.name_scopes", "['', 'layer', 'layer.first']"
    return model


def mutated(model: onnx.ModelProto, draw: random.Random) -> bytes:
    """The model as bytes, with one to three of its fields or a region of its bytes changed."""
    if draw.random() < 0.15:
        return _changed_bytes(model.SerializeToString(), draw)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for _ in range(draw.randint(1, 3)):
        fields = list(_fields(changed))
        likely = [field for field in fields if isinstance(field[0], _LIKELY)]
        message, field = draw.choice(likely if likely and draw.random() < 0.6 else fields)
        # Fields with few valid numbers take no others.
        with suppress(ValueError):
            _change(message, field, draw)
    return changed.SerializeToString()


def _changed_bytes(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice((1, 1, 2, 8, 64)))
    new = draw.choice((b"", draw.randbytes(end - start), data[start:end] * 2, b"\xff" * 10))
    return data[:start] if draw.random() < 0.1 else data[:start] + new + data[end:]


def _fields(message: Message) -> Iterator[tuple[Message, str]]:
    for field, value in message.ListFields():
        yield message, field.name
        if field.message_type is not None:
            for nested in [value] if isinstance(value, Message) else value:
                yield from _fields(nested)


def _change(message: Message, field: str, draw: random.Random) -> None:
    value = getattr(message, field)
    if draw.random() < 0.1:
        message.ClearField(field)
    elif isinstance(value, (int, float, str, bytes)):
        setattr(message, field, _other(value, draw))
    elif not isinstance(value, Message) and len(value):
        _change_list(value, draw)


def _change_list(values: object, draw: random.Random) -> None:
    items = list(values)
    index = draw.randrange(len(items))
    kind = draw.choice(("drop", "twice", "swap", "other"))
    if kind == "drop":
        del items[index]
    elif kind == "twice":
        items.append(items[index])
    elif kind == "swap":
        items[index], items[-1] = items[-1], items[index]
    elif not isinstance(items[index], Message):
        items[index] = _other(items[index], draw)
    # Messages are owned by their list, so they are copied before it is cleared.
    copies = [type(value).FromString(value.SerializeToString()) if isinstance(value, Message) else value for value in items]
    del values[:]
    values.extend(copies)


def _other(value: int | float | str | bytes, draw: random.Random) -> int | float | str | bytes:
    if isinstance(value, int):
        small = draw.choice(INTEGERS)
        return small if abs(value) > 2**31 or abs(small) < 2**31 else draw.randrange(30)
    if isinstance(value, float):
        return draw.choice(FLOATS)
    if isinstance(value, str):
        return draw.choice((*TEXTS, value + "_", value[:-1]))
    return draw.choice((b"", value[:-1], value[: len(value) // 2], bytes(reversed(value)), value * 2, b"\xff" * len(value)))


def outcome(data: bytes, folder: Path, compare: bool) -> str:
    """The outcome of reading a file with these bytes."""
    path = folder / "mutated.onnx"
    path.write_bytes(data)
    try:
        model = read(path)
        inputs = model.example_inputs()
        program = capture(model.module, (), inputs, dynamic=False).program
    except LissomError as error:
        text = str(error)
        return (
            f"{type(error).__name__} of several lines: {text!r}" if "\n" in text else f"refused: {type(error).__name__}: {text}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _difference(path, model, inputs, program.run(program.signature.flatten((), inputs))) if compare else "program"


def _difference(path: Path, model: OnnxModel, inputs: dict[str, torch.Tensor], outputs: list[object]) -> str:
    """The difference of a program's outputs from those of ONNX Runtime, in words, if it can run the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        given = {declared.name: tensor.numpy() for declared, tensor in zip(model.inputs, inputs.values(), strict=True)}
        wanted = session.run(None, given)
    # ONNX Runtime's errors have no common class.
    except Exception as error:
        return f"program, and ONNX Runtime refuses it: {str(error).splitlines()[0]}"
    for one, other in zip(outputs, wanted, strict=True):
        if isinstance(one, torch.Tensor) and (
            one.shape != other.shape or not np.allclose(one.detach().numpy(), other, rtol=1e-3, atol=1e-4, equal_nan=True)
        ):
            return f"differs from ONNX Runtime: {list(one.shape)} and {list(other.shape)}"
    return "program that answers like ONNX Runtime"


def _prepare(seed: int, compare: bool) -> Callable[[int, Tell], None]:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    def work(case: int, tell: Tell) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tell(outcome(file_of(case, seed), Path(folder), compare))

    return work


def file_of(case: int, seed: int) -> bytes:
    """The mutated bytes of a case."""
    draw = random.Random(f"{seed}:{case}")
    return mutated(draw.choice(originals()), draw)


def run(count: int, seed: int, first: int = 0, compare: bool = False) -> list[Outcome]:
    """The outcomes of cases `first` to `first + count`; a process that crashes or hangs is the outcome of its case."""
    outcomes, end = [], first + count
    blocks = (range(start, min(start + CHUNK, end)) for start in range(first, end, CHUNK))
    for result in run_apart(blocks, partial(_prepare, seed, compare), 1, lambda _, seconds: seconds >= SECONDS):
        if result.late:
            text = f"takes more than {SECONDS} seconds"
        elif result.code is not None:
            text = f"the process ends: {signal.Signals(-result.code).name if result.code < 0 else f'exit code {result.code}'}"
        else:
            (text,) = result.told
        outcomes.append(Outcome(result.item, text))
    return outcomes


def main() -> int:
    """Run the cases that the command line selects; returns 1 if one is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="compare programs with ONNX Runtime")
    given = parser.parse_args()
    outcomes = run(given.count, given.seed, given.first, given.compare)
    faults = [outcome for outcome in outcomes if outcome.is_fault]
    for outcome in faults if given.count > 1 else outcomes:
        print(f"case {outcome.case}: {outcome.text}")
    kinds = Counter(outcome.text.partition(":")[0] for outcome in outcomes if not outcome.is_fault)
    print(
        f"{len(outcomes)} cases, {len(faults)} faults; " + ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
