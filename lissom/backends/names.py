"""Names of inputs, outputs and state in files for other runtimes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx
from torch.utils import _pytree as pytree

from lissom.backends.exported import leaves_of
from lissom.compiler.ir.program import Program


def results_of(program: Program) -> list[fx.Node]:
    """The tensors the program returns, each once."""
    return list(dict.fromkeys(leaf for leaf in leaves_of(program) if isinstance(leaf, fx.Node)))


def input_names(program: Program) -> list[str]:
    """The names of the inputs as the caller writes them, with underscores for other characters than letters and digits."""
    return _unique([_plain(leaf.path) for leaf in program.signature.tensors], ())


def output_names(program: Program) -> list[str]:
    """The names of the outputs, by their path in the model's output: `last_hidden_state`, `output_0`."""
    paths = dict(zip(reversed(leaves_of(program)), reversed(_paths(program.signature.out_spec)), strict=True))
    wanted = [_plain(paths[result]) or "output" for result in results_of(program)]
    return _unique([f"output_{name}" if name[0].isdigit() else name for name in wanted], input_names(program))


def state_names(program: Program) -> tuple[list[str], list[str]]:
    """The names of the state before and after a call: `past_layers_0_keys` and `present_layers_0_keys`."""
    past = _unique([f"past_{_plain(name)}" for name in program.state], [*input_names(program), *output_names(program)])
    return past, _unique([f"present_{name[5:]}" for name in past], [*input_names(program), *output_names(program)])


def _paths(spec: pytree.TreeSpec, path: str = "") -> list[str]:
    """The path of each leaf of a pytree, `past_0_key`."""
    if spec.is_leaf():
        return [path]
    count = spec.num_children
    given = getattr(spec.context, "_fields", spec.context)
    named = isinstance(given, (list, tuple)) and len(given) == count
    keys: Sequence[object] = given if named else range(count)
    return [
        leaf for key, child in zip(keys, spec.children(), strict=True) for leaf in _paths(child, f"{path}_{key}".lstrip("_"))
    ]


def _plain(path: str) -> str:
    return re.sub(r"\W+", "_", path).strip("_")


def _unique(wanted: Sequence[str], used: Sequence[str]) -> list[str]:
    names: list[str] = []
    for name in wanted:
        number, unique = 1, name
        while unique in names or unique in used:
            unique, number = f"{name}_{number}", number + 1
        names.append(unique)
    return names
