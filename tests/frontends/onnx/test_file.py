"""Tests of lissom.frontends.onnx.file: a file is read as the ONNX standard says, or refused in a sentence."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import lissom
from lissom.errors import ArtifactError, CaptureError, LissomError, UnsupportedError
from lissom.frontends.capture.export import capture
from lissom.frontends.onnx.model import read
from tests.support.models import normal
from tests.support.onnx_files import graph

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'lissom[from-onnx]'")
pytest.importorskip("onnx2fx", reason="onnx2fx is not installed: pip install 'lissom[from-onnx]'")

node = onnx.helper.make_node
ADD = [node("Add", ["x", "w"], ["y"], name="sum")]
INPUT = {"x": ["batch", 4]}


def refusal(path: Path, kind: type[LissomError] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        lissom.from_onnx(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(path: Path, change) -> Path:
    """The file with a change made to its message."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, **entries: object) -> Path:
    """A file whose weight, of four numbers, is kept in another file, `w.data` by default, where `entries` say."""
    folder.mkdir(exist_ok=True)
    path = graph(folder / "m.onnx", ADD, INPUT, w=np.ones(4, np.float32))
    (folder / "w.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())

    def move(model) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in ({"location": "w.data"} | entries).items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)

    return changed(path, move)


def test_a_size_is_never_evaluated(tmp_path):
    mark = tmp_path / "ran"
    text = f"__import__('pathlib').Path('{mark}').touch() or 4"
    path = graph(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": ["batch", text], "past": ["9**9**9"]})
    found = read(path)
    assert found.example_inputs()["x"].dim() == 2
    assert not mark.exists()


def test_external_data_beside_the_file_is_read(tmp_path, monkeypatch):
    path = external(tmp_path)
    x = torch.zeros(1, 4)
    assert lissom.from_onnx(path)(x).tolist() == [[0, 1, 2, 3]]
    monkeypatch.chdir(tmp_path)
    assert lissom.from_onnx("m.onnx")(x).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("location", ["../secret", "{folder}/secret", "link", "folder/link", "sub/../w.data", "", "a\0b", "."])
@pytest.mark.parametrize("relative", [False, True])
def test_external_data_outside_of_the_folder_is_refused(tmp_path, monkeypatch, location, relative):
    (tmp_path / "secret").write_bytes(b"0" * 16)
    location = location.format(folder=tmp_path)
    path = external(tmp_path / "model", location=location)
    (path.parent / "link").symlink_to(tmp_path / "secret")
    (path.parent / "folder").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link").write_bytes(b"0" * 16)
    monkeypatch.chdir(path.parent)
    path = Path("m.onnx") if relative else path
    found = refusal(path)
    assert found.startswith(f"{path} keeps 'w' in the file {location}, which is not ")
    assert found.endswith(
        ("inside of its folder, or is a link; copy the data into the folder itself", "there; put it next to the ONNX file")
    )


def test_external_data_of_function_is_held_to_same_rules(tmp_path):
    tensor = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
    constant = node("Constant", [], ["c"], value=tensor)
    body = onnx.helper.make_function("own", "F", ["a"], ["b"], [constant, node("Add", ["a", "c"], ["b"])], [_opset()])
    path = graph(tmp_path / "m.onnx", [node("F", ["x"], ["y"], domain="own")], INPUT)

    def add(model) -> None:
        model.functions.append(body)
        kept = model.functions[0].node[0].attribute[0].t
        kept.ClearField("raw_data")
        kept.data_location = onnx.TensorProto.EXTERNAL
        entry = kept.external_data.add()
        entry.key, entry.value = "location", "/etc/hostname"

    found = refusal(changed(path, add))
    assert found.startswith(f"{path} keeps 'w' in the file /etc/hostname, which is not inside of its folder")


def _opset(version: int = 18):
    return onnx.helper.make_opsetid("", version)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": 4}, "16 bytes from 4 of 16, where [4] elements are 16 bytes"),
        ({"offset": -4}, "16 bytes from -4 of 16"),
        ({"length": 8}, "8 bytes from 0 of 16"),
        ({"length": 2**70}, f"{2**70} bytes from 0 of 16"),
        ({"offset": "much"}, "its offset or length is not a number"),
    ],
)
def test_external_data_beyond_its_file_is_refused(tmp_path, entries, said):
    path = external(tmp_path, **entries)
    found = refusal(path)
    assert found.startswith(f"{path} keeps 'w' in the file w.data, ")
    assert said in found


