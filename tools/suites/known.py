"""Faults that the suites find and that stay, by item, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

_ITS_ONLY_TENSOR = "bytes: it returns the only tensor of the list it is given, and is counted as a copy"

OPINFO: Mapping[str, str] = {
    "nn.functional.embedding_bag": "bytes: PyTorch's fake kernel gives other sizes for a result of bookkeeping",
    "cartesian_prod": _ITS_ONLY_TENSOR,
    "meshgrid.list_of_tensors": _ITS_ONLY_TENSOR,
    "meshgrid.variadic_tensors": _ITS_ONLY_TENSOR,
}

ONNX: Mapping[str, str] = {
    "test_reduce_max_empty_set_bool": "the maximum of no booleans is true, and the standard says false",
}
