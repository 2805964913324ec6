"""The sites of a program for which passes take amounts: how many heads, neurons, layers, ranks or bits each may have."""

from __future__ import annotations

from dataclasses import replace

from lissom.compiler.analysis.amounts import AmountSite
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.passes import known_passes


def sites(program: Program) -> tuple[AmountSite, ...]:
    """Every site of a program for which a pass takes an amount, with its size and the amounts that each pass takes there.

    Passes whose requirements the program does not meet are left out. Sites are in the order of the graph within each kind.

    Args:
        program: a program in canonical form, as `lissom.optimize(model, inputs).program`.

    Raises:
        UnsupportedError: when an entry point of `lissom.passes` does not name a pass.

    Examples:
        >>> import torch, lissom
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> for site in lissom.sites(lissom.optimize(model, torch.randn(2, 5, 32)).program)[:2]:
        ...     print(site.kind, site.path, site.size, dict(site.takes))
        heads self_attn 4 {'prune-heads': range(1, 5)}
        neurons linear2 64 {'prune-neurons': range(1, 65)}
    """
    by_place: dict[tuple[str, str], AmountSite] = {}
    for pass_class in known_passes().values():
        if not issubclass(pass_class, Approximation) or any(known.breach(program) is not None for known in pass_class.requires):
            continue
        for site in pass_class.sites(program):
            key = site.kind, site.path
            by_place[key] = replace(by_place[key], takes={**by_place[key].takes, **site.takes}) if key in by_place else site
    return tuple(by_place.values())
