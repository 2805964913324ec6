"""Tiny models of timm, torchvision and x-transformers, if these are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tests.support.models import Case, normal
from tools.zoo.entry import Entry, Expected
from tools.zoo.weights import woken

_SMALL = {"img_size": 32, "num_classes": 10}
_PLAIN = _SMALL | {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_VIT = Expected(2, 3, 3, 16, 2)

TIMM: Mapping[str, tuple[str, dict[str, Any], Expected]] = {
    "vit": ("vit_tiny_patch16_224", _PLAIN, _VIT),
    "vit-registers": ("vit_little_patch16_reg4_gap_256", _PLAIN, _VIT),
    "vit-relpos": ("vit_relpos_small_patch16_224", _PLAIN, _VIT),
    "vit-parallel": ("vit_small_patch16_18x2_224", _PLAIN, Expected()),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", _PLAIN, _VIT),
    "deit3": ("deit3_small_patch16_224", _PLAIN, _VIT),
    "beit": ("beit_base_patch16_224", _PLAIN, _VIT),
    "cait": ("cait_xxs24_224", _PLAIN, Expected()),
    "convit": ("convit_tiny", _PLAIN | {"local_up_to_layer": 1}, Expected(2, 3, 3, 16, 2)),
    "eva": ("eva02_tiny_patch14_224", _PLAIN, _VIT),
    "xcit": ("xcit_nano_12_p16_224", _PLAIN, Expected()),
    "flexivit": ("flexivit_small", _PLAIN, _VIT),
    "aimv2": ("aimv2_large_patch14_224", _PLAIN, _VIT),
    "swin": (
        "swin_tiny_patch4_window7_224",
        _SMALL | {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)},
        Expected(4, None, None, 16, 4),
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        _SMALL | {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)},
        Expected(4, None, None, 16, 4),
    ),
    "twins": (
        "twins_svt_small",
        _SMALL
        | {"patch_size": 4, "embed_dims": (16, 32), "depths": (2, 2), "num_heads": (1, 2), "sr_ratios": (2, 1), "wss": (4, 2)},
        Expected(4, None, None, 16, 4),
    ),
    "pit": (
        "pit_ti_224",
        _SMALL | {"base_dims": [16, 16, 16], "depth": [1, 1, 1], "heads": [1, 2, 4]},
        Expected(3, None, None, 16, 3),
    ),
    "levit": (
        "levit_128s",
        {"num_classes": 10, "img_size": 64, "embed_dim": (32, 48), "depth": (1, 1), "num_heads": (2, 3)},
        Expected(),
    ),
    "crossvit": ("crossvit_tiny_240", {"num_classes": 10, "embed_dim": [16, 32], "num_heads": [1, 2]}, Expected()),
    "pvt": (
        "pvt_v2_b0",
        {
            "num_classes": 10,
            "depths": (1, 1),
            "embed_dims": (16, 32),
            "num_heads": (1, 2),
            "sr_ratios": (4, 2),
            "mlp_ratios": (2, 2),
        },
        Expected(2),
    ),
}
"""The model's name in timm, its constructor arguments, and the sites expected from them."""


def entries() -> Iterator[Entry]:
    """The entries of each library that is installed."""
    if find_spec("timm") is not None:
        for name, (model, options, expected) in TIMM.items():
            yield Entry(f"timm/{name}", "timm", partial(_timm, model, options), partial(_same, expected))
    if find_spec("torchvision") is not None:
        yield Entry("torchvision/vit", "torchvision", _vision_transformer, partial(_same, Expected(2, 4, 4, 8, 2)))
        for version in ("", "_v2"):
            build = partial(_swin, version)
            yield Entry(f"torchvision/swin{version}", "torchvision", build, partial(_same, Expected(4, None, None, 8, 4)))
    if find_spec("x_transformers") is not None:
        for name, (options, expected) in X_TRANSFORMERS.items():
            yield Entry(f"x-transformers/{name}", "x-transformers", partial(_x_transformer, options), partial(_same, expected))


X_TRANSFORMERS: Mapping[str, tuple[dict[str, Any], Expected]] = {
    "plain": ({}, Expected(2, 4, 4, 8, 2)),
    "rotary-swiglu": ({"rotary_pos_emb": True, "ff_swish": True, "ff_glu": True, "use_rmsnorm": True}, Expected(2, 4, 4, 8, 2)),
    "alibi": ({"alibi_pos_bias": True, "alibi_num_heads": 4}, Expected(2, 4, 4, 8, 2)),
    "t5-bias": ({"rel_pos_bias": True}, Expected(2, 4, 4, 8, 2)),
    "one-kv-head": ({"attn_one_kv_head": True}, Expected(2, 4, 1, 8, 2)),
    "grouped-kv": ({"attn_kv_heads": 2}, Expected(2, 4, 2, 8, 2)),
    "qk-norm": ({"attn_qk_norm": True}, Expected(2, 4, 4, 8, 2)),
    "memory": ({"attn_num_mem_kv": 3}, Expected(2, 4, 4, 8, 2)),
    "talking-heads": ({"attn_pre_talking_heads": True, "attn_post_talking_heads": True}, Expected(2, 4, 4, 8, 2)),
    "flash": ({"attn_flash": True}, Expected(2, 4, 4, 8, 2)),
}
"""The decoder's constructor arguments beside its sizes."""


def _same(expected: Expected) -> Expected:
    return expected


def _timm(model: str, options: dict[str, Any]) -> Case:
    timm = importlib.import_module("timm")
    size = options.get("img_size", 240 if "crossvit" in model else 32)
    return Case(woken(lambda: timm.create_model(model, pretrained=False, **options)), (normal(2, 3, size, size),))


def _vision_transformer() -> Case:
    models = importlib.import_module("torchvision.models")
    build: Callable[[], nn.Module] = lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)  # noqa: E731
    return Case(woken(build), (normal(2, 3, 32, 32),))


def _swin(version: str) -> Case:
    swin = importlib.import_module("torchvision.models.swin_transformer")
    options: dict[str, Any] = {"num_classes": 10}
    if version:
        options |= {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}

    def build() -> nn.Module:
        return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], **options)

    return Case(woken(build), (normal(2, 3, 64, 64),))


def _x_transformer(options: dict[str, Any]) -> Case:
    library = importlib.import_module("x_transformers")

    def build() -> nn.Module:
        decoder = library.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
        return library.TransformerWrapper(num_tokens=61, max_seq_len=64, attn_layers=decoder)

    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    return Case(woken(build), (ids,))
