"""`python -m tools.zoo.sharding`: plan, shard and partition every model of the zoo, and run the ranks in lock-step.

Reports the sharded fraction of the weights of linear layers, and whether the outputs on 2 and on 4 ranks equal those of the
program before, on every rank, at the example's sizes and at others. Then the ranks run as processes over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.parallel.plan import sharded_fraction
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.divergence import relative_error, run_original, tolerance_of
from lissom.passes.parallel.partition import Partition
from lissom.passes.parallel.shard import Shard
from tools.zoo.coverage import put_section
from tools.zoo.entry import FAMILIES, Entry
from tools.zoo.removal import canonical

WORLD_SIZES = (2, 4)
"""The world sizes that are checked."""
WANTED = 0.9
"""The fraction of a model's linear weights that should be sharded."""
_SECTION = "## Sharding\n"
_INTRODUCTION = """\
The same models on 2 and on 4 ranks with `shard` and `partition`. `python -m tools.zoo.sharding` measures which fraction of the
weights of linear layers is sharded, and whether all ranks give the outputs of the program before: in lock-step in one process,
and as processes that communicate over gloo. Weights of convolutions are not counted.
"""
Record = dict[str, Any]


def check(entry: Entry, report: Callable[[Record], None]) -> None:
    """Build the model, and partition it for each world size. report: called with the record after every phase."""
    record: Record = {"phase": "capture", "failed": None, "error": None, "world_size": {}}
    report(record)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program, samples = canonical(entry.build())
            samples, _, _ = run_original(program, samples)
            for world_size in WORLD_SIZES:
                record["phase"] = str(world_size)
                report(record)
                record["world_size"][str(world_size)] = _partition(program, samples, world_size)
        except Exception as error:
            record |= {"failed": record["phase"], "error": f"{type(error).__name__}: {str(error)[:600]}"}
    report(record | {"phase": None})


def _partition(program: Program, samples: list[Sample], world_size: int) -> Record:
    # A plan changes no call, so it is not run; the pipeline compares the partitioned program with the outputs before.
    planned, plans = Pipeline((Shard(world_size),), checks="off").run(program)
    record: Record = {"share": sharded_fraction(planned)}
    after, history = Pipeline((Partition(),), samples=samples).run(planned)
    record["error_found"] = history.steps[-1].relative_error
    record["skipped"] = [f"{skip.place}: {skip.reason}" for step in (*plans.steps, *history.steps) for skip in step.skipped]
    if isinstance(after, PartitionedProgram):
        first, *others = after.run_ranks(samples[0])
        worst = max((relative_error(a, b) for rank in others for a, b in zip(first, rank, strict=True)), default=0.0)
        record["ranks_differ"] = worst
        record["share_of_bytes"] = after.parameter_bytes / program.parameter_bytes
        record["processes"] = _as_processes(after, samples)
    return record


def _as_processes(program: PartitionedProgram, samples: list[Sample]) -> Record:
    """The largest difference between a rank in lock-step and the same rank as a process, and its tolerance.

    Ranks are forks, so they need not import modules again; each writes its result to a file.
    """
    wanted = [program.run_ranks(sample) for sample in samples]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children: list[int] = []
        for rank in range(len(program.ranks)):
            child = os.fork()
            if child == 0:
                _be_rank(program, rank, samples, [outputs[rank] for outputs in wanted], folder)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        said = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*"))]
    problems = [told for told in said if isinstance(told, str)]
    if problems or len(said) < len(children):
        return {"problem": problems[0] if problems else "a rank died"}
    return {"error_found": max(said), "allowed": tolerance_of(program)}


