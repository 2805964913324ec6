"""Checks on programs: that one is well formed, and that two give the same outputs."""

from __future__ import annotations

import operator
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import fx

from lissom.compiler import fake, text
from lissom.compiler import node as nodes
from lissom.compiler.errors import VerifyError
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample
from lissom.compiler.types import TensorType, format_type

_SIZE_FUNCTIONS = {torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite, torch.sym_float, torch.sym_int}
_SIZE_MODULES = {operator.__name__, "_operator", "math", "torch.utils._sympy.functions"}

TOLERANCE = {
    # Two float64 kernels that sum a few thousand terms in another order differ by some 1e-14.
    torch.float64: 1e-12,
    # The same in float32 (unit roundoff 6e-8): 1e-7 to 5e-6 seen over 12 to 96 layers.
    torch.float32: 2e-5,
    # One rounding to 11 bits is 5e-4; a residual stream meets some twenty of them.
    torch.float16: 1e-2,
    # One rounding to 8 bits is 4e-3; likewise.
    torch.bfloat16: 8e-2,
}


def tolerance_of(program: Program) -> float:
    """The relative error two correct programs may show: that of the coarsest floating type computed in."""
    dtypes = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and nodes.is_tensor(node):
            dtypes.add(nodes.tensor_type(node).dtype)
    return max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=TOLERANCE[torch.float32])


def verify_structure(program: Program, before: Program | None = None) -> None:
    """Check that the program is well formed: order, names, dialect, types, signature.

    Types are recomputed with fake tensors; nodes that `before` has too, with arguments of equal types, keep theirs.

    Raises: VerifyError naming the first node at fault, with the lines around it.
    """
    known = {node.name: node for node in before.graph.nodes} if before else {}
    defined: set[fx.Node] = set()
    names: set[str] = set()
    for node in program.graph.nodes:
        if node.name in names:
            _fail(program, node, f"the name '{node.name}' is used twice")
        names.add(node.name)
        for used in node.all_input_nodes:
            if used not in defined:
                _fail(program, node, f"it reads '{used.name}', which is defined later or not at all")
        if node.op == "call_function":
            _check_dialect(program, node)
        if node.op != "output" and not nodes.has_value(node):
            _fail(program, node, "it has no type; make nodes through the editor")
        if node.op == "get_attr":
            _check_weight(program, node)
        elif node.op == "call_function" and not _is_unchanged(node, known.get(node.name)):
            _check_type(program, node, known.get(node.name))
        defined.add(node)
    _check_signature(program, before)


def _is_unchanged(node: fx.Node, old: fx.Node | None) -> bool:
    """True when a call is the same as before, of values of the same types, and kept its own."""
    if old is None or node.target != old.target or nodes.value(node) is not nodes.value(old):
        return False
    reads, read = list[fx.Node](), list[fx.Node]()
    literals = [
        fx.map_arg((item.args, item.kwargs), lambda used, found=found: found.append(used))
        for item, found in ((node, reads), (old, read))
    ]
    return literals[0] == literals[1] and len(reads) == len(read) and all(map(_is_alike, reads, read))


def _is_alike(left: fx.Node, right: fx.Node) -> bool:
    """True when whatever is computed from the one value has the type of what is computed from the other."""
    one, other = nodes.value(left), nodes.value(right)
    return one is other or fake.description(one) == fake.description(other)


