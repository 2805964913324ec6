"""The pretended GPU with Triton's kernels in the interpreter, in place of their references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from lissom.ops import int4_product, int8_product, quantize_rows, quantized_products
from tools.pretend_cuda.kernels import REFERENCES

LAUNCHERS: dict[object, Callable[..., object]] = {
    quantize_rows: quantized_products._cuda_rows,
    int8_product: quantized_products._cuda_int8,
    int4_product: quantized_products._cuda_int4,
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[object]:
    """Counts the calls of each operator, which the pretended GPU computes by Triton's kernels."""
    found = Counter[object]()

    def launcher(own: object) -> Callable[..., object]:
        def launch(*args: object, **kwargs: object) -> object:
            found[own] += 1
            return LAUNCHERS[own](*args, **kwargs)

        return launch

    monkeypatch.setattr(quantized_products, "has_kernels", lambda device: True)
    for own in LAUNCHERS:
        monkeypatch.setitem(REFERENCES, own, launcher(own))
    return found
