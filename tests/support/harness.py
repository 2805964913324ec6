"""What tests of passes share: capture a module, run passes under the pipeline's own checks, compare text with a golden file.

A test of a small graph needs no model: `text_cases` gives the cases of a file in tests/golden/cases, each a program before and
after its passes, as `mlir-opt` tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from lissom.artifacts.program_text import parse_program
from lissom.backends import FASTEST, find_backends
from lissom.backends.base import Backend
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.cli.bench.saved import make_inputs
from lissom.compiler.ir.fake import symbol_facts
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.pipeline.history import History, Step
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.frontends.capture.export import Capture
from lissom.passes import PASSES, RECIPES
from tests.support.captures import capture_once

aten = torch.ops.aten

GOLDEN = Path(__file__).parent.parent / "golden"


def _needs_packages(backend: Backend) -> pytest.MarkDecorator:
    """Skips OpenVINO where it is not installed."""
    missing = backend.missing() if backend.name == "openvino" else None
    return pytest.mark.skipif(missing is not None, reason=str(missing))


def _every_backend(*quick: str) -> pytest.MarkDecorator:
    """Every backend as a parameter of a test; those that are not quick are marked slow."""
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(
                OnnxRuntime(timing_seconds=0) if item.name == "onnxruntime" else item,
                id=item.name,
                marks=() if item.name in quick else (pytest.mark.slow, _needs_packages(item)),
            )
            for item in find_backends(FASTEST)
        ],
    )


# Inductor takes some twenty seconds a graph. ONNX Runtime's variants are all built and checked, and timed in five runs each.
every_backend = _every_backend("eager", "onnxruntime")
every_backend_but_eager_slow = _every_backend("eager")
every_backend_but_onnxruntime_slow = _every_backend("onnxruntime")


def simulates(backend: Backend) -> bool:
    """Whether the backend has no kernels for quantized layers, and computes them in floating point where `simulate=True`."""
    return backend.name in ("inductor", "openvino")


# Set by `pytest tests/passes --update-goldens`.
update_goldens = False


class Calls(nn.Module):
    """A model whose forward is one function; tensors given by name become buffers, parameters stay parameters.

    function: called with the module's inputs, and with the module itself as `self` when it has weights.
    """

    def __init__(self, function: Callable[..., object], **weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            if isinstance(weight, nn.Parameter):
                self.register_parameter(name, weight)
            else:
                self.register_buffer(name, weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, z: torch.Tensor | None = None) -> object:
        inputs = [item for item in (x, y, z) if item is not None]
        weights = [*self.parameters(), *self.buffers()]
        return self.function(self, *inputs) if weights else self.function(*inputs)


def step_of(history: History, name: str) -> Step:
    """The last step of a pass."""
    return next(step for step in reversed(history.steps) if step.spelling.partition("{")[0] == name)


def capture_model(module: nn.Module, *args: object, dynamic: bool = True, **kwargs: object) -> Capture:
    """The module captured with these arguments, batch and sequence free unless `dynamic` is False; equal ones only once."""
    return capture_once(module.eval(), args, kwargs, dynamic=dynamic)


def apply(passes: Pass | str, program: Program, example: Sample) -> tuple[Program, History]:
    """The program after a pass, or after a pipeline text, checked numerically at two sizes, and what each pass did."""
    chosen: Sequence[Pass] = parse_pipeline(passes, PASSES, RECIPES) if isinstance(passes, str) else [passes]
    return Pipeline(chosen, samples=check_samples(program.signature, example)).run(program)


def rewrite(passes: Pass | str, module: nn.Module, *args: object, dynamic: bool = True) -> tuple[Program, History]:
    """The module captured, and the passes applied."""
    captured = capture_model(module, *args, dynamic=dynamic)
    return apply(passes, captured.program, captured.example)


def calls(program: Program, *targets: object) -> int:
    """How many nodes call one of these operators."""
    return len(program.nodes(*targets))


def check_golden(name: str, text: str) -> None:
    """Compare a text with tests/golden/NAME.txt, or write it there when goldens are updated."""
    path = GOLDEN / f"{name}.txt"
    if update_goldens:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; if that is right, run with --update-goldens"


@dataclass
class TextCase:
    """A block of a file in tests/golden/cases: a title, a pipeline, a program, and what the pipeline gives.

    // title
    // run: pipeline
    program ...
    // gives: summary of the last pass          or `// gives the same: summary`
    program ...
    // skipped NODE: reason                     for each place that the last pass skipped
    """

    file: Path
    title: str
    pipeline: str
    before: str
    given: str

    def check(self) -> None:
        """Parse the program, run the passes with random weights and inputs at two sizes, and compare the text."""
        program = parse_program(self.before)
        assert program.text() == self.before, "write the program as the printer does"
        facts = symbol_facts(program.fake_mode, program.signature.dimensions)
        example = make_inputs(program, {symbol: fact.hint or 1 for symbol, fact in facts.items()})
        after, history = apply(self.pipeline, program, example)
        found, step = after.text(), history.steps[-1]
        given = f"// gives the same: {step.summary}\n" if found == self.before else f"// gives: {step.summary}\n{found}"
        given += "".join(f"// skipped {skip.node}: {skip.reason}\n" for skip in step.skipped)
        if update_goldens:
            self._write(given)
        else:
            told = f"'{self.title}' in {self.file.name} differs; if that is right, run with --update-goldens"
            assert given == self.given, told

    def _write(self, given: str) -> None:
        block = f"// {self.title}\n// run: {self.pipeline}\n{self.before}"
        text = self.file.read_text(encoding="utf-8")
        self.file.write_text(text.replace(block + self.given, block + given), encoding="utf-8")


def text_cases(name: str) -> pytest.MarkDecorator:
    """The cases of tests/golden/cases/NAME.txt as the parameter `text_case` of a test."""
    path = GOLDEN / "cases" / f"{name}.txt"
    blocks = [block.split("\n", 2) for block in path.read_text(encoding="utf-8").removeprefix("// ").split("\n\n// ")]
    cases = []
    for title, run, rest in blocks:
        before, mark, given = rest.partition("// gives")
        cases.append(TextCase(path, title, run.removeprefix("// run: "), before, (mark + given).rstrip("\n") + "\n"))
    return pytest.mark.parametrize("text_case", cases, ids=[case.title for case in cases])