def _check_dialect(program: Program, node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable and not (nodes.is_state_write(node) and _writes_state(program, node)):
            _fail(program, node, f"{target} writes to its argument; only buffers listed as state may be written")
        return
    module = getattr(target, "__module__", "")
    if module not in _SIZE_MODULES and target not in _SIZE_FUNCTIONS:
        _fail(program, node, f"{text.target_text(target)} is no ATen or registered operator and no function of sizes")


def _writes_state(program: Program, node: fx.Node) -> bool:
    target = node.args[0]
    return isinstance(target, fx.Node) and str(target.target) in program.state


def _check_weight(program: Program, node: fx.Node) -> None:
    if not program.has_weight(str(node.target)):
        _fail(program, node, f"the program has no weight '{node.target}'")
    weight, typed = program.weight(str(node.target)), nodes.tensor_type(node)
    found = TensorType(weight.dtype, tuple(weight.shape), weight.device)
    if found != typed:
        described = format_type(found, program.signature.name_of)
        _fail(program, node, f"the weight is {described} but typed {format_type(typed, program.signature.name_of)}")


def _check_type(program: Program, node: fx.Node, old: fx.Node | None) -> None:
    """Type a call anew. Where no pass has typed it, the type is the capture's, which may say less of sizes that vary
    than can be worked out; it must then be right at the example's sizes.
    """
    try:
        again = nodes.type_of(fake.fake_call(program.fake_mode, node))
    except Exception as error:
        _fail(program, node, f"it does not run on its arguments' types: {error}", cause=error)
    recorded = nodes.node_type(node)
    untouched = old is not None and nodes.value(old) is nodes.value(node)
    loose = untouched or _has_new_sizes(node) or fake.depends_on_values(program.fake_mode, recorded)
    same = fake.same_at_example if loose else fake.same_type
    if not same(program.fake_mode, again, recorded):
        name_of = program.signature.name_of
        _fail(program, node, f"it yields {format_type(again, name_of)} but is typed {format_type(recorded, name_of)}")


def _has_new_sizes(node: fx.Node) -> bool:
    """True for a call whose result is as large as values say; its size gets a new name each time it is typed."""
    return torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())


def _check_signature(program: Program, before: Program | None) -> None:
    inputs, arguments = program.placeholders, program.signature.tensors
    if len(inputs) != len(arguments):
        raise VerifyError(f"the program has {len(inputs)} inputs but its signature names {len(arguments)}")
    for node, argument in zip(inputs, arguments, strict=True):
        if not fake.same_type(program.fake_mode, nodes.node_type(node), argument.type):
            described = format_type(argument.type, program.signature.name_of)
            _fail(program, node, f"the signature says {described}")
    if before is None or before.signature is not program.signature:
        return
    old, new = _output_types(before), _output_types(program)
    if len(old) != len(new):
        raise VerifyError(f"the program had {len(old)} outputs and has {len(new)} now; a pass keeps the outputs")
    for index, (wanted, found) in enumerate(zip(old, new, strict=True)):
        if not fake.same_type(program.fake_mode, wanted, found):
            name_of = program.signature.name_of
            was, now = format_type(wanted, name_of), format_type(found, name_of)
            raise VerifyError(f"output {index} was {was} and is now {now}; a pass keeps the outputs' types")


def _output_types(program: Program) -> list[nodes.ValueType]:
    leaves: Sequence[object] = program.output.args[0]  # pyright: ignore[reportAssignmentType]
    return [nodes.node_type(leaf) if isinstance(leaf, fx.Node) else None for leaf in leaves]


def _fail(program: Program, node: fx.Node, reason: str, cause: Exception | None = None) -> NoReturn:
    raise VerifyError(f"{text.place(program, node)}: {reason}\n{text.excerpt(program, node)}") from cause


@dataclass(frozen=True)
class Divergence:
    """How far outputs are from those of another program, over all samples.

    relative_error: max |a - b| / max |a|, the worst output; infinite where shapes or non-numbers disagree.
    cosine: the smallest cosine between the two values of one floating output.
    """

    relative_error: float
    cosine: float


def run_original(program: Program, samples: Sequence[Sample]) -> tuple[list[Sample], list[list[object]]]:
    """The first sample and those of the others that the program runs on, with its outputs.

    The others are drawn from the first, and a draw may break what a model asserts of its inputs: an end in every row.
    """
    kept, outputs = [*samples[:1]], run_samples(program, samples[:1])
    for sample in samples[1:]:
        with suppress(RuntimeError, ValueError, IndexError):
            outputs += run_samples(program, [sample])
            kept.append(sample)
    return kept, outputs


def run_samples(program: Program, samples: Sequence[Sample]) -> list[list[object]]:
    """The program's flat outputs on each sample, then the state it leaves, without gradients. State is put back afterwards."""
    outputs = []
    for sample in samples:
        with torch.no_grad(), kept_state(program):
            outputs.append([*program.run(sample), *program.state_values()])
    return outputs


def answers(program: Program, outputs: Sequence[list[object]]) -> list[list[object]]:
    """What calls return, of what `run_samples` gives: a pass that loses may keep the state in another form."""
    count = len(program.output.args[0])  # pyright: ignore[reportArgumentType]
    return [found[:count] for found in outputs]


