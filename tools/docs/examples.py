"""For each pass, a small model that shows it at work; `generate.py` makes the pages of docs/passes from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tools.docs.attention_models import (
    Attention,
    CachedAttention,
    CountedMask,
    Dropouts,
    EinsumScores,
    EqualHeads,
    FirstToken,
    HeadsInFloat,
    LocalAttention,
    MergedProjection,
    Padded,
    PaddedAttention,
    Projections,
    Rotary,
    SelfAttention,
)
from tools.docs.layer_models import (
    Block,
    CastsByHand,
    ConvolutionalStem,
    DeadUnits,
    Deep,
    FeedForward,
    FromFile,
    GatedWeight,
    Layered,
    MergedGate,
    Mixture,
    ParallelBlock,
    PreNorm,
    RmsNormed,
    Stream,
    TiedHead,
    TwoInFour,
    UnusedPooler,
    UpProjection,
    WrittenSoftmax,
)


@dataclass(frozen=True)
class Example:
    """A small model for one pass.

    inputs: Python text that makes its inputs. passes: the pipeline the pass is shown in. data: Python text that makes
    calibration data, for passes that need some. imports: lines that the model needs besides PyTorch's.
    """

    model: type[nn.Module]
    inputs: str
    passes: str = "exact"
    data: str = ""
    imports: str = ""


_RAGGED = "(torch.randn(4, 128, 256), torch.arange(128) < torch.tensor([[128], [40], [30], [20]]))"


EXAMPLES = {
    "eliminate-dead-code": Example(UnusedPooler, "torch.randn(4, 128, 256)"),
    "remove-no-ops": Example(Dropouts, "torch.randn(4, 128, 256)"),
    "fold-constants": Example(GatedWeight, "torch.randn(4, 128, 256)"),
    "merge-common-subexpressions": Example(ParallelBlock, "torch.randn(4, 128, 256)"),
    "rewrite-einsum": Example(EinsumScores, "torch.randn(4, 128, 256)"),
    "raise-rms-norm": Example(RmsNormed, "torch.randn(4, 128, 256)"),
    "raise-activations": Example(FeedForward, "torch.randn(4, 128, 256)"),
    "raise-softmax": Example(WrittenSoftmax, "torch.randn(4, 128, 256)"),
    "raise-rotary": Example(Rotary, "torch.randn(4, 128, 256)"),
    "merge-projections": Example(Projections, "torch.randn(4, 128, 256)", "merge-projections{always=true}"),
    "eliminate-dead-tokens": Example(FirstToken, "torch.randn(4, 128, 256)", "eliminate-dead-tokens"),
    "zero-padding": Example(Padded, _RAGGED, "zero-padding"),
    "pack-tokens": Example(Padded, _RAGGED, "zero-padding,pack-tokens"),
    "cast": Example(Block, "torch.randn(4, 128, 256)", "cast{dtype=bf16}"),
    "fold-casts": Example(CastsByHand, "torch.randn(4, 128, 256)", "fold-casts"),
    "sink-casts": Example(HeadsInFloat, "torch.randn(4, 128, 256).bfloat16()", "sink-casts"),
    "quantize": Example(Block, "torch.randn(4, 128, 256)", "quantize"),
    "fold-quantized-weights": Example(Block, "torch.randn(4, 128, 256)", "quantize{scheme=int8-weight},fold-quantized-weights"),
    "untie-lm-head": Example(TiedHead, "torch.randint(0, 512, (4, 128))", "untie-lm-head"),
    "use-stored-weights": Example(
        FromFile,
        "torch.randn(4, 128, 256)",
        "use-stored-weights",
        imports="from lissom.frontends.checkpoints.stored_weights import StoredWeight, keep_stored\n"
        "from lissom.ops.gguf_blocks import BLOCK_TYPES",
    ),
    "prune-heads": Example(SelfAttention, "torch.randn(4, 128, 256)", "prune-heads{keep=0.5}"),
    "prune-neurons": Example(Block, "torch.randn(4, 128, 256)", "prune-neurons{keep=0.5}"),
    "sparsify-attention": Example(SelfAttention, "torch.randn(1, 512, 256)", "sparsify-attention{window=64,global_tokens=1}"),
    "lower-sparse-attention": Example(LocalAttention, "torch.randn(1, 512, 256)", "lower-sparse-attention{always=true}"),
    "fuse-attention": Example(Projections, "torch.randn(4, 128, 256)", "fuse-attention"),
    "fuse-norm": Example(RmsNormed, "torch.randn(4, 128, 256)", "fuse-norm"),
    "split-gates": Example(MergedGate, "torch.randn(4, 128, 256)", "split-gates"),
    "fuse-rotary": Example(Rotary, "torch.randn(4, 128, 256)", "fuse-rotary"),
    "pack-linear": Example(Block, "torch.randn(4, 128, 256)", "pack-linear"),
    "pack-quantized-linear": Example(
        Block, "torch.randn(4, 128, 256)", "quantize,fold-quantized-weights,pack-quantized-linear"
    ),
    "lower-quantized-products": Example(
        UpProjection,
        "torch.randn(4, 128, 256)",
        "quantize{lm_head=true},fold-quantized-weights,lower-quantized-products{always=true}",
    ),
    "fuse-epilogues": Example(Block, "torch.randn(4, 128, 256)", "pack-linear,fuse-epilogues"),
    "fuse-unpadded-attention": Example(
        PaddedAttention, _RAGGED, "zero-padding,pack-tokens,fuse-attention,fuse-unpadded-attention"
    ),
    "fuse-merged-attention": Example(
        MergedProjection, "torch.randn(1, 32, 256)", "fuse-attention,pack-linear,fuse-merged-attention"
    ),
    "simplify-masks": Example(CountedMask, "(torch.randn(4, 128, 256), torch.ones(4, 128, dtype=torch.bool))"),
    "raise-attention": Example(Attention, "(torch.randn(4, 128, 256), torch.ones(4, 128))"),
    "pool-heads": Example(SelfAttention, "torch.randn(4, 128, 256)", "pool-heads{groups=2},merge-equal-heads"),
    "merge-equal-heads": Example(EqualHeads, "torch.randn(4, 128, 256)", "merge-equal-heads"),
    "eliminate-dead": Example(DeadUnits, "torch.randn(4, 128, 256)", "eliminate-dead"),
    "prune-layers": Example(Deep, "torch.randn(4, 128, 256)", "prune-layers{keep=0.5,criterion=magnitude}"),
    "prune-experts": Example(
        Mixture,
        "torch.randn(4, 128, 256)",
        "prune-experts{keep=0.5},eliminate-dead",
        "[torch.randn(4, 128, 256) for _ in range(4)]",
        imports="from lissom.ops.grouped_product import grouped_product",
    ),
    "prune-hidden": Example(
        Stream,
        "torch.randn(4, 128, 64)",
        "prune-hidden{keep=0.5,criterion=magnitude,reconstruct=false}",
    ),
    "prune-vocabulary": Example(TiedHead, "torch.randint(0, 128, (4, 128))", "prune-vocabulary{keep=128},eliminate-dead"),
    "sparsify": Example(Block, "torch.randn(4, 128, 256)", "sparsify{keep=0.5}"),
    "pack-sparse": Example(TwoInFour, "torch.randn(4, 128, 256).bfloat16()", "pack-sparse{always=true}"),
    "gptq": Example(
        Block, "torch.randn(4, 128, 256)", "quantize{scheme=int4-weight},gptq", "[torch.randn(4, 128, 256) for _ in range(4)]"
    ),
    "smooth-quant": Example(
        PreNorm,
        "torch.randn(4, 128, 256)",
        "smooth-quant,quantize{scheme=int8-static}",
        "[torch.randn(4, 128, 256) for _ in range(4)]",
    ),
    "awq": Example(
        PreNorm, "torch.randn(4, 128, 256)", "awq,quantize{scheme=int4-weight}", "[torch.randn(4, 128, 256) for _ in range(4)]"
    ),
    "write-state-in-place": Example(CachedAttention, "torch.randn(1, 4, 256)", "write-state-in-place"),
    "rotate": Example(CachedAttention, "torch.randn(1, 4, 256)", "rotate", "[torch.randn(1, 4, 256) for _ in range(4)]"),
    "quantize-cache": Example(CachedAttention, "torch.randn(1, 4, 256)", "quantize-cache"),
    "low-rank": Example(Block, "torch.randn(4, 128, 256)", "low-rank{rank=64}", "[torch.randn(4, 128, 256) for _ in range(4)]"),
    "linear-attention": Example(
        MergedProjection, "torch.randn(1, 1024, 256)", "linear-attention", data="[torch.randn(2, 256, 256)]"
    ),
    "depthwise-separable": Example(
        ConvolutionalStem,
        "torch.randn(4, 64, 200).cumsum(-1)",
        "depthwise-separable{budget=0.5}",
        "[torch.randn(4, 64, 200).cumsum(-1) for _ in range(4)]",
    ),
    "share-layers": Example(Layered, "torch.randn(4, 128, 256)", "share-layers{every=2}"),
    "shard": Example(PreNorm, "torch.randn(4, 128, 256)", "shard{world_size=2}"),
    "partition": Example(PreNorm, "torch.randn(4, 128, 256)", "shard{world_size=2},partition"),
    "equalize": Example(PreNorm, "torch.randn(4, 128, 256)", "equalize"),
    "distill": Example(
        Block,
        "torch.randn(4, 128, 256)",
        "prune-neurons{keep=0.5},distill{steps=60,learning_rate=0.001}",
        "[torch.randn(4, 128, 256) for _ in range(20)]",
    ),
    "finetune": Example(
        Block,
        "torch.randn(4, 128, 256)",
        "finetune{steps=60,learning_rate=0.001}",
        "[{'x': torch.ones(4, 128, 256) * i, 'labels': torch.ones(4, 128, 256)} for i in range(8)]",
    ),
    "correct-bias": Example(
        Block,
        "torch.randn(4, 128, 256)",
        "quantize{scheme=int4-weight},correct-bias",
        "[torch.randn(4, 128, 256) for _ in range(4)]",
    ),
}
