"""Calls of every entry point of the C++ kernels, right ones and spoilt ones: `python -m tests.ops.generated_calls`.

A right call has odd sizes, odd strides and both dtypes. A spoilt call has one to three operands or options changed: another
dtype, size, stride or storage, an empty or a scalar tensor, a huge size, an index out of range, NaN. Whatever is called, the
result equals the reference's, or the call is refused with a sentence; the process lives. `tools.sanitize` runs them under
sanitizers. The last call is named when the process is ended.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import os
import random
import resource
import sys
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lissom.ops.block_sparse_linear import (
    BLOCK,
    block_sparse_linear_reference,
    block_sparse_quantized_linear_reference,
    pack_nonzero_blocks,
)
from lissom.ops.blocked_attention import blocked_attention
from lissom.ops.formats import BYTE_SCALES, SCALES, quantize
from lissom.ops.fused_attention import fused_attention_reference, merged_attention_reference, unpadded_attention_reference
from lissom.ops.fused_rows import fused_layer_norm_reference, fused_rms_norm_reference, fused_rotary_reference
from lissom.ops.native import kernel_dtypes, load_kernels
from lissom.ops.packed_linear import pack, packed_embedding_reference, packed_linear_reference
from lissom.ops.quantized_linear import fill_panels, pack_bytes, pack_groups, quantized_linear_reference
from lissom.ops.weight_quantized_linear import FORMS, pack_blocks, pack_stored, weight_quantized_linear_reference
from tests.ops.calls import Call, Value, said, spoil
from tests.ops.patterns import PATTERNS, layout_of, slots_and_rows
from tests.ops.unreadable import is_gone

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "squared_relu")
# float32: sums in another order, and exponentials good to 2e-7.  bfloat16: the reference also rounds what is between two
# operators, 8 bits each of numbers up to the largest; a norm divides these by a deviation that may be small.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
_NORM = 10
# A layer norm of two values that are nearly equal divides what is left of them by as little as sqrt(1e-5).
# Limits of the kernels alone: other dtypes, sizes of 32 bits, memory they cannot read, numbers they do not compute with.
OF_KERNELS = ("kernels compute in", "must be from 0 to", "clone it", "must be finite", "allocate memory", "zero point of x is")
OF_SCHEMAS = ("Expected a value of type", "value cannot be converted to type")


class Generator:
    """Calls from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.dtypes = kernel_dtypes() or (torch.float32,)
        self.makers = [self.linear, self.quantized, self.stored, self.embedding, self.attention, self.merged, self.sparse]
        self.makers += [self.norm, self.rotary, self.unpadded, self.blocks]

    def call(self) -> tuple[Call, bool]:
        """A call, and whether it is spoilt."""
        call = self.random.choice(self.makers)()
        spoilt = self.random.random() < 0.7
        for _ in range(self.random.choice([1, 1, 2, 3]) if spoilt else 0):
            spoil(call, self.random)
        return call, spoilt

    def numbers(self, *sizes: int, dtype: torch.dtype) -> torch.Tensor:
        """Normal, laid out in some way that has these sizes."""
        whole = torch.randn(sizes, generator=self.torch).to(dtype)
        if len(sizes) > 1 and self.random.random() < 0.3:
            one, another = self.random.sample(range(len(sizes)), 2)
            return whole.transpose(one, another).contiguous().transpose(one, another)
        return whole

    def size(self, most: int = 70) -> int:
        return self.random.choice([0, 1, 2, 3, 31, 32, 33, self.random.randint(1, most), self.random.randint(1, most)])

    def around(self, call: Call, lead: Sequence[int], features: int, dtype: torch.dtype) -> Call:
        """The call with a bias and what else surrounds a product; half the time with a norm."""
        maybe = lambda *sizes: self.numbers(*sizes, dtype=dtype) if self.random.random() < 0.6 else None  # noqa: E731
        call.operands |= {"bias": maybe(features), "other": maybe(*lead, features)}
        call.options["features"] = features
        if call.name.endswith("_norm"):
            call.operands |= {"norm_weight": maybe(features), "norm_bias": maybe(features)}
            call.options["eps"] = 1e-5
        else:
            call.options |= {"activation": self.random.choice(ACTIVATIONS), "combine": self.random.choice(["add", "mul"])}
        return call

    def lead(self) -> list[int]:
        return [self.random.choice([0, 1, 1, 2, 5, 17, 60]) for _ in range(self.random.choice([0, 1, 1, 2]))]

    def linear(self) -> Call:
        dtype, lead = self.random.choice(self.dtypes), self.lead()
        inputs, features = self.size(), self.size()
        inputs += inputs % 2 if dtype == torch.bfloat16 else 0
        weight = pack(torch.randn(features, inputs, generator=self.torch).to(dtype))
        operands = {"x": self.numbers(*lead, inputs, dtype=dtype), "weight": weight}
        norm = self.random.random() < 0.4
        call = Call("packed_linear" + "_norm" * norm, packed_linear_reference, operands, {})
        return self.around(call, lead, features, dtype)

    def quantized(self) -> Call:
        dtype, lead = self.random.choice(self.dtypes), self.lead()
        groups = self.random.choice([0, 0, 1, 2, 3])  # none: a scale for each feature
        inputs, features = groups * 4 * self.random.choice([0, 1, 5, 8]) if groups else self.size(), self.size()
        q = torch.randint(-127, 128, (features, inputs), generator=self.torch).to(torch.int8)
        scale = fill_panels(torch.rand(features, generator=self.torch) / 100, features)
        operands = {"x": self.numbers(*lead, inputs, dtype=dtype), "weight": pack_bytes(q), "scale": scale}
        known = self.random.random() < 0.3
        operands |= {
            "sums": fill_panels(q.sum(1, dtype=torch.int32), features),
            "x_scale": torch.tensor(0.02) if known else None,
            "x_zero_point": torch.tensor(self.random.choice([0, 128, 255]), dtype=torch.uint8) if known else None,
        }
        kinds = ["token", "tensor", *["group"] * (not known and inputs // max(groups, 1) % 32 == 0)]
        options, zero = {"granularity": self.random.choice(kinds)}, None
        if groups:
            bits = self.random.choice([4, 8])
            q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (features, inputs), generator=self.torch).to(torch.int8)
            scale = torch.rand(features, groups, generator=self.torch) / 100
            scale = scale.to(self.random.choice([torch.float16, torch.float32]))
            if bits == 4 and options["granularity"] == "group" and self.random.random() < 0.5:
                q, zero = (q + 8).to(torch.uint8), torch.randint(0, 16, scale.shape, generator=self.torch).to(torch.uint8)
            operands |= zip(("weight", "scale", "sums"), pack_groups(q, scale, bits, zero), strict=True)
        operands["zero_point"] = None if zero is None else pack_blocks(zero, features)
        norm = self.random.random() < 0.4
        call = Call("quantized_linear" + "_norm" * norm, quantized_linear_reference, operands, {**options})
        return self.around(call, lead, features, dtype)

    def blocks(self) -> Call:
        """A linear layer without the zero blocks of its weight, half of them in int8."""
        dtype, lead = self.random.choice(self.dtypes), self.lead()
        features, inputs, quantized = self.size(), BLOCK * self.random.choice([0, 1, 2, 9, 16, 17]), self.random.random() < 0.5
        kept = torch.rand(-(-features // 32), inputs // BLOCK, generator=self.torch) < self.random.choice([0, 0.3, 1])
        kept = kept.repeat_interleave(32, 0)[:features].repeat_interleave(BLOCK, 1)
        norm = "_norm" * (self.random.random() < 0.4)
        x = self.numbers(*lead, inputs, dtype=dtype)
        if not quantized:
            weight = (torch.randn(features, inputs, generator=self.torch) * kept).to(dtype)
            stored = dict(zip(("weight", "places", "ends"), pack_nonzero_blocks(pack(weight)), strict=True))
            call = Call("block_sparse_linear" + norm, block_sparse_linear_reference, {"x": x, **stored}, {})
            return self.around(call, lead, features, dtype)
        q = (torch.randint(-127, 128, (features, inputs), generator=self.torch) * kept).to(torch.int8)
        stored = dict(zip(("weight", "places", "ends"), pack_nonzero_blocks(pack_bytes(q)), strict=True))
        known = self.random.random() < 0.3
        grid = {
            "scale": fill_panels(torch.rand(features, generator=self.torch) / 100, features),
            "sums": fill_panels(q.sum(1, dtype=torch.int32), features),
            "x_scale": torch.tensor(0.02) if known else None,
            "x_zero_point": torch.tensor(128, dtype=torch.uint8) if known else None,
        }
        options: dict[str, Value] = {"granularity": self.random.choice(["token", "tensor"])}
        name, reference = "block_sparse_quantized_linear" + norm, block_sparse_quantized_linear_reference
        return self.around(Call(name, reference, {"x": x, **stored, **grid}, options), lead, features, dtype)

    def stored(self) -> Call:
        dtype, lead = self.random.choice(self.dtypes), self.lead()
        groups, features, form = self.random.choice([1, 1, 2, 3]), self.size(), self.random.choice(list(FORMS))
        inputs = groups * 2 * self.random.choice([0, 1, 5, 8, 16, 17])
        low, high = int(FORMS[form].low), int(FORMS[form].high) + 1
        q = torch.randint(low, high, (features, inputs), generator=self.torch).to(torch.int8 if low else torch.uint8)
        if not FORMS[form].is_integer:
            q = quantize(torch.randn(features, inputs, generator=self.torch), torch.tensor(0.5), None, FORMS[form])
        scale = (torch.rand(features, groups, generator=self.torch) / 100).to(self.random.choice([*SCALES, *BYTE_SCALES]))
        zero = torch.randint(0, high, (features, groups), generator=self.torch).to(torch.uint8)
        if self.random.random() < 0.3:
            zero = (zero * scale.float()).to(self.random.choice([torch.float16, torch.float32]))
        operands = {
            "x": self.numbers(*lead, inputs, dtype=dtype),
            "weight": pack_stored(q, form),
            "scale": pack_blocks(scale, features),
            "zero_point": pack_blocks(zero, features) if low == 0 or self.random.random() < 0.3 else None,
        }
        norm, options = self.random.random() < 0.4, {"format": form, "tensor_scale": self.random.choice([1.0, 1.0, 0.7])}
        call = Call("weight_quantized_linear" + "_norm" * norm, weight_quantized_linear_reference, operands, options)
        return self.around(call, lead, features, dtype)

    def embedding(self) -> Call:
        features, inputs = self.size(), 2 * self.size()
        four = self.random.random() < 0.4
        if four:
            weight = pack_stored(torch.randint(0, 16, (features, inputs), generator=self.torch).to(torch.uint8), "uint4")
        else:
            weight = pack(torch.randn(features, inputs, generator=self.torch).to(self.random.choice(self.dtypes)))
        sizes = self.lead() if features else [0]
        indices = torch.randint(0, max(features, 1), sizes, generator=self.torch)
        operands = {"weight": weight, "indices": indices.to(self.random.choice([torch.int64, torch.int32]))}
        options: dict[str, Value] = {"features": features, "bits": 4 if four else 8 * weight.element_size()}
        return Call("packed_embedding", packed_embedding_reference, operands, options)

    def qkv(self) -> tuple[dict[str, Value], dict[str, Value], list[int]]:
        dtype, shared = self.random.choice(self.dtypes), self.random.choice([1, 1, 2, 3])
        batch, key_heads, queries, keys = self.random.choice([0, 1, 2]), self.random.choice([1, 2]), self.size(), self.size(150)
        head_dim, value_dim = self.size(), self.size()
        heads = shared * key_heads
        q = self.numbers(batch, heads, queries, head_dim, dtype=dtype)
        k = self.numbers(batch, key_heads, keys, head_dim, dtype=dtype)
        v = self.numbers(batch, key_heads, keys, value_dim, dtype=dtype)
        sizes = [self.random.choice([1, size]) for size in (batch, heads, queries)] + [keys]
        kind = self.random.choice(["none", "seen", "bias", "hidden", "window"])
        bias = None if kind == "none" else torch.randn(sizes, generator=self.torch)
        if kind == "window":  # of some keys, from anywhere on: a row may see none, and a later one earlier keys
            first, width = torch.randint(-keys - 1, keys + 1, (*sizes[:-1], 1), generator=self.torch), self.random.randint(1, 9)
            place = torch.arange(sizes[-1])
            bias = (place >= first) & (place < first + width)
        elif bias is not None and kind != "bias":
            bias = bias > -0.5 if kind == "seen" else torch.zeros(sizes).masked_fill(bias < -0.5, -torch.inf)
        softcap, with_sinks = self.random.choice([0.0, 2.0]), self.random.random() < 0.3
        sinks = self.numbers(heads, 1, 1, dtype=torch.float32) if with_sinks else None
        options: dict[str, Value] = {"scale": head_dim**-0.5 if head_dim else 1.0, "softcap": softcap, "sinks": sinks}
        return {"q": q, "k": k, "v": v, "bias": bias}, options, [heads, queries, keys]

    def attention(self) -> Call:
        operands, options, _ = self.qkv()
        options["causal"] = self.random.random() < 0.3
        if self.random.random() < 0.2:
            for name in ("k", "v"):
                whole = operands[name]
                assert isinstance(whole, torch.Tensor)
                operands[name] = (whole * 20).clamp(-127, 127).to(torch.int8)
                options[f"{name}_scale"] = torch.rand(*whole.shape[:3], 1, generator=self.torch) / 20
        return Call("fused_attention", fused_attention_reference, operands, options)

    def merged(self) -> Call:
        dtype, key_heads = self.random.choice(self.dtypes), self.random.choice([1, 2])
        heads, tokens = key_heads * self.random.choice([1, 2]), self.size()
        width = (heads + 2 * key_heads) * self.random.choice([1, 7, 8, 32])
        qkv = self.numbers(self.random.choice([0, 1, 2]), tokens, width, dtype=dtype)
        bias = torch.randn(tokens, tokens, generator=self.torch) > -0.5 if self.random.random() < 0.4 else None
        options: dict[str, Value] = {"heads": heads, "key_heads": key_heads, "scale": 0.4, "softcap": 0.0}
        options["causal"] = self.random.random() < 0.5
        return Call("merged_attention", merged_attention_reference, {"qkv": qkv, "bias": bias}, options)

    def unpadded(self) -> Call:
        heads, key_heads, depth = 2, self.random.choice([1, 2]), self.random.choice([1, 7, 8, 32])
        seen = torch.arange(self.size()) < torch.randint(0, 40, (self.random.choice([0, 1, 2]), 1), generator=self.torch)
        slots, rows = slots_and_rows(seen)
        sizes = [1, seen.numel(), heads + 2 * key_heads, depth]
        whole = self.numbers(*sizes, dtype=self.random.choice(self.dtypes)).transpose(1, 2)
        parts = whole.split([heads, key_heads, key_heads], 1)
        low, high = (self.random.choice([None, None, -9, 0, 5]) for _ in range(2))
        bias = seen[:, None, None] if self.random.random() < 0.7 else None
        operands: dict[str, Value] = {**dict(zip("qkv", parts, strict=True)), "slots": slots, "rows": rows, "bias": bias}
        options: dict[str, Value] = {"scale": 0.4, "softcap": self.random.choice([0.0, 2.0]), "low": low, "high": high}
        return Call("unpadded_attention", unpadded_attention_reference, operands, options)

    def sparse(self) -> Call:
        operands, options, (heads, queries, keys) = self.qkv()
        pattern = self.random.choice([item for name, item in PATTERNS.items() if name != "many"])
        operands["layout"] = layout_of(pattern, self.random.choice([1, heads]), queries + 1, keys + 1)
        options |= {"pattern": pattern.encode(), "block": pattern.block}
        return Call("block_sparse_attention", blocked_attention, operands, options)

    def norm(self) -> Call:
        dtype, features = self.random.choice(self.dtypes), self.size()
        maybe = lambda: self.numbers(features, dtype=dtype) if self.random.random() < 0.7 else None  # noqa: E731
        operands: dict[str, Value] = {"x": self.numbers(*self.lead(), features, dtype=dtype), "weight": maybe()}
        if self.random.random() < 0.5:
            return Call("fused_rms_norm", fused_rms_norm_reference, operands, {"eps": 1e-5})
        return Call("fused_layer_norm", fused_layer_norm_reference, {**operands, "bias": maybe()}, {"eps": 1e-5})

    def rotary(self) -> Call:
        dtype, half, tokens = self.random.choice(self.dtypes), self.size(), self.size()
        batch, angles = self.random.choice([0, 1, 2]), half * self.random.choice([1, 2])
        sizes, heads = self.random.choice([[tokens], [1, 1, tokens], [batch, 1, tokens]]), self.random.choice([1, 3])
        operands: dict[str, Value] = {"x": self.numbers(batch, heads, tokens, 2 * half, dtype=dtype)}
        operands |= {name: self.numbers(*sizes, angles, dtype=dtype) for name in ("cos", "sin")}
        return Call("fused_rotary", fused_rotary_reference, operands, {"interleaved": self.random.random() < 0.5})


def fault_of(call: Call, spoilt: bool) -> str | None:
    """What is wrong with what a call does, or None. The reference is asked where it does not take terabytes."""
    operator = getattr(torch.ops.lissom, call.name)
    found = call.run(operator)
    tensors = [item for item in (*call.operands.values(), *call.options.values()) if isinstance(item, torch.Tensor)]
    if isinstance(found, Exception) and not spoilt:
        return f"a right call was refused: {found}"
    # An empty operand may have a huge size too, and with it a result of some of its sizes.
    huge = any(math.prod(size for size in item.shape if size) > 2**24 for item in tensors)
    strange = huge or any(item.is_meta or item.is_sparse or is_gone(item) for item in tensors)
    if strange or (isinstance(found, Exception) and any(text in str(found) for text in (*OF_KERNELS, *OF_SCHEMAS))):
        return None
    wanted = call.run(call.reference)
    if isinstance(found, Exception) or isinstance(wanted, Exception):
        if isinstance(found, Exception) and isinstance(wanted, Exception):
            return None
        return f"the kernel gives {_outcome(found)}, and the reference {_outcome(wanted)}"
    with FakeTensorMode(allow_non_fake_inputs=True):
        declared = call.run(operator)
    if isinstance(declared, Exception) and any(text in str(declared) for text in OF_SCHEMAS):
        return None  # a scalar that is a tensor is taken for a number, but for a fake one
    if isinstance(declared, Exception) or (declared.shape, declared.dtype) != (found.shape, found.dtype):
        return f"the kernel gives {_outcome(found)}, and the fake kernel {_outcome(declared)}"
    # The reference has no use for sums of weights, and wrong ones give a wrong product.
    return None if spoilt and "sums" in call.operands else _difference(call, found, wanted)


def _outcome(found: torch.Tensor | Exception) -> str:
    return said(found) if isinstance(found, torch.Tensor) else f"{type(found).__name__}: {found}"


def _difference(call: Call, found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"the kernel gives {said(found)}, and the reference {said(wanted)}"
    if found.numel() == 0:
        return None
    one, another = found.double(), wanted.double()
    finite = another.isfinite()
    if not torch.equal(one.isfinite(), finite):
        counts = [int((~item).sum()) for item in (one.isfinite(), finite)]
        return f"of {one.numel()} numbers the kernel has {counts[0]} that are not finite, and the reference {counts[1]}"
    scale = float(another[finite].abs().max()) if bool(finite.any()) else 0.0
    difference = float((one - another)[finite].abs().max()) if bool(finite.any()) else 0.0
    allowed = ALLOWED.get(found.dtype, 0.0) * (_NORM if call.name.endswith("_norm") and call.name != "fused_rms_norm" else 1)
    return None if difference <= allowed * max(scale, 1.0) else f"they are off by {difference:.3g} of {scale:.3g}"


def main() -> int:
    """Run calls from a seed; returns 1 when one does something wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amx", action="store_true", help="multiply by tiles, which are emulated where there are none")
    given = parser.parse_args()
    faulthandler.enable()
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which reserves terabytes
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    if missing := load_kernels():
        raise SystemExit(missing)
    if given.amx and not torch.ops.lissom.use_amx(True):
        raise SystemExit("the operating system does not permit AMX")
    faults = 0
    with torch.inference_mode():
        for number in range(given.seed, given.seed + given.calls):
            torch.set_num_threads(1 + number % 3)
            call, spoilt = Generator(number).call()
            print(f"\r{number}: {call}"[:2000], file=sys.stderr, flush=True)
            fault = fault_of(call, spoilt)
            if fault is not None:
                faults += 1
                print(f"{number}: {call}\n    {fault}", flush=True)
    print(f"{given.calls} calls, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
