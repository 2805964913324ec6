"""Canonical programs of small models, passes run on them, and what the passes report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.passes import PASSES, RECIPES
from tests.support.models import Case
from tools.zoo.removal import canonical


def programs_of(models: Mapping[str, Callable[[], Case]]) -> Callable[[str], tuple[Program, list[Sample]]]:
    """A function that gives the program of a model after the exact recipe, the caller's own, and inputs at two sizes."""

    @cache
    def made(name: str) -> tuple[Program, list[Sample]]:
        with torch.no_grad():
            return canonical(models[name]())

    def program_of(name: str) -> tuple[Program, list[Sample]]:
        program, samples = made(name)
        return program.copy(), samples

    return program_of


def run_passes(text: str, program: Program, samples: list[Sample]) -> tuple[Program, History]:
    """The program after these passes, each checked on the samples."""
    return Pipeline(parse_pipeline(text, PASSES, RECIPES), samples).run(program)


def notes(history: History) -> list[str]:
    return [note for step in history.steps for note in step.notes]


def reasons(history: History) -> list[str]:
    return [skip.reason for step in history.steps for skip in step.skipped]
