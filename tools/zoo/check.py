"""The check of one model: each phase is timed, and the first failure is reported in one sentence.

Seconds are processor seconds, so that other work on the machine does not count.
"""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
import torch
from torch.utils import _pytree as pytree

import lissom
from lissom.backends.base import Backend
from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, other_sizes
from lissom.compiler.ir.signature import Signature
from lissom.compiler.pipeline.history import History
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.frontends.capture.export import Capture, capture
from lissom.runtime.compiled_model import CompiledModel
from tests.support.flop_counter import miscounted
from tests.support.models import Case
from tools.zoo.entry import Entry
from tools.zoo.fresh import answers, outline

EAGER, RUNTIME = "eager", "onnxruntime"
# The check compares the outputs of a variant, not its speed.
BACKENDS: Mapping[str, Backend | str] = {EAGER: EAGER, RUNTIME: lissom.OnnxRuntime(timing_seconds=0.0)}
Report = Callable[[dict[str, Any]], None]

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


class _PhaseError(Exception):
    """A phase failed, so later phases cannot run."""


def check(entry: Entry, report: Report, backends: Sequence[str] = (EAGER,), loader: str | None = None) -> None:
    """Build the model, capture it, compile it for each backend, and compare all with it at several sizes.

    report: called with the record after every phase, so that an interrupted run keeps what it has.
    loader: the address of `fresh.loader`; compiled models are saved, and loaded there in a fresh process.
    """
    record: dict[str, Any] = {"seconds": {}, "failed": None, "error": None, "backends": {}}

    @contextmanager
    def phase(name: str, place: dict[str, Any] = record) -> Generator[None]:
        record["phase"] = name
        report(record)
        started = time.process_time()
        try:
            yield
        except Exception as error:
            place["failed"], place["error"], place["place"] = name, sentence(error), _place(error)
            raise _PhaseError from error
        finally:
            record["seconds"][name] = round(record["seconds"].get(name, 0.0) + time.process_time() - started, 3)

    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _phases(entry, record, phase, backends, loader)
    except _PhaseError:
        pass
    record["phase"] = None
    report(record)


def _phases(
    entry: Entry, record: dict[str, Any], phase: Callable[..., Any], backends: Sequence[str], loader: str | None
) -> None:
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
        record["dynamic"] = sorted(dimension.name for dimension in signature.dimensions.values())
        record["notes"] = list(captured.notes[1:])
    with phase("agree"):
        samples = [captured.example, *other_samples(case, signature, captured.example)]
        record["shapes"] = len(samples)
        wanted = [answer(case, *signature.arguments(sample)) for sample in samples]
        outputs = (captured.program.run(sample) for sample in samples)
        record["capture_error"] = max(_error(leaves, other) for (_, leaves), other in zip(wanted, outputs, strict=True))
        record["allowed"] = tolerance_of(captured.program)
        record["agrees"] = record["capture_error"] <= record["allowed"]
    for name in backends:
        place = record["backends"][name] = {}
        try:
            _through(name, case, captured, samples, wanted, loader, place, lambda what, place=place: phase(what, place))
        except _PhaseError:
            continue
    with phase("optimize"), _known(captured):
        # Before a backend lowers it, the program has the operators that the recipe raises.
        optimized = lissom.optimize(case.model, case.inputs, checks="off", progress=lambda *_: None)
        record |= _facts(optimized.program, optimized.report.history)
    with phase("sites"):
        record["sites"] = _sites(optimized.program)
    with phase("cost"):
        record["miscounted"] = miscounted(captured.program, captured.example)


def _through(
    name: str,
    case: Case,
    captured: Capture,
    samples: Sequence[Sample],
    wanted: Sequence[tuple[str, list[object]]],
    loader: str | None,
    results: dict[str, Any],
    phase: Callable[[str], Any],
) -> None:
    """Compile for one backend and compare; save, load in a fresh process, and compare again. Results go into `results`."""
    signature, allowed = captured.program.signature, tolerance_of(captured.program)
    # The passes are checked once; the executables of other backends are compared as a whole.
    checks = "numeric" if name == EAGER else "off"
    with phase("compile"), _known(captured):
        compiled = lissom.compile(case.model, case.inputs, backend=BACKENDS[name], checks=checks, progress=lambda *_: None)
    with phase("equal"):
        here = [_structure_and_leaves(compiled(*args, **kwargs)) for args, kwargs in map(signature.arguments, samples)]
        results["error_found"], results["structure"] = compared(wanted, here)
        results["equal"] = results["error_found"] <= allowed and results["structure"]
    if loader is None:
        return
    with phase("reload"):
        there = _reloaded(compiled, samples, loader)
        results["reload_error"], same = compared(wanted, there)
        results["reloaded"] = results["reload_error"] <= allowed and same


