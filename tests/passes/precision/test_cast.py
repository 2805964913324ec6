"""Tests of cast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import lissom
from lissom.backends.base import Backend
from lissom.backends.eager.backend import Eager
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.errors import LissomError, RequirementError
from lissom.ops.attention import attention
from lissom.passes.precision.cast import Cast, Caster
from tests.support import captures
from tests.support.decoders import MAX_LENGTH, VOCABULARY
from tests.support.decoders import decoder as tiny_decoder
from tests.support.harness import aten, calls, check_golden, every_backend, rewrite
from tests.support.models import Case, FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

pytestmark = pytest.mark.usefixtures("shared_captures")
MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)}


def dtypes_of(program: Program, *targets: object) -> set[torch.dtype]:
    return {nodes.tensor_type(node).dtype for node in program.nodes(*targets)}


def first_output(result: object) -> torch.Tensor:
    values = result.values() if isinstance(result, dict) else result
    return next(item for item in values if isinstance(item, torch.Tensor) and item.is_floating_point())


def test_rewrites() -> None:
    _, history = rewrite(Cast(), seeded(FeedForward), normal(2, 5, 8))
    check_golden("cast", history.diff(0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_products_run_in_bfloat16_and_answers_keep_their_dtype(name: str) -> None:
    case: Case = MODELS[name]()
    fast = captures.compile(case.model, case.inputs, passes="cast{dtype=bf16}")
    with torch.no_grad():
        wanted, found = first_output(case.model(*case.args, **case.kwargs)), first_output(fast(*case.args, **case.kwargs))
    step = next(step for step in fast.report.history.steps if step.spelling == "cast")
    assert found.dtype == wanted.dtype == torch.float32
    # Two layers, some ten roundings to 8 bits each.
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.999
    assert step.relative_error is not None and 0 < step.relative_error < 0.1
    assert step.size.parameter_bytes < 0.75 * fast.report.history.steps[0].size.parameter_bytes


def test_softmax_and_exponentials_stay_in_float32() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.layer(x), -1) + torch.exp(self.layer(x)) + self.layer(x).pow(2)

    program, _ = rewrite(Cast(), seeded(Mixed), normal(2, 5, 8))
    assert dtypes_of(program, aten.linear.default) == {torch.bfloat16}
    assert dtypes_of(program, aten.softmax.int, aten.exp.default, aten.pow.Tensor_Scalar) == {torch.float32}


def test_positions_are_not_rounded() -> None:
    """bfloat16 has no odd numbers past 256, so angles and masks must be computed before they are cast."""
    case = tiny_llama()
    program = captures.optimize(case.model, case.inputs, passes="cast").program
    assert dtypes_of(program, aten.cos.default, aten.sin.default) <= {torch.float32}


def test_a_value_is_cast_once_for_all_its_readers() -> None:
    program, _ = rewrite(Cast(), seeded(lambda: Twice()), normal(2, 5, 8))
    assert calls(program, aten.to.dtype) == 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) * self.b(x)


def test_the_model_keeps_its_weights() -> None:
    module = seeded(FeedForward)
    before = {name: (weight.data_ptr(), weight.dtype) for name, weight in module.named_parameters()}
    captures.compile(module, normal(2, 5, 8), passes="cast")
    assert before == {name: (weight.data_ptr(), weight.dtype) for name, weight in module.named_parameters()}


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(LissomError, match=r"cast\{dtype=int3\} is not known; choose bf16"):
        Cast(dtype="int3")


@dataclass(frozen=True)
class CastAll(Approximation):
    """Casts to float16 whatever may overflow it."""

    def run(self, edit: Editor) -> None:
        Caster(edit, torch.float16).run()


def halved(module: nn.Module, *inputs: torch.Tensor, options: str = "") -> tuple[Program, Step]:
    """The program in float16, calibrated on its own inputs, and what cast said."""
    optimized = captures.optimize(module, inputs, passes=f"cast{{dtype=fp16{options}}}", data=[inputs])
    return optimized.program, optimized.report.history.steps[-1]


def relative(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted - found).detach().abs().max() / wanted.detach().abs().max())


def linears(program: Program) -> list[torch.dtype]:
    return [nodes.tensor_type(node).dtype for node in program.nodes(aten.linear.default)]


def test_float16_needs_calibration_data() -> None:
    wanted = r"cast\{dtype=fp16\} needs calibration data to find what overflows: pass data=, or choose dtype=bf16"
    with pytest.raises(RequirementError, match=wanted):
        captures.optimize(seeded(FeedForward), normal(2, 5, 8), passes="cast{dtype=fp16}")


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_cast_where_everything_fits(name: str) -> None:
    case: Case = MODELS[name]()
    optimized = captures.optimize(case.model, case.inputs, passes="cast{dtype=fp16}", data=[case.inputs])
    step = optimized.report.history.steps[-1]
    assert dtypes_of(optimized.program, aten.linear.default, aten.addmm.default) == {torch.float16}
    assert step.notes[0].startswith("all ")
    assert step.notes[0].endswith(" values fit float16, with none over 65504/4")
    # Two layers, some ten roundings to 11 bits each.
    assert step.relative_error is not None and 0 < step.relative_error < 5e-3


def padded(case: Case) -> dict[str, object]:
    """The inputs of a case with padding behind the second sequence."""
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {**case.kwargs, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "weight"), [pytest.param("tiny_t5", "wo.weight", marks=pytest.mark.slow), ("tiny_llama", "down_proj.weight")]
)
def test_a_residual_stream_that_overflows_stays_in_float32(name: str, weight: str) -> None:
    case: Case = MODELS[name]()
    inputs = padded(case)
    with torch.no_grad():
        for path, tensor in case.model.named_parameters():
            if path.endswith(weight):
                tensor.mul_(1e6)
        wanted = first_output(case.model(**inputs))
    careful = captures.optimize(case.model, inputs, passes="cast{dtype=fp16}", data=[inputs])
    careless = captures.optimize(case.model, inputs, passes=[CastAll()])
    found = first_output(careful.program(**inputs))
    assert not first_output(careless.program(**inputs)).isfinite().all()
    assert found.isfinite().all()
    # Some ten roundings to 11 bits in each of two layers.
    assert relative(wanted, found) < 1e-2
    step = careful.report.history.steps[-1]
    assert " values in float32: of values and weights " in step.notes[0]
    assert " may overflow, the largest being " in step.notes[0]
    assert linears(careful.program).count(torch.float16) > 8
    assert {skip.reason for skip in step.skipped} == {"an input or output may overflow float16"}


@pytest.mark.slow
def test_the_note_names_the_residual_stream() -> None:
    case = tiny_t5()
    with torch.no_grad():
        for block in case.model.encoder.block:  # pyright: ignore
            block.layer[1].DenseReluDense.wo.weight.mul_(1e6)
    optimized = captures.optimize(case.model, case.inputs, passes="cast{dtype=fp16}", data=[case.inputs])
    assert "the largest being the residual stream in encoder.block.1" in optimized.report.history.steps[-1].notes[0]


class Scaled(nn.Module):
    """A layer whose result is scaled before the next one reads it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.layer_norm(self.first(x) * self.scale, (8,), eps=1e-20))


