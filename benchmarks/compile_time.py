"""The cost of compiling: seconds of capture, passes and verification, and peak memory, as models grow deeper and by model.

    python benchmarks/compile_time.py --layers 12 24 --update
    python benchmarks/compile_time.py --models MiniLM Qwen3-0.6B --update

Encoders of BERT-base's width, or models of known shapes, with random weights, each in a process of its own. Prints a Markdown
table; `--update` puts it into benchmarks/README.md, `--figure FILE` draws that of the layers. Memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import save, subplots
from readme import put_table

if TYPE_CHECKING:
    import torch

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
    from transformers import BertConfig, BertModel

    import lissom

    inputs = warm_up()
    before = _memory("VmRSS")
    model = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    history = lissom.compile(model, inputs).report.history
    capture, *steps = history.steps
    return Cost(
        layers,
        capture.size.nodes,
        weight_bytes,
        capture.seconds,
        sum(step.seconds for step in steps),
        sum(step.check_seconds for step in steps),
        (_memory("VmHWM") - before) / weight_bytes,
    )


PASSES = {"exact": "exact", "int8": "quantize{scheme=int8-dynamic}", "int4": "quantize{scheme=int4-weight}"}
MODELS = ("MiniLM", "BERT-base", "ModernBERT-base", "Qwen3-0.6B", "Llama-3.2-1B")


@dataclass(frozen=True)
class ModelCost:
    """The cost of compiling one model with one pipeline.

    seconds: of the whole call, which also lowers, times and builds. capture, passes, verification: seconds of these.
    weight_bytes, result_bytes: of the model and of the result. peak: bytes of the process above those it used with the model.
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


def measure_model(name: str, passes: str) -> ModelCost:
    """Compile a model of this shape."""
    import lissom

    inputs = warm_up()
    model = build(name)
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    before, started = _memory("VmRSS"), time.perf_counter()
    if hasattr(model, "lm_head"):
        compiled = lissom.compile_generation(model, max_length=512, passes=PASSES[passes])
    else:
        compiled = lissom.compile(model, inputs, passes=PASSES[passes])
    seconds, peak = time.perf_counter() - started, _memory("VmHWM") - before
    capture, *steps = compiled.report.history.steps
    return ModelCost(
        name,
        passes,
        seconds,
        capture.seconds,
        sum(step.seconds for step in steps),
        sum(step.check_seconds for step in steps),
        weight_bytes,
        steps[-1].size.parameter_bytes,
        peak,
    )


def warm_up() -> dict[str, torch.Tensor]:
    """Compile a small encoder, so that imports and first calls are not counted; returns its inputs, which any encoder takes."""
    import torch
    from transformers import BertConfig, BertModel

    import lissom

    tokens = torch.ones(2, 16, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    lissom.compile(BertModel(BertConfig(num_hidden_layers=1, hidden_size=24, intermediate_size=48)).eval(), inputs)
    return inputs


def build(name: str) -> torch.nn.Module:
    """A model of this shape with random weights in float32."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    if name == "MiniLM":
        config = t.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        return t.BertModel(config, add_pooling_layer=False).eval()
    if name == "BERT-base":
        return t.BertModel(t.BertConfig(), add_pooling_layer=False).eval()
    if name == "ModernBERT-base":
        return t.ModernBertModel(t.ModernBertConfig()).eval()
    sizes: dict[str, Any] = {"num_key_value_heads": 8, "tie_word_embeddings": True}
    if name == "Qwen3-0.6B":
        sizes |= {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
        return t.Qwen3ForCausalLM(t.Qwen3Config(num_hidden_layers=28, num_attention_heads=16, **sizes)).eval()
    sizes |= {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
    return t.LlamaForCausalLM(t.LlamaConfig(num_hidden_layers=16, num_attention_heads=32, **sizes)).eval()


def model_table(costs: list[ModelCost]) -> str:
    """The costs as Markdown, with the machine."""
    rows = [
        f"| {cost.model} | {cost.passes} | {cost.seconds:.1f} | {cost.capture:.1f} | {cost.steps:.1f} | "
        f"{cost.verification:.1f} | {cost.weight_bytes / 1e6:.0f} | {cost.result_bytes / 1e6:.0f} | {cost.peak / 1e6:.0f} |"
        for cost in costs
    ]
    heads = "model | passes | all, s | capture, s | passes, s | checks, s | model, MB | result, MB | peak above the model, MB"
    return "\n".join([f"| {heads} |", "|---|---|" + "---:|" * 7, *rows, "", machine()]) + "\n"


def _memory(field: str) -> int:
    """Bytes this process uses now (`VmRSS`), or has used at most (`VmHWM`)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}; memory is measured on Linux")
    return int(match[1]) * 1024


def measure_apart(layers: int) -> Cost:
    """Run `measure` in a process of its own."""
    return Cost(**_apart("--one", str(layers)))


def _apart(*arguments: str) -> dict[str, Any]:
    """The cost that this file prints with these arguments in a process of its own."""
    ran = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


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
    import torch
    import transformers

    from lissom.measure.machine import device_name

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
    parser.add_argument("--models", nargs="*", choices=MODELS, help="compile models of these shapes instead; all by default")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one-model", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_model:
        print(json.dumps(asdict(measure_model(*options.one_model))))
        return
    if options.models is not None:
        names = [(model, passes) for model in options.models or MODELS for passes in PASSES]
        text = model_table([ModelCost(**_apart("--one-model", *name)) for name in names])
        print(text)
        if options.update:
            put_table("compile_models", text, by_processor=True)
        return
    if options.one:
        print(json.dumps(asdict(measure(options.one))))
        return
    costs = [measure_apart(layers) for layers in options.layers]
    printed = table(costs)
    print(printed)
    if options.update:
        put_table("compile_time", printed, by_processor=True)
    if options.figure:
        draw(costs, options.figure)


if __name__ == "__main__":
    main()
