"""Tests of lissom.inspect.svg.sharding."""

import lissom
from lissom.compiler.parallel.plan import make_plan
from lissom.inspect.svg.sharding import sharding_svg
from tests.support.models import tiny_llama
from tests.support.svg_reading import boxes, texts


def test_weights_and_collectives_are_drawn_in_order():
    case = tiny_llama()
    program = lissom.optimize(case.model, case.inputs, checks="structural").program
    picture = sharding_svg(program, make_plan(program, 2))
    found = texts(picture)
    assert any(word.startswith("model.layers.0-") and "×" in word for word in found)
    order = [
        next(i for i, word in enumerate(found) if word.startswith(name)) for name in ("self_attn.q_proj", "self_attn.o_proj")
    ]
    reduced = next(i for i, word in enumerate(found) if word.startswith("all-reduce of the output of self_attn"))
    assert order[0] < order[1] < reduced < next(i for i, word in enumerate(found) if word.startswith("mlp."))
    assert len(boxes(picture, "rank0")) == len(boxes(picture, "rank1")) > 7
    # Columns of the output projection: the shards of the ranks are side by side.
    at = next(i for i, word in enumerate(found) if word.startswith("self_attn.o_proj"))
    assert "Shard(1)" in found[at + 1] and "Shard(0)" in found[order[0] + 1]
