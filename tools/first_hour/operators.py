"""Every operator with a path on CUDA at real sizes, beside its reference. Prints one entry a case as JSON.

An operator that PyTorch computes is compared with the same formula in float64 on the CPU; a quantized layer with the program
that simulates it on the device in floating point.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional

import lissom
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import INTEGER_PRODUCTS, PACKED_PRODUCTS
from lissom.compiler.verify.divergence import run_samples
from lissom.errors import UnsupportedError
from lissom.ops import int4_product, int8_product, quantize_rows
from lissom.ops.attention import attention, attention_reference
from lissom.ops.block_sparse_attention import block_sparse_attention
from lissom.ops.formats import pack_halves
from lissom.ops.fused_rows import fused_rms_norm_reference
from lissom.ops.grouped_product import grouped_product
from lissom.ops.linear_attention import linear_attention, linear_attention_reference
from lissom.ops.pattern import Condition, Pattern
from lissom.ops.quantization import fake_quantize_dynamic, fake_quantize_dynamic_reference
from lissom.ops.quantized_products import int4_product_reference, int8_product_reference, quantize_rows_reference
from lissom.ops.rotary import rotary_reference
from lissom.ops.sparse_linear import pack, sparse_linear
from lissom.ops.triton_kernels import obstacle
from tools.first_hour.device import device

LAYERS = ((768, 3072), (3072, 768), (2048, 8192), (8192, 2048), (832, 1000))
"""Inputs and features: BERT-base, Llama 1B, and sizes that are multiples of 64 and 8 alone."""
ROWS = (1, 17, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative error in the Frobenius norm. Half precision: two roundings of 5e-4 and 4e-3, weights and result, twice over.
float32: a sum of 8,192 terms in any order, without TF32."""
SCHEMES = {
    "int8": ("int8-dynamic", "int8-static", "int8-weight"),
    "fp8": ("fp8",),
    "int4": ("int4-weight,group=64,symmetric=true", "int4-weight,group=64,symmetric=false"),
}
Case = dict[str, object]


def _normal(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def quantized_layers(kind: str, pretend: bool) -> Iterator[Case]:
    """A linear layer in each scheme of this kind, at all sizes and numbers of rows."""
    for scheme in SCHEMES[kind]:
        for dtype in (torch.bfloat16,) if kind == "int4" or pretend else (torch.bfloat16, torch.float16):
            for inputs, features in ((128, 64), (64, 72)) if pretend else LAYERS:
                name = f"{scheme} {inputs}→{features} {_short(dtype)}"
                yield from guarded(name, partial(_quantized_layer, name, scheme, dtype, inputs, features))


def _quantized_layer(name: str, scheme: str, dtype: torch.dtype, inputs: int, features: int) -> Iterator[Case]:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(inputs, features)).eval().to("cuda", dtype)
    # The batch is the only size that varies; static scales are those of these rows.
    example = _normal(64, inputs).to(dtype).cuda()
    # The last layer of a model counts as its LM head.
    passes = f"quantize{{scheme={scheme},lm_head=true}}"
    simulated = lissom.optimize(layer, example, passes=passes, data=[example]).program
    fast = lissom.compile(layer, example, passes=passes, data=[example], goal=None)
    products = [node for node in fast.program.nodes(*INTEGER_PRODUCTS, *PACKED_PRODUCTS)]
    how = nodes.overload(products[0]).name().partition("::")[2].partition(".")[0] if products else "simulated"
    for rows in ROWS:
        x = _normal(rows, inputs).to(dtype).cuda()
        ((wanted,),) = run_samples(simulated, [(x,)])
        found = [fast(x) for _ in range(2)][-1]  # the second call replays a graph
        yield _case(f"{name}, {rows} rows", _error(found, wanted), ALLOWED[dtype], how=how)


def guarded(name: str, run: Callable[[], Iterator[Case]]) -> Iterator[Case]:
    """The cases up to the first error, which fails by itself; a layer that Lissom refuses does not."""
    try:
        yield from run()
    except UnsupportedError as error:
        yield {"case": name, "ok": True, "how": f"refused: {error}"}
    except Exception as error:
        yield {
            "case": name,
            "ok": False,
            "how": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}",
        }


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    difference = found.cpu().double() - wanted.cpu().double()
    return float(difference.norm() / wanted.cpu().double().norm())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _case(name: str, error: float, allowed: float, **more: object) -> Case:
    # A NaN is no number below the bound.
    return {
        "case": name,
        "error": error if math.isfinite(error) else str(error),
        "allowed": allowed,
        "ok": error <= allowed,
    } | more


Call = Callable[..., torch.Tensor]


