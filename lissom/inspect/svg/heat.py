"""The heat of a picture: the figure of every node that its color shows, and what a report must have measured for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lissom.compiler.pipeline.history import History
from lissom.errors import UnsupportedError
from lissom.inspect.hot_layers import LayerTimes
from lissom.inspect.node_errors import NodeErrors

HEATS = ("flops", "bytes", "parameters", "time", "error", "mass")
MEASURED = ("error", "mass")
"""The heats that `report.errors` measures."""
LEVELS = 4
"""The number of colors."""
_LABELS = {"flops": "FLOPs", "bytes": "bytes moved", "mass": "attention mass lost", "time": "milliseconds"}


@dataclass(frozen=True)
class Heat:
    """A figure of nodes.

    Attributes:
        values: by name in the text, `%gelu`.
        largest: a module has the largest of its nodes', not the sum.
    """

    label: str
    values: Mapping[str, float]
    largest: bool

    def join(self, keys: Mapping[str, str]) -> dict[str, float]:
        """The figures of what a picture draws.

        Args:
            keys: for every node the node that stands for it, or its closed module.
        """
        joined: dict[str, float] = {}
        for name, key in keys.items():
            value = self.values.get(name, 0.0)
            adds = not self.largest and not key.startswith("%")
            joined[key] = joined.get(key, 0.0) + value if adds else max(joined.get(key, 0.0), value)
        return joined


def heat_of(kind: str, history: History, step: int, times: LayerTimes | None, errors: NodeErrors | None) -> Heat:
    """The heat of the program after a step.

    Raises:
        UnsupportedError: for another kind, or one that is not known for the step, with what measures it.
    """
    if kind not in HEATS:
        raise UnsupportedError(f"there is no heat '{kind}'; give one of {', '.join(HEATS)}")
    label, largest = _LABELS.get(kind, kind), kind in MEASURED
    if kind in ("flops", "bytes", "parameters"):
        costs = {name: fact.cost for name, fact in history.facts_of(step).items() if name.startswith("%")}
        if not costs:
            raise UnsupportedError(f"the {label} of step {step} are not known: an earlier version saved the model")
        return Heat(label, {name: float(getattr(cost, kind)) for name, cost in costs.items()}, largest)
    if step != len(history.steps) - 1:
        raise UnsupportedError(f"heat '{kind}' is measured for the last step alone, {len(history.steps) - 1}")
    if kind == "time":
        if times is None or not times.nodes:
            raise UnsupportedError("no times of nodes were measured; call report.kernels() of a compiled model first")
        values = times.nodes
    else:
        if errors is None:
            raise UnsupportedError(f"heat '{kind}' was not measured; call report.errors() first")
        values = errors.nodes if kind == "error" else {name: 1 - mass for name, mass in errors.kept_mass.items()}
    return Heat(label, {f"%{name}": value for name, value in values.items()}, largest)
