"""Random pipelines of one to four passes, with random valid options."""

from __future__ import annotations

import random
from collections.abc import Callable

Draw = Callable[[random.Random], str]
"""Draws one pass as text."""


def _pass(name: str, **options: tuple[object, ...]) -> Draw:
    """A pass with some of its options, each drawn from its values; None leaves the option at its default."""

    def draw(generator: random.Random) -> str:
        drawn = {key: generator.choice(values) for key, values in options.items()}
        given = [f"{key}={_spelled(value)}" for key, value in drawn.items() if value is not None]
        return f"{name}{{{','.join(given)}}}" if given else name

    return draw


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_KEEP = (0.25, 0.5, 0.75, 0.9)
_RANKED = (None, "auto", "magnitude", "second-order", "taylor")
_CANONICAL = (
    *("eliminate-dead-code", "remove-no-ops", "rewrite-einsum", "fold-constants", "merge-common-subexpressions"),
    *("raise-rms-norm", "raise-softmax", "raise-activations", "raise-rotary", "raise-attention", "simplify-masks"),
)
_ELIMINATIONS = (
    "eliminate-dead",
    *("eliminate-dead-tokens", "merge-equal-heads"),
)
_LOWERINGS = (
    *("merge-projections{always=true}", "split-gates", "fuse-rotary", "fuse-attention", "pack-linear", "fuse-epilogues"),
    *("fuse-norm", "fuse-unpadded-attention", "fuse-merged-attention", "lower-sparse-attention{always=true}"),
    *("pack-sparse{always=true}", "write-state-in-place", "fold-quantized-weights", "pack-quantized-linear"),
)
DISTILL = _pass(
    "distill",
    steps=(1, 3),
    blockwise=(None, 0, 1),
    batch=(None, 1, 2),
    precision=(None, "bf16", "fp16"),
    embeddings=(None, True),
)
EXACT: tuple[Draw, ...] = (
    *map(_pass, _CANONICAL),
    *map(_pass, _ELIMINATIONS),
    *map(_pass, _LOWERINGS),
    _pass("pack-tokens"),
    _pass("equalize"),
    _pass("smooth-quant", alpha=(None, 0.25, 0.75, 1.0), norms=(None, False), linears=(None, False)),
    _pass("awq", scheme=(None, "int8-weight"), symmetric=(None, False), norms=(None, False), linears=(None, False)),
    _pass("untie-lm-head"),
    _pass("rotate", where=(None, "heads", "residual"), basis=(None, "hadamard", "random"), seed=(None, 1)),
    _pass("rotate", where=("residual",), basis=("pca",)),
    _pass("rotate", where=("cache",), basis=(None, "hadamard", "random", "balanced")),
    _pass("fold-casts"),
    _pass("sink-casts"),
)
"""Exact passes."""
LOSSY: tuple[Draw, ...] = (
    _pass("prune-heads", keep=_KEEP, criterion=_RANKED, scope=(None, "layer"), round_to=(None, 2)),
    _pass("prune-neurons", keep=_KEEP, criterion=_RANKED, scope=(None, "layer"), round_to=(None, 4)),
    _pass("prune-experts", keep=_KEEP, criterion=(None, "frequency")),
    _pass("prune-layers", keep=(0.5, 0.75), part=(None, "attention", "feed-forward"), criterion=(None, "magnitude")),
    _pass("prune-hidden", keep=(0.5, 0.75), round_to=(1, 2, 4), criterion=(None, "magnitude"), reconstruct=(None, False)),
    _pass("prune-vocabulary", keep=(9, 20), logits=(None, "compact")),
    _pass("prune-vocabulary", coverage=(0.7, 1.0), logits=(None, "compact")),
    _pass("prune-neurons", amounts=('"*=0.5"', '"*=3"'), criterion=_RANKED),
    _pass("sparsify", amounts=('"*=0.5"', '"*=2:4"')),
    _pass("low-rank", amounts=('"*=0.5"', '"*=2"')),
    _pass("pool-heads", amounts=('"*=1"', '"*=0.5"')),
    _pass("quantize", schemes=('"*=int8-weight"', '"*=none,*.0=int8-dynamic"')),
    _pass("sparsify-attention", patterns=('"*=window:2"', '"*=block:2"')),
    _pass("sparsify", keep=(0.5, 0.8), criterion=(None, "wanda", "sparsegpt")),
    _pass("sparsify", pattern=("2:4", "1:4"), criterion=(None, "wanda", "sparsegpt")),
    _pass("zero-padding"),
    _pass("low-rank", keep=(0.5, 0.9), whiten=(None, False), attention=(None, True), asymmetric=(None, False)),
    _pass("low-rank", rank=(1, 2, 3), fisher=(None, False)),
    _pass("linear-attention", features=(None, "elu", "relu")),
    _pass("share-layers", groups=(1, 2), take=(None, "mean", "first")),
    _pass("pool-heads", keep=(0.5, 0.3), align=(None, False), regroup=(None, False)),
    _pass("sparsify-attention", window=(1, 2, 5), global_tokens=(None, 1, 3)),
    _pass("sparsify-attention", pattern=("block",), block=(1, 2, 4)),
    _pass("sparsify-attention", pattern=("strided", "dilated"), window=(2, 4), block=(2,)),
    _pass("sparsify-attention", pattern=("global-window-random",), window=(3, 4), block=(2, 4), random_blocks=(1, 2)),
    _pass("sparsify-attention", pattern=("measured",), block=(2, 4), mass=(0.5, 0.9)),
    _pass("quantize", scheme=("int8-dynamic", "int8-static"), activations=(None, "tensor"), symmetric=(None, False)),
    _pass("quantize", scheme=("int8-static",), observer=(None, "percentile", "mse", "entropy"), attention=(None, True)),
    _pass("quantize", scheme=("int8-weight", "int4-weight"), granularity=(None, "channel", "group"), symmetric=(None, False)),
    _pass("quantize", scheme=("int8-dynamic", "int4-weight", "fp8"), embeddings=(None, True), lm_head=(None, True)),
    _pass("quantize", scheme=("mxfp4-weight", "mxfp8-weight", "nvfp4-weight"), embeddings=(None, True), lm_head=(None, True)),
    _pass("quantize-cache", bits=(None, 4)),
    _pass("correct-bias"),
    DISTILL,
    _pass("gptq", act_order=(None, False), asymmetric=(None, False)),
    _pass("cast", dtype=("bf16",)),
    _pass("cast", dtype=("bf16", "fp16")),
)
"""Lossy passes."""


def draw_pipeline(generator: random.Random) -> tuple[str, ...]:
    """One to four passes, each as text; about a third of the pipelines are exact."""
    share = generator.choice((0.0, 0.5, 0.7))
    count = generator.choice((1, 2, 2, 3, 3, 4))
    drawn = [generator.choice(LOSSY if generator.random() < share else EXACT)(generator) for _ in range(count)]
    if any(spelled.startswith("prune") for spelled in drawn) and generator.random() < 0.6:
        drawn += [spelled for spelled in _ELIMINATIONS[:4] if generator.random() < 0.7]
    return tuple(drawn)


def draw_recovery(generator: random.Random) -> tuple[str, ...]:
    """Two lossy passes and `distill`, each as text."""
    return (
        *(draw(generator) for draw in generator.sample([lossy for lossy in LOSSY if lossy is not DISTILL], 2)),
        DISTILL(generator),
    )


def simpler(passes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Pipelines with one pass fewer, or with the options of one pass at their defaults."""
    shorter = [passes[:at] + passes[at + 1 :] for at in range(len(passes))]
    plain = [
        (*passes[:at], spelled.partition("{")[0], *passes[at + 1 :]) for at, spelled in enumerate(passes) if "{" in spelled
    ]
    return [*shorter, *plain]
