"""What is found out about one model: each phase timed, and the first thing that goes wrong told in one sentence.

Seconds are processor seconds: on a machine that does other work beside, they are what the phase takes on a core of its own.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
import torch
from torch.utils import _pytree as pytree

import lissom
from lissom.compiler.errors import InputError
from lissom.compiler.history import History
from lissom.compiler.linears import is_attention
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample, resize
from lissom.compiler.signature import Signature
from lissom.compiler.structure import structure
from lissom.compiler.verify import relative_error, tolerance_of
from lissom.frontends.export import Capture, capture
from tests.compiler.flop_counter import miscounted
from tests.models import Case
from tests.zoo.entry import Entry

Report = Callable[[dict[str, Any]], None]

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


class _Stopped(Exception):
    """A phase failed, so that the later ones have nothing to work on."""


def check(entry: Entry, report: Report, backend: str = "eager") -> None:
    """Build the model, capture it, compile it for a backend, and compare both with it at several sizes.

    report: called with the facts found so far, after every phase, so that a run that is cut short has told what it knew.
    """
    record: dict[str, Any] = {"seconds": {}, "failed": None, "error": None}

    @contextmanager
    def phase(name: str) -> Generator[None]:
        record["phase"] = name
        report(record)
        started = time.process_time()
        try:
            yield
        except Exception as error:
            record["failed"], record["error"], record["place"] = name, _sentence(error), _place(error)
            raise _Stopped from error
        finally:
            record["seconds"][name] = round(time.process_time() - started, 3)

    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _phases(entry, record, phase, backend)
    except _Stopped:
        pass
    record["phase"] = None
    report(record)


def _phases(entry: Entry, record: dict[str, Any], phase: Callable[[str], Any], backend: str) -> None:
    with phase("expect"):
        record["expected"] = asdict(entry.expect())
    with phase("build"):
        case = entry.build()
        record["parameters"] = sum(parameter.numel() for parameter in case.model.parameters())
    with phase("eager"):
        once, twice = _leaves(case, case.args, case.kwargs), _leaves(case, case.args, case.kwargs)
        record["random"] = _error(once, twice) > 0
        record["finite"] = all(bool(torch.isfinite(leaf).all()) for leaf in once if isinstance(leaf, torch.Tensor))
    with phase("capture"):
        captured = capture(case.model, case.args, case.kwargs)
        record["captured"], record["nodes"] = True, len(captured.program.nodes())
        signature = captured.program.signature
        record["dynamic"] = sorted(found.name for found in signature.dimensions.values())
        record["notes"] = list(captured.notes[1:])
    with phase("agree"):
        samples = [captured.example, *_other_samples(case, signature, captured.example)]
        record["shapes"] = len(samples)
        wanted = [_leaves(case, *signature.arguments(sample)) for sample in samples]
        record["capture_error"] = max(map(_error, wanted, (captured.program.run(sample) for sample in samples)))
        record["allowed"] = tolerance_of(captured.program)
        record["agrees"] = record["capture_error"] <= record["allowed"]
    with phase("compile"):
        with _known(captured):
            compiled = lissom.compile(case.model, case.inputs, backend=backend, checks="numeric", progress=lambda *_: None)
            # Before a backend lowers it, the program has the operators the recipe raises.
            program = lissom.optimize(case.model, case.inputs, checks="off", progress=lambda *_: None).program
        record |= _facts(program, compiled.report.history)
    with phase("equal"):
        found = [_flat(compiled(*args, **kwargs)) for args, kwargs in map(signature.arguments, samples)]
        record["compiled_error"] = max(map(_error, wanted, found))
        record["equal"] = record["compiled_error"] <= record["allowed"]
    with phase("sites"):
        record["sites"] = _sites(program)
    with phase("cost"):
        record["miscounted"] = miscounted(captured.program, captured.example)


@contextmanager
def _known(captured: Capture) -> Generator[None]:
    """Let compile use a capture already made: it takes most of the time, and would come out the same."""
    with mock.patch("lissom.api.capture", lambda *_, **__: captured):
        yield


def _facts(program: Program, history: History) -> dict[str, Any]:
    """What the exact recipe left of the program."""
    raising = [step for step in history.steps if step.spelling.startswith("raise-attention")]
    skipped = Counter(skip.reason for step in raising for skip in step.skipped)
    return {
        "nodes_after": len(program.nodes()),
        "softmax": len(program.nodes(*_SOFTMAX)),
        "attention": sum(map(is_attention, program.nodes())),
        "raised": sum(step.rewritten for step in raising),
        "skipped": dict(skipped),
        "pass_seconds": round(sum(step.seconds + step.check_seconds for step in history.steps[1:]), 3),
    }


def _sites(program: Program) -> dict[str, Any]:
    """The attention and feed-forward sites the analysis `structure` finds."""
    found = program.fact(structure)
    return {
        "attention": len(found.attention),
        "heads": sorted({site.heads for site in found.attention}),
        "kv_heads": sorted({site.key_value_heads for site in found.attention}),
        "head_dim": sorted({site.head_dim for site in found.attention}),
        "feed_forward": len(found.feed_forward),
    }


def _other_samples(case: Case, signature: Signature, example: Sample) -> list[Sample]:
    """The example at up to three other sizes the signature allows and the model runs on: larger, twice as large, smallest."""
    sizes = signature.sizes_of(example)
    wanted = (
        {symbol: size + 1 + index for index, (symbol, size) in enumerate(sizes.items())},
        {symbol: size * 2 for symbol, size in sizes.items()},
        {symbol: max(signature.dimensions[symbol].minimum, size // 2) for symbol, size in sizes.items()},
        {symbol: size * 3 for symbol, size in sizes.items()},
        {symbol: signature.dimensions[symbol].minimum for symbol in sizes},
    )
    allowed = (_allowed(case, signature, example, sizes | other) for other in wanted if sizes)
    return [sample for sample in allowed if sample is not None][:3]


def _allowed(case: Case, signature: Signature, example: Sample, sizes: Mapping[sympy.Symbol, int]) -> Sample | None:
    """The example at these sizes; some models want a token in every row, which a draw of positions may leave out."""
    for seed in range(8):
        sample = resize(signature, example, sizes, seed)
        try:
            signature.check_sizes(sample)
        except InputError:
            return None
        try:
            _leaves(case, *signature.arguments(sample))
        except (ValueError, RuntimeError):
            continue
        return sample
    return None


def _leaves(case: Case, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[object]:
    return _flat(case.model(*args, **kwargs))


def _flat(output: object) -> list[object]:
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(output)]


def _error(wanted: list[object], found: list[object]) -> float:
    if len(wanted) != len(found):
        return float("inf")
    return max(map(relative_error, wanted, found), default=0.0)


def _sentence(error: Exception) -> str:
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{name}: {lines[0][:400]}" if lines else name


def _place(error: BaseException) -> str:
    """The innermost line of Lissom on the way to the fault, or of anything when Lissom is not on it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/lissom/" in frame.filename] or list(frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
