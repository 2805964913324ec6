"""The pipeline text of a choice of options, one for each group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lissom.compiler.analysis.amounts import AmountSite
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.spelling import format_pipeline, parse_pipeline
from lissom.passes import RECIPES, known_passes
from lissom.passes.attention.pool_heads.pool_heads import PoolHeads
from lissom.passes.attention.sparsify_attention.sparsify_attention import SparsifyAttention
from lissom.passes.lightweight.low_rank.low_rank import LowRank
from lissom.passes.prune.merge_equal_heads import MergeEqualHeads
from lissom.passes.prune.prune_experts import PruneExperts
from lissom.passes.prune.prune_heads import PruneHeads
from lissom.passes.prune.prune_layers.prune_layers import PruneLayers
from lissom.passes.prune.prune_neurons import PruneNeurons
from lissom.passes.prune.sparsify import BLOCK, Sparsify
from lissom.passes.quantize.gptq import Gptq
from lissom.passes.quantize.quantize import Quantize, has_four_bits
from lissom.passes.quantize.quantize_cache import QuantizeCache
from lissom.passes.quantize.rotate.rotate import Rotate
from lissom.passes.quantize.untie_lm_head import UntieLmHead
from lissom.passes.recover.distill import Distill
from lissom.tuning.sites import (
    BLOCKS,
    CACHE,
    CACHES,
    EXPERTS,
    LOW_RANK,
    NO_LINEARS,
    PATTERN,
    PLAIN,
    TABLE,
    TABLE_SCHEMES,
    UNTIED,
    Group,
    Option,
)

EXACT = "exact"
HALF = 0.5
"""The fraction of its bytes that a layer has as two factors."""
KEPT = 0.4
"""The fraction of its blocks that a layer keeps: MiniLM's products in int8 then take 0.6 × the time with AVX-512."""
PACKED = "zero-padding,pack-tokens"
"""Leaves padding out of all operators that treat tokens one by one."""
_Entries = Callable[[Group, Option], Mapping[str, object]]
"""The amounts of a pass, by path, that the option of a group stands for."""


def _removed(kind: str) -> _Entries:
    return lambda group, option: {group.layer: 0} if group.kind == kind and not option.left else {}


def _fewer(kind: str) -> _Entries:
    return lambda group, option: (
        dict.fromkeys(group.units, option.left) if group.kind == kind and 0 < option.left < group.size else {}
    )


def _pooled(group: Group, option: Option) -> Mapping[str, object]:
    return dict.fromkeys(group.units, option.pooled) if option.pooled else {}


def _patterns(group: Group, option: Option) -> Mapping[str, object]:
    return dict.fromkeys(group.linears, option.scheme) if group.kind == PATTERN and option.scheme != PLAIN else {}


def _factored(group: Group, option: Option) -> Mapping[str, object]:
    return dict.fromkeys(group.linears, HALF) if _stays(group, option) and option.scheme == LOW_RANK else {}


def _in_blocks(group: Group, option: Option) -> Mapping[str, object]:
    return dict.fromkeys(group.linears, KEPT) if _stays(group, option) and option.scheme.startswith(BLOCKS) else {}


def _stays(group: Group, option: Option) -> bool:
    """True if linear layers of the group are left."""
    return option.left > 0 and group.kind not in NO_LINEARS


_REDUCTIONS: tuple[tuple[_Entries, Callable[[str, bool], Sequence[Pass]]], ...] = (
    (_removed("attention"), lambda amounts, _: [PruneLayers(amounts=amounts, part="attention")]),
    (_removed("feed-forward"), lambda amounts, _: [PruneLayers(amounts=amounts, part="feed-forward")]),
    (_fewer("attention"), lambda amounts, fitted: [PruneHeads(amounts=amounts, criterion="auto" if fitted else "magnitude")]),
    (
        _fewer("feed-forward"),
        lambda amounts, fitted: [PruneNeurons(amounts=amounts, criterion="auto" if fitted else "magnitude")],
    ),
    (_fewer(EXPERTS), lambda amounts, _: [PruneExperts(amounts=amounts)]),
    (_pooled, lambda amounts, fitted: [PoolHeads(amounts=amounts, align=fitted, regroup=fitted), MergeEqualHeads()]),
    (_patterns, lambda patterns, _: [SparsifyAttention(patterns=f"*={PLAIN},{patterns}")]),
    (_factored, lambda amounts, _: [LowRank(amounts=amounts)]),
    (
        _in_blocks,
        lambda amounts, fitted: [Sparsify(pattern=BLOCK, amounts=amounts, criterion="sparsegpt" if fitted else "magnitude")],
    ),
)
"""In the order of the pipeline: the amounts that the option of a group stands for, and the passes with those of all groups."""


