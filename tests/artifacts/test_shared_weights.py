"""ONNX artifacts hold weights once."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import lissom
from tests.support.models import normal, seeded


class Layers(nn.Module):
    """A linear layer, which ONNX holds transposed, an embedding, and a matrix that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(97, 64)
        self.up = nn.Linear(64, 192)
        self.down = nn.Linear(192, 64, bias=False)
        self.head = nn.Linear(64, 97, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(self.table(ids)))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = seeded(Layers)
    ids = torch.randint(0, 97, (2, 7))
    fast = lissom.compile(model, ids, backend=lissom.OnnxRuntime(timing_seconds=0), checks="structural")
    folder = tmp_path_factory.mktemp("onnx") / "model"
    fast.save(folder)
    return model, fast, ids, folder


def bytes_of(folder: Path) -> int:
    files = [folder / name for name in ("model.onnx.data", "weights.safetensors")]
    return sum(file.stat().st_size for file in files if file.exists())


def test_weights_are_there_once_and_it_loads(saved, tmp_path):
    model, fast, ids, folder = saved
    weights = sum(weight.nbytes for weight in dict(model.named_parameters()).values())
    # ONNX itself holds a tied table twice: as rows, and transposed for the product.
    assert bytes_of(folder) < weights + model.table.weight.nbytes + 4096
    again = lissom.load(folder)
    assert torch.equal(again(ids), fast(ids))
    again.save(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(folder)
    assert torch.equal(lissom.load(tmp_path / "again")(ids), fast(ids))
    for name, weight in again.program.weights().items():
        torch.testing.assert_close(weight, fast.program.weight(name), rtol=0, atol=0)


def test_any_onnx_runtime_opens_the_model(saved):
    _, fast, ids, folder = saved
    session = onnxruntime.InferenceSession(os.fspath(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), fast(ids))


def test_a_model_without_matrices(tmp_path):
    fast = lissom.compile(nn.LayerNorm(8), normal(2, 8), backend=lissom.OnnxRuntime(timing_seconds=0), checks="structural")
    fast.save(tmp_path / "model")
    x = normal(3, 8)
    assert not (tmp_path / "model" / "model.onnx.data").exists()
    assert torch.equal(lissom.load(tmp_path / "model")(x), fast(x))
