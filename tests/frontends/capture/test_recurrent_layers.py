"""LSTM, GRU and RNN beside a transformer: captured whole, for sequences of any length."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.ir.fake import recurrent_layers_whole
from lissom.compiler.ir.operators import RECURRENT_LAYERS
from lissom.errors import UnsupportedError
from lissom.frontends.capture.export import capture
from tests.support.models import normal, seeded

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
# Sums of at most 16 terms in float32, unit roundoff 6e-8, on values below 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Tagger(nn.Module):
    """A recurrent layer, and a score for each step."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(8, 8, batch_first=True, **options)
        self.score = nn.Linear(16 if self.rnn.bidirectional else 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.rnn(x)[0])


def tagger(name: str, **options: object) -> Tagger:
    return seeded(lambda: Tagger(KINDS[name], **options)).eval()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "two"])
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_steps(name, options):
    model = tagger(name, **options)
    program = capture(model, (normal(2, 5, 8),)).program
    assert len(program.nodes(*RECURRENT_LAYERS)) == 1
    for shape in [(2, 5, 8), (3, 9, 8), (1, 1, 8)]:
        torch.testing.assert_close(program(normal(*shape)), model(normal(*shape)), **CLOSE)


def test_pytorch_types_them_as_before_afterwards():
    kernels = {target: dict(target.py_kernels) for target in RECURRENT_LAYERS}
    capture(tagger("lstm"), (normal(2, 5, 8),))
    assert {target: dict(target.py_kernels) for target in RECURRENT_LAYERS} == kernels
    exported = _decomposed(tagger("lstm"))
    assert not [node for node in exported.graph.nodes if node.target in RECURRENT_LAYERS]


def test_other_threads_type_them_as_before():
    with recurrent_layers_whole(), ThreadPoolExecutor(1) as pool:
        exported = pool.submit(_decomposed, tagger("gru")).result()
    assert not [node for node in exported.graph.nodes if node.target in RECURRENT_LAYERS or "empty" in node.name]


def _decomposed(model: nn.Module) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (normal(2, 5, 8),)).run_decompositions()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_is_loaded(name, tmp_path):
    model = tagger(name)
    lissom.compile(model, normal(2, 5, 8)).save(tmp_path / "saved")
    torch.testing.assert_close(lissom.load(tmp_path / "saved")(normal(3, 7, 8)), model(normal(3, 7, 8)), **CLOSE)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_onnx_runtime_takes_any_number_of_steps(name):
    model = tagger(name, bidirectional=True)
    fast = lissom.compile(model, normal(2, 5, 8), backend="onnxruntime")
    torch.testing.assert_close(fast(normal(3, 7, 8)), model(normal(3, 7, 8)), **CLOSE)


def test_a_backend_that_unrolls_steps_says_so():
    with pytest.raises(UnsupportedError, match=r"in rnn, .*\) step by step, and the number of steps, sequence, varies"):
        lissom.compile(tagger("rnn"), normal(2, 5, 8), backend="onnxruntime")
    fixed = lissom.compile(tagger("rnn"), normal(2, 5, 8), backend="onnxruntime", dynamic=False)
    torch.testing.assert_close(fixed(normal(2, 5, 8)), tagger("rnn")(normal(2, 5, 8)), **CLOSE)


def test_their_products_count():
    steps = lissom.optimize(tagger("lstm"), normal(2, 5, 8)).report.history.steps
    # 10 tokens by 4 gates of two 8 x 8 matrices, and by the 8 x 3 scores; two operations each.
    assert steps[0].size.flops == 2 * 10 * (4 * 2 * 8 * 8 + 8 * 3)
