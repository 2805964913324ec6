"""Tests of lissom.backends.onnxruntime.stored: the ONNX model of an artifact is that of its program, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.compiler.ir.program import kept_state
from lissom.errors import ArtifactError, InputError
from tests.support.caches import decoder, decoder_session
from tests.support.models import capture_of, normal, tokens

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'lissom[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'lissom[onnx]'")

BACKEND = OnnxRuntime(timing_seconds=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A feed-forward and a decoder with a cache, each with the folder its session was saved to."""
    plain, made = capture_of("feed_forward"), {}
    built = {"plain": (plain, BACKEND.build(plain.program, plain.example)), "cache": (decoder(), decoder_session())}
    for name, (found, executable) in built.items():
        folder = tmp_path_factory.mktemp(name)
        BACKEND.save_files(executable, folder)
        made[name] = found, folder
    return made


def refusal(saved, name: str, target: Path, change) -> str:
    """What is said of the saved model with a change made to it."""
    found, folder = saved[name]
    shutil.copytree(folder, target)
    path = target / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        BACKEND.load_executable(found.program, target)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "location", ["../model.onnx.data", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "link.data", "other.data", "batches.json"]
)
def test_weights_elsewhere_are_refused_before_onnx_runtime_opens_file(saved, tmp_path, location):
    (tmp_path / "model.onnx.data").write_bytes(bytes(10**5))

    def move(model) -> None:
        tensor = next(item for item in model.graph.initializer if item.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
        (tmp_path / "m" / "other.data").write_bytes(bytes(10**5))
        (tmp_path / "m" / "link.data").symlink_to(tmp_path / "model.onnx.data")

    found = refusal(saved, "plain", tmp_path / "m", move)
    assert " keeps '" in found


def test_weights_beyond_their_file_are_refused(saved, tmp_path):
    def shift(model) -> None:
        tensor = next(item for item in model.graph.initializer if item.external_data)
        next(entry for entry in tensor.external_data if entry.key == "offset").value = str(10**9)

    assert " bytes from 1000000000 of " in refusal(saved, "plain", tmp_path / "m", shift)


def test_operators_of_other_domains_are_refused(saved, tmp_path):
    def strange(model) -> None:
        model.graph.node[0].domain = "com.acme"

    assert "holds the operator com.acme." in refusal(saved, "plain", tmp_path / "m", strange)


def test_functions_are_refused(saved, tmp_path):
    own = onnx.helper.make_function("own", "F", ["a"], ["b"], [onnx.helper.make_node("Relu", ["a"], ["b"])], [])
    found = refusal(saved, "plain", tmp_path / "m", lambda model: model.functions.append(own))
    assert "holds the function 'F', and no artifact has any" in found


def rename(model, old: str, new: str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def test_input_of_another_name_dtype_or_shape_is_refused(saved, tmp_path):
    def shape(model) -> None:
        model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 3

    def dtype(model) -> None:
        """An input of int32 that is cast to what the graph reads."""
        rename(model, "x", "inner")
        value = next(item for item in model.graph.input if item.name == "inner")
        value.name, value.type.tensor_type.elem_type = "x", onnx.TensorProto.INT32
        model.graph.node.insert(0, onnx.helper.make_node("Cast", ["x"], ["inner"], to=onnx.TensorProto.FLOAT))

    found = refusal(saved, "plain", tmp_path / "name", lambda model: rename(model, "x", "z"))
    assert "has the inputs z, and the program x; compile the model again" in found
    found = refusal(saved, "plain", tmp_path / "dtype", dtype)
    assert "has the input 'x' as tensor(int32)" in found
    # ONNX Runtime itself may find that the ranks do not fit.
    refusal(saved, "plain", tmp_path / "shape", shape)


def test_an_output_that_the_program_lacks_is_refused(saved, tmp_path):
    def more(model) -> None:
        name = model.graph.node[0].output[0]
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))

    assert "has the outputs output, " in refusal(saved, "plain", tmp_path / "m", more)


def test_a_state_of_another_size_is_refused(saved, tmp_path):
    """The memory of a state has the size the program says, so a model that reads more of it must not run."""
    found, _ = saved["cache"]

    def larger(model) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if value.name.startswith(("past_", "present_")):
                value.type.tensor_type.shape.dim[2].dim_value *= 64

    said = refusal(saved, "cache", tmp_path / "m", larger)
    assert "compile the model again" in said
    assert found.program.state


def test_it_runs_when_nothing_is_changed(saved):
    for found, folder in saved.values():
        session = BACKEND.load_executable(found.program, folder)
        with torch.no_grad(), kept_state(found.program):
            wanted = found.program.run(found.example)[0]
        # A few products of float32 with sums of at most 64 terms, unit roundoff 6e-8.
        torch.testing.assert_close(session(found.example)[0], wanted, rtol=1e-4, atol=1e-5)


def test_inputs_whose_memory_would_be_misread_are_refused(saved):
    found, folder = saved["cache"]
    session = BACKEND.load_executable(found.program, folder)
    ids, *rest = found.example
    for wrong in (ids.int(), ids.to(torch.int16), ids.float(), ids.bool(), torch.empty_like(ids, device="meta")):
        with pytest.raises(InputError) as caught:
            session([wrong, *rest])
        assert str(caught.value) == (
            f"input 'input_ids' is {wrong.dtype} on {wrong.device}, and the model takes torch.int64 on cpu; convert it first"
        )
    zeros = torch.zeros(ids.shape[0], 2 * ids.shape[1], dtype=torch.int32)[:, ::2]
    with pytest.raises(InputError):
        session([zeros, *rest])


def test_inputs_of_other_sizes_are_refused_by_onnx_runtime(saved):
    found, folder = saved["cache"]
    session = BACKEND.load_executable(found.program, folder)
    ids, *rest = found.example
    for wrong in (ids[:1], ids[..., None], tokens(3, 4)):
        with pytest.raises(RuntimeError):
            session([wrong, *rest])
    with pytest.raises((RuntimeError, ValueError)):
        session([ids])


def test_a_negated_view_is_read_as_its_numbers(saved):
    found, folder = saved["plain"]
    session = BACKEND.load_executable(found.program, folder)
    x = torch.complex(normal(2, 5, 8), normal(2, 5, 8, seed=1)).conj().imag
    assert x.is_neg()
    assert torch.equal(session([x])[0], session([x.resolve_neg().clone()])[0])
