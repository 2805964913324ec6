"""Mixed precision: matrix products, embeddings and the residual stream in bfloat16 or float16, where values fit.

bfloat16 keeps float32's range and 8 of its 24 bits. float16 keeps 11 bits and ends at 65504; below 6·10⁻⁵ it loses bits, and
below 3·10⁻⁸ everything. Each operator falls into one of five groups:

- products, convolutions, attention, embeddings and norms run in reduced precision. Their kernels sum in float32, and norms and
  attention compute their statistics and softmax in float32 inside.
- element-wise operators and views follow their inputs: reduced precision as soon as one input is.
- the KV cache is in reduced precision where the values written to it are.
- softmax, exponentials, powers, sums and everything not named here run in float32, on values cast back.
- values computed only from positions or masks keep their dtype until they are combined with one in reduced precision.

For float16 the first two groups depend on measured ranges. Every value is observed on calibration data, in float32. A call runs
in float16 only if all its inputs and outputs stay below 65504 / `margin` and at most the fraction `underflow` of each is below
the smallest normal number. Other calls run in float32, and so do their readers until values fit again. Padding counts too.
Weights are checked in the same way, without the margin. Sums inside a kernel are not measured, since kernels compute them in
float32; only `lissom::attention` computes scores in its operands' dtype, so there |q kᵀ| is bounded by ‖q‖ ‖k‖. Micikevicius et
al. 2018, Mixed Precision Training, §3.3, keep the same sums in float32. https://arxiv.org/abs/1710.03740

Outputs are cast back, so the program's output dtypes stay. The lowest value of an additive mask, and a value that fills hidden
positions, is clamped to bfloat16's lowest number, because float32's would overflow; to half of float16's lowest, because scores
are added to it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.casts import dtype_of
from lissom.compiler.analysis.module_filter import is_protected
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.ranges import Range, measured_ranges, range_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_view
from lissom.compiler.ir.operators import (
    ATTENTIONS,
    CONVOLUTIONS,
    EPILOGUES,
    GROUPED_PRODUCTS,
    LAYER_NORMS,
    MATMULS,
    MATMULS_WITH_BIAS,
    PARTS,
    PERMUTATIONS,
    REPEATS,
    RESHAPES,
)
from lissom.compiler.ir.view_calls import Copy
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops.attention import attention
from lissom.ops.quantization import dequantize, fake_quantize
from lissom.ops.rotary import rotary

aten = torch.ops.aten

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST = torch.finfo(torch.float16).max

_LOW = {
    *(aten.linear.default, *MATMULS, *MATMULS_WITH_BIAS, *GROUPED_PRODUCTS, *CONVOLUTIONS, *ATTENTIONS),
    *(aten.embedding.default, *LAYER_NORMS, aten.group_norm.default),
}
_VIEWS = (*PERMUTATIONS, *RESHAPES, *PARTS)
"""Views of a weight that are taken of the cast weight."""
_FOLLOWS = {
    *(*RESHAPES, *REPEATS, operator.getitem, aten.cat.default, aten.stack.default, aten.clone.default, aten.contiguous.default),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar, aten.mul.Scalar, aten.neg.default),
    *(*EPILOGUES, aten.tanh.default, aten.sigmoid.default, rotary),
    *(aten.index_select.default, aten.index_copy.default, aten.index.Tensor, aten.gather.default, aten.roll.default),
    *(aten.masked_fill.Scalar, aten.where.self, aten.maximum.default, aten.minimum.default, aten.clamp.default),
    *(aten.constant_pad_nd.default, aten.pad.default, aten.max_pool2d.default),
}
_FILLS: dict[object, str] = {aten.masked_fill.Scalar: "value", aten.constant_pad_nd.default: "value", aten.pad.default: "value"}
"""Operators with a number that fills places of their result."""
_MASKS: dict[object, str] = {aten.scaled_dot_product_attention.default: "attn_mask", attention: "bias"}
Misfit = Literal["overflow", "underflow"]
_ADDENDS: dict[object, str] = {
    aten.addmm.default: "self",
    aten.baddbmm.default: "self",
    **dict.fromkeys((aten.linear.default, aten.layer_norm.default, aten.group_norm.default, *CONVOLUTIONS), "bias"),
}
"""Operands that are added to larger numbers, so that small values may underflow."""


@dataclass(frozen=True)
class Cast(Approximation):
    """Computes in bfloat16 or float16, and in float32 where that would lose too much.

    Attributes:
        dtype: `bf16`, or `fp16`, which needs calibration data to find what overflows.
        margin: how many times larger than on calibration data a value may become without overflow in float16; 1 or more.
        underflow: fraction of a tensor's non-zero elements that may be below float16's smallest normal number, 0 to 1.
        skip: module paths that stay in float32, with `*` and `?`, separated by commas: `"encoder.layer.0,*.lm_head"`.
    """

    dtype: str = "bf16"
    margin: float = 4.0
    underflow: float = 0.5
    skip: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnsupportedError(f"cast{{dtype={self.dtype}}} is not known; choose {', '.join(DTYPES)}")
        if not self.margin >= 1:
            raise UnsupportedError(f"cast takes margin= of 1 or more, not {self.margin:g}")
        if not 0 <= self.underflow <= 1:
            raise UnsupportedError(f"cast takes underflow= of 0 to 1, not {self.underflow:g}")

    def run(self, edit: Editor) -> None:
        low = DTYPES[self.dtype]
        if low is not torch.float16:
            Caster(edit, low, self.skip).run()
            return
        if not edit.data:
            raise RequirementError(
                "cast{dtype=fp16} needs calibration data to find what overflows: pass data=, or choose dtype=bf16"
            )
        guard = _Guard(edit, self.margin, self.underflow)
        Caster(edit, low, self.skip, guard).run()
        guard.report()


@dataclass
class _Guard:
    """The ranges of all values of a program, and those that do not fit float16."""

    edit: Editor
    margin: float
    underflow: float
    ranges: dict[fx.Node, Range] = field(init=False)
    sums: set[fx.Node] = field(init=False)
    candidates: set[fx.Node] = field(default_factory=set[fx.Node])
    overflowing: dict[fx.Node, float] = field(default_factory=dict[fx.Node, float])
    vanishing: set[fx.Node] = field(default_factory=set[fx.Node])

    def __post_init__(self) -> None:
        program = self.edit.program
        self.sums = set(program.fact(structure).residuals)
        values = {node for node in program if node.op in ("placeholder", "call_function")}
        progress = partial(self.edit.report, "measure")
        self.ranges = measured_ranges(program, self.edit.data, values, torch.float16, progress)

    def misfit(self, node: fx.Node) -> Misfit | None:
        """The reason a call cannot run in float16; None if it can."""
        mask, addend = (nodes.argument(node, of[node.target]) if node.target in of else None for of in (_MASKS, _ADDENDS))
        misfits = [
            self._misfit(value, mask=value is mask, added=value is addend)
            for value in (*node.all_input_nodes, node)
            if _is_floating(value) and nodes.tensor_type(value).rank > 0
        ]
        if node.target is attention:
            q, k = (self._range(value) for value in node.all_input_nodes[:2])
            largest = q.norm * k.norm if q is not None and k is not None else 0.0
            if largest > _LARGEST / 2:
                self.overflowing[node] = largest
                misfits.append("overflow")
        return "overflow" if "overflow" in misfits else "underflow" if "underflow" in misfits else None

    def _misfit(self, value: fx.Node, *, mask: bool, added: bool) -> Misfit | None:
        value_range = self._range(value)
        if value_range is None:
            return None
        # Negative values of a mask are clamped.
        largest = value_range.high if mask else value_range.largest
        if largest > (_LARGEST if value.op == "get_attr" else _LARGEST / self.margin):
            self.overflowing[value] = largest
            return "overflow"
        if value_range.small > self.underflow and not (mask or added):
            self.vanishing.add(value)
            return "underflow"
        return None

    def _range(self, value: fx.Node) -> Range | None:
        if value not in self.ranges and value.op == "get_attr":
            self.ranges[value] = range_of(self.edit.program.weight(str(value.target)), torch.float16)
        return self.ranges.get(value)

    def report(self) -> None:
        """Note in the history how many values stay in float32, and why."""
        values = [node for node in self.candidates if nodes.is_tensor(node)]
        kept, limit = [node for node in values if dtype_of(node) != torch.float16], f"{_LARGEST:.0f}/{self.margin:g}"
        if not kept:
            self.edit.note(f"all {len(values)} values fit float16, with none over {limit}")
            return
        parts: list[str] = []
        if self.overflowing:
            worst = max(self.overflowing, key=lambda value: self.overflowing[value])
            path = nodes.origin(worst).module_path
            named = (
                "the residual stream" if worst in self.sums else f"'{worst.target if worst.op == 'get_attr' else worst.name}'"
            )
            where = f" in {path}" if path and worst.op != "get_attr" else ""
            bound = f"{_LARGEST:.0f}" if worst.op == "get_attr" else limit
            parts.append(
                f"{len(self.overflowing)} may overflow, the largest being {named}{where}, "
                f"{self.overflowing[worst]:.2g} over {bound}"
            )
        if self.vanishing:
            parts.append(f"{len(self.vanishing)} would lose much to underflow")
        cause = " and ".join(parts)
        self.edit.note(f"kept {len(kept)} of {len(values)} values in float32: of values and weights {cause}; the rest follows")


@dataclass
class Caster:
    """Writes the casts of a program whose values may become a format of fewer bits; what a guard names stays in float32."""

    edit: Editor
    low: torch.dtype
    skip: str = ""
    guard: _Guard | None = None
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict[tuple[fx.Node, torch.dtype], fx.Node])
    changed: set[fx.Node] = field(default_factory=set[fx.Node])

    def run(self) -> None:
        program = self.edit.program
        output_types = [nodes.node_type(result) for result in program.output.all_input_nodes]
        results = list(program.output.all_input_nodes)
        self._cast_state()
        for node in self.edit.nodes():
            wanted = self._dtype_for(node)
            mask = nodes.argument(node, _MASKS[node.target]) if node.target in _MASKS and wanted is self.low else None
            swaps: dict[fx.Node, fx.Node] = {}
            for used in _operands(node):
                if wanted is not None and _is_floating(used) and nodes.tensor_type(used).dtype in (torch.float32, self.low):
                    swaps[used] = self._cast(used, wanted, node, clamp=used is mask)
            self._apply(node, {old: new for old, new in swaps.items() if old is not new}, wanted)
        for result, before in zip(results, output_types, strict=True):
            if nodes.is_tensor(result) and nodes.tensor_type(result).dtype == self.low and before != nodes.node_type(result):
                back = self._cast(result, torch.float32, program.output)
                program.output.replace_input_with(result, back)

    def _cast_state(self) -> None:
        """Store the KV cache in reduced precision: state that calls write rows to and nothing else reads."""
        for write in self.edit.program.nodes(aten.index_copy.default):
            state = nodes.operand(write)
            if state.op != "get_attr" or nodes.tensor_type(state).dtype != torch.float32:
                continue
            others = [user for user in state.users if user is not write]
            copies = [Copy(user) for user in others if nodes.is_call(user, aten.copy_.default)]
            kept = len(copies) == len(others) and all(copy.x is state and copy.source is write for copy in copies)
            if str(state.target) in self.edit.program.state and others and kept and self._obstacle(write) is None:
                self.edit.set_weight(state, self.edit.program.weight(str(state.target)).to(self.low), retype=False)
                self.changed.add(state)

    def _dtype_for(self, node: fx.Node) -> torch.dtype | None:
        """The floating dtype to cast a node's operands to; None to leave them as they are."""
        if nodes.is_state_write(node) and dtype_of(Copy(node).x) == dtype_of(Copy(node).source):
            return None
        follows = node.target in _FOLLOWS or is_view(node)
        short = any(_is_floating(operand) and nodes.tensor_type(operand).dtype == self.low for operand in _operands(node))
        if self.guard is not None and not is_protected(node, self.skip):
            # The calls that would run in float16 if all values fitted.
            candidates = self.guard.candidates
            if node.target in _LOW or (follows and not candidates.isdisjoint(node.all_input_nodes)):
                candidates.add(node)
        if node.target in _LOW or (short and follows):
            reason = self._obstacle(node)
            if reason is None:
                return self.low
            self.edit.skip(node, reason)
        return torch.float32 if short else None

    def _obstacle(self, node: fx.Node) -> str | None:
        """The reason a call stays in float32; None if it can run in reduced precision."""
        if is_protected(node, self.skip):
            return "skip= names it"
        match self.guard.misfit(node) if self.guard is not None else None:
            case "overflow":
                return "an input or output may overflow float16"
            case "underflow":
                return "an input or output would lose much to underflow in float16"
            case None:
                return None

    def _cast(self, source: fx.Node, dtype: torch.dtype, reader: fx.Node, *, clamp: bool = False) -> fx.Node:
        """The value in that dtype, cast before its first reader; a weight is cast at compile time."""
        source_type = nodes.tensor_type(source)
        # A number takes the dtype of the tensor it is combined with.
        if source_type.dtype == dtype or (source_type.rank == 0 and not self._overflows(source)):
            return source
        edit, key = self.edit, (source, dtype)
        if key not in self.casts:
            with edit.before(reader):
                if source.op == "get_attr" and dtype == self.low and source.target not in edit.program.state:
                    low = _fitted(edit.tensor(source), dtype).to(dtype)
                    self.casts[key] = edit.weight(f"{source.target}_low", edit.like(source, low))
                elif nodes.is_call(source, *_VIEWS) and self._views_weight(source):
                    # The weight is cast at compile time, and not its view whenever the program runs.
                    low = self._cast(source.all_input_nodes[0], dtype, reader)
                    self.casts[key] = edit.again(source, low)
                elif source.target is dequantize:
                    self.casts[key] = edit.call(dequantize, *source.args, **{**source.kwargs, "dtype": dtype})
                else:
                    value = edit.call(aten.clamp_min.default, source, _lowest(dtype)) if clamp else source
                    self.casts[key] = edit.call(aten.to.dtype, value, dtype)
        return self.casts[key]

    def _views_weight(self, value: fx.Node) -> bool:
        """True for a view of a weight, such as the transposed matrices of experts."""
        while nodes.is_call(value, *_VIEWS):
            value = value.all_input_nodes[0]
        return value.op == "get_attr" and value.target not in self.edit.program.state

    def _overflows(self, node: fx.Node) -> bool:
        """True for a constant with float32's lowest number, which is minus infinity in reduced precision."""
        if node.op != "get_attr" or node.target in self.edit.program.state:
            return False
        value = self.edit.program.weight(str(node.target))
        return not torch.equal(_fitted(value, self.low), value)

    def _fit_fill(self, node: fx.Node, dtype: torch.dtype | None) -> None:
        """Clamp the number that fills places of a result in reduced precision."""
        value = nodes.argument(node, _FILLS[node.target]) if node.target in _FILLS and dtype == self.low else None
        if isinstance(value, (int, float)):
            fitted = float(_fitted(torch.tensor(value, dtype=torch.float64), self.low))
            if fitted < math.inf:
                fitted = min(fitted, torch.finfo(self.low).max)
            nodes.set_argument(node, _FILLS[node.target], fitted if fitted != value else value)

    def _apply(self, node: fx.Node, swaps: dict[fx.Node, fx.Node], dtype: torch.dtype | None) -> None:
        """Let the node read the cast values, and infer its type again where its inputs have changed."""
        if not swaps and self.changed.isdisjoint(node.all_input_nodes):
            return
        for old, new in swaps.items():
            node.replace_input_with(old, new)
        self._fit_fill(node, dtype)
        before = nodes.node_type(node)
        self.edit.retype_call(node)
        if swaps:
            self.edit.rewritten += 1
        if nodes.node_type(node) != before:
            self.changed.add(node)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The inputs of a call that may be cast: a stored scale keeps its dtype."""
    return node.all_input_nodes[:1] if node.target in (fake_quantize, dequantize) else node.all_input_nodes


def _lowest(dtype: torch.dtype) -> float:
    """The number that hides a position in an additive mask of that dtype."""
    lowest = torch.finfo(dtype).min
    return lowest / 2 if dtype == torch.float16 else lowest


def _fitted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor with float32's lowest numbers, which hide positions, raised to that dtype's `_lowest`, or itself."""
    if tensor.numel() == 0 or bool(tensor.amin() >= torch.finfo(torch.bfloat16).min):
        return tensor
    return torch.where((tensor < torch.finfo(torch.bfloat16).min) & tensor.isfinite(), _lowest(dtype), tensor)


def _is_floating(node: fx.Node) -> bool:
    return nodes.is_tensor(node) and nodes.tensor_type(node).dtype.is_floating_point
