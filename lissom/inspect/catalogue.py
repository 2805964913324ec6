"""The catalogue of passes: all passes in groups, and one pass with its options and an example."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import re
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.spelling import format_value, options_of, type_text
from lissom.inspect.tables import plain_table

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Pruning": ("prune",),
    "Quantization": ("quantize",),
    "Distillation": ("recover",),
    "Sparse and linear attention": ("attention",),
    "Lightweight layers": ("lightweight",),
    "Tensor parallelism": ("parallel",),
    "Mixed precision": ("precision",),
    "Canonical form, first in every compile": ("canonical",),
    "Lowering, last in every compile and chosen by the backend": ("lowering",),
}
"""The groups of passes, each with the folders of `lissom.passes` that hold them."""
OTHER = "From other packages"

_EXACT = ("rewrite", "annotation")
_KINDS = {
    "rewrite": "exact: outputs stay equal within rounding, which is checked",
    "approximation": "lossy: outputs change; the error is measured, and the pass is reverted where it makes the program slower",
    "annotation": "exact: adds information and changes no output",
    "training": "lossy: trains weights to recover quality",
}
_EXAMPLES = {
    "prune-heads": "prune-heads{keep=0.75}",
    "prune-neurons": "prune-neurons{keep=0.75}",
    "prune-layers": "prune-layers{keep=0.75}",
    "prune-experts": "prune-experts{keep=0.75}",
    "prune-hidden": "prune-hidden{keep=0.75}",
    "prune-vocabulary": "prune-vocabulary{coverage=0.999}",
    "sparsify": "sparsify{pattern=2:4}",
    "pool-heads": "pool-heads{groups=2},merge-equal-heads",
    "merge-equal-heads": "pool-heads{groups=2},merge-equal-heads",
    "pack-tokens": "zero-padding,pack-tokens",
    "smooth-quant": "smooth-quant,quantize{scheme=int8-static}",
    "awq": "awq,quantize{scheme=int4-weight}",
    "gptq": "quantize{scheme=int4-weight},gptq",
    "correct-bias": "quantize{scheme=int8-static},correct-bias",
    "distill": "prune-neurons{keep=0.5},distill{minutes=5}",
    "equalize": "equalize,quantize{scheme=int8-weight}",
    "quantize": "quantize{scheme=int8-dynamic}",
    "untie-lm-head": "untie-lm-head,quantize{scheme=int4-weight,lm_head=true}",
    "fold-quantized-weights": "quantize{scheme=int8-weight},fold-quantized-weights",
    "low-rank": "low-rank{budget=0.5}",
    "depthwise-separable": "depthwise-separable{budget=0.5}",
    "share-layers": "share-layers{every=2}",
    "sparsify-attention": "sparsify-attention{pattern=window,window=64}",
    "shard": "shard{world_size=2},partition",
    "partition": "shard{world_size=2},partition",
}
"""Example pipelines with an option or with the usual companions of a pass; for any other pass, its name alone."""
_CALIBRATED = {
    *("prune-experts", "prune-layers", "prune-hidden", "prune-vocabulary", "smooth-quant", "awq", "gptq"),
    *("correct-bias", "distill", "finetune"),
}
"""The passes whose examples need calibration data."""
_LONGEST_NAME = 29


def grouped(passes: Mapping[str, type[Pass]]) -> dict[str, dict[str, type[Pass]]]:
    """The passes by group; within a group lossy ones come first, otherwise the order is kept."""
    titles = {room: title for title, rooms in GROUPS.items() for room in rooms}
    groups: dict[str, dict[str, type[Pass]]] = {title: {} for title in (*GROUPS, OTHER)}
    for name, pass_class in sorted(passes.items(), key=lambda pair: pair[1].kind in _EXACT):
        package, _, rest = pass_class.__module__.partition("lissom.passes.")
        room = rest.partition(".")[0] if not package else ""
        groups[titles.get(room, OTHER)][name] = pass_class
    return {title: members for title, members in groups.items() if members}


def passes_table(passes: Mapping[str, type[Pass]], recipes: Mapping[str, str]) -> RenderableType:
    """Every pass with what it does, in groups, and the recipes; `*` marks lossy passes."""
    groups = {
        title: {
            name + ("" if pass_class.kind in _EXACT else " *"): first_line(pass_class) for name, pass_class in members.items()
        }
        for title, members in grouped(passes).items()
    }
    # With a space after each comma, lines break between passes.
    groups["Recipes"] = {name: pipeline.replace(",", ", ") for name, pipeline in recipes.items()}
    parts: list[RenderableType] = []
    for title, rows in groups.items():
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        table.add_column(no_wrap=True, min_width=_LONGEST_NAME)
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, Text(text))
        parts += [Text(title, style="bold"), table, Text()]
    return Group(*parts, Text("* lossy. `lissom passes NAME` shows the options of a pass and an example."))


def pass_page(pass_class: type[Pass]) -> RenderableType:
    """The page of a pass: what it does, whether it is lossy, its options with types and defaults, and an example."""
    parts: list[RenderableType] = [Text(f"{pass_class.name()}: {first_line(pass_class)}"), Text(_KINDS[pass_class.kind])]
    parts += [Text(f"requires that {requirement.fact}") for requirement in pass_class.requires]
    if options_of(pass_class):
        table = plain_table()
        table.add_column("option", no_wrap=True)
        table.add_column("takes", overflow="fold", max_width=20)
        table.add_column("default", overflow="fold")
        table.add_column("meaning", overflow="fold")
        for name, takes, default, meaning in option_rows(pass_class):
            table.add_row(name, Text(takes), Text(default), Text(meaning))
        parts += [Text(), table]
    # Only `show` prints programs for several ranks without running them.
    command = "show" if ".parallel." in pass_class.__module__ else "compile"
    data = " --data texts.txt" if pass_class.name() in _CALIBRATED else ""
    return Group(*parts, Text(f"\nExample: lissom {command} minilm --passes '{example_of(pass_class.name())}'{data}"))


def option_rows(pass_class: type[Pass]) -> list[tuple[str, str, str, str]]:
    """Each option with its type, its default as pipeline text (`required` without one), and its meaning."""
    documented: dict[str, str] = {}
    for base in reversed(pass_class.__mro__):
        documented |= _meanings(python_inspect.getdoc(base) or "")
    defaults = {
        field.name: "required" if field.default is dataclasses.MISSING else format_value(field.default)
        for field in dataclasses.fields(pass_class)
    }
    return [(name, type_text(hint), defaults[name], documented.get(name, "")) for name, hint in options_of(pass_class).items()]


def example_of(name: str) -> str:
    """An example pipeline with the pass."""
    return _EXAMPLES.get(name, name)


def first_line(described: object) -> str:
    """The first line of an object's docstring."""
    return (python_inspect.getdoc(described) or "").partition("\n")[0]


def _meanings(docstring: str) -> dict[str, str]:
    """The description of each field, from the section `Attributes:` of a docstring."""
    fields = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", docstring.partition("\nAttributes:\n")[2], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in fields}
