"""`python -m tools.zoo.removal`: zero random heads and neurons of every model of the zoo, remove them, compare the outputs."""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from lissom.compiler.analysis.axes.columns import Columns, find_head_columns, find_neuron_columns
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.compiler.verify.divergence import compare, run_original, run_samples, tolerance_of
from lissom.compiler.verify.structure import verify_structure
from lissom.frontends.capture.export import capture
from lissom.passes import PASSES, RECIPES
from tests.support.models import Case
from tools.zoo.entry import Entry

REWRITES = "eliminate-dead"


def canonical(case: Case) -> tuple[Program, list[Sample]]:
    """The program of a model after the exact recipe, and inputs at two sizes, where it takes both."""
    with torch.no_grad():
        case.model(*case.args, **case.kwargs)  # some models complete themselves in their first call, and capture refuses that
    captured = capture(case.model, case.args, case.kwargs)
    samples, _, _ = run_original(captured.program, check_samples(captured.program.signature, captured.example))
    program, _ = Pipeline(parse_pipeline(RECIPES["exact"], PASSES), checks="off").run(captured.program)
    return program, samples


def read_columns(program: Program) -> tuple[dict[str, tuple[Columns, AttentionSite | None]], dict[str, str]]:
    """The sites whose units are recognised, by the name of their operator; and for the others, the reason why not."""
    recognised: dict[str, tuple[Columns, AttentionSite | None]] = {}
    refused: dict[str, str] = {}
    facts = program.fact(structure)
    sites = [(site.node, find_head_columns(program, site), site) for site in facts.attention]
    sites += [(site.down, find_neuron_columns(program, site), None) for site in facts.feed_forward]
    for node, columns, site in sites:
        if isinstance(columns, str):
            refused[node.name] = f"{place(program, node)}: {columns}"
        else:
            recognised[node.name] = columns, site
    return recognised, refused


def mask_randomly(program: Program, generator: random.Random) -> dict[str, list[int]]:
    """Zero the weight columns of random heads and neurons in this program; returns the dead units of each site."""
    edit = Editor(program, "mask")
    recognised, _ = read_columns(program)
    units: dict[str, set[int]] = {}
    for columns, site in recognised.values():
        weight = str(columns.weight.target)
        if weight not in units:
            units[weight] = _some_units(columns.count, site, generator)
            edit.set_weight(columns.weight, columns.zeroed(program.weight(weight), units[weight]))
            bias = columns.layer.args[2:3] if columns.layer.target is torch.ops.aten.linear.default else ()
            if len(units[weight]) == columns.count and bias and generator.random() < 0.5:
                edit.set_weight(bias[0], torch.zeros_like(program.weight(str(bias[0].target))))
    return {name: sorted(units[str(columns.weight.target)]) for name, (columns, _) in recognised.items()}


def _some_units(count: int, site: AttentionSite | None, generator: random.Random) -> set[int]:
    """None, some or all of the units; for grouped heads often whole groups, or equally many of each group."""
    if generator.random() < 0.12:
        return set(range(count))
    dead = set(generator.sample(range(count), generator.randrange(count)))
    if site is None or not 1 <= site.key_value_heads < count or count % site.key_value_heads:
        return dead
    within = count // site.key_value_heads
    if generator.random() < 0.4:
        dead |= set(range(within))
    if generator.random() < 0.6 and within > 1:
        dead |= {group * within + generator.randrange(within) for group in range(site.key_value_heads)}
    return dead


