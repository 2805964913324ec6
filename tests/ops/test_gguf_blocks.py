"""Tests of lissom.ops.gguf_blocks, against the package that defines the types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.ops.gguf_blocks import BLOCK_TYPES, unpack_blocks
from lissom.ops.quantization import dequantize
from tests.models import normal

gguf = pytest.importorskip("gguf")
# Where the float16 numbers of a block are; all other bytes may be anything.
HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes whose float16 numbers are finite, of any size and sign; the first block's are zero."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, BLOCK_TYPES[name].bytes), dtype=np.uint8)
    for at in HALVES[name]:
        bits = generator.integers(0, 0x7C00, count, dtype=np.uint16) | (generator.integers(0, 2, count, dtype=np.uint16) << 15)
        bits[0] = 0
        blocks[:, at : at + 2] = bits[:, None].view(np.uint8)
    return blocks


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
