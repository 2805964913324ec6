"""Weights quantized to the K types of llama.cpp: Q4_K, Q5_K and Q6_K.

    Q4_K, Q5_K   w = (d · a) · q - (m · b), eight groups of 32 in a block of 256; a and b in 0 … 63
    Q6_K         w = (d · a) · q, sixteen groups of 16 in a block of 256; a in -128 … 127

Rows that are no multiple of 256 are in blocks of 32, with a scale each: Q5_0 (w = d · q), Q5_1 (w = d · q + m) and Q8_0.

Scales of groups are searched as in make_qkx2_quants and make_qx_quants of ggml-quants.c: candidates on a grid, each refined by
least squares. Unlike there, all weights count the same, and the integer factors of each group are searched once more among
their neighbours, with d and m as they are stored. The layout is that of ggml-common.h, github.com/ggml-org/ggml.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch

from lissom.errors import UnsupportedError
from lissom.export.gguf.weights import Blocks, halves_apart
from lissom.ops.gguf_blocks import BLOCK_TYPES

Types = Literal["q4_k", "q5_k", "q6_k", "q4_k_m", "q5_k_m"]
_CHUNK = 1 << 9
"""The number of blocks that are quantized at once: they stay in the processor's cache."""
_LAYER = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")
_TABLES = ("token_embd.weight", "output.weight")
_POSITIONS = "position_embd.weight"
"""Not quantized in llama.cpp either."""
_SMALL = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""The types of 32 weights a block that llama.cpp takes in place of K types."""
_TINY = 1e-30


def check_types(types: str | None) -> Types | None:
    """The types of that name. Raises UnsupportedError for another name."""
    known = next((known for known in get_args(Types) if known == types), None)
    if types is not None and known is None:
        raise UnsupportedError(f"types= is {types!r:.80}; choose {', '.join(get_args(Types))}")
    return known


def type_of(name: str, columns: int, types: Types, layers: int) -> str | None:
    """The block type of a matrix of the file; blocks of 32 for rows of no whole blocks of 256, None for rows of none of 32.

    Args:
        name: in the file. `_m` has embedding tables, LM heads and some `attn_v` and `ffn_down` in Q6_K, and `attn_qkv` in the
            type with one more bit, as llama.cpp. Learned positions stay as they are.
    """
    if columns % 32 or name == _POSITIONS:
        return None
    kind, found = types.removesuffix("_m").upper(), _LAYER.fullmatch(name)
    if types.endswith("_m") and (name in _TABLES or (found and _gets_more_bits(int(found[1]), layers))):
        kind = "Q6_K"
    if types.endswith("_m") and name.endswith("attn_qkv.weight"):
        kind = "Q5_K" if kind == "Q4_K" else "Q6_K"
    return _SMALL[kind] if columns % 256 else kind


def _gets_more_bits(layer: int, layers: int) -> bool:
    """use_more_bits of llama.cpp: the first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def quantized(weight: torch.Tensor, kind: str) -> Blocks:
    """A matrix in blocks. Its memory beyond the result is that of some blocks.

    Raises:
        UnsupportedError: for values that are not finite.
    """
    form, pack = BLOCK_TYPES[kind], _PACKERS[kind]
    blocks = weight.reshape(-1, form.size)
    data = torch.empty(len(blocks), form.bytes, dtype=torch.uint8)
    for start in range(0, len(blocks), _CHUNK):
        part = blocks[start : start + _CHUNK].float()
        if not bool(part.isfinite().all()):
            raise UnsupportedError(f"a weight has values that are not finite, which {kind} cannot hold")
        data[start : start + _CHUNK] = pack(part)
    return Blocks(form, data.view(len(weight), -1))


def _bytes_of(half: torch.Tensor) -> torch.Tensor:
    return half.half().view(-1, 1).view(torch.uint8)


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(1) / 127).half()
    q = (x / scale.float().clamp_min(_TINY).unsqueeze(1)).round_().clamp_(-127, 127)
    return torch.cat((_bytes_of(scale), q.to(torch.int8).view(torch.uint8)), 1)


def _scale_and_minimum(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and minimum of each group, w = scale · q - minimum, neither below 0. x: [blocks, groups, size]."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1)
    width = (high - low).clamp_min(_TINY)
    best_scale, best_minimum = width / largest, -low
    best = _error(x, best_scale, best_minimum, largest)
    total, count = x.sum(-1), x.shape[-1]
    for step in range(-10, 11):
        q = ((x - low.unsqueeze(-1)) * ((largest + 0.1 * step) / width).unsqueeze(-1)).round_().clamp_(0, largest)
        q_sum, q_square, product = q.sum(-1), q.square().sum(-1), (q * x).sum(-1)
        spread = count * q_square - q_sum.square()
        scale = (count * product - total * q_sum) / spread.clamp_min(1)
        minimum = (q_sum * product - q_square * total) / spread.clamp_min(1)
        # A minimum below 0 has no factor; without one the scale is that of a line through 0.
        below = minimum < 0
        scale = torch.where(below, product / q_square.clamp_min(1), scale).clamp_min(0)
        minimum = minimum.clamp_min(0)
        error = _error(x, scale, minimum, largest)
        better = (error < best) & (spread > 0)
        best = torch.where(better, error, best)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _integers(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, largest: int) -> torch.Tensor:
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(_TINY), 0)
    return ((x + minimum.unsqueeze(-1)) * inverse.unsqueeze(-1)).round_().clamp_(0, largest)


def _error(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, largest: int) -> torch.Tensor:
    q = _integers(x, scale, minimum, largest)
    return q.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).sub_(x).square_().sum(-1)


