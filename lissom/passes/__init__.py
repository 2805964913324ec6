"""The passes, each in a file or folder of its own; their table, and the named pipelines. No pass imports another."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.errors import UnsupportedError
from lissom.passes.attention.linear_attention.linear_attention import LinearAttention
from lissom.passes.attention.pool_heads.pool_heads import PoolHeads
from lissom.passes.attention.sparsify_attention.sparsify_attention import SparsifyAttention
from lissom.passes.canonical.eliminate_dead_code import EliminateDeadCode
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.canonical.merge_common_subexpressions import MergeCommonSubexpressions
from lissom.passes.canonical.raise_activations.raise_activations import RaiseActivations
from lissom.passes.canonical.raise_attention.raise_attention import RaiseAttention
from lissom.passes.canonical.raise_rms_norm import RaiseRmsNorm
from lissom.passes.canonical.raise_rotary import RaiseRotary
from lissom.passes.canonical.raise_softmax import RaiseSoftmax
from lissom.passes.canonical.remove_no_ops import RemoveNoOps
from lissom.passes.canonical.rewrite_einsum import RewriteEinsum
from lissom.passes.canonical.simplify_masks import SimplifyMasks
from lissom.passes.lightweight.depthwise_separable.depthwise_separable import DepthwiseSeparable
from lissom.passes.lightweight.low_rank.low_rank import LowRank
from lissom.passes.lightweight.share_layers import ShareLayers
from lissom.passes.lowering.fuse_attention import FuseAttention
from lissom.passes.lowering.fuse_epilogues import FuseEpilogues
from lissom.passes.lowering.fuse_merged_attention import FuseMergedAttention
from lissom.passes.lowering.fuse_norm import FuseNorm
from lissom.passes.lowering.fuse_rotary import FuseRotary
from lissom.passes.lowering.fuse_unpadded_attention import FuseUnpaddedAttention
from lissom.passes.lowering.lower_quantized_products.lower_quantized_products import LowerQuantizedProducts
from lissom.passes.lowering.lower_sparse_attention import LowerSparseAttention
from lissom.passes.lowering.merge_projections import MergeProjections
from lissom.passes.lowering.pack_linear import PackLinear
from lissom.passes.lowering.pack_quantized_linear import PackQuantizedLinear
from lissom.passes.lowering.pack_sparse import PackSparse
from lissom.passes.lowering.split_gates import SplitGates
from lissom.passes.lowering.write_state_in_place import WriteStateInPlace
from lissom.passes.parallel.partition import Partition
from lissom.passes.parallel.shard import Shard
from lissom.passes.precision.cast import Cast
from lissom.passes.precision.fold_casts import FoldCasts
from lissom.passes.precision.sink_casts import SinkCasts
from lissom.passes.prune.eliminate_dead.eliminate_dead import EliminateDead
from lissom.passes.prune.eliminate_dead_tokens import EliminateDeadTokens
from lissom.passes.prune.merge_equal_heads import MergeEqualHeads
from lissom.passes.prune.pack_tokens.pack_tokens import PackTokens
from lissom.passes.prune.prune_experts import PruneExperts
from lissom.passes.prune.prune_heads import PruneHeads
from lissom.passes.prune.prune_hidden import PruneHidden
from lissom.passes.prune.prune_layers.prune_layers import PruneLayers
from lissom.passes.prune.prune_neurons import PruneNeurons
from lissom.passes.prune.prune_vocabulary.prune_vocabulary import PruneVocabulary
from lissom.passes.prune.sparsify import Sparsify
from lissom.passes.prune.zero_padding import ZeroPadding
from lissom.passes.quantize.awq import Awq
from lissom.passes.quantize.correct_bias import CorrectBias
from lissom.passes.quantize.equalize import Equalize
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights
from lissom.passes.quantize.gptq import Gptq
from lissom.passes.quantize.quantize import Quantize
from lissom.passes.quantize.quantize_cache import QuantizeCache
from lissom.passes.quantize.rotate.rotate import Rotate
from lissom.passes.quantize.smooth_quant import SmoothQuant
from lissom.passes.quantize.untie_lm_head import UntieLmHead
from lissom.passes.quantize.use_stored_weights import UseStoredWeights
from lissom.passes.recover.distill import Distill
from lissom.passes.recover.finetune import Finetune

_ALL: tuple[type[Pass], ...] = (
    *(EliminateDeadCode, RemoveNoOps, RewriteEinsum, FoldConstants, MergeCommonSubexpressions),
    *(RaiseRmsNorm, RaiseSoftmax, RaiseActivations, RaiseRotary, RaiseAttention, SimplifyMasks),
    *(EliminateDeadTokens, ZeroPadding, PackTokens),
    *(PruneHeads, PruneNeurons, PruneExperts, PruneLayers, PruneHidden, PruneVocabulary, Sparsify),
    *(EliminateDead, MergeEqualHeads),
    *(LowRank, LinearAttention, DepthwiseSeparable, ShareLayers, PoolHeads, SparsifyAttention),
    *(Rotate, Equalize, SmoothQuant, Awq, UntieLmHead, Quantize, Gptq, CorrectBias),
    *(QuantizeCache, FoldQuantizedWeights, UseStoredWeights),
    *(Distill, Finetune),
    *(Cast, FoldCasts, SinkCasts),
    *(MergeProjections, SplitGates, FuseRotary, LowerSparseAttention, FuseAttention),
    *(PackQuantizedLinear, LowerQuantizedProducts, PackLinear, FuseEpilogues, FuseNorm, FuseUnpaddedAttention),
    *(FuseMergedAttention, PackSparse, WriteStateInPlace, Shard, Partition),
)
PASSES: Mapping[str, type[Pass]] = {pass_class.name(): pass_class for pass_class in _ALL}
"""Lissom's passes by name."""

_EXACT = (
    "eliminate-dead-code,remove-no-ops,rewrite-einsum,fold-constants,merge-common-subexpressions,"
    "raise-rms-norm,raise-softmax,raise-activations,raise-rotary,raise-attention,simplify-masks,"
    "merge-common-subexpressions"
)

RECIPES: Mapping[str, str] = {
    "exact": _EXACT,
    "generation": f"{_EXACT},eliminate-dead-tokens",
    "mixed-precision": "cast,sink-casts,fold-casts",
    "fast": "eliminate-dead-tokens,quantize",
    "balanced": "cast,quantize{scheme=auto,embeddings=true}",
    "small": "quantize{scheme=int4-weight,embeddings=true,lm_head=true},gptq{if_data=true}",
    "int8": "quantize",
    "int4": "quantize{scheme=int4-weight}",
}
"""Pipelines by name. The last five are goals (time, both, size, or a weight format) and need no calibration data."""


def known_passes() -> dict[str, type[Pass]]:
    """Lissom's passes and those that other packages add through the entry-point group `lissom.passes`.

    Raises:
        UnsupportedError: when an entry point does not name a pass.
    """
    table = dict(PASSES)
    for entry in entry_points(group="lissom.passes"):
        loaded = entry.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise UnsupportedError(f"entry point '{entry.name}' of lissom.passes is {loaded!r}, which is no pass class")
        table.setdefault(loaded.name(), loaded)
    return table
