"""MiniLM in int8 on the pretended GPU, whose Triton kernels run in the interpreter."""

from __future__ import annotations

import copy
from collections import Counter

import lissom
from lissom.compiler.verify.divergence import compare
from lissom.frontends.models.huggingface import load
from lissom.ops import int8_product, quantize_rows
from tests.ops.triton_kernels.interpreted.launching import launches as launches
from tools.pretend_cuda import pretend_cuda


def test_minilm(launches: Counter[object]) -> None:
    """Six layers with real weights, whose sizes are those of whole tiles."""
    checkpoint = load("minilm")
    inputs = {name: value[:1] for name, value in checkpoint.encode(["A kernel of one's own."]).items()}
    example = checkpoint.example_inputs
    simulated = lissom.compile(checkpoint.model, example, passes="quantize", goal=None)
    with pretend_cuda():
        moved = {name: value.cuda() for name, value in example.items()}
        fast = lissom.compile(copy.deepcopy(checkpoint.model).cuda(), moved, passes="quantize", goal=None, checks="off")
        launches.clear()
        found = fast(**{name: value.cuda() for name, value in inputs.items()}).last_hidden_state.cpu()
    assert (launches[quantize_rows], launches[int8_product]) == (24, 36)
    wanted = simulated(**inputs).last_hidden_state
    dense = checkpoint.model(**inputs).last_hidden_state
    # A value half way between two steps may round the other way: less than all of quantization changes.
    lost = compare([[dense]], [[wanted]]).relative_error
    assert compare([[wanted]], [[found]]).relative_error <= lost
