"""Packages of AOTInductor, loaded in fresh processes of Python and C++ that know nothing of Lissom."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import ArtifactError, UnsupportedError

EXAMPLES = Path(__file__).parents[2] / "examples"
PRUNED = "prune-heads{keep=0.5}"
PYTHON = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
rows, columns = map(int, sys.argv[2:4])
outputs = model(*(torch.ones(rows, columns, dtype=torch.int64) for _ in model.get_metadata()["inputs"].split()))
assert "lissom" not in sys.modules
torch.save(outputs, sys.argv[4])
"""
# Both are PyTorch in float32, which sums in another order.
ALLOWED = 1e-5


@pytest.fixture(scope="module")
def bert() -> transformers.BertModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=60)).eval()


def example() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def package(bert, tmp_path_factory) -> Path:
    """A pruned model in a package."""
    path = tmp_path_factory.mktemp("package") / "bert.pt2"
    written = lissom.optimize(bert, example(), passes=PRUNED).export_pt2(path)
    assert written.inputs == ["input_ids: i64[batch, sequence]", "attention_mask: i64[batch, sequence]"]
    assert written.outputs == ["last_hidden_state: f32[batch, sequence, 32]", "pooler_output: f32[batch, 32]"]
    assert written.relative_error < ALLOWED
    assert str(written).startswith("(input_ids: i64[batch, sequence], attention_mask: ")
    assert [file.name for file in path.parent.iterdir()] == ["bert.pt2"]
    return path


@pytest.fixture(scope="module")
def wanted(bert) -> list[torch.Tensor]:
    """The pruned model's outputs for 3 rows of 7 ones."""
    ones = torch.ones(3, 7, dtype=torch.int64)
    fast = lissom.compile(bert, example(), passes=PRUNED, goal=None)
    return list(fast(input_ids=ones, attention_mask=ones).values())


def test_python_loads_it(package: Path, wanted: list[torch.Tensor], tmp_path: Path) -> None:
    found = tmp_path / "outputs.pt"
    subprocess.run([sys.executable, "-P", "-c", PYTHON, str(package), "3", "7", str(found)], check=True, cwd=tmp_path)
    for mine, theirs in zip(wanted, torch.load(found), strict=True):
        assert relative_error(mine, theirs) < ALLOWED


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_cpp_loads_it(package: Path, wanted: list[torch.Tensor], tmp_path: Path) -> None:
    """By the commands in the example's first lines."""
    folder, program = torch.__path__[0], str(tmp_path / "run_package")
    libraries = [f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    source = [str(EXAMPLES / "run_package.cpp"), f"-I{folder}/include"]
    subprocess.run(["g++", "-std=c++20", *source, *libraries, "-o", program], check=True, capture_output=True)
    ran = subprocess.run([program, str(package), "3", "7"], check=True, capture_output=True, text=True)
    lines = [line.rsplit(" ", 1) for line in ran.stdout.splitlines()]
    assert [shape for shape, _ in lines] == [str(list(tensor.shape)) for tensor in wanted]
    # Six digits are printed.
    assert [float(mean) for _, mean in lines] == pytest.approx([float(tensor.mean()) for tensor in wanted], rel=1e-4, abs=1e-6)
    refused = subprocess.run([program, str(tmp_path / "none.pt2"), "3"], check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "none.pt2" in refused.stderr


class Nested(nn.Module):
    """Its outputs are one tensor twice, a constant, and an input."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], scale: float = 2.0) -> dict[str, object]:
        total = (pair[0] + pair[1]) * scale
        return {"a": total, "b": [total, 3], "c": pair[0]}


@pytest.mark.slow
def test_nested_arguments_are_flat(tmp_path: Path) -> None:
    pair = (torch.randn(2, 3), torch.randn(2, 3))
    written = lissom.optimize(Nested(), (pair,)).export_pt2(tmp_path / "nested.pt2")
    assert [text.partition(":")[0] for text in written.inputs] == ["pair_0", "pair_1"]
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "nested.pt2"))
    first, second = torch.randn(5, 3), torch.randn(5, 3)
    assert [text.partition(":")[0] for text in written.outputs] == ["a", "a", "c"]
    for found, expected in zip(loaded(first, second), [2 * (first + second), 2 * (first + second), first], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)  # twice a sum is exact


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_int8_runs_elsewhere(bert, scheme: str, tmp_path: Path) -> None:
    """One process here and one without Lissom give the outputs of the backend that Lissom runs the same program on."""
    passes, path = f"quantize{{scheme={scheme}}}", tmp_path / "bert.pt2"
    lissom.optimize(bert, example(), passes=passes, data=[example()]).export_pt2(path)
    loaded = torch._inductor.aoti_load_package(str(path))
    quantized = lissom.compile(bert, example(), passes=passes, data=[example()], goal=None, simulate=True)
    for rows, columns in ((1, 1), (1, 5), (3, 40)):
        ids = torch.randint(3, 60, (rows, columns), generator=torch.Generator().manual_seed(rows))
        wanted = quantized(input_ids=ids, attention_mask=torch.ones_like(ids))
        exact = bert(input_ids=ids, attention_mask=torch.ones_like(ids))
        for mine, theirs, float_ in zip(loaded(ids, torch.ones_like(ids)), wanted.values(), exact.values(), strict=True):
            # A value near the middle of two integers may round the other way, which changes less than all roundings do.
            assert relative_error(theirs, mine) < relative_error(float_, theirs)
    assert "aoti_torch_cpu__int_mm_out" in _code(path)


def _code(package: Path) -> str:
    """The C++ code in a package, and the names that it calls."""
    with zipfile.ZipFile(package) as files:
        return "".join(files.read(name).decode("latin1") for name in files.namelist() if name.endswith((".so", ".cpp")))


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("int4-weight", "its weight is in int4, and PyTorch multiplies int8 on CPUs"),
        ("int8-group", "its input is quantized to int8, and a weight in int8 is multiplied with uint8"),
    ],
)
def test_layers_without_a_kernel_are_refused(bert, scheme: str, reason: str, tmp_path: Path) -> None:
    optimized = lissom.optimize(bert, example(), passes=f"quantize{{scheme={scheme}}}")
    with pytest.raises(UnsupportedError, match=f"'inductor' has no kernel for 12 quantized layers.*{reason}"):
        optimized.export_pt2(tmp_path / "bert.pt2")
    assert not any(tmp_path.iterdir())


def test_operators_of_lissom_are_refused(bert, tmp_path: Path) -> None:
    optimized = lissom.optimize(bert, example(), passes="quantize{scheme=int8-dynamic,embeddings=true}")
    with pytest.raises(UnsupportedError, match=r"calls lissom\.dequantize\.default, an operator of Lissom.*embeddings=true"):
        optimized.export_pt2(tmp_path / "bert.pt2")
    assert not any(tmp_path.iterdir())


def test_a_place_that_does_not_exist_is_refused(bert, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="none"):
        lissom.optimize(bert, example()).export_pt2(tmp_path / "none" / "bert.pt2")
    assert not any(tmp_path.iterdir())


def test_without_a_compiler_nothing_is_written(bert, tmp_path: Path) -> None:
    optimized = lissom.optimize(bert, example())
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(UnsupportedError, match=r"needs a C\+\+ compiler"),
    ):
        optimized.export_pt2(tmp_path / "bert.pt2")
    assert not any(tmp_path.iterdir())
