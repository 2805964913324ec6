"""Tests of use-stored-weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.errors import RequirementError
from lissom.frontends.checkpoints.gguf import keep_blocks
from lissom.frontends.checkpoints.stored_weights import StoredWeight, keep_stored
from lissom.ops.gguf_blocks import BLOCK_TYPES
from lissom.ops.native import missing_weight_quantized_kernel, reads_few_bits_faster
from lissom.ops.quantization import dequantize
from lissom.ops.weight_quantized_linear import weight_quantized_linear
from tests.support import captures
from tests.support.harness import check_golden, every_backend, rewrite, step_of
from tests.support.models import normal
from tests.support.neighbours import all_but_slow

gguf_files = pytest.importorskip("tests.support.gguf_files")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
aten = torch.ops.aten


def stored(kind: str, rows: int, columns: int, seed: int = 0) -> StoredWeight:
    form = BLOCK_TYPES[kind]
    blocks = gguf_files.random_blocks(kind, rows * columns // form.size, 2e-3, seed)
    return StoredWeight(torch.from_numpy(blocks), form, rows, columns)


def hold(weight: StoredWeight) -> nn.Parameter:
    """A parameter with the values of a stored weight, which remembers it."""
    values = weight.unpack().dequantize(slice(None))
    return keep_stored(nn.Parameter(values.T.contiguous() if weight.transposed else values), weight)  # pyright: ignore


def layers(*kinds: str) -> nn.Sequential:
    """Linear layers of 256 features whose weights a file stores in these types."""
    module = nn.Sequential(*(nn.Linear(256, 256) for _ in kinds))
    for seed, (layer, kind) in enumerate(zip(module, kinds, strict=True)):
        layer.weight = hold(stored(kind, 256, 256, seed))
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_files.write_llama(file, tied=True, size=2e-4)
    options = {"gguf_file": file.name, "local_files_only": True, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options).eval()
    keep_blocks(model, file)
    return model


INPUTS = {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}


def test_golden() -> None:
    _, history = rewrite("use-stored-weights", layers("Q8_0", "Q4_K"), normal(2, 3, 256))
    check_golden("use_stored_weights", history.diff(0, 1))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_outputs_are_the_same_bit_for_bit(kind: str) -> None:
    module, x = layers(kind), normal(2, 3, 256)
    before = captures.optimize(module, x).program
    after = captures.optimize(module, x, passes="use-stored-weights").program
    assert len(after.nodes(dequantize)) == 1
    assert torch.equal(after(x), before(x))
    assert after.parameter_bytes < 0.4 * before.parameter_bytes


def test_a_model_of_all_types_with_a_tied_table(llama: nn.Module) -> None:
    before = captures.optimize(llama, INPUTS).program
    found = captures.optimize(llama, INPUTS, passes="use-stored-weights")
    program = found.program
    assert torch.equal(program(**INPUTS)[0], before(**INPUTS)[0])
    assert step_of(found.report.history, "use-stored-weights").skipped == ()
    (look_up,) = program.nodes(aten.embedding.default)[:1]
    assert program.weight(str(look_up.args[0].target)).dtype == torch.int8
    assert not any(item.dtype == torch.float32 and item.numel() > 256 * 256 // 8 for item in program.weights().values())


def test_a_transposed_weight() -> None:
    """As GPT-2's."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = stored("Q4_1", 96, 256)
            self.weight = hold(StoredWeight(weight.blocks, weight.kind, 96, 256, transposed=True))
            self.bias = nn.Parameter(normal(96))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    module, x = Turned(), normal(5, 256)
    program = captures.optimize(module, x, passes="use-stored-weights").program
    assert len(program.nodes(dequantize)) == 1
    assert torch.equal(program(x), module(x))
    torch.testing.assert_close(captures.compile(module, x, passes="use-stored-weights")(x), module(x), rtol=1e-4, atol=1e-5)


