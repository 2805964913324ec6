"""Tests of lissom.artifacts.arrays: inputs and outputs in a file."""

import io
import re
import zipfile

import numpy as np
import pytest
import torch

from lissom.artifacts.arrays import named_tensors, read_arrays, read_inputs, write_tensors
from lissom.errors import ArtifactError, InputError
from tests.support.models import captured, normal


@pytest.fixture
def signature():
    return captured("bert").signature


def ids() -> np.ndarray:
    return np.arange(6).reshape(2, 3)


def test_inputs_are_read_by_name(signature, tmp_path):
    np.savez(tmp_path / "data.npz", attention_mask=np.ones((2, 3), np.int64), input_ids=ids())
    args, kwargs = read_inputs(signature, tmp_path / "data.npz")
    assert args == ()
    assert torch.equal(kwargs["input_ids"], torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize("order", "<>")
def test_order_of_bytes_in_file_does_not_matter(signature, tmp_path, order):
    arrays = {"input_ids": ids().astype(f"{order}i8"), "attention_mask": np.ones((2, 3), f"{order}i8")}
    np.savez(tmp_path / "data.npz", **arrays)
    _, kwargs = read_inputs(signature, tmp_path / "data.npz")
    assert torch.equal(kwargs["input_ids"], torch.arange(6).reshape(2, 3))
    assert torch.equal(kwargs["attention_mask"], torch.ones(2, 3, dtype=torch.long))


def test_nested_inputs_are_read_by_their_paths(tmp_path):
    np.savez(
        tmp_path / "data.npz", **{"past['layer'][0]": normal(2, 3, 4).numpy(), "past['layer'][1]": np.float64(normal(2, 3, 4))}
    )
    args, kwargs = read_inputs(captured("nested").signature, tmp_path / "data.npz")
    assert args == ()
    assert kwargs["double"] is True
    assert [tensor.dtype for tensor in kwargs["past"]["layer"]] == [torch.float32, torch.float32]


def test_an_array_too_few_or_too_many_is_refused(signature, tmp_path):
    np.savez(tmp_path / "data.npz", input_ids=ids())
    with pytest.raises(InputError, match=r"lacks 'attention_mask'; the program takes \(\*, input_ids: i64"):
        read_inputs(signature, tmp_path / "data.npz")
    np.savez(tmp_path / "data.npz", input_ids=ids(), attention_mask=ids(), more=ids())
    with pytest.raises(InputError, match="holds 'more', which is not an argument"):
        read_inputs(signature, tmp_path / "data.npz")


def test_what_holds_no_arrays_is_refused(signature, tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "one.npy", ids())
    np.savez(tmp_path / "objects.npz", input_ids=np.array([{}], dtype=object), attention_mask=ids())
    whole = tmp_path / "whole.npz"
    np.savez(whole, input_ids=ids(), attention_mask=ids())
    (tmp_path / "half.npz").write_bytes(whole.read_bytes()[:200])
    for name in ("text.npz", "one.npy", "objects.npz", "half.npz", "nothing.npz"):
        with pytest.raises(ArtifactError, match="cannot be read as arrays: "):
            read_inputs(signature, tmp_path / name)


def test_a_dtype_no_tensor_has_is_refused(signature, tmp_path):
    np.savez(tmp_path / "data.npz", input_ids=np.array([["a"]]), attention_mask=ids())
    with pytest.raises(InputError, match="argument 'input_ids' is an array of <U1, which is not a tensor dtype"):
        read_inputs(signature, tmp_path / "data.npz")


def test_tensors_have_names():
    x = torch.zeros(1)
    assert list(named_tensors(x)) == ["output"]
    assert list(named_tensors({"past": {"layer": (x, x)}, "sum": [x, None], "double": True})) == [
        "past.layer.0",
        "past.layer.1",
        "sum.0",
    ]


def test_tensors_are_written_whole(tmp_path):
    write_tensors({"a": normal(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.array_equal(arrays["a"], normal(2, 3).numpy())
        assert arrays["b"].dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_link_where_temporary_file_would_be_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("lissom.io.files.secrets.token_hex", lambda _: "guessed")
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".lissom-guessed").symlink_to(tmp_path / "kept")
    with pytest.raises(ArtifactError, match="cannot be written: File exists"):
        write_tensors({"a": normal(2)}, tmp_path / "out.npz")
    assert (tmp_path / "kept").read_text() == "kept"


def header(*shape: int) -> bytes:
    """The header of an array of float32."""
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return written.getvalue()


def flagged(content: bytes, offset: int, value: int) -> bytes:
    """An archive of one file, with two bytes changed in its header and in the directory, which has them 2 bytes later."""
    changed = bytearray(content)
    for start in (content.find(b"PK\x03\x04") + offset, content.find(b"PK\x01\x02") + offset + 2):
        changed[start : start + 2] = value.to_bytes(2, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("x.npy", header(1 << 40) + b"0" * 64, "Unable to allocate|EOF"),
        ("x.npy", header(1 << 70) + b"0" * 64, "too large|larger"),
        ("x.npy", header(-5) + b"0" * 64, "negative dimensions"),
        ("x.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"{'descr': ((((((", "EOF|never closed|Cannot parse"),
        ("x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 20, "EOF"),
        ("x", b"no array", "one of its files is not an array"),
        ("x.npy", b"no array", "one of its files is not an array"),
    ],
)
def test_a_damaged_array_is_a_sentence(tmp_path, member, content, said):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    with pytest.raises(ArtifactError, match=rf"^'{path}' cannot be read as arrays: .*({said}).*; write it with numpy\.savez"):
        read_arrays(path)


@pytest.mark.parametrize(
    ("compression", "place"), [(zipfile.ZIP_LZMA, 60), (zipfile.ZIP_BZIP2, 60), (zipfile.ZIP_DEFLATED, 45)]
)
def test_damaged_compression_is_a_sentence(tmp_path, compression, place):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", header(1) + b"0000")
    content = bytearray(path.read_bytes())
    content[place : place + 10] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read as arrays: "):
        read_arrays(path)


@pytest.mark.parametrize(("offset", "value", "said"), [(6, 1, "is encrypted"), (8, 99, "method is not supported")])
def test_archive_that_zipfile_does_not_read_is_sentence(tmp_path, offset, value, said):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header(1) + b"0000")
    path.write_bytes(flagged(path.read_bytes(), offset, value))
    with pytest.raises(ArtifactError, match=said):
        read_arrays(path)


def test_arrays_larger_than_memory_are_refused_unread(tmp_path):
    """The directory of the archive claims 4 GiB - 2 for each of 4,096 files."""
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(4096):
            archive.writestr(f"{index}.npy", header(1) + b"0000")
    content = path.read_bytes()
    start = content.find(b"PK\x01\x02")
    entries = re.sub(rb"(PK\x01\x02.{20}).{4}", lambda found: found[1] + b"\xfe\xff\xff\xff", content[start:], flags=re.DOTALL)
    path.write_bytes(content[:start] + entries)
    with pytest.raises(
        ArtifactError, match=r"its arrays would take 175\d+ bytes of memory; the limit is \d+, which this machine"
    ):
        read_arrays(path)


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b", "a.npy", "..x", "", "ä"])
def test_an_output_may_have_any_name_of_a_file(tmp_path, name):
    write_tensors({name: normal(2, 3), "other": torch.ones(1)}, tmp_path / "out.npz")
    found = read_arrays(tmp_path / "out.npz")
    assert {*found} == {name, "other"} and np.array_equal(found[name], normal(2, 3))


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..\\x", "a\0b", "a\ud800", "a\nb", "a" * 1001])
def test_an_output_with_another_name_is_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match=r"^an output is called '.*, which a file in an archive cannot be called; rename"):
        write_tensors({name: torch.ones(1)}, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_a_sparse_output_is_written_dense(tmp_path):
    write_tensors({"x": torch.eye(3).to_sparse()}, tmp_path / "out.npz")
    assert np.array_equal(read_arrays(tmp_path / "out.npz")["x"], np.eye(3))
