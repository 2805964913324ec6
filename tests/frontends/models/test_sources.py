"""Tests of lissom.frontends.models.sources: what a user may name as a model, and what is loaded for it."""

import subprocess
import sys

import pytest
import torch

from lissom.errors import ArtifactError
from lissom.frontends.models import sources
from tests.support.models import tiny_bert

LAZY = ("onnx", "onnx_ir", "onnx2fx", "timm", "torchvision", "transformers")


def refusal(name: object) -> str:
    with pytest.raises(ArtifactError) as caught:
        sources.load(str(name))
    return str(caught.value)


def test_a_directory_is_a_checkpoint(tmp_path):
    tiny_bert().model.save_pretrained(tmp_path)
    found = sources.load(str(tmp_path))
    assert type(found.model).__name__ == "BertModel"
    assert found.example_inputs.keys() == {"input_ids", "attention_mask"}
    assert found.notes[0].startswith("example inputs: 2 x 12 random token ids")
    with torch.no_grad():
        found.model(**found.example_inputs)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_text("")
    assert refusal(path) == f"{path} is a file, but its name does not end in .onnx; give an ONNX file or a directory"


def test_a_file_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("onnx2fx", reason="onnx2fx is not installed: pip install 'lissom[from-onnx]'")
    assert refusal(tmp_path / "no.onnx") == f"{tmp_path / 'no.onnx'} is not a file; give the path of an ONNX file"


@pytest.mark.parametrize("name", ["hub:bert", "no/such/directory", "minlm"])
def test_a_name_that_means_nothing_is_refused(name):
    assert refusal(name).startswith(f"'{name}' is neither a directory nor a packaged model (minilm, gemma3-270m)")


def test_model_libraries_are_imported_when_their_model_is_named():
    code = f"import sys, lissom, lissom.cli.main; print([name for name in {LAZY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
