"""Every criterion of prune-heads and prune-neurons at the same fraction kept, on all-MiniLM-L6-v2, without retraining.

    python benchmarks/pruning.py --keep 0.75 --update
    python benchmarks/pruning.py --speed --keep 0.75

For each criterion heads alone, neurons alone and both: recall and cosine as in quality.py, and the seconds of the passes.
`--speed` removes the pruned units and times the compiled program against our own unpruned one, at 32 rows of 128 tokens.
Smaller `--pairs` and `--texts` are faster and less precise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from quality import calibration_batches, conditions, minilm_table, read_pairs
from readme import put_table

import lissom
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.measure.timing import time_calls

CRITERIA = ("magnitude", "wanda", "gradient", "taylor", "reconstruction", "second-order")
ROWS, TOKENS = 32, 128


def pipelines(keep: float, criteria: Iterable[str]) -> list[str]:
    """Heads alone, neurons alone, and both, by each criterion."""
    chosen: list[str] = []
    for criterion in criteria:
        passes = [f"prune-{units}{{keep={keep:g},criterion={criterion}}}" for units in ("heads", "neurons")]
        chosen += [*passes, ",".join(passes)]
    return chosen


def speed_table(checkpoint: Checkpoint, keep: float, texts: int, seconds: float) -> str:
    """Milliseconds per call of the program pruned by `second-order`, and of the unpruned one, as Markdown."""
    pruning = f"prune-heads{{keep={keep:g}}},prune-neurons{{keep={keep:g}}}"
    data = calibration_batches(checkpoint, texts)
    models = {
        "none": lissom.compile(checkpoint.model, checkpoint.example_inputs),
        f"`{pruning}`": lissom.compile(checkpoint.model, checkpoint.example_inputs, passes=pruning, data=data),
    }
    inputs = checkpoint.encode(["a sentence " * TOKENS] * ROWS, TOKENS)
    timings = time_calls({name: lambda model=model: model(**inputs) for name, model in models.items()}, seconds)
    first = next(iter(timings.values())).median_ms
    lines = ["| passes | parameters | ms (middle half) | × |", "|---|---:|---:|---:|"]
    for name, timing in timings.items():
        lines.append(f"| {name} | {models[name].program.parameter_count:,} | {timing} | {first / timing.median_ms:.2f} |")
    return "\n".join(lines) + f"\n\n{ROWS} rows of {TOKENS} tokens, {torch.get_num_threads()} threads.\n"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--keep", type=float, default=0.75, help="the fraction of heads and of neurons kept; %(default)s by default"
    )
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--pairs", type=int, help="evaluated synsets; all of them by default")
    parser.add_argument("--texts", type=int, default=3400, help="calibration texts; %(default)s by default")
    parser.add_argument("--speed", action="store_true", help="time the pruned program instead")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per program")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    checkpoint = load("minilm")
    if options.speed:
        printed = speed_table(checkpoint, options.keep, options.texts, options.seconds)
    else:
        texts = read_pairs("evaluation", options.pairs)
        printed = minilm_table(checkpoint, pipelines(options.keep, options.criteria), texts, options.texts)
    printed = f"{printed}\n{conditions()}; {options.texts} calibration texts.\n"
    print(printed)
    if options.update:
        put_table("pruning-speed" if options.speed else "pruning", printed)


if __name__ == "__main__":
    main()
