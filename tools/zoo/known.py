"""Models that cannot be captured or saved, do not run on ONNX Runtime, or keep a decomposed attention, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

_EXPERTS = "loops over the experts that were given tokens"
_BLOCKS = "computes the number of its blocks with tensors, so that a shape depends on their values"

CANNOT_BE_CAPTURED: Mapping[str, str] = {
    "causal/qwen4_exp": "branches on the number of complete blocks",
    "causal/qwen4_exp_text": "branches on the number of complete blocks",
    "classifier/longformer": _BLOCKS,
    "masked/longformer": _BLOCKS,
    "encoder-decoder/led": _BLOCKS,
    "encoder-decoder/fsmt": "branches on whether the mask pads anything",
    "encoder/openai_privacy_filter": _EXPERTS,
}

_WEIGHTS = "it returns the attention weights, or computes its output from them"

ATTENTION_LEFT: Mapping[str, str] = {
    "encoder-decoder/longt5": "its local attention computes blocks of keys in scores of rank 5",
    "encoder-decoder/pegasus_x": "its local attention computes blocks of keys in scores of rank 5",
    "timm/convit": "it mixes two softmaxes before the product with v",
    "hand-written/cross-attention": _WEIGHTS,
    "hand-written/cross-attention-bias-kv": _WEIGHTS,
    "hand-written/multihead-attention-weights": _WEIGHTS,
    "x-transformers/one-kv-head": "it merges heads and queries into one dimension of the scores",
    "x-transformers/talking-heads": "it mixes the heads' attention weights before the product with v",
}

_TIES = "it takes the top k of tied scores, and PyTorch and ONNX Runtime order ties differently"
_HISTOGRAM = "it counts the tokens of its only expert with a histogram without a range, which the exporter does not support"

NOT_ON_ONNX_RUNTIME: Mapping[str, str] = {
    "causal/axk2": _TIES,
    "causal/deepseek_v32": _TIES,
    "causal/dots3_note": _TIES,
    "causal/dots3_note_text": _TIES,
    "causal/glm_moe_dsa": _TIES,
    "causal/hy_v4": _TIES,
    "causal/jetmoe": _TIES,
    "classifier/axk2": _TIES,
    "encoder/mistral_large4_text": _TIES,
    "causal/hunyuan_v1_moe": _HISTOGRAM,
    "classifier/hunyuan_v1_moe": _HISTOGRAM,
    "hand-written/bfloat16": "ONNX Runtime lacks kernels of bfloat16 on a CPU",
}

_RECURRENT = "artifacts do not allow the operator of its recurrent layer"

CANNOT_BE_SAVED: Mapping[str, str] = {
    "hand-written/dataclass-outputs": "its outputs are of a class of its own",
    "hand-written/fake-quantized": "artifacts do not allow PyTorch's fake quantizers",
    "hand-written/gru": _RECURRENT,
    "hand-written/lstm": _RECURRENT,
    "hand-written/lstm-bidirectional": _RECURRENT,
}

ILL_CONDITIONED: Mapping[str, str] = {
    # Half a rounding step on every weight changes its outputs by 3e-5, more than the tolerance of 2e-5.
    "causal/cpmant": "rounding its weights once more changes its outputs by more than the tolerance",
}
"""Models whose exact passes may be rolled back."""