@pytest.mark.parametrize("dims", [[10**12], [2**40, 2**40], [3], [-4]])
def test_weight_with_wrong_element_count_is_refused(tmp_path, dims):
    path = graph(tmp_path / "m.onnx", ADD, INPUT, w=np.ones(4, np.float32))
    changed(path, lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), dims))
    assert refusal(path).startswith(f"{path} holds 'w'")


def test_an_input_too_large_for_an_example_is_told(tmp_path):
    path = graph(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": [10**12, 4]})
    with pytest.raises(CaptureError) as caught:
        read(path).example_inputs()
    assert str(caught.value) == (
        f"input 'x' is [{10**12}, 4], and example inputs are made of at most {2**28} elements; give example inputs of your own"
    )


def test_a_size_of_minus_one_varies(tmp_path):
    found = read(graph(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": [-1, 4]}))
    assert found.describe_inputs() == "x[size_0, 4]"


INTEGERS = {"i": np.array([0, 1]), "axis": np.array(9), "three": np.array([3])}
OUT_OF_RANGE = {
    "Gather": node("Gather", ["x", "i"], ["y"], axis=9, name="wrong"),
    "Gather from the back": node("Gather", ["x", "i"], ["y"], axis=-3, name="wrong"),
    "GatherND": node("GatherND", ["x", "i"], ["y"], batch_dims=-1, name="wrong"),
    "Softmax": node("Softmax", ["x"], ["y"], axis=9, name="wrong"),
    "LayerNormalization": node("LayerNormalization", ["x", "w"], ["y"], axis=9, name="wrong"),
    "Concat": node("Concat", ["x", "x"], ["y"], axis=9, name="wrong"),
    "Transpose": node("Transpose", ["x"], ["y"], perm=[0, 0], name="wrong"),
    "CumSum": node("CumSum", ["x", "axis"], ["y"], name="wrong"),
    "Tile": node("Tile", ["x", "three"], ["y"], name="wrong"),
    "Pad": node("Pad", ["x", "i"], ["y"], name="wrong"),
    "Slice": node("Slice", ["x", "three", "three", "three"], ["y"], name="wrong"),
    "Flatten": node("Flatten", ["x"], ["y"], axis=9, name="wrong"),
    "Unsqueeze": node("Unsqueeze", ["x", "three"], ["y"], name="wrong"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_axis_out_of_range_is_refused_with_its_node(tmp_path, name):
    path = graph(tmp_path / "m.onnx", [OUT_OF_RANGE[name]], INPUT, w=np.ones(4, np.float32), **INTEGERS)
    with pytest.raises(LissomError) as caught:
        capture(lissom.from_onnx(path), (), {"x": normal(2, 4)})
    found = str(caught.value)
    assert "\n" not in found
    assert f"{name.partition(' ')[0]} " in found
    assert "wrong" in found


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        (node("ReduceSum", ["x"], ["y"], keepdims=16, name="wrong"), "keepdims of 16, and the standard has 0, 1"),
        (node("Gemm", ["x", "w"], ["y"], transB=-1, name="wrong"), "transB of -1, and the standard has 0, 1"),
        (node("CumSum", ["x", "axis"], ["y"], exclusive=2, name="wrong"), "exclusive of 2, and the standard has 0, 1"),
    ],
)
def test_flag_that_is_none_is_refused_with_its_node(tmp_path, operator, said):
    path = graph(tmp_path / "m.onnx", [operator], INPUT, w=np.ones((4, 4), np.float32), axis=np.array(1))
    assert f"{operator.op_type} 'wrong' has the attribute {said}" in refusal(path)


def test_every_own_operator_refuses_a_missing_axis():
    from lissom.frontends.onnx import operators

    x, ids, w = normal(2, 4), torch.tensor([0, 1]), torch.ones(4)
    calls = [
        lambda: operators.gather(x, ids, axis=9),
        lambda: operators.gather(x, ids, axis=-3),
        lambda: operators.rms_normalization(x, w, axis=5),
        lambda: operators.layer_normalization(x, w, axis=-5),
        lambda: operators.slices(x, torch.tensor([1]), torch.tensor([2]), torch.tensor([9])),
        lambda: operators.pad(x, torch.tensor([1, 1]), axes=torch.tensor([9])),
        lambda: operators.pad(x, torch.tensor([1, 1])),
        lambda: operators.pad(x, torch.tensor([1, 1, 1, 1]), axes=torch.tensor([0, -2])),
        lambda: operators.tile(x, torch.tensor([2, 2, 2])),
        lambda: operators.gather_nd(x, ids[:, None], batch_dims=-1),
        lambda: operators.gather_nd(x, ids[:, None], batch_dims=2),
        lambda: operators.cumulative_sum(x, torch.tensor(9)),
        lambda: operators.reshape(x, torch.tensor([2, 4, 0])),
    ]
    for call in calls:
        with pytest.raises((IndexError, ValueError)):
            call()


def _chain(count: int, calls: int) -> list:
    """Functions of which each calls the one before so many times."""
    bodies = [[node("Relu", ["a"], ["b"])]]
    for number in range(1, count):
        names = ["a", *(f"t{index}" for index in range(1, calls)), "b"]
        bodies.append([node(f"F{number - 1}", [one], [other], domain="own") for one, other in pairwise(names)])
    opsets = [_opset(), onnx.helper.make_opsetid("own", 1)]
    return [onnx.helper.make_function("own", f"F{index}", ["a"], ["b"], body, opsets) for index, body in enumerate(bodies)]


@pytest.mark.parametrize(
    ("count", "calls", "said"),
    [
        (9, 10, "it has 100000000 nodes once its functions are written out"),
        (5000, 1, "Function call chain depth exceeds limit"),
    ],
)
def test_functions_that_grow_without_bounds_are_refused(tmp_path, count, calls, said):
    path = graph(tmp_path / "m.onnx", [node(f"F{count - 1}", ["x"], ["y"], domain="own")], INPUT)
    assert said in refusal(changed(path, lambda model: model.functions.extend(_chain(count, calls))))


def test_functions_within_bounds_are_read(tmp_path):
    path = graph(tmp_path / "m.onnx", [node("F3", ["x"], ["y"], domain="own")], INPUT)
    changed(path, lambda model: model.functions.extend(_chain(4, 2)))
    x = normal(2, 4)
    assert torch.equal(lissom.from_onnx(path)(x), x.relu())


def test_a_function_that_calls_itself_is_refused(tmp_path):
    body = [node("F0", ["a"], ["b"], domain="own")]
    own = onnx.helper.make_function("own", "F0", ["a"], ["b"], body, [_opset(), onnx.helper.make_opsetid("own", 1)])
    path = graph(tmp_path / "m.onnx", [node("F0", ["x"], ["y"], domain="own")], INPUT)
    assert "Cycle detected in model-local function" in refusal(changed(path, lambda model: model.functions.append(own)))


BROKEN = {
    "cycle": ([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])], "contains a cycle"),
    "two outputs of one name": ([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], "'y' is redeclared"),
    "an input that is not there": ([node("Add", ["x", "nowhere"], ["y"])], "'nowhere'"),
    "an output that is not there": ([node("Relu", ["x"], ["z"])], "'y' is not an output"),
    "too few inputs": ([node("MatMul", ["x"], ["y"])], "MatMul"),
    "an attribute of another type": ([node("Softmax", ["x"], ["y"], axis="one")], "Mismatched attribute type"),
    "an attribute that is not known": ([node("Relu", ["x"], ["y"], size=3)], "Unrecognized attribute: size for operator Relu"),
    "dimensions that do not fit": ([node("MatMul", ["x", "x"], ["y"])], None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_graph_that_breaks_the_standard_is_refused(tmp_path, name):
    nodes, said = BROKEN[name]
    path = graph(tmp_path / "m.onnx", nodes, {"x": [3, 4]})
    found = refusal(path, LissomError)
    assert (said or "Incompatible dimensions") in found


def test_a_slice_of_a_size_below_zero_is_refused(tmp_path):
    """ONNX's own inference aborts the process at one, when it reads the file or when it simplifies the graph."""
    steps = [
        node("MaxPool", ["x"], ["p"], kernel_shape=[28, 3], name="window"),
        node("Slice", ["p", "one", "last", "axis"], ["y"], name="cut"),
    ]
    path = graph(
        tmp_path / "m.onnx", steps, {"x": [1, 1, 4, 4]}, one=np.array([1]), last=np.array([-1]), axis=np.array([2])
    )  # fmt: skip
    with pytest.raises(LissomError):
        capture(lissom.from_onnx(path), (), {"x": normal(1, 1, 4, 4)})


def test_nodes_may_come_in_any_order(tmp_path):
    path = graph(tmp_path / "m.onnx", [node("Neg", ["a"], ["y"]), node("Relu", ["x"], ["a"])], INPUT)
    x = normal(2, 4)
    assert torch.equal(lissom.from_onnx(path)(x), -x.relu())


@pytest.mark.parametrize("version", [-1, 0])
def test_an_opset_that_is_none_is_refused(tmp_path, version):
    path = graph(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], INPUT, opset=version)
    assert "No Op registered for Relu" in refusal(path)


def test_two_initializers_of_one_name_are_refused(tmp_path):
    path = graph(tmp_path / "m.onnx", ADD, INPUT, w=np.ones(4, np.float32))
    changed(path, lambda model: model.graph.initializer.append(model.graph.initializer[0]))
    assert refusal(path) == f"{path} is not a valid ONNX file: it holds two initializers 'w'; export the model again"


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_a_file_that_is_cut_short_is_refused(tmp_path, keep):
    path = graph(tmp_path / "m.onnx", ADD, INPUT, w=np.ones(4, np.float32))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert str(path) in refusal(path, LissomError)


@pytest.mark.parametrize("text", ["5", "[" * 5000, "['a'", "", "[1, 2]", " " * 200_000])
def test_scopes_and_traces_not_from_exporters_are_dropped(tmp_path, text):
    path = graph(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"], name="/layer/act")], INPUT)

    def note(model) -> None:
        for key in ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"):
            entry = model.graph.node[0].metadata_props.add()
            entry.key, entry.value = key, text

    x = normal(2, 4)
    assert torch.equal(lissom.from_onnx(changed(path, note))(x), x.relu())


def test_a_boolean_weight_is_true_or_false(tmp_path):
    path = graph(tmp_path / "m.onnx", [node("Where", ["w", "x", "zero"], ["y"])], INPUT, w=np.ones(4, bool), zero=np.float32(0))
    changed(path, lambda model: setattr(model.graph.initializer[0], "raw_data", b"\x00\x02\xff\x01"))
    model = lissom.from_onnx(path)
    assert model(torch.ones(1, 4)).tolist() == [[0, 1, 1, 1]]
    (mask,) = (tensor for tensor in model.state_dict().values() if tensor.dtype is torch.bool)
    assert mask.view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.mkdir()
    assert refusal(path) == f"{path} is not a file; give the path of an ONNX file"


def test_a_name_that_is_code_is_a_name(tmp_path):
    mark = tmp_path / "ran"
    name = f'a"+str(__import__("os").system("touch {mark}"))+"'
    path = graph(tmp_path / "m.onnx", [node("Add", ["x", name], ["y"], name=name)], INPUT, **{name: np.ones(4, np.float32)})
    lissom.from_onnx(path)(torch.ones(1, 4))
    assert not mark.exists()


def test_what_onnx2fx_cannot_convert_is_refused_in_one_line(tmp_path):
    path = graph(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], INPUT)
    changed(path, lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.STRING))
    assert os.linesep not in refusal(path, (UnsupportedError, ArtifactError))


def test_name_with_line_end_is_quoted_on_one_line(tmp_path):
    path = external(tmp_path / "model")

    def change(model):
        kept = model.graph.initializer[0]
        kept.ClearField("external_data")
        kept.data_location, kept.raw_data, kept.name = onnx.TensorProto.DEFAULT, b"\x00", "\n"

    assert "holds '\\n' of [4] elements in 1 bytes" in refusal(changed(path, change))
