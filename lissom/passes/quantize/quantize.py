"""Quantize linear layers: weights, and for most schemes activations, in a low-precision format.

x_q = clamp(round(x / s) + z),  x ≈ s · (x_q - z).  Nodes are `lissom::fake_quantize` and `lissom::fake_quantize_dynamic`,
quantize followed by dequantize: the program stays in floating point, so it runs, trains and exports. Exact passes then store
the weights as integers, and backends fuse the nodes into integer kernels. Jacob et al. 2018, arXiv:1712.05877.

| scheme | weights | activations |
|---|---|---|
| int8-dynamic (W8A8) | int8, per-channel | uint8, per-token or per-tensor scale and zero point, computed at run time |
| int8-group (W8A8) | int8, per-channel | int8, per-group of 32, computed at run time |
| int8-static (W8A8) | int8, per-channel | uint8, per-tensor scale and zero point from calibration data |
| int8-weight (W8A16) | int8, per-channel | floating point |
| int4-weight (W4A16) | uint4, per-group of 32 with zero points | floating point |
| int4-dynamic (W4A8) | uint4, per-group of 32 with zero points | int8, as for int8-group |
| fp8 | e4m3, per-channel | e4m3, per-token or per-tensor scale, computed at run time |
| mxfp4-weight (W4A16) | e2m1, per-group of 32, scales are powers of two | floating point |
| mxfp8-weight (W8A16) | e4m3, per-group of 32, scales are powers of two | floating point |
| nvfp4-weight (W4A16) | e2m1, per-group of 16, e4m3 scales and one float32 scale for the tensor | floating point |

A scale for 32 neighbours rounds least where some features are far larger than others, as in decoders. It takes about as long as
a scale per token for a few rows, as in decode, and longer for many.

The last three are the block formats of `lissom/ops/block_formats.py`, which has their formulas. Their groups and scales are
fixed, and there are no zero points. The experts of a mixture, whose matrices are stacked in one weight, have their own scales.

The residual stream, norms and softmax stay in floating point unless `residual` or `attention` is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import fx

from lissom.compiler.analysis.amounts import UNCHANGED, Amounts, AmountSite, amounts_text
from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.analysis.structure.linear import input_of, is_attention, is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of, treated_layers, weight_sites
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.observers import Observer, WeightObserver, observed_ranges, weight_scale
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention, Embedding
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import CONVOLUTIONS
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops.block_formats import BLOCK_FORMATS, BlockFormat, block_scale
from lissom.ops.formats import FORMATS, Format, scale_for, weight_format
from lissom.ops.quantization import GROUP, fake_quantize, fake_quantize_dynamic

_IntegerScheme = Literal["int8-dynamic", "int8-group", "int8-static", "int8-weight", "int4-weight", "int4-dynamic"]
Scheme = Literal[_IntegerScheme, "fp8", "mxfp4-weight", "mxfp8-weight", "nvfp4-weight"]
_Grid = tuple[torch.Tensor, torch.Tensor | None, float]
"""Scale, zero point, and the number that is multiplied with every scale."""
_DEFAULT_GROUP = 32
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Quantize(Approximation):
    """Quantizes linear layers to int8, int4, fp8 or a block format.

    Attributes:
        scheme: what is quantized, and when its scale is computed; see the table. `int8-static` needs calibration data; `auto`
            is `int8-group` in programs on a CPU with a KV cache or other state, and `int8-dynamic` elsewhere.
        schemes: schemes of single layers by module path, with `*` and `?`; `none` leaves a layer as it is:
            `"*=none,encoder.layer.0=int8-dynamic,*.output.dense=int4-weight"`. Layers that it does not name get `scheme`.
        granularity: per-tensor, per-channel or per-group weight scales; `auto` is the scheme's default.
        group: number of neighbouring weights per scale with granularity=group.
        symmetric: quantizes weights without a zero point; asymmetric weights are stored as uint8 or uint4. By default those of
            four bits have zero points: a byte for each group, which takes up to a quarter of the error.
        activations: per-token or per-tensor activation scales of int8-dynamic and fp8.
        observer: chooses the clipping range of activations from calibration data: `min-max`, `percentile`, `mse` or `entropy`.
        fraction: the part of all values that `percentile` keeps inside the clipping range.
        weight_observer: chooses the clipping range of weights, `min-max` or `mse`; `auto` is `mse` for int4.
        embeddings: quantizes embedding tables too, and with them the LM heads tied to them. By default schemes of four bits
            store tables that are tied to an LM head in int8; other tables, and those of other schemes, stay as they are.
        lm_head: quantizes LM heads and classifiers that are not tied to an embedding table.
        attention: quantizes queries, keys and values at the input of attention.
        residual: quantizes the outputs of residual adds.
        skip: module paths to leave as they are, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        only: module paths to change, in the same form; others stay as they are.
    """

    scheme: Literal[Scheme, "auto"] = "int8-dynamic"
    granularity: Literal["auto", "tensor", "channel", "group"] = "auto"
    group: int = _DEFAULT_GROUP
    symmetric: bool | None = None
    activations: Literal["token", "tensor"] = "token"
    observer: Observer = "min-max"
    fraction: float = 0.9999
    weight_observer: WeightObserver = "auto"
    embeddings: bool | None = None
    lm_head: bool = False
    attention: bool = False
    residual: bool = False
    skip: str = ""
    only: str = ""
    schemes: str = ""

    def __post_init__(self) -> None:
        if self.group < 1:
            raise UnsupportedError(f"quantize takes group= of 1 or more neighbours, not {self.group}")
        if not 0.5 < self.fraction <= 1:
            raise UnsupportedError(f"quantize takes fraction= above 0.5 and up to 1, not {self.fraction:g}")
        if self.scheme == "fp8" and self.symmetric is False:
            raise UnsupportedError("quantize{scheme=fp8} has no zero points: leave out symmetric=false")
        self._check_block_format()
        if (self.attention or self.residual) and (self.scheme.endswith(("-weight", "auto")) or _by_group(self.scheme)):
            what = "weights" if self.scheme.endswith("-weight") else "inputs of linear layers"
            raise UnsupportedError(
                f"quantize{{scheme={self.scheme}}} quantizes {what} only: leave out attention= and residual=, or choose "
                "int8-dynamic, int8-static or fp8"
            )
        if self._schemes() and (self.attention or self.residual):
            raise UnsupportedError("quantize{schemes=} names layers: leave out attention= and residual=, which name none")

    def _check_block_format(self) -> None:
        """Refuse options that a block format fixes."""
        form = self._block_format
        if form is None:
            return
        fixed = {"granularity": ("auto", "group"), "group": (_DEFAULT_GROUP, form.size), "symmetric": (None, True)}
        fixed["weight_observer"] = ("auto", "min-max")
        odd = next((name for name, values in fixed.items() if getattr(self, name) not in values), None)
        if odd is not None:
            raise UnsupportedError(
                f"quantize{{scheme={self.scheme}}} scales blocks of {form.size} by their largest value and has no zero points: "
                f"leave out {odd}="
            )

    def _schemes(self) -> Amounts:
        takes = f"one of {', '.join(get_args(Scheme))}, or none"
        return Amounts.parse(self.schemes, "quantize{schemes=}", lambda amount: amount in get_args(Scheme), takes)

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        layers, tables = _matrices(program), {_table(site.node) for site in program.fact(structure).embeddings}
        sites = weight_sites(layers, cls.name(), _taken)
        multiplied = {matrix.name for node, matrix in layers.items() if is_linear(node)}
        for node, matrix in layers.items():
            site = sites[matrix.name]
            text = f"{cls.name()}{{{'embeddings' if matrix.node in tables else 'lm_head'}=true}}"
            if matrix.node in tables or node in program.fact(structure).lm_heads:
                kind = site.kind if matrix.name in multiplied else "embedding"
                sites[matrix.name] = replace(site, kind=kind, takes={text: _taken(*matrix.shape)})
        return [*sites.values()]

    @property
    def weight_format(self) -> Format:
        """The format of weights."""
        if self._block_format is not None:
            return self._block_format.element
        if self.scheme == "fp8":
            return FORMATS["fp8"]
        return weight_format(self.scheme.partition("-")[0], self.symmetric)

    @property
    def _block_format(self) -> BlockFormat | None:
        """The block format of weights; None for schemes with a scale in floating point."""
        return _block_format_of(self.scheme)

    @property
    def activation_format(self) -> Format | None:
        """The format of activations; None for weight-only schemes."""
        if self.scheme.endswith("-weight"):
            return None
        return FORMATS["fp8" if self.scheme == "fp8" else "int8" if _by_group(self.scheme) else "uint8"]

    def run(self, edit: Editor) -> None:
        if self.scheme == "auto":
            on_cpu = all(leaf.type.device.type == "cpu" for leaf in edit.program.signature.tensors)
            chosen: Scheme = "int8-group" if edit.program.state and on_cpu else "int8-dynamic"
            edit.note(f"scheme=auto is {chosen} here")
            replace(self, scheme=chosen).run(edit)
            return
        matrices = {node: matrix for node, matrix in _matrices(edit.program).items() if self.embeddings or is_linear(node)}
        sites = weight_sites(matrices, self.name(), _taken)
        parts = self._parts(edit, matrices, sites) if self._schemes() else [(self, [])]
        done = {name: pass_.scheme for pass_, others in parts for name in pass_._quantize(edit, others)}
        if done and not (self.attention or self.residual or self.embeddings):
            text = amounts_text([*sites.values()], [done.get(name) for name in sites])
            per_site = replace(self, scheme=Quantize.scheme, schemes=f"*={UNCHANGED},{text}", skip="", only="")
            edit.per_site = format_pass(per_site)

    def _parts(
        self, edit: Editor, matrices: Mapping[fx.Node, Matrix], sites: Mapping[str, AmountSite]
    ) -> list[tuple[Quantize, list[fx.Node]]]:
        """A pass for each scheme, with the layers that are not its own; layers that stay as they are are reported."""
        given = dict(zip(sites, self._schemes().at([*sites.values()], "linear layers"), strict=True))
        schemes = {node: given[matrix.name] or self.scheme for node, matrix in matrices.items()}
        for node in (rest := [node for node in edit.program.nodes() if is_linear(node) and node not in matrices]):
            if isinstance(reason := matrix_of(node, stacks=True), str) and node.target not in CONVOLUTIONS:
                edit.skip(node, reason)
        for node, scheme in schemes.items():
            if scheme == UNCHANGED:
                edit.skip(node, "schemes= leaves it as it is")
        return [
            (replace(self, scheme=scheme, schemes=""), [*rest, *(node for node, other in schemes.items() if other != scheme)])
            for scheme in get_args(Scheme)
            if scheme in schemes.values()
        ]

    def _quantize(self, edit: Editor, others: Sequence[fx.Node]) -> list[str]:
        """Quantize all layers but `others` by one scheme; returns the names of their weights."""
        if self.scheme == "int8-static" and not edit.data:
            raise RequirementError("quantize{scheme=int8-static} needs calibration data: pass data=, or choose int8-dynamic")
        layers = self._layers(edit, others)
        values = dict.fromkeys(input_of(layer) for layer in layers)
        if self.attention:
            calls = map(Attention, edit.nodes(*Attention.targets))
            values |= dict.fromkeys(operand for call in calls for operand in (call.q, call.k, call.v))
        if self.residual:
            values |= dict.fromkeys(edit.program.fact(structure).residuals)
        if self.activation_format is not None:
            self._quantize_activations(edit, list(values), set(layers))
        tables = {_table(site.node) for site in edit.program.fact(structure).embeddings}
        for matrix in {matrix.name: matrix for matrix in layers.values()}.values():
            # Gemma's table in int8, a scale for 32 neighbours, is the same to the bit; in int4 it costs 1.6 % of perplexity.
            form = self._table_format if matrix.node in tables else self.weight_format
            self._quantize_weight(edit, matrix.node, form, transposed=matrix.transposed)
        if self.embeddings:
            for site in edit.program.fact(structure).embeddings:
                if site.node not in others:
                    self._quantize_table(edit, site.node)
        return [matrix.name for matrix in layers.values()]

    @property
    def _table_format(self) -> Format:
        """The format of tables that are tied to an LM head."""
        return weight_format("int8", self.symmetric) if self.embeddings is None else self.weight_format

    @property
    def _takes_tied(self) -> bool:
        """True if tables that are tied to an LM head are quantized: they are most of what a small decoder reads for a token."""
        return has_four_bits(self.scheme) if self.embeddings is None else self.embeddings

    def _layers(self, edit: Editor, others: Sequence[fx.Node]) -> dict[fx.Node, Matrix]:
        """The linear layers to quantize, with their matrices; the rest but for `others` is reported as skipped."""
        return treated_layers(
            edit,
            lambda node: obstacle_by_name(node, skip=self.skip, only=self.only) or matrix_of(node, stacks=True),
            partial(self._obstacle, edit),
            {*edit.program.fact(structure).convolutions, *others},
        )

    def _obstacle(self, edit: Editor, node: fx.Node, matrix: Matrix) -> str | None:
        look_ups = [site.node for site in edit.program.fact(structure).embeddings if _table(site.node) is matrix.node]
        tied = bool(look_ups)
        if tied and not self._takes_tied:
            return "its weight is an embedding table too; embeddings=true treats both"
        if named := next(filter(None, (obstacle_by_name(look_up, skip=self.skip, only="") for look_up in look_ups)), None):
            return f"its weight is an embedding table too, and {named}"
        if not tied and node in edit.program.fact(structure).lm_heads and not self.lm_head:
            return "it is an LM head or classifier; lm_head=true includes it"
        if nodes.tensor_type(input_of(node)).dtype == torch.float64:
            return "it computes in float64"
        size = nodes.fixed_size(matrix.node, -2 if matrix.transposed else -1)
        if _by_group(self.scheme) and size % GROUP:
            return f"its {size} input features are no multiple of {GROUP}, of which activations share a scale"
        return self._shape_obstacle(size, self._table_format if tied else self.weight_format)

    def _shape_obstacle(self, size: int, form: Format) -> str | None:
        block = self._block_of(form)
        if block is not None and size % block.size:
            return f"its {size} input features are no multiple of {block.size}, the block size of {block.name}"
        if block is None and self._granularity == "group" and size % self.group:
            return f"its {size} input features are no multiple of group={self.group}"
        if form.bits == 4 and size % 2:
            return f"its number of input features, {size}, is odd, and {form.name} packs two per byte"
        return None

    @property
    def _granularity(self) -> str:
        if self.granularity != "auto":
            return self.granularity
        return "group" if has_four_bits(self.scheme) else "channel"

    def _block_of(self, form: Format) -> BlockFormat | None:
        """The scheme's block format where weights in this format are its elements, and not tables in int8."""
        return self._block_format if self._block_format is not None and form is self._block_format.element else None

    def _quantize_weight(self, edit: Editor, node: fx.Node, form: Format, *, transposed: bool = False) -> None:
        """Insert Q/DQ between a weight and all its readers."""
        weight = edit.tensor(node)
        outputs, inputs = weight.shape[:-3:-1] if transposed else weight.shape[-2:]
        block = self._block_of(form)
        group = self.group if block is None else block.size
        shapes = {"tensor": (1, 1), "channel": (outputs, 1), "group": (outputs, inputs // group)}
        shape = shapes["group" if block is not None else self._granularity]
        # A stack of matrices has scales for each of them.
        shape = (*weight.shape[:-2], *(shape[::-1] if transposed else shape))
        zero_point, tensor_scale = None, 1.0
        if block is not None:
            scale, tensor_scale = block_scale(weight, shape, block)
        else:
            scale, zero_point = weight_scale(weight, shape, form, self.weight_observer)
            if self._granularity == "group":
                least, largest = scale.abs().aminmax()
                scale = scale.half() if least > _HALF.tiny and largest < _HALF.max else scale
        self._insert(edit, node, list(node.users), form, (scale, zero_point, tensor_scale), str(node.target))

    def _insert(
        self, edit: Editor, value: fx.Node, readers: list[fx.Node], form: Format, grid: _Grid | None, weight: str = ""
    ) -> None:
        """Insert Q/DQ between a value and its readers.

        Args:
            grid: computed at run time where it is None.
            weight: the value's name when it is a weight.
        """
        name = weight or value.name
        with edit.before(readers[0], like=[value if weight or value.op == "call_function" else readers[0]]):
            if grid is None:
                granularity = "group" if _by_group(self.scheme) else self.activations
                rounded = edit.call(fake_quantize_dynamic, value, format=form.name, granularity=granularity)
            else:
                scale, zero_point, tensor_scale = grid
                parts = [edit.weight(f"{name}_scale", scale)]
                if zero_point is not None:
                    parts.append(edit.weight(f"{name}_zero_point", zero_point.to(torch.uint8)))
                options = {} if tensor_scale == 1 else {"tensor_scale": tensor_scale}
                rounded = edit.call(fake_quantize, value, *parts, format=form.name, **options)
        for reader in readers:
            reader.replace_input_with(value, rounded)
        edit.rewritten += 1

    def _quantize_table(self, edit: Editor, look_up: fx.Node) -> None:
        """Quantize an embedding table, unless it is quantized already with an LM head tied to it."""
        table = _table(look_up)
        if table is None:
            return
        reason = obstacle_by_name(look_up, skip=self.skip, only=self.only)
        if edit.may_change(look_up, reason or self._shape_obstacle(nodes.fixed_size(table, 1), self.weight_format)):
            self._quantize_weight(edit, table, self.weight_format)

    def _quantize_activations(self, edit: Editor, values: list[fx.Node], layers: set[fx.Node]) -> None:
        """Insert Q/DQ between these values and the layers, and with `attention` and `residual` their readers there."""
        form = self.activation_format
        assert form is not None
        ranges: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.scheme == "int8-static":
            ranges = observed_ranges(
                edit.program, edit.data, set(values), self.observer, form, self.fraction, partial(edit.report, "observe")
            )
        sums = set(edit.program.fact(structure).residuals) if self.residual else set[fx.Node]()
        for value in values:
            asked = [user for user in value.users if user in layers or (self.attention and is_attention(user)) or value in sums]
            if asked:
                self._insert(edit, value, asked, form, (*scale_for(*ranges[value], form), 1.0) if value in ranges else None)


def _block_format_of(scheme: str) -> BlockFormat | None:
    return BLOCK_FORMATS.get(scheme.removesuffix("-weight"))


def has_four_bits(scheme: str) -> bool:
    """True for a scheme whose weights have four bits."""
    block = _block_format_of(scheme)
    return scheme.startswith("int4") if block is None else block.element.bits == 4


def _by_group(scheme: str) -> bool:
    """True if activations have per-group scales."""
    return scheme in ("int8-group", "int4-dynamic")


def _table(look_up: fx.Node) -> fx.Node | None:
    """The table of an embedding where it is a weight."""
    table = Embedding(look_up).table
    return table if table.op == "get_attr" else None


def _matrices(program: Program) -> dict[fx.Node, Matrix]:
    """The linear layers and the look-ups in embedding tables, each with its weight; those without a matrix are left out."""
    layers = {
        node: matrix
        for node in program.nodes()
        if is_linear(node) and isinstance(matrix := matrix_of(node, stacks=True), Matrix)
    }
    look_ups = {site.node: table for site in program.fact(structure).embeddings if (table := _table(site.node)) is not None}
    return layers | {node: Matrix(table, transposed=False) for node, table in look_ups.items()}


def _taken(outputs: int, inputs: int) -> tuple[str, ...]:
    """The schemes that fit a weight of that many out_features and in_features, at default options."""
    return (UNCHANGED, *(scheme for scheme in get_args(Scheme) if inputs % _group_of(scheme) == 0))


def _group_of(scheme: str) -> int:
    """The number of neighbouring inputs that share a scale, at default options; 1 where all of them do."""
    block = _block_format_of(scheme)
    return block.size if block is not None else _DEFAULT_GROUP if has_four_bits(scheme) or _by_group(scheme) else 1