def pipeline_of(
    groups: Sequence[Group],
    options: Sequence[Option],
    linears: Sequence[str],
    *,
    steps: int = 0,
    bf16: bool = False,
    packed: bool = False,
    fitted: bool = True,
) -> str:
    """The passes that give each group its option, as text; `exact` if all stay as they are.

    Args:
        linears: the paths of all linear layers.
        steps: of distillation, where it is possible; 0 for none.
        bf16: whether layers in floating point are in bfloat16.
        packed: whether padding is left out.
        fitted: whether passes choose and fit weights on calibration data; not where time alone is measured.
    """
    chosen = list(zip(groups, options, strict=True))
    passes: list[Pass] = []
    for entries, make in _REDUCTIONS:
        amounts = [f"{path}={amount}" for group, option in chosen for path, amount in entries(group, option).items()]
        passes += make(",".join(amounts), fitted) if amounts else []
    staying = [(group, _format(option)) for group, option in chosen if _stays(group, option) and option.scheme != LOW_RANK]
    schemes = {path: scheme for group, scheme in staying for path in group.linears}
    gone = {path for group, option in chosen if not option.left for path in group.linears}
    tables = [(group, option.scheme) for group, option in chosen if group.kind == TABLE]
    quantized = quantize_of({path: schemes.get(path, PLAIN) for path in linears if path not in gone}, tables)
    if any(group.symmetric for group in groups):
        quantized = [replace(pass_, symmetric=True) for pass_ in quantized]
    distill: list[Pass] = [Distill(steps=steps, precision="fp32")] if steps else []
    # Weights learn before they are cast and quantized; where nothing else is lossy, through the quantizers, if in float32.
    # A layer that is cast after it was quantized has no kernel.
    before, after = (distill, []) if passes else ([], distill if quantized and not bf16 else [])
    cast = parse_pipeline(RECIPES["mixed-precision"], known_passes()) if bf16 else []
    pack = parse_pipeline(PACKED, known_passes()) if packed else []
    fit: list[Pass] = _gptq_of(schemes, tables) if fitted else []
    untie: list[Pass] = [UntieLmHead()] if any(scheme.startswith(UNTIED) for _, scheme in tables) else []
    cache = next((option.scheme for group, option in chosen if group.kind == CACHE), PLAIN)
    rotate: list[Pass] = [Rotate(where="cache")] if cache == CACHES[1] else []
    cached: list[Pass] = [QuantizeCache(bits=4 if rotate else 8)] if cache != PLAIN else []
    return format_pipeline([*passes, *before, *untie, *rotate, *cast, *quantized, *fit, *after, *cached, *pack]) or EXACT


def _format(option: Option) -> str:
    """The scheme of `quantize` in that of an option."""
    return PLAIN if option.scheme == BLOCKS else option.scheme.removeprefix(f"{BLOCKS}-")


def _gptq_of(schemes: Mapping[str, str], tables: Sequence[tuple[Group, str]]) -> list[Pass]:
    """`gptq` for the layers and LM heads of four bits: rounding those to nearest costs several times as much."""
    heads = [(group, scheme.removeprefix(UNTIED)) for group, scheme in tables if group.option == "lm_head" or group.tied]
    every = {**schemes, **{path: scheme for group, scheme in heads for path in group.linears}}
    quantized = {path: scheme for path, scheme in every.items() if scheme != PLAIN}
    four = [path for path, scheme in quantized.items() if has_four_bits(scheme)]
    return [Gptq(only="" if len(four) == len(quantized) else ",".join(four))] if four else []


def quantize_of(schemes: Mapping[str, str], tables: Sequence[tuple[Group, str]] = ()) -> list[Quantize]:
    """`quantize` with these schemes of linear layers by path and of tables by group; nothing if all are `none`."""
    used, passes = set(schemes.values()), list[Quantize]()
    # int4 of linear layers would take tables that are tied to an LM head along.
    embeddings = False if any(group.tied for group, _ in tables) else None
    if len(used) == 1 and used != {PLAIN}:
        passes.append(replace(Quantize(embeddings=embeddings), scheme=used.pop()))
    elif len(used) > 1:
        named = ",".join(f"{path}={scheme}" for path, scheme in _merged(schemes).items())
        passes.append(Quantize(schemes=named, embeddings=embeddings))
    for option in dict.fromkeys(group.option for group, _ in tables):
        for scheme in dict.fromkeys(scheme for group, scheme in tables if group.option == option and scheme != PLAIN):
            only = ",".join(path for group, own in tables if (group.option, own) == (option, scheme) for path in group.linears)
            parts = [(option, scheme)]
            if scheme.startswith(UNTIED):
                parts = [(option, TABLE_SCHEMES[0]), ("lm_head", scheme.removeprefix(UNTIED))]
            passes += [replace(Quantize(only=only), **{"scheme": scheme, option: True}) for option, scheme in parts]
    return passes


