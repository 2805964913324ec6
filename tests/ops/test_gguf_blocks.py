"""Tests of lissom.ops.gguf_blocks, against the package that defines the types."""

from __future__ import annotations

import pytest
import torch

from lissom.ops.gguf_blocks import BLOCK_TYPES, unpack_blocks
from lissom.ops.quantization import dequantize
from tests.support.models import normal

gguf = pytest.importorskip("gguf")
random_blocks = pytest.importorskip("tests.support.gguf_files").random_blocks


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_sizes_are_those_of_ggml(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (BLOCK_TYPES[name].size, BLOCK_TYPES[name].bytes)


@pytest.mark.parametrize("chunk", [1 << 20, 500])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_random_blocks_have_the_same_bits(name: str, chunk: int) -> None:
    kind, rows = BLOCK_TYPES[name], 6
    stored = random_blocks(name, rows * 5)
    wanted = gguf.dequantize(stored.reshape(rows, -1), gguf.GGMLQuantizationType[name])
    found = unpack_blocks(torch.from_numpy(stored), kind, rows, 5 * kind.size, chunk)
    options = {"format": kind.format, "dtype": torch.float32}
    floats = dequantize(found.packed(), found.scale, found.zero_point, **options)
    # To the sign of zero.
    assert torch.equal(floats.view(torch.int32), torch.from_numpy(wanted).view(torch.int32))
    assert torch.equal(found.dequantize(slice(2, 4)), floats[2:4])
    assert found.scale.shape == (rows, 5 * kind.size // kind.group)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_weights_have_the_same_bits(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    stored = gguf.quantize(normal(24, 96, seed=3).numpy(), kind)
    found = unpack_blocks(torch.from_numpy(stored), BLOCK_TYPES[name], 24, 96)
    assert torch.equal(found.dequantize(slice(None)), torch.from_numpy(gguf.dequantize(stored, kind)))


@pytest.mark.parametrize(("bytes_", "rows", "columns"), [(17, 1, 32), (18, 2, 32), (18, 1, 16), (18, 1, 64), (36, 1, 48)])
def test_other_sizes_are_refused(bytes_: int, rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{bytes_} bytes are no {rows} rows of {columns} weights in Q4_0"):
        unpack_blocks(torch.zeros(bytes_, dtype=torch.uint8), BLOCK_TYPES["Q4_0"], rows, columns)