def _with_minimums(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers, uint8 [blocks, 256], and the first 16 bytes of the blocks of Q4_K and Q5_K."""
    x = x.view(len(x), 8, 32)
    scale, minimum = _scale_and_minimum(x, largest)
    factors = [(part.amax(1, keepdim=True) / 63).half() for part in (scale, minimum)]
    d, m = (factor.float() for factor in factors)
    wanted = [(part / unit.clamp_min(_TINY)).round_().clamp_(0, 63) for part, unit in ((scale, d), (minimum, m))]
    a, b = wanted
    best = _error(x, d * a, m * b, largest)
    for step, other in ((s, o) for s in (-1, 0, 1) for o in (-1, 0, 1) if s or o):
        trial_a, trial_b = (wanted[0] + step).clamp_(0, 63), (wanted[1] + other).clamp_(0, 63)
        error = _error(x, d * trial_a, m * trial_b, largest)
        better = error < best
        best, a, b = torch.where(better, error, best), torch.where(better, trial_a, a), torch.where(better, trial_b, b)
    q = _integers(x, d * a, m * b, largest).to(torch.uint8).flatten(1)
    a, b = a.to(torch.uint8), b.to(torch.uint8)
    packed = [a[:, :4] | ((a[:, 4:] >> 4) << 6), b[:, :4] | ((b[:, 4:] >> 4) << 6), (a[:, 4:] & 15) | ((b[:, 4:] & 15) << 4)]
    return q, torch.cat([*(_bytes_of(factor) for factor in factors), *packed], 1)


def _joined(q: torch.Tensor, run: int, shifts: int, bits: int) -> torch.Tensor:
    """Small integers in bytes: those of `shifts` neighbouring runs in one run of bytes. q: [blocks, 256]."""
    parts = q.view(len(q), -1, shifts, run)
    found = parts[:, :, 0].clone()
    for place in range(1, shifts):
        found |= parts[:, :, place] << (bits * place)
    return found.flatten(1)


def _q4_k(x: torch.Tensor) -> torch.Tensor:
    q, head = _with_minimums(x, 15)
    return torch.cat((head, _joined(q, 32, 2, 4)), 1)


def _q5_k(x: torch.Tensor) -> torch.Tensor:
    q, head = _with_minimums(x, 31)
    return torch.cat((head, _joined(q >> 4, 32, 8, 1), _joined(q & 15, 32, 2, 4)), 1)


def _symmetric(x: torch.Tensor, scale: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers in -count … count - 1 at these scales, and the squared error."""
    inverse = torch.where(scale != 0, 1 / torch.where(scale != 0, scale, 1), 0)
    q = (x * inverse.unsqueeze(-1)).round_().clamp_(-count, count - 1)
    return q, (q * scale.unsqueeze(-1)).sub_(x).square_().sum(-1)


def _best_scale(x: torch.Tensor, count: int) -> torch.Tensor:
    """The scale of each group, for integers in -count … count - 1. x: [..., size]."""
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_scale = peak / -count
    _, best = _symmetric(x, best_scale, count)
    for step in range(-9, 10):
        q, _ = _symmetric(x, peak / -(count + 0.1 * step), count)
        scale = (q * x).sum(-1) / q.square().sum(-1).clamp_min(1)
        _, error = _symmetric(x, scale, count)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale


def _with_fifth_bits(q: torch.Tensor) -> torch.Tensor:
    """Integers of five bits, [blocks, 32]: the fifth bits in 4 bytes, then the others in 16."""
    places = 1 << torch.arange(8, dtype=torch.uint8)
    high = ((q >> 4).view(len(q), 4, 8) * places).sum(-1, dtype=torch.uint8)
    return torch.cat((high, halves_apart(q & 15)), 1)


def _q5_0(x: torch.Tensor) -> torch.Tensor:
    scale = _best_scale(x, 16).half()
    q, _ = _symmetric(x, scale.float(), 16)
    return torch.cat((_bytes_of(scale), _with_fifth_bits((q + 16).to(torch.uint8))), 1)


def _q5_1(x: torch.Tensor) -> torch.Tensor:
    low = x.amin(1)
    scale, below = _scale_and_minimum((x - low[:, None]).unsqueeze(1), 31)
    d, m = scale.squeeze(1).half(), (low - below.squeeze(1)).half()
    q = _integers(x, d.float(), -m.float(), 31).to(torch.uint8)
    return torch.cat((_bytes_of(d), _bytes_of(m), _with_fifth_bits(q)), 1)


def _q6_k(x: torch.Tensor) -> torch.Tensor:
    x = x.view(len(x), 16, 16)
    best_scale = _best_scale(x, 32)
    largest = best_scale.gather(1, best_scale.abs().argmax(1, keepdim=True))
    half = (largest / -128).half()
    d = half.float()
    wanted = torch.where(d != 0, best_scale / torch.where(d != 0, d, 1), 0).round_().clamp_(-128, 127)
    a = wanted
    q, best = _symmetric(x, d * a, 32)
    for step in (-1, 1):
        trial = (wanted + step).clamp_(-128, 127)
        _, error = _symmetric(x, d * trial, 32)
        a, best = torch.where(error < best, trial, a), torch.minimum(error, best)
    q = (_symmetric(x, d * a, 32)[0] + 32).to(torch.uint8).flatten(1)
    factors = a.to(torch.int8).view(torch.uint8)
    return torch.cat((_joined(q & 15, 64, 2, 4), _joined(q >> 4, 32, 4, 2), factors, _bytes_of(half)), 1)


_PACKERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
