"""`lissom.tune` on all-MiniLM-L6-v2 beside single techniques and other searches over the same options in the same time.

    python benchmarks/tune.py --minutes 20 --max-drop 0.01 --update

Compared are: the exact program; `quantize`, `cast`, and padding left out; heads, neurons and layers pruned by themselves to
three amounts each, and pruned and quantized; a random search over the options of tune; Optuna's TPE over the same, if it is
installed; int8 by torchao; and int8 under the same bound by NNCF's accuracy control on OpenVINO. All are timed side by side
with the exact program, and evaluated by the mean cosine of embeddings of WordNet glosses that neither passes nor searches have
seen. What was chosen is evaluated by recall@10 too, as in quality.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from quality import calibration_batches, conditions, difference, read_pairs, retrieve
from readme import put_table
from tune_peers import PEERS, prepare

import lissom
from lissom.errors import LissomError
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.measure.timing import time_calls
from lissom.tuning.build import Variant
from lissom.tuning.report import shortened
from lissom.tuning.sites import PLAIN, SCHEMES, Option, groups_of, linear_paths

ROWS, TOKENS, HELD, BATCH = 8, 64, 256, 32
KEEPS = (0.75, 0.5, 0.25)

Judged = tuple[str, float, float]
"""A pipeline, its speedup, and the drop of the metric."""
Batches = list[dict[str, torch.Tensor]]


class Judge:
    """Builds pipelines, times them beside the exact program, and evaluates them.

    Passes calibrate on one set of texts, searches choose by a second, and the table has the drop on a third.
    """

    def __init__(self, checkpoint: Checkpoint, calibration: int) -> None:
        self.checkpoint, self.data = checkpoint, calibration_batches(checkpoint, calibration)
        texts = read_pairs("evaluation").glosses
        self.chosen_by, self.reported_on = (self._batches(texts[at : at + HELD]) for at in (0, HELD))
        self.example = checkpoint.encode(texts[:ROWS], TOKENS)
        self.exact = lissom.compile(checkpoint.model, self.example)

    def _batches(self, texts: Sequence[str]) -> Batches:
        return [self.checkpoint.encode(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]

    def metric(self, model: Callable[..., object], batches: Batches | None = None) -> float:
        """The mean cosine of the embeddings to the original's."""
        with torch.no_grad():
            cosines = [
                (embeddings(model, batch) * embeddings(self.checkpoint.model, batch)).sum(-1)
                for batch in batches or self.chosen_by
            ]
        return float(torch.cat(cosines).mean())

    def speedup(self, call: Callable[[], object]) -> float:
        """The speedup over the exact program, of the lower quartiles. call: computes the outputs of the example."""
        calls = {"exact": lambda: self.exact(**self.example), "fast": call}
        timings = time_calls(calls, 1.0, most=300)
        return timings["exact"].low_ms / timings["fast"].low_ms

    def judge(self, pipeline: str, *, reported: bool = False) -> Judged:
        """Raises: LissomError if the pipeline cannot be built."""
        fast = lissom.compile(self.checkpoint.model, self.example, passes=pipeline, data=self.data, goal=None)
        drop = 1.0 - self.metric(fast, self.reported_on if reported else None)
        return pipeline, self.speedup(lambda: fast(**self.example)), drop


