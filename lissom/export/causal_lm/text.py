"""Logits of texts by a program without a KV cache, for comparison with those of a decoder."""

from __future__ import annotations

import torch

from lissom.backends.names import output_names, results_of
from lissom.compiler.ir.program import Program
from lissom.export.causal_lm.names import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS


def logits_of(program: Program, ids: torch.Tensor) -> torch.Tensor:
    """The program's logits of a text, [tokens, vocabulary]."""
    given = {INPUT_IDS: ids[None], ATTENTION_MASK: torch.ones_like(ids)[None], POSITION_IDS: torch.arange(len(ids))[None]}
    sample = [given[leaf.path].to(leaf.type.dtype) for leaf in program.signature.tensors]
    place = output_names(program).index(LOGITS)
    with torch.no_grad():
        outputs = program.run(sample)
    logits = outputs[program.leaves.index(results_of(program)[place])]
    assert isinstance(logits, torch.Tensor)
    return logits[0].float()


def count_equal(equal: int, steps: int) -> str:
    """How many greedy tokens are the program's, in words; the others were checked to have nearly the largest logit."""
    if equal == steps:
        return f"{equal} greedy tokens equal to the program's"
    return f"{equal} of {steps} greedy tokens equal to the program's, whose logits are nearly equal at the others"
