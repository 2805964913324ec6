"""Hashes that tell programs, weights and data apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import torch

from lissom.compiler.ir.printer import node_text
from lissom.compiler.ir.program import Program

_NAME = re.compile(r"%(\w+)")


def fingerprint(*parts: object) -> str:
    """A hash of texts, and of samples with their values."""
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()[:32]


def program_fingerprint(program: Program) -> str:
    """A hash of a program's operators and weights."""
    return fingerprint(structure_fingerprint(program), program.weights())


def structure_fingerprint(program: Program) -> str:
    """A hash of a program's operators, whatever the order and the names of its nodes.

    Models that iterate over a set, as Gemma 3 over its kinds of layers, are captured in another order in each process.
    """
    known: dict[str, str] = {}
    ends: list[str] = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        line = node_text(program, node).removeprefix(f"%{node.name}: ")
        known[node.name] = fingerprint(_NAME.sub(lambda match: known.get(match[1], match[0]), line))
        if not node.users:
            ends.append(known[node.name])
    weights = sorted(node_text(program, node) for node in program.graph.nodes if node.op == "get_attr")
    return fingerprint(program.signature.describe(), weights, sorted(ends))


def _feed(digest: hashlib._Hash, part: object) -> None:
    if isinstance(part, torch.Tensor):
        tensor = part.detach().cpu().contiguous()
        _feed(digest, f"{tensor.dtype} {list(tensor.shape)}")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(part, Mapping):
        _feed(digest, [element for pair in sorted(part.items()) for element in pair])
    elif isinstance(part, Sequence) and not isinstance(part, str):
        _feed(digest, f"[{len(part)}")
        for element in part:
            _feed(digest, element)
    else:
        encoded = str(part).encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)
