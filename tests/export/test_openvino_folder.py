"""Tests of lissom.export.openvino_folder: OpenVINO runs the files without Lissom, and nothing is written that differs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import ArtifactError, UnsupportedError
from tests.backends.openvino.test_quantized import layers
from tests.frontends.models.test_huggingface import directory  # noqa: F401
from tests.support.models import counter, feed_forward, normal, tiny_bert, tokens

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lissom[openvino]'")
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def run(folder: Path, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the files in a folder, as another program computes them."""
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", F32)
    results = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(results[index].copy()) for index in range(len(compiled.outputs))]


def test_openvino_runs_the_files(tmp_path):
    case = tiny_bert()
    written = lissom.optimize(case.model, case.inputs).export_openvino(tmp_path / "bert")
    assert sorted(path.name for path in (tmp_path / "bert").iterdir()) == [
        "config.json",
        "openvino_model.bin",
        "openvino_model.xml",
    ]
    # Nothing of this machine.
    assert "/tmp" not in (tmp_path / "bert" / "openvino_model.xml").read_text()
    assert written.relative_error < 1e-5 and written.megabytes > 0.01
    assert str(written).endswith("other programs have to set it") and " MB; opened by OpenVINO 20" in str(written)
    for batch, length in ((1, 1), (3, 7)):
        ids = tokens(batch, length)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            wanted = case.model(input_ids=ids, attention_mask=mask)
        found = run(tmp_path / "bert", input_ids=ids, attention_mask=mask)
        # Two layers of float32.
        assert max(map(relative_error, [wanted.last_hidden_state, wanted.pooler_output], found)) < 1e-5


@pytest.mark.parametrize(
    ("scheme", "note"),
    [
        ("int8-static", "2 of 2 quantized layers run in integers: 2 products from integers"),
        ("int8-group", "2 of 2 quantized layers run in integers: 2 products from integers"),
        ("int8-dynamic", "0 of 2 quantized layers run in integers; 2 in floating point on quantized values: OpenVINO has no "),
    ],
)
def test_quantized_programs_keep_their_rounding(tmp_path, scheme, note):
    case = layers()
    optimized = lissom.optimize(case.model, case.inputs, passes=f"quantize{{scheme={scheme}}}", data=[normal(4, 7, 64, seed=1)])
    written = optimized.export_openvino(tmp_path / "m")
    assert written.notes[0].startswith(note)
    x = normal(3, 9, 64, seed=3)
    with torch.no_grad():
        (wanted,) = optimized.program.run([x])
    # Float32 products of equal integers; one activation rounded the other way moves a sum of 64 terms by 1e-3 at most.
    assert relative_error(wanted, *run(tmp_path / "m", x=x)) < 1e-3


def test_nothing_is_written_where_it_is_refused(tmp_path, monkeypatch):
    case = counter()
    with pytest.raises(UnsupportedError, match="the folder has no place for state, and Counter keeps 'seen'; compile it with"):
        lissom.optimize(case.model, case.inputs).export_openvino(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    plain = lissom.optimize(feed_forward().model, feed_forward().inputs)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ArtifactError, match="exists and is not an artifact, so it is not replaced"):
        plain.export_openvino(tmp_path / "full")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest))
    with pytest.raises(UnsupportedError) as caught:
        plain.export_openvino(tmp_path / "m")
    assert str(caught.value) == "OpenVINO's IR needs openvino; pip install 'lissom[openvino]'"


def test_command_line_writes_a_folder(tmp_path, directory):  # noqa: F811
    found = CliRunner().invoke(app, ["export", str(directory), str(tmp_path / "ir"), "--format", "openvino"])
    assert found.exit_code == 0, found.output
    assert {"openvino_model.xml", "openvino_model.bin", "config.json"} <= {path.name for path in (tmp_path / "ir").iterdir()}
    assert " MB; opened by OpenVINO " in found.output