def expected_left(columns: Columns, site: AttentionSite | None, dead: Sequence[int]) -> int:
    """The number of dead heads that must stay because groups keep equal numbers."""
    groups = site.key_value_heads if site is not None else columns.count
    if groups < 1 or columns.count % groups or len(dead) == columns.count:
        return 0
    within = columns.count // groups
    counts = Counter(unit // within for unit in dead)
    living = [counts[group] for group in range(groups) if counts[group] < within]
    return sum(living) - min(living) * len(living)


def remove(entry: Entry, report: Callable[[dict[str, Any]], None], seed: int = 0) -> None:
    """Zero and remove units in one model. report: called with the record after every phase."""
    record: dict[str, Any] = {"failed": None, "error": None, "phase": "build"}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _remove(entry, record, report, seed)
    except Exception as error:
        record["failed"], record["error"] = record["phase"], f"{type(error).__name__}: {str(error)[:600]}"
    record["phase"] = None
    report(record)


def _remove(entry: Entry, record: dict[str, Any], report: Callable[[dict[str, Any]], None], seed: int) -> None:
    def phase(name: str) -> None:
        record["phase"] = name
        report(record)

    phase("capture")
    masked, samples = canonical(entry.build())
    phase("mask")
    recognised, refused = read_columns(masked)
    dead = mask_randomly(masked, random.Random(f"{entry.name} {seed}"))
    phase("remove")
    after, history = Pipeline(parse_pipeline(REWRITES, PASSES), checks="off").run(masked)
    verify_structure(after, masked)
    phase("compare")
    # Some models reject some sizes: a classifier looks for a token that only the example contains.
    samples, wanted, _ = run_original(masked, samples)
    error = compare(wanted, run_samples(after, samples)).relative_error
    phase("count")
    record |= {
        "error_found": error,
        "equal": error <= tolerance_of(masked),
        "sites": len(recognised) + len(refused),
        "refused": refused,
        "parameters": [masked.parameter_count, after.parameter_count],
        **_left(after, recognised, dead),
        "skipped": [f"{skip.place}: {skip.reason}" for skip in _skips(history)],
    }


def _skips(history: History) -> list[Any]:
    return [skip for step in history.steps for skip in step.skipped]


def _left(
    after: Program, recognised: dict[str, tuple[Columns, AttentionSite | None]], dead: dict[str, list[int]]
) -> dict[str, Any]:
    """Of the sites with dead units: the number treated fully, and what remains of the others beyond what must stay."""
    present, _ = read_columns(after)
    touched = [name for name, units in dead.items() if units]
    left: dict[str, int] = {}
    for name in touched:
        columns, site = recognised[name]
        expected = columns.count - len(dead[name]) + expected_left(columns, site, dead[name])
        if name in present and present[name][0].count > expected:
            left[name] = present[name][0].count - expected
    return {"masked": len(touched), "treated": len(touched) - len(left), "left": left}


def describe(record: dict[str, Any]) -> str:
    """One line: the model and its result."""
    start = f"{record['name']} ({record['total_seconds']:.1f} s): "
    if record.get("failed"):
        return f"{start}{record['failed']}: {record['error']}"
    before, now = record["parameters"]
    outcome = "equal" if record["equal"] else f"DIFFERS by {record['error_found']:.2g}"
    more = "".join(f"\n    {line}" for line in [*record["refused"].values(), *record["skipped"]])
    return f"{start}{outcome}, {record['treated']} of {record['masked']} masked of {record['sites']}, {before} -> {now}{more}"


def table(records: Sequence[dict[str, Any]]) -> str:
    """The results of all models: the number equal, the fraction of sites treated, and the reasons for the others."""
    done = [record for record in records if not record.get("failed")]
    lines = [
        f"{len(records)} models, {len(done)} captured and treated, {sum(record['equal'] for record in done)} equal",
        f"{sum(r['treated'] for r in done)} of {sum(r['masked'] for r in done)} masked sites treated; "
        f"{sum(len(r['refused']) for r in done)} of {sum(r['sites'] for r in done)} sites without units of their own",
    ]
    failed = Counter((record["failed"], record["error"][:100]) for record in records if record.get("failed"))
    lines += [f"  failed {count} x {phase}: {error}" for (phase, error), count in failed.most_common()]
    lines += [f"  DIFFERS {record['name']}" for record in done if not record["equal"]]
    lines += [f"  left {record['name']}: {record['left']}" for record in done if record["left"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Remove zeroed heads and neurons of the models that the arguments select; returns 1 if an output changes."""
    from tools.zoo import selection
    from tools.zoo.catalogue import entries

    parser = argparse.ArgumentParser(prog="python -m tools.zoo.removal", description=__doc__)
    selection.add_arguments(parser, "zoo-removal.json")
    options = parser.parse_args(arguments)
    check = partial(remove, seed=options.seed)
    records = selection.run_chosen(options, selection.choose(parser, options, entries()), check, describe)
    print(table(records))
    return 1 if any(not record.get("failed") and not record["equal"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
