"""Tests of lissom.inspect.svg.program and Report.to_svg."""

import re

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.errors import ArtifactError, UnsupportedError
from lissom.inspect.lines import Line
from lissom.inspect.svg.canvas import Canvas
from lissom.inspect.svg.program import Picture, program_svg
from lissom.inspect.svg.shown import shown
from tests.inspect.html.test_page import Hostile
from tests.support.models import tiny_llama
from tests.support.svg_reading import boxes, curves, nodes, parsed, texts


@pytest.fixture(scope="module")
def pruned(minilm):
    passes = "prune-heads{keep=0.75},eliminate-dead"
    return lissom.optimize(minilm.model, minilm.example_inputs, passes=passes, checks="structural").report


def test_identical_layers_are_drawn_once(pruned):
    step = next(item.index for item in pruned.history.steps if item.spelling.startswith("prune-heads"))
    picture, program = pruned.to_svg(step=step), pruned.history.texts[step]
    assert "encoder.layer.0-5 ×6 identical" in texts(picture)
    drawn = nodes(picture)
    layers = {
        re.search(rf"  {name}: .*  # (.*)", program)[1].split(".")[2] for name in drawn if "encoder" in _line(program, name)
    }
    assert layers == {"0"} and len(set(drawn)) == len(drawn)
    # Six layers of twenty nodes, one of them drawn, and two that compute sizes.
    count = sum(Line.of(line).is_node for line in program.split("\n"))
    in_layer = sum("encoder.layer.0." in _line(program, name) for name in drawn)
    sizes = len(re.findall(r"(?m)^  %\w+: int", program))
    assert len(drawn) + 5 * in_layer + sizes == count


def _line(program: str, name: str) -> str:
    return next(line for line in program.split("\n") if line.startswith(f"  {name}:"))


def test_every_read_value_has_a_curve(pruned):
    """In one layer each node that another one reads is joined to it by a chain of curves."""
    picture = pruned.to_svg(only="encoder.layer.3")
    starts = {(round(item[0]), round(item[1])) for item in curves(picture)}
    for about, (left, _, right, bottom) in boxes(picture, "node"):
        assert (round((left + right) / 2), round(bottom)) in starts or about.startswith("%layer_norm"), about


def test_no_two_boxes_overlap(pruned):
    for step in (0, len(pruned.history.steps) - 1):
        found = [place for _, place in boxes(pruned.to_svg(step=step), "node", "folded", "value")]
        for index, first in enumerate(found):
            for other in found[index + 1 :]:
                assert first[2] <= other[0] or other[2] <= first[0] or first[3] <= other[1] or other[3] <= first[1]


def test_one_module_with_what_it_reads(pruned):
    found = texts(pruned.to_svg(only="encoder.layer.3"))
    assert "encoder.layer.3" in found and "output" in found
    assert any(word.startswith("layer_norm") for word in found) and "query: linear" in found
    assert not any("encoder.layer.2" in word for word in found)


def test_what_a_pass_changed_is_marked(pruned):
    history = pruned.history
    step = next(item.index for item in history.steps if item.spelling == "eliminate-dead")
    before = pruned.to_svg(step=step - 1, compare=step, only="encoder.layer.0")
    after = pruned.to_svg(step=step, compare=step - 1, only="encoder.layer.0")
    assert [about for about, _ in boxes(before, "removed")] == [] and boxes(before, "changed")
    names = {about.partition(":")[0] for about, _ in boxes(after, "changed")}
    assert {re.sub(r"_\d+$", "", name) for name in names} >= {"%linear", "%scaled_dot_product_attention"}
    captured = pruned.to_svg(step=0, compare=step, only="encoder.layer.0")
    assert any("dropout" in about for about, _ in boxes(captured, "removed"))
    added = pruned.to_svg(step=step, compare=0)
    assert boxes(added, "changed") and " changed, " in texts(added)[1]


def test_a_change_of_weights_alone_is_marked(pruned):
    step = next(item.index for item in pruned.history.steps if item.spelling.startswith("prune-heads"))
    found = boxes(pruned.to_svg(step=step, compare=step - 1, only="encoder.layer.0"), "changed")
    assert [about.partition(" = ")[2].partition("(")[0] for about, _ in found] == ["aten.linear"]


def test_heat_colors_the_costliest_nodes(pruned):
    picture, program = pruned.to_svg(heat="flops", only="encoder.layer.0"), pruned.history.texts[-1]
    costs = {name: fact.cost.flops for name, fact in pruned.history.facts_of(len(pruned.history.steps) - 1).items()}
    hottest = [about.split(":")[0] for about, _ in boxes(picture, "heat4")]
    names = [about.split(":")[0] for about, _ in boxes(picture, "node", *(f"heat{level}" for level in (1, 2, 3, 4)))]
    largest = max(costs[name] for name in names)
    assert hottest and set(hottest) == {name for name in names if costs[name] > 0.75 * largest}
    assert any(f"color: FLOPs, at most {float(largest):.3g}" in text for text in texts(picture))
    assert "linear" in _line(program, hottest[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heat": "warmth"}, "there is no heat 'warmth'; give one of flops, bytes, parameters, time, error, mass"),
        ({"heat": "error"}, "heat 'error' was not measured; call report.errors() first"),
        ({"heat": "mass", "step": 2}, "heat 'mass' is measured for the last step alone"),
        ({"heat": "time"}, "no times of nodes were measured"),
        ({"heat": "flops", "compare": 1}, "give heat= or compare="),
    ],
)
def test_a_heat_that_is_not_known_is_refused(pruned, options, message):
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        pruned.to_svg(**options)


