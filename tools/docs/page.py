"""The page of one pass, from its docstrings and its example."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import get_args

from lissom.compiler.pipeline.history import History, Size
from lissom.compiler.pipeline.pass_kinds import Approximation, Pass
from lissom.compiler.pipeline.spelling import options_of, parse_pipeline
from lissom.inspect.catalogue import first_line, option_rows
from lissom.inspect.svg.change import change_svg
from lissom.measure.choice import is_measured
from lissom.passes import PASSES, RECIPES
from lissom.passes.quantize.quantize import Scheme
from tools.docs.examples import Example
from tools.docs.measure import Gain, run_example

_CURVES = "Quality, latency and bytes against the share kept, on real models: [What pruning costs and gains](../curves.md)."
_SCHEMES = ", ".join(f"[{name}](../schemes/{name}.md)" for name in get_args(Scheme))
_SPARSE = "Dense and sparse against the length: [benchmarks](../../benchmarks/README.md#sparse-attention)"
_LENGTH = "[against the length](../../benchmarks/README.md#sparse-and-linear-attention-against-the-length)"
MEASURED = {
    **dict.fromkeys(("prune-heads", "prune-neurons", "prune-layers", "prune-hidden", "sparsify"), _CURVES),
    "low-rank": "By calibration data and by weights alone, on real models: [benchmarks](../../benchmarks/README.md#low-rank).",
    "pool-heads": "Quality on a real model, by each way of pooling: "
    "[benchmarks](../../benchmarks/README.md#what-pruning-costs-in-quality).",
    "sparsify-attention": f"{_SPARSE}; what patterns cost in quality on a real model: "
    f"[benchmarks](../../benchmarks/README.md#what-sparse-attention-costs-in-quality), and {_LENGTH}.",
    "lower-sparse-attention": f"{_SPARSE}; the windows models come with: "
    "[benchmarks](../../benchmarks/README.md#the-windows-a-model-comes-with).",
    "linear-attention": "Times and memory against the length, and what a real model loses: "
    f"[benchmarks](../../benchmarks/README.md#linear-attention), and {_LENGTH}.",
    "distill": "What it wins back on a real model: [benchmarks](../../benchmarks/README.md#what-distillation-wins-back).",
    **dict.fromkeys(("shard", "partition"), "Plans of models of four families: [Tensor parallelism](../parallel.md)."),
    "quantize": f"Each scheme on real models, and when not to use it: {_SCHEMES}.",
}
"""The measurements of a pass on real models."""
NOTICE = "<!-- Made by tools/docs/generate.py from the pass's docstring and tools/docs/examples.py; change those instead. -->"


def page(pass_class: type[Pass], example: Example, history: History, timings: str) -> str:
    """The page as Markdown, with an empty output block. history: of the example, the pass last. timings: the measured part."""
    sizes = history.steps[-2].size, history.steps[-1].size
    module = sys.modules[pass_class.__module__]
    return (
        "\n\n".join(
            [
                NOTICE,
                f"# {pass_class.name()}",
                inspect.getdoc(module) or "",
                _about(pass_class),
                "## Options",
                _options(pass_class),
                "## At work",
                f"```python\n{_code(pass_class, example)}\n```",
                "<!-- output -->\n```text\n```",
                _picture(pass_class.name()),
                "## Gain and loss",
                f"<!-- sizes -->\n{_sizes(*sizes)}\n<!-- end -->",
                f"<!-- measured -->\n{timings}<!-- end -->",
                "## Limits",
                _limits(_sources(pass_class)),
            ]
        )
        + "\n"
    )


def change_picture(name: str) -> str | None:
    """What the pass changes in its example, as SVG; None if it leaves the graph as it is."""
    history = run_example(name)
    return change_svg(history, len(history.steps) - 1, name)


def left_by_times(name: str) -> bool:
    """True if a pass left a layer of the example as it is because it timed a kernel as slower; the next time may differ."""
    return any(is_measured(skip.reason) for step in run_example(name).steps for skip in step.skipped)


def _picture(name: str) -> str:
    if change_picture(name) is None and not left_by_times(name):
        return "The graph of the example stays as it is: the pass changes weights alone."
    return f"![The nodes that {name} changes](pictures/{name}.svg)"


def _sources(pass_class: type[Pass]) -> str:
    """The source of a pass, with the helpers in its own folder."""
    path = Path(inspect.getfile(pass_class))
    paths = [path, *sorted(other for other in path.parent.glob("*.py") if other != path)]
    return "\n".join(file.read_text(encoding="utf-8") for file in (paths if path.parent.name == path.stem else [path]))


def timings(gain: Gain, machine: str) -> str:
    """The measured part of a page."""
    before, after = gain.timings
    return (
        "| | before | after |\n|---|---|---|\n"
        f"| median ms of a call (middle half of the runs) | {before} | {after} |\n\n"
        f"Relative error {gain.relative_error:.1e}, allowed {gain.allowed:.0e}. {before.runs} runs each in turn on {machine}.\n"
    )


def _about(pass_class: type[Pass]) -> str:
    kind = next(first_line(base) for base in pass_class.__mro__ if base.__module__ == Pass.__module__)
    recipes = [f"`{name}`" for name, text in RECIPES.items() if re.search(rf"\b{pass_class.name()}\b", text)]
    sentences = [f"Kind: {pass_class.kind}. {kind}", f"Recipes: {', '.join(recipes) or 'none'}."]
    sentences += [f"Requires that {requirement.fact}." for requirement in pass_class.requires]
    sentences += [MEASURED[pass_class.name()]] if pass_class.name() in MEASURED else []
    return "\n".join(sentences)


def _options(pass_class: type[Pass]) -> str:
    if not options_of(pass_class):
        return "None."
    rows = [
        f"| `{name}` | {takes} | {'required' if default == 'required' else f'`{default}`'} | {meaning} |"
        for name, takes, default, meaning in option_rows(pass_class)
    ]
    return "\n".join(["| option | takes | default | meaning |", "|---|---|---|---|", *rows])


def _code(pass_class: type[Pass], example: Example) -> str:
    source = inspect.getsource(example.model).strip()
    imports = ["import torch", "from torch import nn"]
    imports += ["from torch.nn import functional"] if "functional." in source else []
    passes = "" if example.passes == "exact" else f', passes="{example.passes}"'
    passes += f", data={example.data}" if example.data else ""
    # Backends' passes run only with a backend; the others do not depend on the machine.
    function = "compile" if ".lowering." in pass_class.__module__ else "optimize"
    lossy = any(isinstance(pass_, Approximation) for pass_ in parse_pipeline(example.passes, PASSES, RECIPES))
    # A pass of the recipe `exact` may begin with the same words.
    exact = f"{pass_class.name()}-" in RECIPES["exact"]
    condition = f'step.spelling == "{pass_class.name()}"' if exact else f'step.spelling.startswith("{pass_class.name()}")'
    passes += ", goal=None" if function == "compile" and lossy else ""
    return "\n".join(
        [
            *imports,
            "\nimport lissom" + (f"\n{example.imports}" if example.imports else "") + "\n\n",
            source,
            "\n\ntorch.manual_seed(0)",
            f"history = lissom.{function}({example.model.__name__}(), {example.inputs}{passes}).report.history",
            f"step = next(step for step in history.steps if {condition})",
            "print(step.summary)",
            "print(history.diff(step.index - 1, step.index))",
        ]
    )


def _sizes(before: Size, after: Size) -> str:
    return (
        "| | before | after |\n|---|---|---|\n"
        f"| operator calls | {before.nodes} | {after.nodes} |\n"
        f"| MFLOP | {before.flops / 1e6:.1f} | {after.flops / 1e6:.1f} |\n"
        f"| weights, bytes | {before.parameter_bytes} | {after.parameter_bytes} |"
    )


def _limits(source: str) -> str:
    reasons = skip_reasons(source)
    if not reasons and "(Fitting)" in source:
        return "It trains no program with a KV cache, and no stored integers; more in [recovering quality](../recovery.md)."
    if not reasons:
        return "It treats every place of the form above and reports none as skipped; anything else it does not touch."
    listed = "\n".join(f"- {reason}" for reason in reasons)
    return f"It leaves a place alone, and gives the reason in the history, when\n\n{listed}"


def skip_reasons(source: str) -> list[str]:
    """The reasons a pass's source gives for leaving a place alone.

    They are what it passes to `skip`, raises for itself, keeps in `_OBSTACLES`, assigns to `reason`, or returns in place of
    what it looks for (`-> Matrix | str`, `_obstacle…`), and what `obstacle_by_name` says.
    """
    line_of: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        for given in _given(node):
            for reason in _texts(given):
                line_of.setdefault(reason, node.lineno if isinstance(node, ast.stmt | ast.expr) else 0)
    return sorted(line_of, key=lambda reason: line_of[reason])


def _given(node: ast.AST) -> list[ast.expr]:
    """The expressions whose literals are reasons."""
    call = node.exc if isinstance(node, ast.Raise) else node
    match call:
        case ast.Call(func=ast.Name(id="obstacle_by_name")):
            return [ast.Constant(text) for text in ("skip= names it", "only= does not name it")]
        case ast.Call(func=ast.Attribute(attr="skip"), args=[*_, reason]):
            return [reason]
        case ast.Call(func=ast.Name(id=name), args=[*_, reason]) if isinstance(node, ast.Raise) and name.startswith("_"):
            return [reason]
        case ast.Assign(targets=[ast.Name(id="reason")], value=value):
            return [value]
        case ast.AnnAssign(target=ast.Name(id="_OBSTACLES"), value=ast.Dict(values=values)):
            return values
        case ast.FunctionDef(name=name, returns=returns) if "obstacle" in name or (returns and "| str" in ast.unparse(returns)):
            return [
                statement.value
                for statement in ast.walk(call)
                if isinstance(statement, ast.Return) and statement.value is not None
            ]
    return []


def _texts(node: ast.expr) -> list[str]:
    """The texts an expression may be."""
    match node:
        case ast.BoolOp(values=values):
            return [text for value in values for text in _texts(value)]
        case ast.IfExp(body=body, orelse=other):
            return [*_texts(body), *_texts(other)]
    return [text] if (text := _text(node)) else []


def _text(node: ast.expr) -> str:
    """A string's text, with `…` for interpolated values; nothing if it is not a literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    return ""
