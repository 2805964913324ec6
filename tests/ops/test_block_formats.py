"""Tests of block floating-point formats: against a table in float64, and against torchao where it is installed."""

from __future__ import annotations

import math

import pytest
import torch

from lissom.ops.block_formats import BLOCK_FORMATS, BlockFormat, block_scale
from lissom.ops.formats import FORMATS, fp4_values, pack_halves, quantize, unpack_halves
from lissom.ops.quantization import dequantize_reference, fake_quantize_reference, quantize_weight

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""OCP Microscaling Formats 1.0, table 5; the code of a value is its index."""
E4M3 = [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
"""OCP 8-bit Floating Point 1.0, table 1, without the code of NaN."""
VALUES = {"mxfp4": E2M1, "mxfp8": E4M3, "nvfp4": E2M1}
FORMS = [*BLOCK_FORMATS.values()]


def nearest_code(value: float, values: list[float]) -> int:
    """The code of the nearest value by brute force, of two the even one; larger values saturate."""
    size = min(abs(value), values[-1])
    distance = min(abs(size - candidate) for candidate in values)
    codes = [code for code, candidate in enumerate(values) if abs(size - candidate) == distance]
    return next((code for code in codes if code % 2 == 0), codes[0])


def oracle(block: list[float], form: BlockFormat, tensor_scale: float) -> tuple[float, list[float]]:
    """The scale of a block, without that of the tensor, and its elements before they are scaled, in float64."""
    values, largest = VALUES[form.name], max(map(abs, block))
    if form.name == "nvfp4":
        scaled = min(max(largest / 6 / tensor_scale, 2.0**-6), 448.0)
        scale = E4M3[nearest_code(scaled, E4M3)]
    else:
        exponent = math.floor(math.log2(values[-1]))
        scale = 2.0 ** max(math.floor(math.log2(largest)) - exponent, -127) if largest else 2.0**-127
    return scale, [math.copysign(values[nearest_code(v / (scale * tensor_scale), values)], v) for v in block]


def tensors() -> dict[str, torch.Tensor]:
    """Matrices of several magnitudes, whose blocks differ, with zeros and ties."""
    made = torch.Generator().manual_seed(0)
    normal = torch.randn(6, 96, generator=made)
    spread = normal * torch.exp2(torch.randint(-20, 20, (6, 1), generator=made))
    ties = torch.arange(-96, 96).view(2, 96) / 16
    return {
        "normal": normal,
        "bfloat16": normal.bfloat16(),
        "spread": spread,
        "ties": ties,
        "large": normal * 1e37,
        "small": normal * 1e-30,
        "sparse": normal.where(torch.rand(6, 96, generator=made) < 0.05, 0.0),
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", list(tensors()))
def test_numbers_are_those_of_the_specification(name: str, form: BlockFormat) -> None:
    x = tensors()[name]
    scale, tensor_scale = block_scale(x, (len(x), x.shape[1] // form.size), form)
    q = quantize(x, scale, None, form.element, tensor_scale).double()
    assert scale.dtype == form.scale
    for blocks, scales, elements in zip(x.double().tolist(), scale.double().tolist(), q.tolist(), strict=True):
        for index, found in enumerate(scales):
            span = slice(index * form.size, (index + 1) * form.size)
            wanted, rounded = oracle(blocks[span], form, tensor_scale)
            assert found == wanted
            assert elements[span] == rounded


def test_codes_are_those_of_e2m1() -> None:
    values = fp4_values(torch.arange(16, dtype=torch.uint8))
    assert values.float().tolist() == [*E2M1, *(-value for value in E2M1)]
    assert [math.copysign(1, value) for value in values.float().tolist()] == [1.0] * 8 + [-1.0] * 8
    packed = torch.arange(256, dtype=torch.uint8)
    unpacked = unpack_halves(packed, FORMATS["fp4"])
    assert pack_halves(unpacked).equal(packed)
    assert unpacked[:4].float().tolist() == [0.0, 0.0, 0.5, 0.0]  # the first element is in the low half


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_code_times_every_scale_is_kept(form: BlockFormat) -> None:
    # Values of the format are quantized to themselves, whatever the scale: all codes, in blocks with the largest among them.
    values = torch.tensor(VALUES[form.name]).double()
    values = torch.cat((values, -values))
    filled = torch.cat((values, values.new_zeros(-len(values) % form.size))).view(-1, form.size)
    filled[:, 0] = values.max()
    scales = torch.arange(1, 255 if form.name != "nvfp4" else 127, dtype=torch.uint8).view(form.scale).float()
    usable = scales[(scales.double() * values.max() < 3e38) & (scales >= 2.0**-118)]
    for scale in usable.tolist():
        x = (filled * scale).float()
        found, tensor_scale = block_scale(x, (len(x), 1), form)
        assert fake_quantize_reference(x, found, format=form.element.name, tensor_scale=tensor_scale).allclose(x, rtol=2e-7)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_stored_weights_are_those_of_fake_quantize(form: BlockFormat) -> None:
    x = tensors()["spread"]
    scale, tensor_scale = block_scale(x, (len(x), x.shape[1] // form.size), form)
    options = {"format": form.element.name, "tensor_scale": tensor_scale}
    stored = quantize_weight(x, scale, **options)
    assert stored.nbytes == x.numel() * form.element.bits // 8
    found = dequantize_reference(stored, scale, dtype=torch.float32, **options)
    assert found.equal(fake_quantize_reference(x, scale, **options))


def test_blocks_of_zeros_stay_zero_and_nan_spreads_to_its_block() -> None:
    for form in FORMS:
        scale, tensor_scale = block_scale(torch.zeros(2, 64), (2, 64 // form.size), form)
        assert not fake_quantize_reference(torch.zeros(2, 64), scale, format=form.element.name, tensor_scale=tensor_scale).any()
    x = torch.ones(1, 64)
    x[0, 3] = math.nan
    scale, _ = block_scale(x, (1, 2), BLOCK_FORMATS["mxfp4"])
    assert scale.isnan().tolist() == [[True, False]]
    assert fake_quantize_reference(x, scale, format="fp4").isnan().sum() == 32


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def every_exponent() -> torch.Tensor:
    """Blocks whose values have each exponent of float32, subnormals and zeros among them, and every fraction of three bits."""
    exponents, fractions = torch.arange(0, 255).view(-1, 1), torch.arange(32)
    raw = (exponents << 23) | ((fractions % 8) << 20) | ((fractions // 8) << 18)
    values = raw.to(torch.int32).view(torch.float32)
    return torch.cat((values, values * torch.tensor([1.0, -1.0]).repeat(16), values[:, :1] * torch.linspace(0, 1, 32)))


def torchao_tensors() -> dict[str, torch.Tensor]:
    infinite = torch.randn(2, 64)
    infinite[0, 5], infinite[1, 40] = math.inf, -math.inf
    nan = torch.randn(2, 64)
    nan[0, 5] = math.nan
    every_code = fp4_values(torch.arange(16, dtype=torch.uint8)).float()
    scaled = torch.cat((every_code, every_code)) * torch.exp2(torch.arange(-120.0, 120)).view(-1, 1)
    return {**tensors(), "exponents": every_exponent(), "infinite": infinite, "nan": nan, "codes": scaled}


@pytest.mark.parametrize("name", list(torchao_tensors()))
@pytest.mark.parametrize("form", FORMS[:2], ids=lambda form: form.name)
def test_mx_formats_are_bit_identical_to_torchao(form: BlockFormat, name: str) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    x = torchao_tensors()[name]
    element = torch.float4_e2m1fn_x2 if form.element.bits == 4 else torch.float8_e4m3fn
    wanted_scale, wanted = mx.to_mx(x, element, form.size)
    scale, _ = block_scale(x, (len(x), x.shape[1] // form.size), form)
    assert bits(scale).equal(bits(wanted_scale))
    finite = ~scale.isnan().repeat_interleave(form.size, 1)  # the elements of a block whose scale is NaN have no meaning
    each = finite if form.element.bits == 8 else finite[:, ::2]
    q = quantize_weight(x, scale, format=form.element.name)
    assert bits(q)[each].equal(bits(wanted)[each])
    again = mx.to_dtype(wanted, wanted_scale, element, form.size, torch.float32)
    found = dequantize_reference(q, scale, format=form.element.name, dtype=torch.float32)
    assert bits(found).view(torch.int32)[finite].equal(bits(again).view(torch.int32)[finite])
    assert found.isnan().logical_not().equal(finite)


@pytest.mark.parametrize("name", ["normal", "bfloat16", "spread", "ties", "large", "small", "sparse", "exponents"])
def test_nvfp4_is_bit_identical_to_torchao(name: str) -> None:
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    x, form = torchao_tensors()[name], BLOCK_FORMATS["nvfp4"]
    wanted = nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=nv.per_tensor_amax_to_scale(x.abs().amax()))
    scale, tensor_scale = block_scale(x, (len(x), x.shape[1] // form.size), form)
    assert tensor_scale == float(wanted.per_tensor_scale)
    assert bits(scale).equal(bits(wanted.scale.view(scale.shape)))
    q = quantize_weight(x, scale, format="fp4", tensor_scale=tensor_scale)
    assert q.equal(wanted.qdata.view(torch.uint8))
    found = dequantize_reference(q, scale, format="fp4", dtype=torch.float32, tensor_scale=tensor_scale)
    assert found.view(torch.int32).equal(wanted.dequantize(torch.float32).view(torch.int32))
