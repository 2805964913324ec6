"""The pipeline text of a choice of options, one for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lissom.compiler.analysis.amounts import AmountSite
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.spelling import format_pipeline, parse_pipeline
from lissom.passes import RECIPES, known_passes
from lissom.passes.lightweight.low_rank.low_rank import LowRank
from lissom.passes.prune.prune_heads import PruneHeads
from lissom.passes.prune.prune_layers.prune_layers import PruneLayers
from lissom.passes.prune.prune_neurons import PruneNeurons
from lissom.passes.quantize.quantize import Quantize
from lissom.passes.recover.distill import Distill
from lissom.tuning.sites import LOW_RANK, PLAIN, Group, Option

EXACT = "exact"
HALF = 0.5
"""The fraction of its bytes that a layer has as two factors."""


def pipeline_of(
    groups: Sequence[Group],
    options: Sequence[Option],
    linears: Sequence[str],
    *,
    steps: int = 0,
    bf16: bool = False,
    criterion: str = "auto",
) -> str:
    """The passes that give each group its option, as text; `exact` if all stay as they are.

    linears: the paths of all linear layers. steps: of distillation, where it is possible; 0 for none. bf16: whether layers in
    floating point are in bfloat16. criterion: by which heads and neurons are chosen.
    """
    chosen = list(zip(groups, options, strict=True))
    passes: list[Pass] = []
    for part in ("attention", "feed-forward"):
        gone = [group.layer for group, option in chosen if group.kind == part and option.left == 0]
        if gone:
            passes.append(PruneLayers(amounts=",".join(f"{layer}=0" for layer in gone), part=part))
    for kind, prune in (("attention", PruneHeads), ("feed-forward", PruneNeurons)):
        fewer = [(group, option.left) for group, option in chosen if group.kind == kind and 0 < option.left < group.size]
        amounts = ",".join(f"{unit}={left}" for group, left in fewer for unit in group.units)
        if amounts:
            passes.append(prune(amounts=amounts, criterion=criterion))  # pyright: ignore[reportArgumentType]
    staying = [(group, option) for group, option in chosen if option.left]
    factored = [path for group, option in staying if option.scheme == LOW_RANK for path in group.linears]
    if factored:
        passes.append(LowRank(amounts=",".join(f"{path}={HALF}" for path in factored)))
    schemes = {path: option.scheme for group, option in staying if option.scheme != LOW_RANK for path in group.linears}
    gone = {path for group, option in chosen if not option.left for path in group.linears}
    quantized = quantize_of({path: schemes.get(path, PLAIN) for path in linears if path not in gone})
    distill: list[Pass] = [Distill(steps=steps, precision="fp32")] if steps else []
    # Weights learn before they are cast and quantized; where nothing else is lossy, through the quantizers, if in float32.
    # A layer that is cast after it was quantized has no kernel.
    before, after = (distill, []) if passes else ([], distill if quantized and not bf16 else [])
    cast = parse_pipeline(RECIPES["mixed-precision"], known_passes()) if bf16 else []
    return format_pipeline([*passes, *before, *cast, *quantized, *after]) or EXACT


def quantize_of(schemes: Mapping[str, str]) -> list[Quantize]:
    """`quantize` with these schemes of linear layers by path, or nothing if all are `none`."""
    used = set(schemes.values())
    if used <= {PLAIN}:
        return []
    if len(used) == 1:
        return [Quantize(scheme=used.pop())]  # pyright: ignore[reportArgumentType]
    return [Quantize(schemes=",".join(f"{path}={scheme}" for path, scheme in _merged(schemes).items()))]


def _merged(schemes: Mapping[str, str]) -> dict[str, str]:
    """The same schemes with one entry for all layers of a module that have one scheme; `*` has the most frequent one."""
    counts = {scheme: list(schemes.values()).count(scheme) for scheme in schemes.values()}
    usual = max(counts, key=lambda scheme: counts[scheme])
    found: dict[str, str] = {"*": usual}
    for path, scheme in schemes.items():
        if scheme == usual or any(_holds(module, path) for module in found if module != "*"):
            continue
        parts = path.split(".")
        modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        alike = (item for item in modules if {schemes[other] for other in schemes if _holds(item, other)} == {scheme})
        found[next(alike, path)] = scheme
    return found


def _holds(module: str, path: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def read_options(groups: Sequence[Group], pipeline: str) -> list[Option]:
    """The option that a pipeline of `pipeline_of` gives each group: its inverse."""
    gone: set[tuple[str, str]] = set()
    lefts: dict[str, int] = {}
    factored: set[str] = set()
    schemes: dict[str, str] = {}
    paths = [path for group in groups for path in group.linears]
    for item in parse_pipeline(pipeline, known_passes(), RECIPES):
        match item:
            case PruneLayers():
                gone |= {(item.part, path) for path, left in item._amounts().entries if left == "0"}
            case PruneHeads() | PruneNeurons():
                lefts |= {path: int(left) for path, left in item._amounts().entries}
            case LowRank():
                factored |= {path for path, _ in item._amounts().entries}
            case Quantize():
                sites = [AmountSite("linear", (path,), 1, {}) for path in paths]
                found = item._schemes().at(sites, "linear layers") if item.schemes else [None] * len(paths)
                schemes |= {path: scheme or item.scheme for path, scheme in zip(paths, found, strict=True)}
            case _:
                pass
    return [_option(group, gone, lefts, factored, schemes) for group in groups]


def _option(
    group: Group, gone: set[tuple[str, str]], lefts: Mapping[str, int], factored: set[str], schemes: Mapping[str, str]
) -> Option:
    if (group.kind, group.layer) in gone:
        return Option(0)
    left = next((lefts[unit] for unit in group.units if unit in lefts), group.size)
    if any(path in factored for path in group.linears):
        return Option(left, LOW_RANK)
    return Option(left, next((schemes[path] for path in group.linears if path in schemes), PLAIN))
