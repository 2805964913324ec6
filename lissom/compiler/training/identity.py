"""The identity of a training run: hashes of its program, weights and data, and its options as text."""

from __future__ import annotations

from collections.abc import Sequence

from lissom.compiler.ir.fingerprint import fingerprint, structure_fingerprint
from lissom.compiler.ir.program import Program
from lissom.compiler.training.batches import Batch


def identity_of(programs: Sequence[Program], batches: Sequence[Batch], options: str) -> dict[str, str]:
    """Texts by name.

    Args:
        programs: the student, and the teacher if there is one.
        batches: with the data that is held out.
    """
    return {
        "program": fingerprint(*map(structure_fingerprint, programs)),
        "options": options,
        "data": fingerprint(*((batch.inputs, batch.labels) for batch in batches)),
        "weights before it": fingerprint(*(program.weights() for program in programs)),
    }
