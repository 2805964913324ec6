"""Tests of lissom.inspect.identical_layers."""

import re

import pytest
import torch
from torch import nn

import lissom
from lissom.inspect.identical_layers import identical_layers
from lissom.inspect.lines import Line


class Block(nn.Module):
    def __init__(self, epsilon: float, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8, epsilon), nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) + bias


class Stack(nn.Module):
    """Blocks; those in `other` read another bias."""

    def __init__(self, blocks: list[tuple[float, int]], other: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*item) for item in blocks)
        self.other = other

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        biases = bias.sin(), bias.cos()
        for index, block in enumerate(self.blocks):
            x = block(x, biases[index in self.other])
        return x


def lines(text: str) -> list[Line]:
    return [Line.of(item) for item in text.split("\n")]


def groups(model: nn.Module) -> list[tuple[str, ...]]:
    inputs = (torch.randn(2, 3, 8), torch.randn(8))
    found = identical_layers(lines(lissom.optimize(model.eval(), inputs, checks="structural").program.text()))
    return [group.members for group in found.get("blocks", ())]


def test_identical_layers_are_one_group():
    assert groups(Stack([(1e-5, 16)] * 4)) == [("0", "1", "2", "3")]


@pytest.mark.parametrize("odd", [(1e-6, 16), (1e-5, 17)], ids=["a constant", "a shape"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_layer_that_differs_is_not_folded(odd, place):
    blocks = [(1e-5, 16)] * 4
    blocks[place] = odd
    found = groups(Stack(blocks))
    assert (str(place),) in found and len(found) == 2


def test_layers_that_read_different_values_are_not_folded():
    assert groups(Stack([(1e-5, 16)] * 5, other=(1, 3))) == [("0", "2", "4"), ("1", "3")]


def test_layers_reading_the_previous_differently_are_not_folded():
    """Each layer reads the sum of the one before, and the fourth its product: values of one type."""
    text = ["program Model(x: f32[2]) {"]
    for layer in range(5):
        read = "%x" if layer == 0 else f"%mul_{layer - 1}" if layer == 3 else f"%add_{layer - 1}"
        text.append(f"  %mul_{layer}: f32[2] = aten.mul.Tensor({read}, 2)  # layers.{layer}")
        text.append(f"  %add_{layer}: f32[2] = aten.add.Tensor(%mul_{layer}, 1)  # layers.{layer}")
    found = identical_layers([Line.of(item) for item in [*text, "  return [%add_4]", "}"]])
    assert [group.members for group in found["layers"]] == [("0", "1", "2", "4"), ("3",)]


def test_quantized_layers_are_folded(minilm):
    """The last node of a layer quantizes what the next one reads, which also reads it unquantized."""
    options = {"passes": "quantize{scheme=int8-dynamic}", "checks": "structural"}
    program = lissom.optimize(minilm.model, minilm.example_inputs, **options).program
    (first, last) = identical_layers(lines(program.text()))["encoder.layer"]
    assert (first.members, last.members) == (tuple("01234"), ("5",))


def test_differences_are_listed():
    inputs = (torch.randn(2, 3, 8), torch.randn(8))
    model = Stack([(1e-5, 16), (1e-6, 16), (1e-5, 16)]).eval()
    usual, other = identical_layers(lines(lissom.optimize(model, inputs, checks="structural").program.text()))["blocks"]
    assert (usual.differences, other.members) == ((), ("1",))
    assert [line[:2] for line in other.differences] == ["- ", "+ "]
    assert "1e-05" in other.differences[0] and "1e-06" in other.differences[1]


def test_any_change_of_one_node_ends_the_fold(minilm):
    """Every constant and every size in every line of one layer of a real program, changed one at a time."""
    program = lissom.optimize(minilm.model, minilm.example_inputs, checks="structural").program
    text = program.text().split("\n")
    whole = identical_layers([Line.of(item) for item in text])["encoder.layer"]
    assert [group.members for group in whole] == [tuple("012345")]
    tried = 0
    for index, line in enumerate(text):
        if "encoder.layer.3." not in line or not line.startswith("  %"):
            continue
        head, _, path = line.rpartition("  # ")
        for found in re.finditer(r"(?<![\w.%@])\d+(?![\w.])", head):
            changed = f"{head[: found.start()]}{int(found[0]) + 1}{head[found.end() :]}  # {path}"
            folds = identical_layers([Line.of(item) for item in [*text[:index], changed, *text[index + 1 :]]])
            assert ("3",) in [group.members for group in folds["encoder.layer"]], changed
            tried += 1
    assert tried > 20


def test_lines_give_their_text_back(minilm):
    text = lissom.optimize(minilm.model, minilm.example_inputs, checks="structural").program.text()
    for item in [*text.split("\n"), "  %x: f32[2] = aten.add.Tensor(%y, '%z  # w')  # <b>.a  # b", "%", "@", ""]:
        line = Line.of(item)
        names = [*line.names, ""]
        assert "".join(piece + name for piece, name in zip(line.pieces, names, strict=True)) == item


def test_layers_that_read_input_with_name_of_builtin():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    text = lissom.optimize(model, torch.randn(2, 8), checks="structural").program.text()
    assert "input:" in text.split("\n")[0] and "%input_1" in text
    assert [group.members for group in identical_layers(lines(text))[""]] == [("0", "1", "2")]


def test_a_weight_whose_name_has_a_dash():
    model = nn.Sequential()
    model.add_module("en-de", nn.Linear(4, 4))
    text = lissom.optimize(model, torch.randn(2, 4), checks="structural").program.text()
    assert {"@en-de.weight", "@en-de.bias"} <= {line.defines for line in lines(text)}
    reads = next(line.reads for line in lines(text) if line.is_node and line.reads)
    assert "@en-de.weight" in reads
