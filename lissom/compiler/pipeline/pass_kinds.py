"""The four kinds of pass, and the requirements a pass may have on a program."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass
from typing import Any, ClassVar

from torch import fx

from lissom.compiler.analysis.amounts import AmountSite
from lissom.compiler.analysis.structure.linear import is_quantizer, weight_path
from lissom.compiler.analysis.token_ids import is_masked_logits
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import printer
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program


@dataclass(frozen=True)
class Requirement:
    """A fact about a program that a pass needs.

    Attributes:
        fact: the fact as text, `weights are floating point`.
        breach: returns the first node that violates it, or None.
        remedy: what the user can do.
    """

    fact: str
    breach: Callable[[Program], fx.Node | None]
    remedy: str

    def sentence(self, program: Program, pass_name: str, node: fx.Node) -> str:
        """The error message: which pass requires what, which node violates it, which pass caused it, what to do."""
        made_by = nodes.origin(node).passes
        history = f", made so by {made_by[-1]}" if made_by else ", already so in the original model"
        shown = printer.node_text(program, node)
        return f"{pass_name} requires that {self.fact}; {shown} breaks it{history}: {self.remedy}"


def _first_quantized_weight(program: Program) -> fx.Node | None:
    """The first quantizer of a linear layer's weight, or the weight itself when it is stored in integers."""
    for node in program.nodes():
        for value in weight_path(node):
            if is_quantizer(value) or (value.op == "get_attr" and not nodes.tensor_type(value).dtype.is_floating_point):
                return value
    return None


FLOATING_POINT_WEIGHTS = Requirement(
    "weights of linear layers are floating point", _first_quantized_weight, "put this pass before the one that quantizes"
)


def _first_masked_logits(program: Program) -> fx.Node | None:
    return next(filter(is_masked_logits, program.nodes()), None)


FINITE_LOGITS = Requirement(
    "no logits are masked, as a loss of them would be infinite",
    _first_masked_logits,
    "put this pass before prune-vocabulary",
)


class Pass(ABC):
    """One step of a pipeline: a frozen dataclass whose fields are its options.

    The class name in kebab case is its name in pipeline text. A subclass derives from one of the four kinds.

    Attributes:
        redefines: whether it changes the expected outputs on purpose: later passes are measured against the outputs after it.
        leaves_dead: whether it only zeroes units; `eliminate-dead` runs right after it and removes them.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    kind: ClassVar[str]
    leaves_dead: ClassVar[bool] = False
    redefines: ClassVar[bool] = False
    requires: ClassVar[tuple[Requirement, ...]] = ()

    @classmethod
    def name(cls) -> str:
        """`raise-rms-norm` for the class `RaiseRmsNorm`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def about(cls) -> str:
        """The first line of the docstring: what the pass is for."""
        return (cls.__doc__ or "").partition("\n")[0]

    @abstractmethod
    def run(self, edit: Editor) -> None:
        """Change the program through the editor; report places that could not be changed with `edit.skip`."""


class Rewrite(Pass):
    """Changes the form, not the outputs: checked against the program before it."""

    kind = "rewrite"


class Approximation(Pass):
    """Changes the outputs: measured against the original and charged to the budget.

    Attributes:
        cheapens: whether its purpose is a faster or smaller program, together with the exact passes after it; it is reverted
            when it brings neither. False when it enables other passes, or reduces their loss.
    """

    kind = "approximation"
    cheapens: ClassVar[bool] = True

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        """The sites of a program for which the pass takes an amount, in the order of the graph; none where it takes none."""
        return ()


class Annotation(Pass):
    """Adds metadata only: outputs stay bit-identical."""

    kind = "annotation"


class Training(Pass):
    """Changes weights only, to recover the loss of approximations; it works on a copy of the weights."""

    kind = "training"

    def fixed(self, program: Program) -> Collection[str]:
        """The names of weights it never writes, which need no copy, such as large embedding tables; none by default."""
        return ()