@pytest.mark.parametrize(("margin", "kept"), [(1, 0), (2, 0), (4, 2), (100, 2)])
def test_the_margin_is_kept(margin: int, kept: int) -> None:
    module, x = seeded(lambda: Scaled(1.0)), normal(2, 5, 8)
    module.scale = 30000 / float(module.first(x).detach().abs().max())  # pyright: ignore
    program, step = halved(module, x, options=f",margin={margin}")
    assert linears(program) == [torch.float16] * 2
    assert len(step.skipped) == kept
    assert dtypes_of(program, aten.layer_norm.default) == {torch.float32 if kept else torch.float16}
    assert relative(module(x), program(x)) < 5e-3  # pyright: ignore


def test_weights_have_no_margin() -> None:
    module = seeded(lambda: nn.Linear(8, 8))
    with torch.no_grad():
        module.weight[0, 0] = 60000
    x = normal(2, 8) * 0.01
    assert linears(halved(module, x)[0]) == [torch.float16]
    with torch.no_grad():
        module.weight[0, 0] = 66000
    program, step = halved(module, x)
    assert linears(program) == [torch.float32]
    assert step.notes == (
        "kept 1 of 1 values in float32: of values and weights 1 may overflow, the largest being 'weight', 6.6e+04 over 65504; "
        "the rest follows",
    )


