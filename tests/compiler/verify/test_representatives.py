"""Tests of lissom.compiler.verify.representatives: which layers of a stack are compared node by node."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.representatives import representatives
from lissom.compiler.verify.rounding import differs_locally
from lissom.frontends.generation.decoder import capture_decoder
from tests.support import captures
from tests.support.harness import apply
from tests.support.models import seeded

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")


def stack(layers: int) -> tuple[Program, Program, Sample]:
    """A quantized encoder, its lowered program, and a sample."""
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64)
    ids = torch.arange(10, 26).view(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = seeded(lambda: BertModel(config, add_pooling_layer=False)).eval()
    before = captures.optimize(model, inputs, passes="quantize", checks="off").program
    sample = before.signature.flatten((), inputs)
    return before, apply("fold-quantized-weights,pack-quantized-linear", before, sample)[0], sample


def compared_layers(before: Program, after: Program) -> set[str]:
    chosen = representatives(before, after)
    assert chosen is not None
    paths = {nodes.origin(node).module_path for node in before.nodes() if node.name in chosen.compared}
    return {path.split(".")[2] for path in paths if path.startswith("encoder.layer.")}


def test_of_layers_alike_three_are_compared() -> None:
    before, after, sample = stack(6)
    assert compared_layers(before, after) == {"0", "2", "4", "5"}  # the last is of a form of its own
    assert not differs_locally(before, after, [sample])


def test_of_three_layers_all_are() -> None:
    before, after, _ = stack(3)
    assert representatives(before, after) is None


def test_a_layer_of_another_form_is_compared_too() -> None:
    before, after, _ = stack(7)
    edit = Editor(after, "other")
    output = next(node for node in after.nodes() if "layer.4.output.dense" in nodes.origin(node).module_path)
    with edit.before(output.next, like=[output]):
        edit.call(torch.ops.aten.neg.default, output)
    assert compared_layers(before, after) == {"0", "2", "4", "5", "6"}


def test_a_write_to_the_state_belongs_to_the_layer_of_its_value() -> None:
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**dict.fromkeys(SIZES, 32), num_hidden_layers=6)))
    before = capture_decoder(model.eval(), max_length=16).program
    chosen = representatives(before, before.copy())
    assert chosen is not None
    writes = [node.name for node in before.nodes() if nodes.is_state_write(node)]
    assert len(writes) == 2 * 6
    assert [name for name in writes if name in chosen.compared] == [*writes[:2], *writes[6:8], *writes[10:]]


@pytest.mark.parametrize("layer", [0, 2, 4, 5])
def test_a_mistake_in_them_is_found(layer: int) -> None:
    before, after, sample = stack(6)
    norm = after.nodes(torch.ops.aten.layer_norm.default)[2 * layer + 1]
    weight = nodes.argument(norm, "weight")
    assert isinstance(weight, torch.fx.Node)
    Editor(after, "break").set_weight(weight, after.weight(str(weight.target)) * 1.05)
    assert differs_locally(before, after, [sample])