def embeddings(model: Callable[..., object], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean-pooled embeddings of unit length, [rows, features]."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def single_techniques() -> Iterator[str]:
    """Pipelines of one technique with one amount everywhere."""
    yield from ("quantize", "cast", "zero-padding,pack-tokens")
    for keep in KEEPS:
        for passes in (f"prune-heads{{keep={keep}}}", f"prune-neurons{{keep={keep}}}", f"prune-layers{{keep={keep}}}"):
            yield passes
            yield f"{passes},quantize"


def best(tried: list[Judged], max_drop: float) -> str:
    """The fastest within the bound; the exact program if there is none."""
    return max(
        (judged for judged in tried if judged[2] <= max_drop), key=lambda judged: judged[1], default=("exact", 1.0, 0.0)
    )[0]


def searched(judge: Judge, minutes: float, optuna: bool) -> list[Judged]:
    """A random search or Optuna's TPE over the options of tune, for that many minutes."""
    program = lissom.optimize(judge.checkpoint.model, judge.example).program
    groups, linears = groups_of(program), linear_paths(program)
    variants = [Variant("eager", bf16, packed) for bf16 in (False, True) for packed in (False, True)]
    offered: list[Sequence[Variant | Option]] = [variants, *(group.options((PLAIN, *SCHEMES)) for group in groups)]
    judged: list[Judged] = []

    def attempt(chosen: list[int]) -> Judged | None:
        variant, *options = [items[at] for items, at in zip(offered, chosen, strict=True)]
        try:
            judged.append(judge.judge(variant.passes(groups, options, linears)))
        except LissomError:
            return None
        return judged[-1]

    if not optuna:
        numbers, started = random.Random(0), time.monotonic()
        while time.monotonic() - started < 60 * minutes:
            attempt([numbers.randrange(len(items)) for items in offered])
        return judged
    import optuna as library

    def objective(trial):
        result = attempt([trial.suggest_int(f"{at}", 0, len(items) - 1) for at, items in enumerate(offered)])
        if result is None:
            raise library.TrialPruned
        return result[1], result[2]

    study = library.create_study(directions=["maximize", "minimize"], sampler=library.samplers.TPESampler(seed=0))
    study.optimize(objective, timeout=60 * minutes)
    return judged


def table(judge: Judge, chosen: dict[str, str], peers: Iterable[str], max_drop: float, pairs: int | None) -> str:
    """Speed, cosine and recall@10 of what was chosen and of peers, speed and cosine of single techniques, as Markdown."""
    texts = read_pairs("evaluation", pairs)
    original = retrieve(judge.checkpoint.model, judge.checkpoint, texts)
    lines = ["| program | × faster | drop of the cosine | change of recall@10 (95 %) | passes |", "|---|---:|---:|---:|---|"]

    def add(name: str, speedup: float, drop: float, call: Callable[..., object] | None, passes: str) -> None:
        change = ""
        if call is not None:
            relative, low, high = difference(original, retrieve(call, judge.checkpoint, texts), 10)
            change = f"{relative:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append(f"| {name} | {speedup:.2f} | {drop:.4f} | {change} | {passes} |")
        print(lines[-1], flush=True)

    for name, pipeline in chosen.items():
        _, speedup, drop = judge.judge(pipeline, reported=True)
        call = None
        if name != pipeline:
            call = lissom.compile(judge.checkpoint.model, judge.example, passes=pipeline, data=judge.data, goal=None)
        add("single" if call is None else name, speedup, drop, call, f"`{shortened(pipeline)}`")
    for name in peers:
        peer = prepare(name, judge.data, judge.example, judge.metric, max_drop)
        drop = 1.0 - judge.metric(peer.model, judge.reported_on)
        add(name, judge.speedup(peer.call), drop, peer.model, "")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of each search")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--calibration", type=int, default=128, help="texts")
    parser.add_argument("--pairs", type=int, help="synsets for recall@10; all of them by default")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--store", help="a directory for what lissom.tune finds: a run that was ended goes on from it")
    parser.add_argument("--only", default="single,tune,random,optuna,peers", help="which of these, separated by commas")
    options = parser.parse_args()
    wanted, judge = options.only.split(","), Judge(load("minilm"), options.calibration)
    chosen: dict[str, str] = {}
    if "single" in wanted:
        judged = [judge.judge(pipeline) for pipeline in single_techniques()]
        chosen |= {pipeline: pipeline for pipeline, _, _ in judged}
        chosen["best single technique"] = best(judged, options.max_drop)
    if "tune" in wanted:
        limits = {"max_drop": options.max_drop, "minutes": options.minutes, "store": options.store}
        tuned = lissom.tune(judge.checkpoint.model, judge.example, data=judge.data, metric=judge.metric, **limits)
        print(tuned.report, flush=True)
        chosen["lissom.tune"] = tuned.pipeline
    if "random" in wanted:
        chosen["random search"] = best(searched(judge, options.minutes, optuna=False), options.max_drop)
    if "optuna" in wanted and importlib.util.find_spec("optuna") is not None:
        chosen["Optuna TPE"] = best(searched(judge, options.minutes, optuna=True), options.max_drop)
    text = table(judge, chosen, PEERS if "peers" in wanted else (), options.max_drop, options.pairs)
    text += f"\nmax_drop {options.max_drop:g}, {options.minutes:g} minutes for each search. {conditions()}.\n"
    print(text)
    if options.update:
        put_table("tune", text, by_processor=True)


if __name__ == "__main__":
    main()