def _reloaded(compiled: CompiledModel, samples: Sequence[Sample], loader: str) -> list[tuple[str, list[object]]]:
    with tempfile.TemporaryDirectory(prefix="lissom-") as folder:
        artifact = Path(folder) / "artifact"
        compiled.save(artifact)
        return answers(loader, artifact, samples)


def compared(wanted: Sequence[tuple[str, list[object]]], actual: Sequence[tuple[str, list[object]]]) -> tuple[float, bool]:
    """The largest relative error, and whether the structures are the same."""
    error = max(_error(leaves, others) for (_, leaves), (_, others) in zip(wanted, actual, strict=True))
    return error, [structure for structure, _ in wanted] == [structure for structure, _ in actual]


@contextmanager
def _known(captured: Capture) -> Generator[None]:
    """Let `compile` use an existing capture, which saves most of the time."""
    with mock.patch("lissom.driver.compile.capture", lambda *_, **__: captured):
        yield


def _facts(program: Program, history: History) -> dict[str, Any]:
    """The program after the exact recipe."""
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
    """The attention and feed-forward sites that the analysis `structure` finds."""
    sites = program.fact(structure)
    return {
        "attention": len(sites.attention),
        "heads": sorted({site.heads for site in sites.attention}),
        "kv_heads": sorted({site.key_value_heads for site in sites.attention}),
        "head_dim": sorted({site.head_dim for site in sites.attention}),
        "feed_forward": len(sites.feed_forward),
    }


def other_samples(case: Case, signature: Signature, example: Sample) -> list[Sample]:
    """The example at up to three other sizes that the signature and the model allow: larger, twice as large, smallest."""
    sizes = signature.sizes_of(example)
    wanted = (
        *other_sizes(signature, example),
        {symbol: size * 3 for symbol, size in sizes.items()},
        {symbol: signature.dimensions[symbol].minimum for symbol in sizes},
    )
    allowed = (_allowed(case, signature, example, other) for other in wanted if sizes)
    return [sample for sample in allowed if sample is not None][:3]


def _allowed(case: Case, signature: Signature, example: Sample, sizes: Mapping[sympy.Symbol, int]) -> Sample | None:
    """The example at these sizes; some models need a certain token in every row, which random positions may miss."""
    for seed in range(8):
        sample = signature.sample_at(example, sizes, seed)
        if sample is None:
            return None
        try:
            _leaves(case, *signature.arguments(sample))
        except (ValueError, RuntimeError):
            continue
        return sample
    return None


def _leaves(case: Case, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[object]:
    return answer(case, args, kwargs)[1]


def answer(case: Case, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[str, list[object]]:
    """The structure of the model's outputs, and their leaves."""
    return _structure_and_leaves(case.model(*args, **kwargs))


def _structure_and_leaves(output: object) -> tuple[str, list[object]]:
    """The structure of a result, and its leaves."""
    leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(output)]
    return outline(output), leaves


def _error(wanted: list[object], actual: list[object]) -> float:
    if len(wanted) != len(actual):
        return float("inf")
    return max(map(relative_error, wanted, actual), default=0.0)


def sentence(error: Exception, *, last: bool = False) -> str:
    """An error in one line; last: the error that Dynamo wraps."""
    error = getattr(error, "inner_exception", error) if last else error
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{name}: {lines[0][:400]}" if lines else name


def _place(error: BaseException) -> str:
    """The innermost line of Lissom in the traceback, or the innermost line of all if Lissom is not in it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/lissom/" in frame.filename] or list(frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""


def describe(record: dict[str, Any]) -> str:
    """One line: the model, its time, and its result."""
    if record.get("failed"):
        outcome = f"{record['failed']}: {record['error']}"
    elif not record["agrees"]:
        outcome = f"the program differs by {record['capture_error']:.2g}"
    else:
        told = ", ".join(f"{name} {_outcome(result)}" for name, result in record["backends"].items())
        outcome = f"{told}, {record['softmax']} softmax left of {record['attention'] + record['softmax']}"
    return f"{record['name']} ({record['total_seconds']:.1f} s): {outcome}"


def _outcome(result: dict[str, Any]) -> str:
    if result.get("failed"):
        return f"{result['failed']}: {result['error']}"
    if not result["equal"]:
        return f"differs by {result['error_found']:.2g}" if result["structure"] else "has another structure"
    if not result.get("reloaded", True):
        return f"differs by {result['reload_error']:.2g} when loaded again"
    return "equal"
