"""Tests of operators that ranks work out together on parts of a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE
from lissom.compiler.parallel.plan import make_plan
from lissom.inspect.sharding import joint_traffic, traffic
from tests.support import captures
from tests.support.canonical_programs import reasons
from tests.support.harness import rewrite
from tests.support.models import normal, seeded
from tests.support.sharding import collectives

CUT = "shard{{world_size={},plan=[head:column-wise]}},partition"
Function = Callable[[torch.Tensor], object]

READERS: dict[str, tuple[Function, tuple[int, int]]] = {
    # What is read of logits, and how many all-reduces and all-gathers it takes.
    "argmax": (lambda x: x.argmax(-1), (0, 1)),
    "argmax kept": (lambda x: x.argmax(2, keepdim=True), (0, 1)),
    "max": (lambda x: tuple(x.max(-1)), (0, 1)),
    "amax": (lambda x: x.amax(-1), (1, 0)),
    "logsumexp": (lambda x: x.logsumexp(-1), (2, 0)),
    "topk": (lambda x: tuple(x.topk(3, -1)), (0, 1)),
    "argmax of softmax": (lambda x: x.softmax(-1).argmax(-1), (2, 1)),
    "log-softmax at tokens": (lambda x: x.log_softmax(-1).gather(-1, x.argmax(-1, keepdim=True)), (3, 1)),
    "entropy": (lambda x: (x.softmax(-1) * x.log_softmax(-1)).amax(-1), (5, 0)),
    "turned": (lambda x: x.transpose(1, 2).log_softmax(1).argmax(1), (2, 1)),
    "last position": (lambda x: x[:, -1].argmax(-1), (0, 1)),
    "temperature": (lambda x: tuple((x / 0.7).log_softmax(-1).topk(2)), (2, 1)),
}


class Head(nn.Module):
    """Logits of a vocabulary, and what is read of them. shift: added to all, so that they may all be negative."""

    def __init__(self, vocabulary: int, read: Function, shift: float = 0.0) -> None:
        super().__init__()
        self.head, self.read, self.shift = nn.Linear(8, vocabulary), read, shift

    def forward(self, x: torch.Tensor) -> object:
        return self.read(self.head(x) + self.shift)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", READERS)
def test_numbers(name: str, world_size: int) -> None:
    read, wanted = READERS[name]
    # 61 divides by none of these; the shift makes a zero in the place of a row that is not there the greatest of all.
    # No two of the greatest are within rounding of each other here, where ranks may choose the other.
    program, history = rewrite(CUT.format(world_size), seeded(lambda: Head(61, read, -50.0)), normal(2, 5, 8, seed=1))
    assert reasons(history) == []
    assert collectives(program) == wanted
    for node in program.nodes(ALL_REDUCE, ALL_GATHER):
        assert all(size <= 5 for size in nodes.tensor_type(node).shape if isinstance(size, int))


@pytest.mark.parametrize("vocabulary", [16, 17, 21, 22, 64])
def test_vocabularies_that_fill_some_ranks(vocabulary: int) -> None:
    # On 4 ranks 17 rows are blocks of 5, the last of which holds 2; 21 are blocks of 6, of which the last holds 3.
    rewrite(CUT.format(4), seeded(lambda: Head(vocabulary, lambda x: (x.argmax(-1), x.amax(-1)), -9.0)), normal(3, 2, 8))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_first_of_equals_wins(world_size: int) -> None:
    model = seeded(lambda: Head(61, lambda x: (x.argmax(-1), x.max(-1)[1])))
    with torch.no_grad():
        model.head.weight.zero_()
        for places in ([17, 33, 60], [59, 60], [0, 31], range(61)):
            model.head.bias.fill_(-3.0)[list(places)] = -1.0
            program, _ = rewrite(CUT.format(world_size), model, normal(2, 5, 8))
            for found in program.run_ranks([normal(2, 5, 8)])[-1]:
                assert isinstance(found, torch.Tensor) and found.unique().tolist() == [min(places)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_formats(dtype: torch.dtype) -> None:
    model = seeded(lambda: Head(61, lambda x: (x.argmax(-1), x.log_softmax(-1).amax(-1), x.logsumexp(-1)))).to(dtype)
    rewrite(CUT.format(4), model, normal(2, 5, 8).to(dtype))


def test_infinite_logits() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 61)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = self.head(x).masked_fill(mask, -torch.inf)
            return logits.argmax(-1), logits.logsumexp(-1), logits.softmax(-1).amax(-1), *logits.topk(2)

    mask = torch.ones(61, dtype=torch.bool)
    mask[[3, 59]] = False
    program, _ = rewrite(CUT.format(4), seeded(Masked), normal(2, 5, 8), mask)
    # Of a row of nothing but -inf the first place is the best, and every place named is one that is there.
    best, total, _, _, places = program.run_ranks([normal(2, 5, 8), torch.ones(61, dtype=torch.bool)])[0]
    assert isinstance(best, torch.Tensor) and isinstance(total, torch.Tensor) and isinstance(places, torch.Tensor)
    assert not best.any() and (total == -torch.inf).all() and places.max() <= 60


def test_logits_that_are_returned_are_gathered_once() -> None:
    program, _ = rewrite(CUT.format(2), seeded(lambda: Head(61, lambda x: (x, x.argmax(-1)))), normal(2, 5, 8))
    assert collectives(program) == (0, 1)
    program, _ = rewrite(CUT.format(2), seeded(lambda: Head(61, lambda x: x.log_softmax(-1))), normal(2, 5, 8))
    assert collectives(program) == (0, 1)


def test_short_rows_are_gathered() -> None:
    program, _ = rewrite(CUT.format(4), seeded(lambda: Head(8, lambda x: x.softmax(-1).amax(-1))), normal(2, 5, 8))
    assert collectives(program) == (0, 1)


def test_bytes_per_token_fall_from_vocabulary_to_few_numbers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Next(nn.Module):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__()
            self.model = LlamaForCausalLM(config)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids).logits.argmax(-1)

    config = LlamaConfig(
        vocab_size=1001, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, use_cache=False
    )
    model, example = seeded(lambda: Next(config)), {"input_ids": torch.randint(0, 1001, (2, 5))}
    program = captures.optimize(model, example).program
    plan = make_plan(program, 4)
    numbers = dict.fromkeys(program.signature.dimensions, 3)
    moved = [item for move in plan.moves for item in traffic(plan, move, numbers)]
    assert [item.kind for item in moved] == ["all-reduce"] * 3
    ((node, item),) = joint_traffic(plan, numbers)
    # Each of 4 ranks tells a value and an index of each of 9 tokens, where logits would be 1001 numbers of each.
    assert str(node.target) == "aten.argmax.default" and item.kind == "all-gather"
    assert item.payload_bytes == 9 * 4 * 2 * 4
    notes = captures.optimize(model, example, passes="shard{world_size=4},partition").report.history.steps[-2].notes
    assert any("reads a sharded dimension: 8 numbers per row exchanged, not gathered" in note for note in notes)