def test_what_vanishes_stays_in_float32() -> None:
    module = seeded(lambda: Scaled(1e-7))
    x = normal(2, 5, 8)
    program, step = halved(module, x)
    assert dtypes_of(program, aten.layer_norm.default) == {torch.float32}
    assert {skip.reason for skip in step.skipped} == {"an input or output would lose much to underflow in float16"}
    assert "of values and weights 1 would lose much to underflow" in step.notes[0]
    assert relative(module(x), program(x)) < 5e-3  # pyright: ignore
    assert dtypes_of(halved(module, x, options=",underflow=1")[0], aten.layer_norm.default) == {torch.float16}


def test_a_small_bias_may_vanish() -> None:
    module = seeded(lambda: nn.Linear(8, 8))
    with torch.no_grad():
        module.bias.mul_(1e-6)
    assert linears(halved(module, normal(2, 8))[0]) == [torch.float16]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_named_modules_stay_in_float32(dtype: str) -> None:
    module, x = seeded(FeedForward), normal(2, 5, 8)
    optimized = captures.optimize(module, x, passes=f'cast{{dtype={dtype},skip="up"}}', data=[x])
    assert torch.float32 in linears(optimized.program)
    assert set(linears(optimized.program)) != {torch.float32}
    assert [skip.reason for skip in optimized.report.history.steps[-1].skipped] == ["skip= names it"]


def test_scores_that_may_overflow_stay_in_float32() -> None:
    class Capped(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            scores = 50 * torch.tanh(q @ k.transpose(-1, -2) * 0.25 / 50)
            return torch.softmax(scores, -1) @ k

    q, k = normal(1, 2, 5, 16), normal(1, 2, 5, 16, seed=1)
    assert dtypes_of(halved(Capped(), q, k)[0], attention) == {torch.float16}
    program, _ = halved(Capped(), q * 200, k * 200)
    assert dtypes_of(program, attention) == {torch.float32}
    assert relative(Capped()(q * 200, k * 200), program(q * 200, k * 200)) < 5e-3  # pyright: ignore


HALF_KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer_norm": lambda x: functional.layer_norm(x, (64,)),
    "rms_norm": lambda x: functional.rms_norm(x, (64,), None, 1e-6),
    "group_norm": lambda x: functional.group_norm(x.transpose(1, 2), 8),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "attention with a mask": lambda x: functional.scaled_dot_product_attention(
        x, x, x, torch.full((5, 5), -32752.0, dtype=x.dtype).triu(1)
    ),
    "masked attention of four dimensions": lambda x: functional.scaled_dot_product_attention(
        x[None], x[None], x[None], torch.full((5, 5), -32752.0, dtype=x.dtype).triu(1)
    ),
}


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("name", HALF_KERNELS)
def test_kernels_sum_float16_in_float32(name: str, size: float) -> None:
    """Squares overflow float16 from 256 on, and sums of them before: a kernel that sums in float16 would show."""
    function = HALF_KERNELS[name]
    x = (normal(2, 5, 64) * size).half()
    x[0, 0, :4] *= 3
    wanted, found = function(x.float()), function(x).float()
    # The rounding of the result, and of probabilities between attention's two products.
    assert float((wanted - found).abs().max()) <= 4e-3 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "product",
    [
        functional.linear,
        lambda x, w: x @ w.T,
        lambda x, w: torch.bmm(x[None], w.T[None]),
        lambda x, w: torch.addmm(torch.zeros(1, dtype=x.dtype), x, w.T),
        lambda x, w: torch.baddbmm(torch.zeros(1, 1, 1, dtype=x.dtype), x[None], w.T[None]),
        lambda x, w: functional.conv1d(x[..., None], w[..., None]),
    ],
)
@pytest.mark.parametrize("rows", [1, 7])
def test_products_sum_float16_in_float32(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: int) -> None:
    """The first half of each sum reaches 2·10⁷, and the second takes it back."""
    x, weight = torch.full((rows, 4096), 100.0).half(), torch.full((3, 4096), 100.0).half()
    weight[:, 2048:] = -100
    assert torch.equal(product(x, weight).flatten(), torch.zeros(3 * rows).half())


