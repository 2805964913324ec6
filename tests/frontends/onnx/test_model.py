"""Tests of lissom.frontends.onnx.model: files of both exporters of PyTorch become modules that give what ONNX Runtime gives."""

import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.compiler.ir import node as nodes
from lissom.errors import ArtifactError, CaptureError, UnsupportedError
from lissom.frontends.capture.export import capture
from lissom.frontends.onnx.model import OnnxModel, read
from lissom.passes import RECIPES
from tests.support.models import Case, normal, tiny_llama, tokens
from tests.support.neighbours import all_but_slow
from tests.support.onnx_files import export, graph, run, tiny_vit

for _package in ("onnx", "onnx_ir", "onnx2fx", "onnxruntime", "onnxscript"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'lissom[from-onnx,dev]'")

helper = pytest.importorskip("onnx.helper")
aten = torch.ops.aten

EXPORTERS = {"dynamo, opset 18": (True, 18), "torchscript, opset 17": (False, 17)}
MODELS = {"llama": tiny_llama, "vit": tiny_vit}


def ones_for_masks(inputs: dict[str, torch.Tensor], batch: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of other sizes: ids anew, masks of 1 with the last token of the last row closed, token types of 0."""
    made = {}
    for name, tensor in inputs.items():
        if tensor.dim() == 4:
            made[name] = normal(batch, *tensor.shape[1:], seed=3)
        elif name == "input_ids":
            made[name] = tokens(batch, length, seed=3)
        else:
            made[name] = torch.full((batch, length), int(name == "attention_mask"))
            made[name][-1, -1] = 0
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The file of a model by an exporter, written once, and read once."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def file(name: str, exporter: str):
        dynamo, opset = EXPORTERS.get(exporter, (True, 23))
        if (name, exporter) not in made:
            path = export(MODELS[name](), folder / f"{name}_{opset}.onnx", dynamo=dynamo, opset=opset)
            made[name, exporter] = path, read(path)
        return made[name, exporter]

    return file


def difference(found: object, wanted: list[torch.Tensor]) -> float:
    """The largest error of any output, relative to the largest number in it."""
    given = [found] if isinstance(found, torch.Tensor) else list(found)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(given, wanted, strict=True))


@pytest.mark.parametrize("exporter", all_but_slow(EXPORTERS, "torchscript, opset 17"))
@pytest.mark.parametrize("name", all_but_slow(MODELS, "vit"))
def test_a_compiled_file_gives_what_onnx_runtime_gives(files, name, exporter):
    path, model = files(name, exporter)
    fast = lissom.compile(model.module, model.example_inputs())
    for sizes in ((2, 8), (3, 5), (1, 7)):
        inputs = ones_for_masks(model.example_inputs(), *sizes)
        # float32 in other orders of summation: a few layers of sums of at most 64 terms, unit roundoff 6e-8.
        assert difference(fast(**inputs), run(path, inputs)) < 1e-5


@pytest.mark.parametrize("exporter", all_but_slow(EXPORTERS, "torchscript, opset 17"))
def test_minilm_gives_what_onnx_runtime_gives(minilm, tmp_path, exporter):
    dynamo, opset = EXPORTERS[exporter]
    path = export(Case(minilm.model, minilm.example_inputs), tmp_path / "minilm.onnx", dynamo=dynamo, opset=opset)
    model = lissom.from_onnx(path)
    fast = lissom.compile(model, minilm.example_inputs, checks="structural")
    # float32 through six layers, sums of at most 1536 terms, in other orders of summation.
    assert difference(fast(**minilm.example_inputs), run(path, minilm.example_inputs)) < 1e-5
    assert {dimension.name for dimension in fast.program.signature.dimensions.values()} == {"batch", "sequence"}
    # The program before it is lowered.
    exact = fast.report.history.texts[RECIPES["exact"].count(",") + 1]
    assert exact.count("= aten.scaled_dot_product_attention(") == 6
    assert exact.count("= aten.linear(") >= 36


def test_opset_23_gives_what_the_model_gives(files):
    """ONNX Runtime refuses the RotaryEmbedding PyTorch 2.13 writes for more than one row, so the model is the reference."""
    _, found = files("llama", "opset 23")
    case = tiny_llama()
    inputs = ones_for_masks(case.kwargs, 3, 7)
    with torch.no_grad():
        wanted = case.model(**inputs).logits
        # float32 in other orders of summation: two layers of sums of at most 24 terms, unit roundoff 6e-8.
        assert difference(found.module(**inputs), [wanted]) < 1e-5


@pytest.mark.parametrize("exporter", all_but_slow([*EXPORTERS, "opset 23"], "torchscript, opset 17", "opset 23"))
def test_the_program_reads_like_that_of_the_model(files, exporter):
    """Linear layers, norms, attention and activations are single operators, as when the model itself is compiled."""
    _, model = files("llama", exporter)
    fast = lissom.optimize(model.module, model.example_inputs(), checks="structural").program
    counts = {
        aten.linear.default: 15,
        aten.scaled_dot_product_attention.default: 2,
        aten.rms_norm.default: 5,
        aten.silu.default: 2,
        aten.embedding.default: 1,
    }
    assert {target: len(fast.nodes(target)) for target in counts} == counts
    assert fast.signature.describe() == "(*, input_ids: i64[batch, sequence], attention_mask: i64[batch, sequence])"


@pytest.mark.parametrize(("exporter", "prefix"), [("dynamo, opset 18", ""), ("torchscript, opset 17", "model.")])
def test_weights_and_modules_keep_the_names_of_the_model(files, exporter, prefix):
    _, model = files("vit", exporter)
    names = set(dict(model.module.named_parameters()))
    # The exporter stores the weights of linear layers transposed and nameless, and equal biases once.
    wanted = {f"{prefix}{name}" for name, weight in tiny_vit().model.named_parameters()}
    assert {name for name in wanted if "attention.q_proj" in name or "mlp.fc2" in name or "layernorm" in name} <= names
    program = capture(model.module, (), model.example_inputs()).program
    paths = {nodes.origin(node).module_path for node in program.nodes(aten.linear.default)}
    assert f"{prefix}vit.layers.1.attention.q_proj" in paths
    assert f"{prefix}classifier" in paths


def test_nodes_name_their_line_in_code_or_file(files):
    _, model = files("vit", "dynamo, opset 18")
    program = capture(model.module, (), model.example_inputs()).program
    assert all(nodes.origin(node).source.endswith(".py") is False for node in program.nodes())
    assert any(nodes.origin(node).source.startswith("modeling_vit.py:") for node in program.nodes(aten.linear.default))
    path, model = files("vit", "torchscript, opset 17")
    program = capture(model.module, (), model.example_inputs()).program
    found = [nodes.origin(node) for node in program.nodes(aten.linear.default)]
    assert all(origin.source.startswith(f"{path.name}:") for origin in found)
    assert "MatMul /model/vit/layers.0/attention/q_proj/MatMul" in {origin.code for origin in found}


def test_weights_are_parameters_and_train(files):
    _, model = files("vit", "dynamo, opset 18")
    model.module(**model.example_inputs()).sum().backward()
    weight = dict(model.module.named_parameters())["vit.layers.0.mlp.fc1.weight"]
    assert weight.shape == (24, 16)
    assert weight.grad is not None
    model.module.zero_grad()


def test_inputs_may_be_given_by_position(files):
    _, model = files("vit", "dynamo, opset 18")
    inputs = model.example_inputs()
    with torch.no_grad():
        assert torch.equal(model.module(*inputs.values()), model.module(**inputs))


def test_a_size_the_graph_fixes_is_fixed_and_noted(tmp_path):
    path = graph(
        tmp_path / "fixed.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="fold")],
        {"x": ["batch", "tokens", 4]},
        shape=np.array([0, 5, 2, 2]),
    )
    model = lissom.from_onnx(path)
    found = capture(model, (), {"x": normal(2, 5, 4)})
    assert found.program.signature.describe() == "(*, x: f32[batch, 5, 4])"
    assert found.notes == (
        "dynamic: batch (1 or more)",
        "dimension 1 of 'x' at 5: it varies in the file (tokens), but constants in its graph fix it",
    )
    with pytest.raises(CaptureError) as caught:
        capture(model, (), {"x": normal(2, 7, 4)})
    assert str(caught.value).startswith("fixed cannot be captured: fixed.onnx:1 (`Reshape fold`): ")


def test_a_size_beyond_the_sequence_is_freed_by_name(tmp_path):
    path = graph(tmp_path / "wide.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch", 3, "height", 8]})
    model = lissom.from_onnx(path)
    x = normal(2, 3, 6, 8)
    assert capture(model, (), {"x": x}).notes[1] == (
        "dimension 2 of 'x' at 6: it varies in the file (height), but name it in dynamic= to let it vary"
    )
    assert (
        capture(model, (), {"x": x}, dynamic={"x": {2: "height"}}).program.signature.describe()
        == "(*, x: f32[2, 3, height, 8])"
    )


def test_example_inputs_follow_names_and_sizes_of_file(files):
    _, model = files("llama", "torchscript, opset 17")
    found = model.example_inputs()
    assert {name: tensor.shape for name, tensor in found.items()} == {"input_ids": (2, 8), "attention_mask": (2, 8)}
    assert found["attention_mask"].min() == 1
    assert found["input_ids"].min() >= 0
    assert found["input_ids"].max() < 37
    assert model.describe_inputs() == "input_ids[batch, sequence], attention_mask[batch, sequence]"


def test_a_size_that_is_a_formula_is_worked_out(tmp_path):
    nodes_ = [helper.make_node("MatMul", ["x", "past"], ["y"])]
    path = graph(tmp_path / "past.onnx", nodes_, {"x": ["batch", "new", "past + new"], "past": ["batch", "past + new", 4]})
    found = read(path).example_inputs()
    batch, new, total = found["x"].shape
    assert total > new
    assert found["past"].shape == (batch, total, 4)


def test_the_command_line_takes_a_file(files):
    path, _ = files("vit", "dynamo, opset 18")
    result = CliRunner().invoke(app, ["show", str(path), "--passes", "exact"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("program vit_18(*, pixel_values: f32[batch, 3, 32, 32]) {")
    # Progress comes first, where a stage is slow.
    assert result.stderr.splitlines()[-1] == "example inputs: pixel_values[batch, 3, 32, 32]"


def refusal(path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        lissom.from_onnx(path)
    return str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "no.onnx"
    assert refusal(path, ArtifactError) == f"{path} is not a file; give the path of an ONNX file"


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x08\x07"], ids=["empty", "text", "no graph"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path, content):
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    assert refusal(path, ArtifactError).startswith(f"{path} is not an ONNX file: ")


def test_operator_without_conversion_is_named_with_its_node(tmp_path):
    path = graph(
        tmp_path / "strange.onnx",
        [
            helper.make_node("Sprocket", ["x"], ["s"], name="/layer/Sprocket", domain="com.acme"),
            helper.make_node("Resize", ["s", "", "scales"], ["y"], name="/layer/Resize"),
        ],
        {"x": [1, 1, 4, 4]},
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    assert refusal(path, UnsupportedError) == (
        f"{path} cannot be converted: there is no correct conversion of com.acme.Sprocket (opset 1) in node '/layer/Sprocket', "
        f"Resize (opset 18) in node '/layer/Resize'; export the model again with standard ONNX operators, opset 17 to 23"
    )


def test_missing_external_data_is_named(tmp_path):
    path = export(tiny_vit(), tmp_path / "vit.onnx", dynamo=True, opset=18, external_data=True)
    shutil.move(tmp_path / "vit.onnx.data", tmp_path / "elsewhere")
    found = refusal(path, ArtifactError)
    assert found.startswith(f"{path} keeps '")
    assert found.endswith("' in the file vit.onnx.data, which is not there; put it next to the ONNX file")


def test_external_data_is_read(tmp_path):
    path = export(tiny_vit(), tmp_path / "vit.onnx", dynamo=True, opset=18, external_data=True)
    model = read(path)
    inputs = model.example_inputs()
    with torch.no_grad():
        # float32 in other orders of summation: two layers of sums of at most 192 terms, unit roundoff 6e-8.
        assert difference(model.module(**inputs), run(path, inputs)) < 1e-5


def test_integers_in_external_data_are_read(tmp_path):
    rows = np.array([2, 0, 2, 1])
    inline = graph(tmp_path / "inline.onnx", [helper.make_node("Gather", ["x", "rows"], ["y"])], {"x": [3, 4]}, rows=rows)
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "rows.onnx"
    onnx.save(onnx.load(inline), path, save_as_external_data=True, location="rows.data", size_threshold=0)
    x = normal(3, 4)
    assert torch.equal(lissom.from_onnx(path)(x), x[torch.from_numpy(rows)])


@pytest.mark.parametrize("package", ["onnx2fx", "onnx_ir"])
def test_a_package_that_is_not_installed_is_named(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(tmp_path / "x.onnx", UnsupportedError) == (
        "reading an ONNX file needs onnx2fx and onnx-ir: pip install 'lissom[from-onnx]'"
    )


def test_the_module_is_a_module():
    assert OnnxModel.__annotations__["module"] == "fx.GraphModule"
    assert issubclass(torch.fx.GraphModule, nn.Module)