def _merged(schemes: Mapping[str, str]) -> dict[str, str]:
    """The schemes with one entry for all layers of a module that have one scheme; `*` has the most frequent one."""
    counts = {scheme: list(schemes.values()).count(scheme) for scheme in schemes.values()}
    usual = max(counts, key=lambda scheme: counts[scheme])
    merged: dict[str, str] = {"*": usual}
    for path, scheme in schemes.items():
        if scheme == usual or any(_holds(module, path) for module in merged if module != "*"):
            continue
        parts = path.split(".")
        modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        alike = (module for module in modules if {schemes[other] for other in schemes if _holds(module, other)} == {scheme})
        merged[next(alike, path)] = scheme
    return merged


def _holds(module: str, path: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def read_options(groups: Sequence[Group], pipeline: str) -> list[Option]:
    """The option that a pipeline of `pipeline_of` gives each group: its inverse."""
    gone: set[tuple[str, str]] = set()
    lefts: dict[str, int] = {}
    pooled: dict[str, int] = {}
    factored: set[str] = set()
    blocks: set[str] = set()
    schemes: dict[str, str] = {}
    paths = [path for group in groups if group.kind not in NO_LINEARS for path in group.linears]
    untied = ""
    for pass_ in parse_pipeline(pipeline, known_passes(), RECIPES):
        match pass_:
            case PruneLayers():
                gone |= {(pass_.part, path) for path, left in pass_._amounts().entries if left == "0"}
            case PruneHeads() | PruneNeurons() | PruneExperts():
                lefts |= {path: int(left) for path, left in pass_._amounts().entries}
            case PoolHeads():
                pooled |= {path: int(left) for path, left in pass_._amounts().entries}
            case LowRank():
                factored |= {path for path, _ in pass_._amounts().entries}
            case Sparsify():
                blocks |= {path for path, _ in pass_._amounts().entries}
            case SparsifyAttention():
                schemes |= {f"{PATTERN} {path}": pattern for path, pattern in pass_._patterns().entries}
            case QuantizeCache():
                schemes[f"{CACHE} {CACHE}"] = CACHES[pass_.bits == 4]
            case UntieLmHead():
                untied = UNTIED
            case Quantize(only=only) if only:
                own = untied if pass_.lm_head else ""
                schemes |= dict.fromkeys((f"{TABLE} {path}" for path in only.split(",")), f"{own}{pass_.scheme}")
            case Quantize():
                sites = [AmountSite("linear", (path,), 1, {}) for path in paths]
                of_paths = pass_._schemes().at(sites, "linear layers") if pass_.schemes else [None] * len(paths)
                schemes |= {path: scheme or pass_.scheme for path, scheme in zip(paths, of_paths, strict=True)}
            case _:
                pass
    options = [_option(group, gone, lefts, factored, blocks, schemes) for group in groups]
    counts = [next((pooled[unit] for unit in group.units if unit in pooled), 0) for group in groups]
    return [replace(option, pooled=count) for option, count in zip(options, counts, strict=True)]


def _option(
    group: Group,
    gone: set[tuple[str, str]],
    lefts: Mapping[str, int],
    factored: set[str],
    blocks: set[str],
    schemes: Mapping[str, str],
) -> Option:
    if (group.kind, group.layer) in gone:
        return Option(0)
    left = next((lefts[unit] for unit in group.units if unit in lefts), group.size)
    if any(path in factored for path in group.linears):
        return Option(left, LOW_RANK)
    marked = (f"{group.kind} {path}" if group.kind in NO_LINEARS else path for path in group.linears)
    scheme = next((schemes[path] for path in marked if path in schemes), PLAIN)
    if any(path in blocks for path in group.linears):
        scheme = BLOCKS if scheme == PLAIN else f"{BLOCKS}-{scheme}"
    return Option(left, scheme)
