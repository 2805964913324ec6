"""Models and data that tests of passes with calibration data share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.passes import PASSES
from tests.support import captures
from tests.support.models import Case, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens

MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)}


def batches() -> list[dict[str, torch.Tensor]]:
    """Batches of token ids, padded at the end."""
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return [{"input_ids": tokens(seed=seed), "attention_mask": mask} for seed in range(3)]


def moments_of(rows: torch.Tensor) -> Moments:
    found = Moments.empty(rows.shape[1])
    found.add(rows)
    return found


@cache
def exact(build: Callable[[], Case]) -> Program:
    case = build()
    return captures.optimize(case.model, case.inputs).program


def passed(build: Callable[[], Case], passes: str) -> tuple[Program, History]:
    """The model after a pipeline text, which is given three batches as data."""
    program = exact(build)
    data = [program.signature.flatten((), batch) for batch in batches()]
    return Pipeline(parse_pipeline(passes, PASSES), samples=data[:1], data=data).run(program)