def _be_rank(program: PartitionedProgram, rank: int, samples: list[Sample], wanted: list[Any], folder: Path) -> NoReturn:
    """Run as one rank of a group of processes, write the result, and exit."""
    try:
        torch.set_num_threads(1)
        world_size, store = len(program.ranks), f"file://{folder}/store"
        dist.init_process_group("gloo", store, timedelta(seconds=60), world_size, rank)
        own = program.of_rank(rank)
        outputs = [own.run(sample) for sample in samples]
        errors = [
            relative_error(a, b) for one, other in zip(wanted, outputs, strict=True) for a, b in zip(one, other, strict=True)
        ]
        said: float | str = max(errors, default=0.0)
        dist.barrier()
    except Exception as error:
        said = f"rank {rank}: {type(error).__name__}: {str(error)[:300]}"
    (folder / f"rank-{rank}").write_text(json.dumps(said), encoding="utf-8")
    os._exit(0)


def is_equal(record: Record) -> bool:
    """True if the model was partitioned for every world size, and all ranks are equal, as processes too."""
    return not record.get("failed") and all(
        result.get("ranks_differ", 0.0) == 0.0 and not _process_problem(result) for result in record["world_size"].values()
    )


def _process_problem(result: Record) -> str | None:
    processes = result.get("processes", {"error_found": 0.0, "allowed": 0.0})
    if "problem" in processes:
        return processes["problem"]
    error = processes["error_found"]
    return None if error <= processes["allowed"] else f"processes differ by {error:.2g} relative"


def share(record: Record) -> float:
    """The smallest sharded fraction of linear weights."""
    return min((result["share"] for result in record["world_size"].values()), default=0.0)


def headline(records: Sequence[Record]) -> str:
    """The sentence that counts the equal models, and those with most of their linear weights sharded."""
    run = [record for record in records if record.get("failed") != "capture"]
    equal, most = sum(map(is_equal, run)), sum(share(record) >= WANTED for record in run if is_equal(record))
    return (
        f"Of {len(run)} models {equal} are equal on {' and '.join(map(str, WORLD_SIZES))} ranks; {most} of them have at "
        f"least {WANTED:.0%} of their linear weights sharded."
    )


def section(records: Sequence[Record]) -> str:
    """The section of the coverage page: a row per family, then the models that fall short, with the reasons."""
    run = [record for record in records if record.get("failed") != "capture"]
    lines = [
        _SECTION,
        _INTRODUCTION,
        f"{headline(records)}\n",
        "| family | models | equal | most weights sharded |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        mine = [record for record in run if record["family"] == family]
        if mine:
            most = sum(share(record) >= WANTED for record in mine)
            lines.append(f"| {family} | {len(mine)} | {sum(map(is_equal, mine))} | {most} |")
    short = [record for record in run if not is_equal(record) or share(record) < WANTED]
    lines += ["", *(f"- {record['name']}: {_reason(record)}" for record in short)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _reason(record: Record) -> str:
    if record.get("failed"):
        return f"{record['failed']}: {record['error']}"
    problem = next(filter(None, map(_process_problem, record["world_size"].values())), None)
    if problem is not None:
        return problem
    skipped = [skip.partition(": ")[2] for result in record["world_size"].values() for skip in result["skipped"]]
    reasons = "; ".join(f"{reason} ({count})" for reason, count in Counter(skipped).most_common(3))
    return f"{share(record):.0%} sharded{'; ' if reasons else ''}{reasons}"


def describe(record: Record) -> str:
    """One line: the model and its result."""
    outcome = _reason(record) if not is_equal(record) or share(record) < WANTED else f"{share(record):.0%} sharded"
    return f"{record['name']} ({record['total_seconds']:.1f} s): {'' if is_equal(record) else 'NOT EQUAL, '}{outcome}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Shard the models that the arguments select; returns 1 if one fails or differs."""
    from tools.zoo import selection
    from tools.zoo.catalogue import entries

    parser = argparse.ArgumentParser(prog="python -m tools.zoo.sharding", description=__doc__)
    selection.add_arguments(parser, "sharding.json")
    options = parser.parse_args(arguments)
    records = selection.run_chosen(options, selection.choose(parser, options, entries()), check, describe)
    if (page := selection.page(options)) is not None:
        put_section(page, section(records))
    print(headline(records))
    return 1 if any(record.get("failed") not in (None, "capture") or not is_equal(record) for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
