"""Attention mass between blocks of queries and blocks of keys, and the fewest blocks that keep a fraction of it.

Mass is the sum of softmax weights. Padding queries do not count. A pair of blocks is averaged over the texts that reach both,
so that short texts do not lower the mass of later blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.calibration.attention_weights import rows_on_data
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample


@dataclass
class BlockMass:
    """Sums over all texts.

    Attributes:
        total: mass from the real queries of a block to a block of keys, [heads, query blocks, key blocks].
        count: number of real queries of a block in texts with real keys in the key block, [query blocks, key blocks].
    """

    total: torch.Tensor
    count: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """The mean mass from a query to a block of keys, in texts that have both, [heads, query blocks, key blocks]."""
        return self.total / self.count.clamp_min(1)

    def add(self, mass: torch.Tensor, real: torch.Tensor, block: int) -> None:
        """Add one text.

        Args:
            mass: its softmax weights, [heads, queries, keys].
            real: which tokens are not padding, [tokens].
        """
        tokens = int(real.nonzero().max()) + 1 if bool(real.any()) else 0
        size = -(-tokens // block)
        padded = torch.zeros(mass.shape[0], size * block, size * block)
        padded[:, :tokens, :tokens] = mass[:, :tokens, :tokens] * real[:tokens, None]
        sums = padded.reshape(-1, size, block, size, block).sum((2, 4))
        held = torch.zeros(size * block)
        held[:tokens] = real[:tokens].float()
        queries = held.reshape(size, block).sum(1)
        self._grow(size, mass.shape[0])
        self.total[:, :size, :size] += sums
        self.count[:size, :size] += queries[:, None] * (queries > 0)

    def _grow(self, size: int, heads: int) -> None:
        more = size - len(self.count)
        if more > 0 or len(self.total) != heads:
            grown = (0, more, 0, more)
            self.count = torch.nn.functional.pad(self.count, grown)
            total = torch.nn.functional.pad(self.total, grown)
            self.total = total if len(total) == heads else torch.zeros(heads, *total.shape[1:])


def block_masses(
    program: Program, data: Sequence[Sample], attentions: Collection[fx.Node], block: int, progress: Callable[[int, int], None]
) -> dict[fx.Node, BlockMass]:
    """The masses of these attentions in blocks of `block` tokens; one text and one layer are in memory at a time."""
    masses = {node: BlockMass(torch.zeros(0, 0, 0), torch.zeros(0, 0)) for node in attentions}
    for node, (_, weights, real) in rows_on_data(program, data, masses, progress):
        tokens = torch.ones(weights.shape[1], dtype=torch.bool) if real is None else real.cpu()
        masses[node].add(weights.cpu(), tokens, block)
    return masses


def fewest_blocks(mean: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest blocks of keys with which each block of queries keeps a fraction of its mass, at every text length.

    Returns booleans of that shape.

    Args:
        mean: [heads, query blocks, key blocks], see `BlockMass.mean`. For every number of key blocks from the query's own block
            on, the kept ones among these blocks hold at least the fraction `share` of their mass. The query's own block is
            always kept.
    """
    size = mean.shape[-1]
    kept = torch.eye(size, dtype=torch.bool).expand_as(mean).clone()
    rows = torch.arange(size)
    for length in range(1, size + 1):
        part = mean[..., :length]
        reached = rows < length
        while True:
            held = (part * kept[..., :length]).sum(-1)
            short = (held < share * part.sum(-1) - 1e-6) & reached
            if not bool(short.any()):
                break
            best = part.masked_fill(kept[..., :length], -1.0).argmax(-1, keepdim=True)
            kept[..., :length].scatter_(-1, best, kept[..., :length].gather(-1, best) | short[..., None])
    return kept
