"""The steps from a program without a KV cache to an ONNX graph that a cache can be added to, whatever the runtime.

    model = export(causal(program, example, runtime), example, runtime)
    mask = take_mask(model)
    take_positions(model)

Each causal attention is a `BlockSparseAttention` with its pattern of positions and no mask. Where the program counts its tokens
from 0, the graph reads position_ids. Nothing else in a program may depend on earlier tokens: writers compare a text in parts
with the whole text.
"""

from __future__ import annotations

import onnx_ir as ir

from lissom.backends.exported import kind_and_reason
from lissom.backends.onnx.export import export_onnx
from lissom.backends.onnx.rewriting import Writer, constant_of, nodes_of, shape_of
from lissom.backends.onnx.translation import DOMAIN, SPARSE_ATTENTION, check_translatable
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import ATTENTIONS, FAKE_QUANTIZES
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from lissom.export.causal_lm.attention import UnmaskAttention, UnpadText
from lissom.export.causal_lm.names import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS, Runtime
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

CHOICES = "quantize{scheme=int4-weight} or quantize{scheme=int8-weight}"
"""The quantization that decoders are written with."""
TOTAL = "total_sequence_length"
"""The name of the number of tokens so far, new ones included."""
_OWN = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)


def causal(program: Program, example: Sample, runtime: Runtime) -> Program:
    """The program with stored integers and without masks. Raises UnsupportedError if a decoder cannot have a KV cache."""
    _check_call(program, runtime)
    passes = [FoldConstants(shared=True), FoldQuantizedWeights(), UnpadText(), UnmaskAttention()]
    found, history = Pipeline(passes, [example], checks="structural").run(program)
    rounded = found.nodes(*FAKE_QUANTIZES)
    if rounded:
        raise UnsupportedError(
            f"{program.name} quantizes activations, at '{rounded[0].name}', which is not written for {runtime.name}; "
            f"choose {CHOICES}"
        )
    left = found.nodes(*ATTENTIONS)
    if left:
        reasons = {skip.node: skip.reason for skip in history.steps[-1].skipped}
        where = nodes.origin(left[0]).module_path or left[0].name
        raise UnsupportedError(
            f"the attention of {program.name} in '{where}' cannot {runtime.attention}: "
            f"{reasons.get(left[0].name, 'it is no causal attention')}"
        )
    return found


def _check_call(program: Program, runtime: Runtime) -> None:
    """Refuse a program that is not called with tokens alone, of any number. Raises UnsupportedError."""
    leaves = {leaf.path: leaf.type for leaf in program.signature.tensors}
    other = next((path for path in leaves if path not in _OWN), None)
    if other is not None or INPUT_IDS not in leaves:
        raise UnsupportedError(
            f"{runtime.name} calls a decoder with {', '.join(_OWN)}, and {program.name} reads "
            f"'{other or next(iter(leaves))}'; call lissom.optimize with example inputs of these names"
        )
    batch, tokens = leaves[INPUT_IDS].shape[:2]
    if isinstance(tokens, int) or (isinstance(batch, int) and batch != 1):
        raise UnsupportedError(
            f"{program.name} takes {INPUT_IDS} of [{batch}, {tokens}] alone, and a decoder takes one text of any length; the "
            f"report of lissom.optimize says why its sizes are fixed"
        )
    if program.state:
        raise UnsupportedError(f"{program.name} keeps '{program.state[0]}', and {runtime.name} keeps keys and values alone")


def export(program: Program, example: Sample, runtime: Runtime) -> ir.Model:
    """The program in ONNX. Raises UnsupportedError for one that cannot be translated, or has no attention."""
    check_translatable(program, runtime.engine)
    try:
        model = export_onnx(program, example, decompose=False)
    # The exporter's errors have no common class; with decompositions it translates more operators.
    except Exception:
        try:
            model = export_onnx(program, example, decompose=True)
        except Exception as error:
            raise UnsupportedError(f"{program.name} has no translation to ONNX: {kind_and_reason(error)}") from error
    if not nodes_of(model, DOMAIN, SPARSE_ATTENTION):
        raise UnsupportedError(f"the program has no attention, and {runtime.name} keeps keys and values alone")
    return model


def add_input(model: ir.Model, name: str, dtype: ir.DataType, *sizes: int | str | ir.SymbolicDim) -> ir.Value:
    """A new input of the model."""
    value = ir.val(name, dtype, ir.Shape(sizes))
    model.graph.inputs.append(value)
    return value


def take_mask(model: ir.Model, batch: int | ir.SymbolicDim = 1) -> ir.Value:
    """A new attention mask, [batch, tokens so far], in place of the program's, of which only sizes are read."""
    inputs = {value.name: value for value in model.graph.inputs}
    if (old := inputs.get(ATTENTION_MASK)) is not None:
        ir.convenience.replace_all_uses_with(old, inputs[INPUT_IDS])
        model.graph.inputs.remove(old)
    return add_input(model, ATTENTION_MASK, ir.DataType.INT64, batch, TOTAL)


def take_positions(model: ir.Model, batch: int | ir.SymbolicDim = 1) -> bool:
    """Read position_ids, [batch, tokens], where the program counts its tokens from 0.

    Returns:
        False if all texts get the positions of the first, because the program uses the count otherwise than for a batch.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    tokens, given = shape_of(inputs[INPUT_IDS])[1], inputs.get(POSITION_IDS)
    if given is None:
        given = add_input(model, POSITION_IDS, ir.DataType.INT64, batch, tokens)
    own = True
    for node in nodes_of(model, "", "Range"):
        first, step = constant_of(node.inputs[0]), constant_of(node.inputs[2])
        counts = first is not None and step is not None and first == 0 and step == 1
        if not counts or list(shape_of(node.outputs[0])) != [tokens]:
            continue
        own = _read_positions(model, node, given) and own
    return own


def _read_positions(model: ir.Model, count: ir.Node, given: ir.Value) -> bool:
    """Replace a count from 0 with positions; False if it is used as [tokens], which all texts share."""
    dtype, old, tokens = count.outputs[0].dtype, count.outputs[0], shape_of(count.outputs[0])[0]
    write = Writer(model)
    if dtype not in (None, ir.DataType.INT64):
        given = write.call("Cast", given, to=int(dtype))
    for user, _ in list(old.uses()):
        sizes = list(shape_of(user.outputs[0]))
        if user.op_type not in ("Unsqueeze", "Reshape") or sizes[0] != 1 or sizes.count(1) != len(sizes) - 1:
            continue
        axes = [axis for axis in range(1, len(sizes)) if sizes[axis] != tokens]
        positions = write.call("Unsqueeze", given, write.integers(*axes)) if axes else given
        ir.convenience.replace_all_uses_with(user.outputs[0], positions)
        model.graph.remove(user, safe=True)
    if not old.uses():
        model.graph.insert_before(count, write.nodes)
        return True
    first = write.call("Gather", given, write.integers(0), axis=0)
    write.replace(count, write.shaped(first, -1))
    return False


def only_logits(model: ir.Model, runtime: Runtime) -> ir.Value:
    """The logits, after the other outputs of the program were dropped. Raises UnsupportedError without logits."""
    kept = {LOGITS, *(value.name for value in model.graph.outputs if (value.name or "").startswith("present."))}
    for value in [value for value in model.graph.outputs if value.name not in kept]:
        model.graph.outputs.remove(value)
    logits = model.graph.outputs[0]
    if logits.name != LOGITS or len(shape_of(logits)) != 3:
        raise UnsupportedError(f"the program does not return logits for each token, from which {runtime.name} takes the next")
    return logits
