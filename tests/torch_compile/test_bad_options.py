"""What is wrong with the mode and the options of `torch.compile(..., backend="lissom")` is said in one sentence."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn

import lissom
from lissom.errors import InputError, PipelineTextError, UnsupportedError
from lissom.inspect.report import Report
from lissom.passes.canonical.remove_no_ops import RemoveNoOps
from lissom.torch_compile import REPORTS, GraphReport, compile_graph
from tests.support.refusals import Refusal, check, table


def asked(mode: object = "default", **options: object) -> object:
    """What Dynamo asks of the backend, for a graph that is looked at once the options are known to be good."""
    return compile_graph(fx.symbolic_trace(nn.Identity()), [], mode=cast(str, mode), options=options)


def given(options: object) -> object:
    return compile_graph(fx.symbolic_trace(nn.Identity()), [], options=cast(Any, options))


OPTIONS: dict[str, Refusal] = {
    "mode unknown": (UnsupportedError, "has no mode 'max-autotun'; did you mean 'max-autotune'?", lambda: asked("max-autotun")),
    "mode of torch alone": (
        UnsupportedError,
        "has no mode 'max-autotune-no-cudagraphs'",
        lambda: asked("max-autotune-no-cudagraphs"),
    ),
    "mode none": (UnsupportedError, "has no mode None; choose default", lambda: asked(None)),
    "mode a list": (UnsupportedError, "has no mode ['default']", lambda: asked(["default"])),
    "options a list": (UnsupportedError, "options= is ['exact']; give a mapping", lambda: given(["exact"])),
    "options text": (UnsupportedError, "options= is 'exact'; give a mapping", lambda: given("exact")),
    "option unknown": (UnsupportedError, "has no option 'pases'; did you mean 'passes'?", lambda: asked(pases="exact")),
    "option of inductor": (UnsupportedError, "has no option 'triton.cudagraphs'", lambda: given({"triton.cudagraphs": True})),
    "option a number": (UnsupportedError, "has no option 1; it has passes", lambda: given({1: 2})),
    "passes unknown": (PipelineTextError, "did you mean 'quantize'?", lambda: asked(passes="quantise")),
    "passes a class": (UnsupportedError, "passes= is the class RemoveNoOps;", lambda: asked(passes=RemoveNoOps)),
    "backend unknown": (UnsupportedError, "did you mean 'eager'?", lambda: asked(backend="egaer")),
    "backend none": (UnsupportedError, "backend= is None;", lambda: asked(backend=None)),
    "checks unknown": (UnsupportedError, "checks='all' is not known", lambda: asked(checks="all")),
    "metric a number": (UnsupportedError, "metric= is 1;", lambda: asked(metric=1)),
    "drop text": (UnsupportedError, "max_drop= is '1';", lambda: asked(metric=lambda call: 1.0, max_drop="1")),
    "drop alone": (UnsupportedError, "max_drop needs a metric", lambda: asked(max_drop=0.1)),
    "data an iterator": (UnsupportedError, "data is an iterator, which can be read once", lambda: asked(data=iter([]))),
    "data a tensor": (InputError, "data= is a Tensor;", lambda: asked(data=torch.zeros(1))),
    "data a mapping": (InputError, "data= is a dict;", lambda: asked(data={})),
    "simulate text": (UnsupportedError, "simulate= is 'yes'; give True or False", lambda: asked(simulate="yes")),
    "goal size": (UnsupportedError, "goal='size' is not known; choose latency, memory, or None", lambda: asked(goal="size")),
}


@table(OPTIONS)
def test_options(refusal: Refusal) -> None:
    check(refusal)


def test_only_the_last_reports_are_kept() -> None:
    before = list(REPORTS)
    try:
        for index in range(300):
            REPORTS.append(GraphReport(f"Graph_{index}", cast(Report, None), "a test"))
        names = [found.name for found in lissom.dynamo_reports()]
        assert names == [f"Graph_{index}" for index in range(200, 300)]
    finally:
        REPORTS.clear()
        REPORTS.extend(before)