def test_a_closed_module_that_changed_is_no_node():
    """Its box has the color of changed nodes."""
    report = lissom.optimize(WithManyNodes(), torch.randn(2, 4), checks="structural").report
    picture = report.to_svg(compare=0)
    assert "wide" in [about for about, _ in boxes(picture, "changed")]
    assert nodes(picture) and all(name.startswith("%") for name in nodes(picture))


class WithManyNodes(nn.Module):
    """A module with more nodes than a picture draws, in front of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = Wide(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.wide(x))


class Wide(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for count in range(210):
            x = x * 1.5 + (x * 1.0 if count == 0 else x)
        return x


def test_results_are_in_the_order_of_the_program(pruned):
    """A set of names would have another order in every process, and so would the picture."""
    lines = [Line.of(line) for line in pruned.history.texts[-1].split("\n")]
    some = [line for line in lines if line.is_node][::7]
    results = Picture(lines, shown(some), {}).results
    assert len(results) > 10 and results == [line.defines for line in some if line.defines in results]


def test_modules_without_room_are_closed():
    case = tiny_llama()
    text = lissom.optimize(case.model, case.inputs, checks="structural").program.text()
    whole, small = program_svg(text, "Llama"), program_svg(text, "Llama", most=12)
    assert len(nodes(small)) < len(nodes(whole))
    assert 0 < len(nodes(small)) + len(boxes(small, "folded")) <= 12
    assert any(re.fullmatch(r"\d+ nodes( each)?", word) for word in texts(small))
    tiny = program_svg(text, "Llama", most=1)
    assert any("for which there is no room" in word for word in texts(tiny))


def test_names_stay_text():
    picture = lissom.optimize(Hostile(), torch.randn(2, 4), checks="structural").report.to_svg()
    assert "<script" not in picture and "alert(1)" in picture
    assert "<!-- <b>: linear" in texts(picture)


def test_the_picture_needs_no_network(pruned):
    picture = pruned.to_svg()
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", picture) == ["http://www.w3.org"]
    assert "prefers-color-scheme:dark" in picture and parsed(picture).get("role") == "img"


def test_a_module_that_holds_itself_is_drawn():
    """A layer called twice: the second call reads the first, so an edge leads upward."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.other(self.inner(x)))

    picture = lissom.optimize(Twice(), torch.randn(2, 4), checks="structural").report.to_svg()
    assert 'class="edge again"' in picture and len(nodes(picture)) == 5


def test_what_does_not_exist_is_refused(pruned, tmp_path):
    with pytest.raises(UnsupportedError, match=r"no node in the module 'encoder.layer.9'; did you mean 'encoder"):
        pruned.to_svg(only="encoder.layer.9")
    with pytest.raises(UnsupportedError, match=r"there is no step 99; this history has steps 0 \(capture\) to"):
        pruned.to_svg(step=99)
    with pytest.raises(UnsupportedError, match="there is no step -1"):
        pruned.to_svg(compare=-1)
    with pytest.raises(ArtifactError, match="it is a directory"):
        pruned.to_svg(tmp_path)
    assert pruned.to_svg(tmp_path / "a.svg") == (tmp_path / "a.svg").read_text()


@pytest.mark.slow
def test_a_deep_model_is_drawn():
    config = transformers.BertConfig(
        num_hidden_layers=48, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    inputs = {"input_ids": torch.randint(0, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    amounts = ",".join(f"encoder.layer.{number}={1 + number % 2}" for number in range(48))
    passes = f'prune-heads{{amounts="{amounts}"}},eliminate-dead'
    model = transformers.BertModel(config).eval()
    picture = lissom.optimize(model, inputs, passes=passes, checks="structural").report.to_svg()
    assert any("×24 identical" in word for word in texts(picture))


def test_only_results_lead_to_the_output():
    text = """program Model(x: f32[batch, 4]) {
  %relu: f32[batch, 4] = aten.relu(%x)
  %sym_size: int batch = aten.sym_size.int(%relu, 0)
  %zeros: f32[batch] = aten.zeros([%sym_size])
  return [%zeros]
}
"""
    picture = program_svg(text, "Model")
    assert len(curves(picture)) == 2
    assert any("without 1 node that computes sizes" in word for word in texts(picture))


def test_places_in_wide_picture_are_not_rounded_to_pixels():
    canvas = Canvas()
    canvas.rect(12345.6, 0, 10, 10, "node")
    assert boxes(canvas.svg(20000, 10, "wide"), "node") == [("", (12345.6, 0, 12355.6, 10))]


def test_a_module_called_output_is_not_the_result():
    model = nn.Sequential()
    model.add_module("output", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    found = lissom.optimize(model, torch.randn(2, 8), checks="structural")
    picture = found.report.to_svg()
    assert len(nodes(picture)) == sum(line.is_node for line in map(Line.of, found.program.text().split("\n")))
    assert texts(picture).count("output") == 2  # the module, and the result
