"""Weights of a program in training that are sharded over the ranks: whole only while an operator reads them.

Each rank holds an equal part of the elements of a weight, its gradient and its AdamW state. Reading the weight gathers the
parts; the backward pass gathers them again, and adds up and scatters the gradient. This is stage 3 of Rajbhandari et al. 2020,
ZeRO, as a parametrization, as Zhang et al. 2024, SimpleFSDP, have it. `torch.distributed.fsdp.fully_shard` does the same in
hooks around the `forward` of submodules, which the flat graph of a program does not call. https://arxiv.org/abs/1910.02054,
https://arxiv.org/abs/2411.00284
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lissom.compiler.ir.program import Program
from lissom.compiler.training.ranks import Ranks

Packed = torch.Tensor | Callable[[], torch.Tensor]


class _Gather(torch.autograd.Function):
    """The whole weight of the ranks' shards; its gradient is summed over the ranks and scattered."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, ranks: Ranks, shape: torch.Size) -> torch.Tensor:
        ctx.ranks, ctx.elements = ranks, shard.numel()
        return ranks.gather_shards(shard)[: shape.numel()].view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        whole = gradients[0].new_zeros(ctx.ranks.world_size * ctx.elements)
        whole[: gradients[0].numel()] = gradients[0].reshape(-1)
        return ctx.ranks.scatter_sum(whole), None, None


class _Whole(nn.Module):
    """The parametrization of a sharded weight.

    Args:
        shape: of the whole weight.
    """

    def __init__(self, shards: Shards, shape: torch.Size) -> None:
        super().__init__()
        self._shards, self._shape = shards, shape

    def forward(self, shard: torch.Tensor) -> torch.Tensor:
        return self._shards.gather(shard, self._shape)


class Shards:
    """The learned weights of a program, sharded over the ranks until the block of `sharded` ends.

    Attributes:
        parameters: this rank's shards by name, [elements / world_size], padded with zeros.
    """

    def __init__(self, program: Program, learned: Mapping[str, nn.Parameter], ranks: Ranks) -> None:
        self._program, self._ranks = program, ranks
        self._shapes = {name: parameter.shape for name, parameter in learned.items()}
        # By the address of a whole weight, which another tensor takes once the weight is freed.
        self._live: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor, torch.Size]] = {}
        made = {parameter: nn.Parameter(self.partition(parameter.detach())) for parameter in learned.values()}
        self.parameters = {name: made[parameter] for name, parameter in learned.items()}
        for name, shard in self.parameters.items():
            program.set_weight(name, shard)
            parametrize.register_parametrization(*self._owner(name), _Whole(self, self._shapes[name]), unsafe=True)
        for parameter in made:
            # Its memory; others may still hold the parameter.
            parameter.data = parameter.new_empty(0)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self._program.graph_module.get_submodule(path), leaf

    def partition(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a whole tensor, in memory of its own."""
        size = -(-whole.numel() // self._ranks.world_size)
        shard = whole.new_zeros(size)
        part = whole.reshape(-1)[self._ranks.rank * size : (self._ranks.rank + 1) * size]
        shard[: part.numel()] = part
        return shard

    def gather(self, shard: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The whole weight, known to `regathering` while it lives."""
        whole = _Gather.apply(shard, self._ranks, shape)
        assert isinstance(whole, torch.Tensor)
        self._live[whole.untyped_storage().data_ptr()] = weakref.ref(whole), shard.detach(), shape
        return whole

    @contextmanager
    def regathering(self) -> Generator[None]:
        """Keep shards in place of the whole weights that the backward pass needs, and gather them there again."""

        def pack(tensor: torch.Tensor) -> Packed:
            known = self._live.get(tensor.untyped_storage().data_ptr())
            if known is None or known[0]() is None:
                return tensor
            _, shard, shape = known
            view = tensor.size(), tensor.stride(), tensor.storage_offset()
            return lambda: self._ranks.gather_shards(shard)[: shape.numel()].as_strided(*view)

        def unpack(packed: Packed) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else packed()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        self._live.clear()

    def close(self) -> None:
        """Put the whole weights back in the program, as parameters."""
        wholes: dict[nn.Parameter, nn.Parameter] = {}
        for name, shape in self._shapes.items():
            owner, leaf = self._owner(name)
            shard = self.parameters[name]
            if shard not in wholes:
                wholes[shard] = nn.Parameter(self._ranks.gather_shards(shard)[: shape.numel()].view(shape).clone())
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
            self._program.set_weight(name, wholes[shard])
