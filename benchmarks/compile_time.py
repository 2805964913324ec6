"""The cost of compiling: seconds of capture, passes and verification, and peak memory, as models grow deeper and by model.

    python benchmarks/compile_time.py --layers 12 24 --update
    python benchmarks/compile_time.py --models MiniLM Llama-1B --passes exact int8 --peers --update

Encoders of BERT-base's width, or models of known shapes, with random weights, each in a process of its own. Prints a Markdown
table; `--update` puts it into benchmarks/README.md, `--figure FILE` draws that of the layers. Memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from apart import run_apart
from compile_models import (
    ALL_MODELS,
    MODELS,
    PASSES,
    build,
    checkpoint,
    compile_model,
    example_inputs,
    generates,
    texts,
    weight_bytes,
)
from compile_peers import costs_of_peers, peer_table
from figures import save, subplots
from memory import used_memory
from readme import put_table
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import lissom
from lissom.generation.encoder_decoder import EncoderDecoderModel
from lissom.measure.machine import device_name

_LINEAR = 1.15
"""Growth by a power of the number of layers up to this counts as linear."""


@dataclass(frozen=True)
class Cost:
    """The cost of compiling one model.

    capture, passes, verification: seconds. memory: the process's peak above what it used before the model was built, divided
    by the bytes of the weights; 1 is the model itself.
    """

    layers: int
    nodes: int
    weight_bytes: int
    capture: float
    passes: float
    verification: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.capture + self.passes + self.verification


def measure(layers: int) -> Cost:
    """Compile an encoder of this depth."""
    warm_up()
    before = used_memory("VmRSS")
    model = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    history = lissom.compile(model, texts(2, 16)).report.history
    capture, *steps = history.steps
    size = weight_bytes(model)
    return Cost(
        layers,
        capture.size.nodes,
        size,
        capture.seconds,
        sum(step.seconds for step in steps),
        sum(step.check_seconds for step in steps),
        (used_memory("VmHWM") - before) / size,
    )


@dataclass(frozen=True)
class ModelCost:
    """The cost of compiling one model with one pipeline.

    seconds: of the whole call, which also lowers, times and builds. capture, steps, verification: seconds of these.
    weight_bytes, result_bytes: of the model and of the result. peak: bytes of the process above those it used before it had the
    model. load_seconds: of loading what was saved in a new process. loaded, called: bytes of that process above those it used
    before: when loaded, and after the first call, which reads mapped weights.
    """

    model: str
    passes: str
    seconds: float
    capture: float
    steps: float
    verification: float
    weight_bytes: int
    result_bytes: int
    peak: int
    load_seconds: float = 0.0
    loaded: int = 0
    called: int = 0


def measure_model(name: str, passes: str, saved: str, source: str = "") -> ModelCost:
    """Compile a model, and save the result.

    Args:
        saved: the folder to save to.
        source: the folder of its checkpoint; without one the model is built in memory.
    """
    warm_up(decoder=generates(name))
    before = used_memory("VmRSS")
    model = Path(source) if source else build(name)
    started = time.perf_counter()
    compiled = compile_model(name, model, passes)
    seconds, peak = time.perf_counter() - started, used_memory("VmHWM") - before
    compiled.save(saved)
    programs = [compiled, compiled.encoder] if isinstance(compiled, EncoderDecoderModel) else [compiled]
    histories = [program.report.history.steps for program in programs]
    steps = [step for history in histories for step in history[1:]]
    return ModelCost(
        name,
        passes,
        seconds,
        sum(history[0].seconds for history in histories),
        sum(step.seconds for step in steps),
        sum(step.check_seconds for step in steps),
        weight_bytes(model),
        sum(history[-1].size.parameter_bytes for history in histories),
        peak,
    )


def measure_load(name: str, saved: str) -> dict[str, float]:
    """The cost of loading what `measure_model` saved: fields of `ModelCost`."""
    load = lissom.load_generation if generates(name) else lissom.load
    inputs = example_inputs(name)
    before, started = used_memory("VmRSS"), time.perf_counter()
    model = load(saved)
    seconds, loaded = time.perf_counter() - started, used_memory("VmRSS") - before
    model(**inputs)
    return {"load_seconds": seconds, "loaded": loaded, "called": used_memory("VmRSS") - before}


def warm_up(*, decoder: bool = False) -> None:
    """Compile a small model, so that imports and first calls are not counted.

    Args:
        decoder: one with its KV cache as well.
    """
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    tokens = torch.ones(2, 16, dtype=torch.long)
    lissom.compile(BertModel(BertConfig(**sizes)).eval(), {"input_ids": tokens, "attention_mask": tokens})
    if decoder:
        lissom.compile_generation(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), max_length=16)


def costs_of_models(names: Sequence[str], passes: Sequence[str], keep: Path | None) -> tuple[list[ModelCost], list[str]]:
    """Measure models with pipelines, each in processes of its own; the costs, and a sentence for each that failed.

    Args:
        keep: a folder in which checkpoints stay.
    """
    costs: list[ModelCost] = []
    failures: list[str] = []
    for name in names:
        with checkpoint(name, keep) as source:
            for spelling in passes:
                try:
                    costs.append(_cost_of_model(name, spelling, source))
                    print(f"{name} {spelling}: {costs[-1].seconds:.1f} s", file=sys.stderr)
                except RuntimeError as error:
                    failures.append(f"{name}, {spelling}: {error}")
    return costs, failures


def _cost_of_model(name: str, passes: str, source: Path | None) -> ModelCost:
    with tempfile.TemporaryDirectory(prefix="compile_time-") as folder:
        saved = f"{folder}/saved"
        compiled = cast(
            dict[str, Any], run_apart(__file__, ["--one-model", name, passes, saved, *([str(source)] if source else [])])
        )
        loaded = cast(dict[str, Any], run_apart(__file__, ["--one-load", name, saved]))
    return ModelCost(**compiled | loaded)


def model_table(costs: list[ModelCost], failures: list[str]) -> str:
    """The costs as Markdown, with what failed."""
    heads = (
        "all, s",
        "capture, s",
        "passes, s",
        "checks, s",
        "model, MB",
        "result, MB",
        "peak, MB",
        "load, s",
        "loaded, MB",
        "called, MB",
    )
    rows: list[str] = []
    for cost in costs:
        compiling = (cost.seconds, cost.capture, cost.steps, cost.verification)
        compiled, loaded = (cost.weight_bytes, cost.result_bytes, cost.peak), (cost.loaded, cost.called)
        cells = [f"{seconds:.1f}" for seconds in compiling] + [f"{size / 1e6:.0f}" for size in compiled]
        cells += [f"{cost.load_seconds:.2f}"] + [f"{size / 1e6:.0f}" for size in loaded]
        rows.append(f"| {cost.model} | {cost.passes} | {' | '.join(cells)} |")
    lines = [f"| model | passes | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads), *rows]
    return "\n".join([*lines, *(f"\n{line}" for line in failures)]) + "\n"


def measure_apart(layers: int) -> Cost:
    """Run `measure` in a process of its own."""
    return Cost(**cast(dict[str, Any], run_apart(__file__, ["--one", str(layers)])))


def exponent(costs: list[Cost], name: str) -> float:
    """The exponent p if `name` grows as layers to the power p: the slope in log-log coordinates."""
    points = [(math.log(cost.layers), math.log(getattr(cost, name))) for cost in costs]
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def table(costs: list[Cost]) -> str:
    """The costs as Markdown, with their growth and the machine."""
    rows = [
        f"| {cost.layers} | {cost.nodes} | {cost.weight_bytes / 1e6:.0f} | {cost.capture:.2f} | {cost.passes:.2f} | "
        f"{cost.verification:.2f} | {cost.seconds:.2f} | {cost.memory:.2f} |"
        for cost in costs
    ]
    heads = "layers | nodes captured | weights, MB | capture, s | passes, s | verification, s | all, s | peak memory / weights"
    lines = [f"| {heads} |", "|" + "---:|" * 8, *rows, ""]
    if len(costs) > 1:
        powers = {name: exponent(costs, name) for name in ("capture", "passes", "verification", "seconds")}
        listed = ", ".join(f"{'all' if name == 'seconds' else name} {power:.2f}" for name, power in powers.items())
        steep = [name for name, power in powers.items() if power > _LINEAR and name != "seconds"]
        word = f"more than linear in {' and '.join(steep)}" if steep else "at most linear"
        lines += [f"Growth, as a power of the number of layers: {listed}. That is {word}.", ""]
    return "\n".join([*lines, machine()]) + "\n"


def machine() -> str:
    """The processor, its cores, and the versions."""
    libraries = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads; {libraries}."


def draw(costs: list[Cost], file: Path) -> None:
    """Seconds by layers, stacked: capture, passes, verification."""
    layers = [cost.layers for cost in costs]
    figure, axes = subplots(figsize=(6, 3.5))
    parts = ("capture", "passes", "verification")
    axes.stackplot(layers, *([getattr(cost, part) for cost in costs] for part in parts), labels=parts)
    axes.set(xlabel="layers", ylabel="seconds", xticks=layers, title="Compiling a BERT of base width")
    axes.legend(loc="upper left")
    save(figure, file)


def main() -> None:
    """Measure each size and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48, 96], help="the depths to compile")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--figure", type=Path, help="draw the seconds to this file, for example docs/figures/compile_time.svg")
    parser.add_argument(
        "--models",
        nargs="*",
        choices=ALL_MODELS,
        metavar="NAME",
        help=f"compile these instead: {', '.join(MODELS)}; all by default",
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="the pipelines for --models")
    parser.add_argument(
        "--peers", action="store_true", help="with --models: time encoders on torch.compile and OpenVINO as well"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write checkpoints there, or use those that are there")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one-model", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--one-load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_model:
        print(json.dumps(asdict(measure_model(*options.one_model))))
    elif options.one_load:
        print(json.dumps(measure_load(*options.one_load)))
    elif options.one:
        print(json.dumps(asdict(measure(options.one))))
    elif options.models is not None:
        names = options.models or MODELS
        text = model_table(*costs_of_models(names, options.passes, options.keep))
        if options.peers:
            text += f"\n{peer_table(*costs_of_peers(names))}"
        show("compile_models", f"{text}\n{machine()}\n", update=options.update)
    else:
        costs = [measure_apart(layers) for layers in options.layers]
        show("compile_time", table(costs), update=options.update)
        if options.figure:
            draw(costs, options.figure)


def show(name: str, text: str, *, update: bool) -> None:
    """Print a table.

    Args:
        update: put it into benchmarks/README.md as well.
    """
    print(text)
    if update:
        put_table(name, text, by_processor=True)


if __name__ == "__main__":
    main()
