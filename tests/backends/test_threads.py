"""A compiled model called from eight threads at once gives what one thread gets, bit for bit."""

import pytest
import torch

from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.ops import KERNELS
from lissom.ops.native import kernel_dtypes, load_kernels
from tests.backends.threaded_calls import compiled, differing_calls

MISSING = load_kernels()


@pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_eight_threads_get_what_one_gets(dtype):
    model = compiled(dtype)
    assert len(model.program.nodes(*KERNELS)) >= 10
    assert differing_calls(model, dtype, threads=8, calls=8) == 0


def test_eight_threads_get_what_one_gets_of_onnx_runtime():
    pytest.importorskip("onnxruntime")
    model = compiled(torch.float32, backend=OnnxRuntime(timing_seconds=0))
    assert differing_calls(model, torch.float32, threads=8, calls=8) == 0


@pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
def test_eight_threads_get_what_one_gets_of_bytes():
    model = compiled(torch.float32, "quantize{scheme=int8-dynamic}")
    assert differing_calls(model, torch.float32, threads=8, calls=8) == 0