def _beside(
    name: str, call: Call, reference: Call, *operands: torch.Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Iterator[Case]:
    """The call on the device in each dtype, beside the reference in float64 on the CPU with operands rounded alike."""
    for dtype in dtypes:
        rounded = [item.to(dtype) if item.is_floating_point() else item for item in operands]
        yield from guarded(f"{name} {_short(dtype)}", partial(_one, f"{name} {_short(dtype)}", call, reference, dtype, rounded))


def _one(name: str, call: Call, reference: Call, dtype: torch.dtype, operands: list[torch.Tensor]) -> Iterator[Case]:
    wanted = reference(*(item.double() if item.is_floating_point() else item for item in operands))
    yield _case(name, _error(call(*(item.cuda() for item in operands)), wanted), ALLOWED[dtype])


def attentions(pretend: bool) -> Iterator[Case]:
    """Attention of encoders and decoders, with soft caps, linear, and by patterns."""
    shapes = ((2, 4, 2, 33, 16),) if pretend else ((8, 12, 12, 128, 64), (2, 32, 8, 512, 64), (1, 8, 1, 333, 128))
    for batch, heads, key_heads, tokens, head_dim in shapes:
        q, k, v = (_normal(batch, count, tokens, head_dim) for count in (heads, key_heads, key_heads))
        wide = [q, *(item.repeat_interleave(heads // key_heads, 1) for item in (k, v))]
        size = f"[{batch}, {heads}/{key_heads}, {tokens}, {head_dim}]"
        for causal in (False, True):
            plain = lambda *qkv, causal=causal: functional.scaled_dot_product_attention(*qkv, is_causal=causal)  # noqa: E731
            yield from _beside(f"scaled_dot_product_attention {size}{' causal' * causal}", plain, plain, *wide)
            linear = lambda *qkv, causal=causal: linear_attention(*qkv, causal=causal)  # noqa: E731
            exact = lambda *qkv, causal=causal: linear_attention_reference(*qkv, causal=causal)  # noqa: E731
            yield from _beside(f"linear_attention {size}{' causal' * causal}", linear, exact, q.abs(), k.abs(), v)
        capped = lambda *qkv: attention(*qkv, scale=0.1, softcap=5.0)  # noqa: E731
        yield from _beside(f"attention {size}", capped, lambda *qkv: attention_reference(*qkv, scale=0.1, softcap=5.0), *wide)
        yield from _windowed(size, q, k, v)


def _windowed(size: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    """Causal attention in a window of 64 tokens as a pattern, by FlexAttention, whose products in float32 may be in TF32."""
    pattern = Pattern(((Condition(query=-1, key=1, low=-63, high=0),),))
    places = torch.arange(q.shape[2])
    mask = pattern.seen(places[:, None], places)

    def reference(*operands: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*operands, attn_mask=mask, scale=0.125, enable_gqa=True)

    def call(*operands: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(*operands, pattern=pattern.encode(), block=pattern.block, scale=0.125)

    yield from _beside(f"block_sparse_attention {size}", call, reference, q, k, v, dtypes=DTYPES[1:])


def rows_of(pretend: bool) -> Iterator[Case]:
    """Norms, rotary embeddings, dynamic quantization and grouped products."""
    for rows, features in ((33, 64),) if pretend else ((1024, 768), (8192, 2048), (333, 8192)):
        x, weight, bias = _normal(rows, features), _normal(features), _normal(features + 1)[1:]
        size = f"[{rows}, {features}]"
        norm = lambda *given: functional.layer_norm(given[0], (given[0].shape[1],), *given[1:])  # noqa: E731
        yield from _beside(f"layer_norm {size}", norm, norm, x, weight, bias)
        rms = lambda *given: fused_rms_norm_reference(*given, eps=1e-5)  # noqa: E731
        yield from _beside(f"rms_norm {size}", rms, rms, x, weight)
        for format in ("int8", "uint8"):
            options = {"format": format, "granularity": "token"}
            # A value on the boundary may go to either neighbour, a step of 1/127 of the largest of a row; few do.
            yield from _beside(
                f"fake_quantize_dynamic {format} {size}",
                lambda given, options=options: fake_quantize_dynamic(given, **options),
                lambda given, options=options: fake_quantize_dynamic_reference(given, **options),
                x, dtypes=(torch.bfloat16, torch.float16),
            )  # fmt: skip
    heads, tokens, head_dim = (2, 9, 16) if pretend else (32, 512, 64)
    angles = _normal(1, 1, tokens, head_dim)
    yield from _beside(
        "rotary", rotary_reference, rotary_reference, _normal(2, heads, tokens, head_dim), angles.cos(), angles.sin()
    )
    inputs, features = (32, 24) if pretend else (768, 3072)
    offs = torch.tensor([0, 40, 41, 96], dtype=torch.int32)
    yield from _beside("grouped_product", grouped_product, _grouped, _normal(96, inputs), _normal(4, inputs, features), offs)


def _grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    ends = [0, *offs.tolist()]
    return torch.cat([x[low:high] @ matrix for low, high, matrix in zip(ends, ends[1:], weight, strict=False)])


def sparse(pretend: bool) -> Iterator[Case]:
    """Linear layers with 2:4 weights, where the device has such products."""
    if torch.cuda.get_device_capability()[0] != 8:
        return
    for inputs, features in ((128, 64),) if pretend else ((768, 3072), (2048, 8192), (8192, 2048)):
        weight = _normal(features, inputs)
        weight = torch.where(torch.arange(inputs) % 4 < 2, weight, 0.0)
        for rows in ROWS:
            yield from _beside(
                f"sparse_linear {inputs}→{features}, {rows} rows",
                lambda x, matrix: sparse_linear(x, *pack(matrix)),
                functional.linear,
                _normal(rows, inputs), weight, dtypes=(torch.bfloat16, torch.float16),
            )  # fmt: skip


def triton_kernels(pretend: bool) -> Iterator[Case]:
    """Triton's kernels beside their references on the CPU: exact integers, and products with bias, GELU and residual."""
    missing = obstacle(torch.device("cuda"))
    if missing is not None:
        yield {"case": "Triton's kernels", "ok": True, "how": f"PyTorch's products: {missing}"}
        return
    for inputs, features in ((128, 72),) if pretend else (*LAYERS, (4096, 4096), (770, 331)):
        for rows in ROWS:
            for dtype in (torch.bfloat16, torch.float16):
                name = f"{inputs}→{features} {_short(dtype)}, {rows} rows"
                yield from guarded(f"int8 {name}", partial(_triton_int8, name, rows, inputs, features, dtype))
                yield from guarded(f"int4 {name}", partial(_triton_int4, name, rows, inputs, features, dtype))


def _triton_int8(name: str, rows: int, inputs: int, features: int, dtype: torch.dtype) -> Iterator[Case]:
    x, other, bias = (_normal(*sizes).to(dtype) for sizes in ((rows, inputs), (rows, features), (features,)))
    known = quantize_rows_reference(x)
    found = quantize_rows(x.cuda())
    wrong = sum(int((one.cpu() != wanted).sum()) for one, wanted in zip(found, known, strict=True))
    yield _case(f"quantize_rows {name}", wrong, 0)
    weight = _integers(-128, 128, features, inputs)
    operands = [known[0], weight, *known[1:], _normal(features).abs() * 1e-3, weight.sum(1, dtype=torch.int32), bias, other]
    yield _beside_reference(f"int8_product {name}", int8_product, int8_product_reference, operands, dtype, dtype=dtype)


def _triton_int4(name: str, rows: int, inputs: int, features: int, dtype: torch.dtype) -> Iterator[Case]:
    x, other, bias = (_normal(*sizes).to(dtype) for sizes in ((rows, inputs), (rows, features), (features,)))
    for signed in (True, False):
        weight = pack_halves(_integers(-8, 8, features, inputs) if signed else _integers(0, 16, features, inputs))
        groups = inputs // 64 if inputs % 64 == 0 else 1
        zero_point = None if signed else _integers(0, 16, features, groups).to(torch.uint8)
        operands = [x, weight, _normal(features, groups).abs() * 1e-2, zero_point, bias, other]
        title = f"int4_product {name}{'' if signed else ' with zero points'}"
        yield _beside_reference(title, int4_product, int4_product_reference, operands, dtype, signed=signed)


def _integers(low: int, high: int, *sizes: int) -> torch.Tensor:
    return torch.randint(low, high, sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.int8)


def _beside_reference(
    name: str, call: Call, reference: Call, operands: list[torch.Tensor | None], allowed: torch.dtype, **options: object
) -> Case:
    options |= {"activation": "gelu"}
    wanted = reference(*operands, **options)
    found = call(*(item if item is None else item.cuda() for item in operands), **options)
    return _case(name, _error(found, wanted), ALLOWED[allowed])


KINDS = {"attention": attentions, "rows": rows_of, "sparse": sparse, "triton": triton_kernels}


def cases(kind: str, pretend: bool) -> Iterator[Case]:
    """All cases of a kind."""
    if kind in SCHEMES:
        yield from quantized_layers(kind, pretend)
        return
    yield from KINDS[kind](pretend)


def main() -> None:
    """Check a kind of operators."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=[*SCHEMES, *KINDS])
    parser.add_argument("--pretend", action="store_true")
    options = parser.parse_args()
    with device(options.pretend), torch.no_grad():
        print(json.dumps(list(cases(options.kind, options.pretend))))


if __name__ == "__main__":
    main()
