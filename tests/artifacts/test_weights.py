"""Tests of lissom.artifacts.weights: shared, tied and oddly laid out tensors, as other programs read them too."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lissom.artifacts.artifact import WEIGHTS
from lissom.compiler.errors import ArtifactError
from tests.artifacts.saving import compiled, compiled_module, reloaded
from tests.models import captured, normal


class Weighted(nn.Module):
    """Reads each of its tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.names = list(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x.sum().to(tensor.dtype) * tensor for tensor in map(self.get_buffer_or_parameter, self.names)]

    def get_buffer_or_parameter(self, name: str) -> torch.Tensor:
        return getattr(self, name)


def check(tmp_path, **tensors):
    """The weights before and after, and the file as the library reads it."""
    model = compiled_module(Weighted(**tensors), normal(2, 3))
    again = reloaded(model, tmp_path / "artifact")
    wanted, found = model.program.weights(), again.program.weights()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name])
        assert (tensor.dtype, type(tensor)) == (found[name].dtype, type(found[name]))
        assert tensor.requires_grad == found[name].requires_grad
    return wanted, found, load_file(tmp_path / "artifact" / WEIGHTS)


def test_a_tied_weight_is_written_once_and_stays_tied(tmp_path):
    program = captured("tied")
    assert list(load_file(_saved(compiled("tied"), tmp_path))) == list(program.weights()) == ["head.weight"]
    weight = normal(4, 5)
    _, found, stored = check(tmp_path, a=weight, b=weight[:], c=weight.clone())
    assert sorted(stored) == ["a", "c"]
    assert found["a"].data_ptr() == found["b"].data_ptr() != found["c"].data_ptr()


def _saved(model, tmp_path):
    model.save(tmp_path / "saved")
    return tmp_path / "saved" / WEIGHTS


def test_a_transposed_weight_is_the_same_memory_as_its_original(tmp_path):
    weight = normal(4, 5)
    wanted, found, stored = check(tmp_path, a=weight, b=weight.T)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {"a": (4, 5)}
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert wanted["b"].stride() == found["b"].stride() == (1, 5)


def test_weights_of_one_storage_that_overlap_or_not(tmp_path):
    flat = normal(40)
    _, found, stored = check(tmp_path, a=flat[:20].view(4, 5), b=flat[20:].view(4, 5), c=flat[10:30].view(4, 5))
    assert sorted(stored) == ["a", "b", "c"]
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_weights_in_any_layout(tmp_path):
    images = normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    wanted, found, stored = check(
        tmp_path,
        last=images,
        gaps=normal(6, 8)[::2, ::3],
        column=normal(6, 8)[:, 2],
        repeated=normal(3, 1).expand(3, 1000),
        number=torch.tensor(2.5),
        empty=torch.empty(0, 4),
        row=normal(1, 7).T,
    )
    assert found["last"].stride() == wanted["last"].stride()
    assert found["repeated"].stride() == (1, 0)
    assert {name: tuple(stored[name].shape) for name in ("last", "repeated", "gaps")} == {
        "last": (2, 4, 5, 3),
        "repeated": (3, 1),
        "gaps": (3, 3),
    }


def test_parameters_stay_parameters(tmp_path):
    check(tmp_path, a=nn.Parameter(normal(3)), b=nn.Parameter(normal(3), requires_grad=False), c=normal(3))


DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    check(tmp_path, a=(normal(3, 4) * 3).to(dtype))


def test_a_conjugate_is_written_as_it_reads(tmp_path):
    check(tmp_path, a=torch.complex(normal(3), normal(3, seed=1)).conj())


def test_a_dtype_safetensors_has_not_is_refused(tmp_path):
    model = compiled_module(Weighted(a=normal(3).to(torch.complex128)), normal(2, 3))
    with pytest.raises(ArtifactError) as caught:
        model.save(tmp_path / "artifact")
    assert str(caught.value) == (
        "weight 'a' is a Tensor of torch.complex128 and torch.strided, which an artifact cannot hold; "
        "make it a plain tensor of a plain dtype before compiling"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_weight_is_refused(tmp_path):
    model = compiled("tied")
    model.program.set_weight("head.weight", model.program.weight("head.weight").detach().to_sparse())
    with pytest.raises(
        ArtifactError, match=r"weight 'head.weight' is a Tensor of torch.float32 and torch.sparse_coo, which an"
    ):
        model.save(tmp_path / "artifact")


def test_weights_lie_where_pytorch_would_put_them(tmp_path):
    model = compiled_module(Weighted(a=normal(3), b=normal(4, 4), c=normal(5), d=normal(32, 16)), normal(2, 3))
    weights = reloaded(model, tmp_path / "artifact").program.weights()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in weights.values())
    header = (tmp_path / "artifact" / WEIGHTS).read_bytes()
    assert (8 + int.from_bytes(header[:8], "little")) % 64 == 0
