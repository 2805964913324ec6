"""Ranks agree, before each call, that all make the same call and that none refuses its inputs.

Without it a rank that refuses its inputs skips a call, and its next call would exchange values with the others' previous one.
Every rank contributes one record of four numbers: the number of the call, the number of the program, a checksum of the inputs,
and whether the rank refuses. When the records agree the call runs. Otherwise no rank runs it, every rank raises, and the
ranks can make the next call.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NoReturn

import torch

from lissom.backends.distributed.ranks import Ranks
from lissom.errors import InputError, RankError

_NUMBERS = 4


class Entry:
    """The entry of one program's calls.

    Args:
        name: of the program. All ranks construct it at the same point.
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        self._ranks = ranks
        self._name = name
        self._channel = ranks.channel(torch.device("cpu"))
        self._program = ranks.next_program()
        self._seen: set[tuple[torch.Size, ...]] = set()

    def agree(self, inputs: Sequence[torch.Tensor], refusal: str | None = None) -> None:
        """Compare the call with that of the other ranks.

        Inputs on the CPU are compared in every call, others at the first call of each combination of shapes, since reading
        them waits for their device.

        Args:
            refusal: why this rank refuses its inputs.

        Raises:
            InputError: with the refusal.
            RankError: when another rank refuses, or the ranks call different programs or have different inputs, or one ended or
                does not answer.
        """
        facts = self._facts(inputs)
        mine = [self._ranks.next_call(), self._program, zlib.crc32(repr(facts).encode()), refusal is not None]
        gathered = torch.empty(self._ranks.world_size * _NUMBERS, dtype=torch.int64)
        with self._ranks.answering(self._name):
            self._channel.gather(gathered, torch.tensor(mine))
        records = gathered.view(-1, _NUMBERS).tolist()
        if refusal is None and records.count(mine) == len(records):
            self._seen.add(tuple(tensor.shape for tensor in inputs))
            return
        if all(record[0] == mine[0] for record in records):
            if any(record[-1] for record in records):
                self._refuse(refusal)
            self._ranks.agree(facts, self._name)
        self._ranks.end(f"the ranks of {self._name} are at different calls; start all of them again")

    def _refuse(self, own: str | None) -> NoReturn:
        sentences = self._ranks.exchange((own or "").encode(), self._name)
        if own is not None:
            raise InputError(own)
        rank, sentence = next((rank, encoded.decode()) for rank, encoded in enumerate(sentences) if encoded)
        raise RankError(f"rank {rank} of {self._name} refused its inputs, so no rank ran this call: {sentence}")

    def _facts(self, inputs: Sequence[torch.Tensor]) -> dict[str, str]:
        """Values all ranks must agree on, by their names in error messages."""
        known = tuple(tensor.shape for tensor in inputs) in self._seen
        read = [tensor for tensor in inputs if tensor.device.type == "cpu" or not known]
        return {
            "the program they call": f"{self._name} ({self._program})",
            "their inputs": " ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in inputs),
            "what their inputs hold, by a checksum": " ".join(f"{_checksum(tensor):08x}" for tensor in read),
        }


def _checksum(tensor: torch.Tensor) -> int:
    # Bytes of any dtype; a view as bytes needs a dimension.
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
