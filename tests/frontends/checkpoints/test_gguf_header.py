"""Tests of lissom.frontends.checkpoints.gguf_header: the fields of gguf's own reader, and files that end early."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers.integrations.ggml import _gguf_parse_value

from lissom.frontends.checkpoints.gguf_header import HeaderReader, dequantize, parse_value
from lissom.ops.gguf_blocks import BLOCK_TYPES

TOKENS = ["", "a", "bé", "</s>"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with an array of each kind."""
    writer = gguf.GGUFWriter(tmp_path / "header.gguf", "llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.5, -1.0, 0.0, 2.0])
    writer.add_array("llama.flags", [True, False])
    writer.add_array("llama.nested", [[1, 2], [3]])
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("llama.none", [])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "header.gguf"


def test_fields_are_those_of_the_reader_of_gguf(file: Path) -> None:
    wanted, fields = gguf.GGUFReader(file).fields, HeaderReader(file).fields
    assert list(fields) == list(wanted)
    for name, field in fields.items():
        other = wanted[name]
        assert (field.types, field.data, field.offset) == (other.types, other.data, other.offset), name
        assert all(a.dtype == b.dtype and a.tolist() == b.tolist() for a, b in zip(field.parts, other.parts, strict=True)), name
        if name != "llama.nested":
            values = [parse_value(field.parts[place], field.types) for place in field.data]
            assert values == [_gguf_parse_value(other.parts[place], other.types) for place in other.data]
    tokens = fields["tokenizer.ggml.tokens"]
    assert [parse_value(tokens.parts[place], tokens.types) for place in tokens.data] == TOKENS


@pytest.mark.parametrize("entry", [b"</s>", b"tokenizer.ggml.scores"])
def test_a_header_cut_short_is_an_error(file: Path, entry: bytes) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: content.index(entry) + len(entry) + 20] if entry != b"</s>" else content[: content.index(entry)])
    with pytest.raises((ValueError, IndexError)):
        HeaderReader(file)


def test_an_array_longer_than_the_file_is_an_error(file: Path) -> None:
    content = bytearray(file.read_bytes())
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    assert int.from_bytes(content[at : at + 8], "little") == len(TOKENS)
    content[at : at + 8] = (2**40).to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"the header has 1099511627776 entries at byte \d+, and the file ends before them"):
        HeaderReader(file)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q6_K", "F16"])
def test_values_are_those_that_gguf_gives(kind: str) -> None:
    blocks = np.random.default_rng(0).integers(0, 64, (2, 3, 420), dtype=np.uint8)
    blocks = blocks[..., : 420 // BLOCK_TYPES[kind].bytes * BLOCK_TYPES[kind].bytes] if kind in BLOCK_TYPES else blocks
    wanted = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(dequantize(blocks, gguf.GGMLQuantizationType[kind]), wanted)