def with_kept_form(before: Program, after: Program, outputs: Sequence[list[object]]) -> list[list[object]]:
    """Of what `run_samples` gives, what calls return, and the state that has the same form in both programs.

    A rewrite may keep less of the state, as where several heads of a cache are one; what was read of it is in the answers.
    """
    count = len(before.output.args[0])  # pyright: ignore[reportArgumentType]
    forms = [{name: _form(program.weight(name)) for name in program.state} for program in (before, after)]
    if forms[0].keys() != forms[1].keys():
        return [list(found) for found in outputs]
    same = [forms[1][name] == form for name, form in forms[0].items()]
    return [[*found[:count], *(item for item, kept in zip(found[count:], same, strict=True) if kept)] for found in outputs]


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


@contextmanager
def kept_state(program: Program) -> Generator[None]:
    """Put the program's state back to what it was."""
    saved = [(tensor, tensor.clone()) for tensor in program.state_tensors()]
    try:
        yield
    finally:
        for tensor, value in saved:
            tensor.copy_(value)


def compare(wanted: Sequence[Sequence[object]], found: Sequence[Sequence[object]]) -> Divergence:
    """The divergence of the outputs `found` from `wanted`, sample by sample, output by output."""
    errors, cosines = [0.0], [1.0]
    for left, right in zip(wanted, found, strict=True):
        for a, b in zip(left, right, strict=True):
            errors.append(relative_error(a, b))
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point():
                cosines.append(_cosine(a, b))
    return Divergence(max(errors), min(cosines))


def relative_error(wanted: object, found: object) -> float:
    """max |a - b| / max |a|; infinite when shapes, dtypes or the places of NaN and infinity differ.

    Integers and flags must be equal. Values under 1e-6 throughout count as 1e-6, so that noise is not divided by noise.
    """
    if not isinstance(wanted, torch.Tensor) or not isinstance(found, torch.Tensor):
        return 0.0 if type(wanted) is type(found) and wanted == found else float("inf")
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(wanted, found) else float("inf")
    if wanted.numel() == 0:
        return 0.0
    a, b = wanted.detach(), found.detach()
    precise = torch.complex128 if a.is_complex() else torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(precise), b.to(precise)
    odd = ~torch.isfinite(a)
    if not torch.equal(odd, ~torch.isfinite(b)) or not torch.equal(a[odd].nan_to_num(), b[odd].nan_to_num()):
        return float("inf")
    a, b = a.masked_fill(odd, 0), b.masked_fill(odd, 0)
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-6))


def _cosine(wanted: torch.Tensor, found: torch.Tensor) -> float:
    a, b = wanted.detach().double().flatten(), found.detach().double().flatten()
    if a.numel() != b.numel():
        return -1.0
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 1.0


def first_difference(before: Program, after: Program, sample: Sample, tolerance: float) -> tuple[fx.Node, float] | None:
    """The first node of `after` whose value differs from that of the node it stands for in `before`.

    Nodes correspond by name, or by the name a pass recorded when it replaced one by the other.
    """
    values: dict[str, object] = {}
    with torch.no_grad(), kept_state(before):
        before.run(sample, lambda node, value: values.update({node.name: lasting(node, value)}))
    found: list[tuple[fx.Node, float]] = []

    def observe(node: fx.Node, value: object) -> None:
        name = node.name if node.name in values else nodes.origin(node).replaces
        if found or name not in values:
            return
        error = worst_error(values[name], value)
        if error > tolerance:
            found.append((node, error))

    with torch.no_grad(), kept_state(after):
        after.run(sample, observe)
    return found[0] if found else None


def lasting(node: fx.Node, value: object) -> object:
    """The value as it will stay; what a write of state yields is the state itself, which is put back."""
    return value.clone() if nodes.is_state_write(node) and isinstance(value, torch.Tensor) else value


def worst_error(wanted: object, found: object) -> float:
    """The relative error of two values, the worst of their parts where they have several."""
    if isinstance(wanted, (tuple, list)) and isinstance(found, (tuple, list)):
        return max(map(worst_error, wanted, found), default=0.0)
    return relative_error(wanted, found)
