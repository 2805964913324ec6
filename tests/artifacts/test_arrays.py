"""Tests of lissom.artifacts.arrays: inputs and outputs in a file."""

import numpy as np
import pytest
import torch

from lissom.artifacts.arrays import named_tensors, read_inputs, write_tensors
from lissom.errors import ArtifactError, InputError
from tests.models import captured, normal


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
def test_the_order_of_bytes_in_a_file_does_not_matter(signature, tmp_path, order):
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


def test_a_link_where_the_temporary_file_would_be_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("lissom.files.secrets.token_hex", lambda _: "guessed")
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".lissom-guessed").symlink_to(tmp_path / "kept")
    with pytest.raises(ArtifactError, match="cannot be written: File exists"):
        write_tensors({"a": normal(2)}, tmp_path / "out.npz")
    assert (tmp_path / "kept").read_text() == "kept"