def test_pack_linear_says_that_float16_is_slow() -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this processor has float16 arithmetic")
    x = normal(2, 5, 8)
    fast = captures.compile(seeded(FeedForward), x, passes="cast{dtype=fp16}", data=[x])
    step = next(step for step in fast.report.history.steps if step.spelling == "pack-linear")
    assert {skip.reason for skip in step.skipped} == {
        "this processor has no float16 arithmetic, and multiplies slower in it than in float32: take cast{dtype=bf16}"
    }


@pytest.mark.parametrize("backend", [Eager(), OnnxRuntime(timing_seconds=0)], ids=lambda backend: backend.name)
def test_an_artifact_in_float16_is_loaded_as_it_was(backend: Backend, tmp_path: Path) -> None:
    case = tiny_bert()
    inputs = padded(case)
    passes = "cast{dtype=fp16},sink-casts,fold-casts"
    fast = captures.compile(case.model, inputs, passes=passes, backend=backend, data=[inputs])
    fast.save(tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved")
    with torch.no_grad():
        wanted = first_output(case.model(**inputs))
        found, again = first_output(fast(**inputs)), first_output(loaded(**inputs))
    assert torch.equal(found, again)
    assert relative(wanted, found) < 5e-3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"margin": 0.5}, "cast takes margin= of 1 or more, not 0.5"),
        ({"underflow": 1.5}, "cast takes underflow= of 0 to 1, not 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(LissomError, match=text):
        Cast(**options)  # pyright: ignore


@every_backend
def test_composes(backend: Backend) -> None:
    case = tiny_t5()
    inputs = padded(case)
    with torch.no_grad():
        for block in case.model.encoder.block:  # pyright: ignore
            block.layer[1].DenseReluDense.wo.weight.mul_(1e6)
        wanted = first_output(case.model(**inputs))
        fast = captures.compile(case.model, inputs, passes="cast{dtype=fp16}", backend=backend, data=[inputs])
        found = first_output(fast(**inputs))
    # Some ten roundings to 11 bits in each of two layers; the stream is in float32.
    assert relative(wanted, found) < 1e-2


def test_cache_takes_the_dtype_written_to_it() -> None:
    compiled = lissom.compile_generation(tiny_decoder("llama"), max_length=MAX_LENGTH, passes="cast{dtype=bf16}", goal=None)
    program = compiled.program
    assert {program.weight(name).dtype for name in program.state} == {torch.bfloat16}
    assert len(program.state) == 4
    # What is read of it is read as it lies.
    assert not any(MAX_LENGTH in nodes.tensor_type(node).shape for node in program.nodes(aten.to.dtype))
    assert compiled.step(torch.tensor([[3, 4, 5]])).shape == (1, VOCABULARY)


def test_cache_that_is_read_beside_stays_as_it_is() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("kept", torch.zeros(2, 4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.kept.sum()
            self.kept.index_copy_(1, torch.tensor([1]), self.linear(x))
            return self.kept * before

    program = captures.optimize(seeded(Reads), normal(2, 1, 8), passes="cast{dtype=bf16}", dynamic=False).program
    assert program.weight("kept").dtype == torch.float32