def test_weights_that_changed_stay_in_floating_point() -> None:
    module, x = layers("Q8_0", "Q5_0", "Q6_K"), normal(2, 256)
    with torch.no_grad():
        module[1].weight[3, 5] += 1
    found = captures.optimize(module, x, passes="use-stored-weights")
    (skip,) = step_of(found.report.history, "use-stored-weights").skipped
    assert skip.reason == "its values are not those of the file: it was changed or cast after it was read"
    assert len(found.program.nodes(dequantize)) == 2
    assert torch.equal(found.program(x), module(x))


def test_a_weight_with_another_reader_stays_in_floating_point() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = layers("Q8_0", "Q8_0")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + (self.one.weight * x[0]).sum() + self.other(x)

    found = captures.optimize(Doubled(), normal(2, 256), passes="use-stored-weights")
    (skip,) = step_of(found.report.history, "use-stored-weights").skipped
    assert skip.reason == "'mul' reads it, which is neither a linear layer nor an embedding"
    assert len(found.program.nodes(dequantize)) == 1


def test_other_models_are_refused() -> None:
    with pytest.raises(RequirementError) as caught:
        captures.optimize(nn.Sequential(nn.Linear(4, 4)), normal(2, 4), passes="use-stored-weights")
    assert str(caught.value) == (
        "use-stored-weights needs a model that was read from a GGUF file or a quantized checkpoint, and no weight of "
        "Sequential was; load such a directory, and put this pass before those that change weights, or use quantize"
    )


@every_backend
def test_every_backend_gives_the_same(backend: object) -> None:
    module, x = layers("Q4_K", "Q6_K", "Q5_1", "Q4_0"), normal(7, 256)
    compiled = captures.compile(module, x, passes="use-stored-weights", backend=backend, simulate=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "passes",
    all_but_slow(
        ["use-stored-weights,cast{dtype=bf16}", "use-stored-weights,quantize-cache", "generation"],
        "use-stored-weights,cast{dtype=bf16}",
    ),
)
def test_it_composes_and_is_lowered(llama: nn.Module, passes: str, tmp_path: Path) -> None:
    passes = passes if "use-stored" in passes else f"{passes},use-stored-weights"
    decoder = lissom.compile_generation(llama, max_length=32, passes=passes, goal=None)
    if missing_weight_quantized_kernel(torch.float32, torch.device("cpu")) is None:
        assert len(decoder.program.nodes(weight_quantized_linear)) > 4
        assert decoder.program.nodes(aten.linear.default) == []
        *layers, head = decoder.program.nodes(weight_quantized_linear)
        # The LM head is the embedding table too, whose rows are looked up in bytes.
        assert head.kwargs["format"] == "int8"
        narrow = {"int5", "uint5", "int6"} if reads_few_bits_faster() else {"uint8"}
        assert {layer.kwargs["format"] for layer in layers} == {"int4", "uint4", "int8", *narrow}
    prompt = INPUTS["input_ids"][:1]
    wanted = llama(prompt, use_cache=False).logits[:, -1]
    close = {"rtol": 0.05, "atol": 0.05} if "cast" in passes or "cache" in passes else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(decoder.step(prompt).float(), wanted, **close)
    decoder.save(tmp_path / "decoder")
    again = lissom.load_generation(tmp_path / "decoder")
    decoder.reset()
    assert torch.equal(again.step(prompt), decoder.step(prompt))


@pytest.mark.slow
def test_onnx_runtime_reads_it_as_a_decoder(llama: nn.Module) -> None:
    backend = OnnxRuntime(timing_seconds=0)
    options = {"passes": "use-stored-weights", "goal": None, "simulate": True}
    decoder = lissom.compile_generation(llama, max_length=32, backend=backend, **options)
    prompt = INPUTS["input_ids"][:1]
    wanted = llama(prompt, use_cache=False).logits[:, -1]
    torch.testing.assert_close(decoder.step(prompt), wanted, rtol=1e-3, atol=1e-4)
