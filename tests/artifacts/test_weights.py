"""Tests of lissom.artifacts.weights: shared, tied and oddly laid out tensors, as other programs read them too."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lissom
from lissom.artifacts.artifact import WEIGHTS
from lissom.artifacts.weights import load_weights, save_weights
from lissom.errors import ArtifactError, UnsupportedError
from lissom.io import tensor_files
from lissom.io.tensor_files import ALIGNMENT, write_tensors
from tests.support.models import FeedForward, captured, normal, seeded
from tests.support.saving import compiled, compiled_module, reloaded


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


def test_transposed_weight_is_same_memory_as_its_original(tmp_path):
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


def pruned(*shape: int, keep: float = 0.5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = normal(*shape)
    return weight.masked_fill(weight.abs() < weight.abs().quantile(1 - keep), 0).to(dtype)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_weight_with_many_zeros_is_stored_smaller_and_exact(tmp_path, dtype):
    weight = pruned(96, 71, keep=0.25).mul(30).to(dtype)
    wanted, found, stored = check(tmp_path, a=nn.Parameter(weight, requires_grad=False))
    assert sorted(stored) == ["a:nonzero", "a:values"]
    assert bits_of(found["a"]) == bits_of(wanted["a"])
    count = int((weight != 0).sum())
    assert stored["a:values"].numel() == count
    assert sum(tensor.nbytes for tensor in stored.values()) == -(-weight.numel() // 8) + count * weight.itemsize


def test_negative_zeros_nans_and_infinities_come_back(tmp_path):
    weight = torch.zeros(4096)
    weight[:6] = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, 1e-45, 1.0])
    weight[4095] = -0.0
    wanted, found, stored = check(tmp_path, a=weight)
    assert bits_of(found["a"]) == bits_of(wanted["a"])
    assert torch.signbit(found["a"]).nonzero().flatten().tolist() == [0, 3, 4095]
    assert stored["a:values"].numel() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
def test_weight_of_zeros_takes_no_memory(tmp_path, dtype):
    wanted, found, stored = check(tmp_path, a=torch.zeros(512, 1 << 12, dtype=dtype))
    assert stored["a:values"].numel() == 0
    assert torch.equal(found["a"], wanted["a"]) and found["a"].data_ptr() % 64 == 0
    found["a"][3, 5] = 1
    assert int(found["a"].sum()) == 1


def test_a_pattern_of_two_in_four_takes_nine_sixteenths(tmp_path):
    groups = normal(64, 16, 4)
    weight = groups.scatter(-1, groups.abs().topk(2, -1, largest=False).indices, 0).flatten(1).bfloat16()
    _, _, stored = check(tmp_path, a=weight)
    assert sum(tensor.nbytes for tensor in stored.values()) / weight.nbytes == 9 / 16


def test_what_saves_little_is_mapped_as_it_is(tmp_path):
    _, _, stored = check(tmp_path, dense=normal(64, 64), nearly=pruned(64, 64, keep=0.9), small=torch.zeros(8, 8))
    assert sorted(stored) == ["dense", "nearly", "small"]


def test_compressed_weights_stay_tied_and_keep_their_strides(tmp_path):
    weight = pruned(48, 40)
    wanted, found, stored = check(tmp_path, a=weight, b=weight[:], c=weight.T)
    assert sorted(stored) == ["a:nonzero", "a:values"]
    assert found["a"].data_ptr() == found["b"].data_ptr() == found["c"].data_ptr()
    assert wanted["c"].stride() == found["c"].stride()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_a_pruned_model_takes_less_and_answers_the_same(tmp_path):
    module, x = seeded(lambda: FeedForward(64, 128)), normal(2, 64)
    dense, sparse = (lissom.compile(module, x, passes=passes, goal=None) for passes in ("exact", "sparsify{keep=0.25}"))
    sizes = []
    for name, model in (("dense", dense), ("sparse", sparse)):
        model.save(tmp_path / name)
        sizes.append((tmp_path / name / WEIGHTS).stat().st_size)
        assert torch.equal(lissom.load(tmp_path / name)(x), model(x))
    # A quarter of the values and a bit each: 28 %; the rest is names.
    assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"nonzero": [64, 65]}, "512 bytes of bits do not fit a weight of [64, 65]"),
        ({"nonzero": [-64, -64]}, "-64 is negative"),
        ({"nonzero": [4090]}, "1024 values do not fit 1022 places"),
        ({"nonzero": "all"}, "the field 'nonzero' is 'all', which is not of type list"),
    ],
)
def test_a_compressed_weight_that_does_not_fit_is_refused(tmp_path, entry, message):
    weight = torch.zeros(4096)
    weight[3::4] = 1
    program = captured("tied")
    program.set_weight("head.weight", weight.reshape(64, 64))
    entries = save_weights(program, tmp_path / "file")
    assert entries["head.weight"]["nonzero"] == [64, 64]
    with pytest.raises(ValueError) as refusal:
        load_weights({"head.weight": entries["head.weight"] | entry}, tmp_path / "file", lambda device: device)
    assert str(refusal.value) == message


def test_weights_read_into_memory_do_not_depend_on_file(tmp_path):
    model = compiled("bert")
    model.save(tmp_path / "artifact")
    again = lissom.load(tmp_path / "artifact", map_weights=False)
    with (tmp_path / "artifact" / "weights.safetensors").open("r+b") as file:
        file.truncate(100)
    wanted = model.program.weights()
    for name, weight in again.program.weights().items():
        assert torch.equal(weight, wanted[name]) and weight.dtype == wanted[name].dtype
        assert weight.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("dtype", sorted(tensor_files.DTYPES, key=str), ids=str)
def test_every_dtype_is_read_into_memory(tmp_path, dtype):
    tensors = {
        "a": torch.arange(7).reshape(7, 1).to(dtype),
        "none": torch.zeros(0, 3).to(dtype),
        "one": torch.ones(()).to(dtype),
    }
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, tensors, {})
    entries = {name: {"tensor": name, "device": "cpu"} for name in tensors}
    found = load_weights(entries, tmp_path / "file", lambda device: device, mapped=False)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_backend_that_maps_files_itself_is_refused(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    lissom.compile(torch.nn.Linear(4, 4), torch.ones(2, 4), backend="onnxruntime").save(tmp_path / "artifact")
    with pytest.raises(
        UnsupportedError, match="backend 'onnxruntime' maps the files of an artifact itself; leave map_weights= out"
    ):
        lissom.load(tmp_path / "artifact", map_weights=False)
