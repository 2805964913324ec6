"""What is wrong with the arguments of a decoder, and of `compile_generation`, is said in one sentence."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lissom
from lissom.errors import ArtifactError, CaptureError, InputError, UnsupportedError
from lissom.generation.model import GenerationModel
from lissom.generation.stream import stream_tokens
from tests.support.decoders import decoder
from tests.support.refusals import Refusal, check, table

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.tensor([[5, 6, 7]])


@cache
def compiled() -> GenerationModel:
    return lissom.compile_generation(decoder("llama"), max_length=16)


def step(ids: object = IDS, mask: object = None) -> torch.Tensor:
    """A step of a decoder that has read nothing."""
    compiled().reset()
    return compiled().step(cast(torch.Tensor, ids), cast(Any, mask)).clone()


def stream(**options: object) -> object:
    return list(stream_tokens(compiled(), IDS, **cast(Any, {"max_new_tokens": 2, **options})))


STEPS: dict[str, Refusal] = {
    "none": (InputError, "input_ids is a NoneType; give a tensor of token ids", lambda: step(None)),
    "text": (InputError, "input_ids is a str;", lambda: step("a text")),
    "list": (InputError, "input_ids is a list;", lambda: step([[5, 6]])),
    "array": (InputError, "input_ids is a ndarray;", lambda: step(np.array([[5, 6]]))),
    "int16": (
        InputError,
        "input_ids is torch.int16; give a tensor of token ids, torch.int64 or torch.int32",
        lambda: step(IDS.short()),
    ),
    "uint8": (InputError, "input_ids is torch.uint8;", lambda: step(IDS.byte())),
    "float": (InputError, "input_ids is torch.float32;", lambda: step(IDS.float())),
    "bool": (InputError, "input_ids is torch.bool;", lambda: step(IDS.bool())),
    "complex": (InputError, "input_ids is torch.complex64;", lambda: step(IDS.to(torch.complex64))),
    "meta": (InputError, "input_ids is on meta, and this decoder reads dense tensors on cpu", lambda: step(IDS.to("meta"))),
    "sparse": (InputError, "input_ids is not dense,", lambda: step(IDS.to_sparse())),
    "one dimension": (InputError, "input_ids is [3], and this decoder reads [1, tokens]", lambda: step(IDS[0])),
    "three dimensions": (InputError, "input_ids is [1, 1, 3],", lambda: step(IDS[None])),
    "two rows": (InputError, "input_ids is [2, 3], and this decoder reads [1, tokens]", lambda: step(IDS.repeat(2, 1))),
    "no rows": (InputError, "input_ids is [0, 3],", lambda: step(IDS[:0])),
    "no tokens": (InputError, "the cache holds 16 tokens, none were given", lambda: step(IDS[:, :0])),
    "too many tokens": (InputError, "0 are read and 17 more were given", lambda: step(torch.ones(1, 17, dtype=torch.int64))),
    "past the vocabulary": (InputError, "row 99 of", lambda: step(torch.tensor([[99]]))),
    "below zero": (InputError, "row -1 of", lambda: step(torch.tensor([[-1]]))),
    "past it in 32 bits": (InputError, "row 2147483647 of", lambda: step(torch.tensor([[2**31 - 1]], dtype=torch.int32))),
    "mask text": (InputError, "attention_mask is a str; give a tensor", lambda: step(mask="left")),
    "mask a list": (InputError, "attention_mask is a list; give a tensor", lambda: step(mask=[[0, 1, 1]])),
    "mask too short": (InputError, "attention_mask is [1, 2]; give [1, 3] for the new", lambda: step(mask=torch.ones(1, 2))),
    "mask too long": (InputError, "attention_mask is [1, 4];", lambda: step(mask=torch.ones(1, 4))),
    "mask of one dimension": (InputError, "attention_mask is [3];", lambda: step(mask=torch.ones(3))),
    "mask of no dimension": (InputError, "attention_mask is [];", lambda: step(mask=torch.tensor(1))),
    "mask of two rows": (InputError, "attention_mask is [2, 3];", lambda: step(mask=torch.ones(2, 3))),
    "mask added to scores": (
        InputError,
        "attention_mask is torch.float32; give integers",
        lambda: step(mask=torch.tensor([[-1e9, 0, 0]])),
    ),
    "crop none": (InputError, "was to keep None; keep 0 to", lambda: compiled().crop(cast(int, None))),
    "crop text": (InputError, "was to keep '2'; keep 0 to", lambda: compiled().crop(cast(int, "2"))),
    "crop below zero": (InputError, "was to keep -1; keep 0 to", lambda: compiled().crop(-1)),
    "rows a list": (InputError, "rows is [0]; give a tensor of 1 row numbers", lambda: compiled().reorder(cast(Any, [0]))),
    "rows too many": (
        InputError,
        "rows is tensor([0, 0]); give a tensor of 1",
        lambda: compiled().reorder(torch.tensor([0, 0])),
    ),
    "rows of floats": (InputError, "rows is tensor([0.]); give", lambda: compiled().reorder(torch.zeros(1))),
    "rows not there": (InputError, "rows is [3]; this decoder has rows 0 to 0", lambda: compiled().reorder(torch.tensor([3]))),
    "temperature below zero": (InputError, "temperature is -1", lambda: stream(temperature=-1.0)),
    "temperature nan": (InputError, "temperature is nan", lambda: stream(temperature=float("nan"))),
    "temperature infinite": (InputError, "temperature is inf", lambda: stream(temperature=float("inf"))),
    "no new tokens": (InputError, "max_new_tokens 0", lambda: stream(max_new_tokens=0)),
    "seed too large": (InputError, "seed is 18446744073709551616; give a whole number of 64", lambda: stream(seed=2**64)),
    "seed too small": (InputError, "seed is -9223372036854775809;", lambda: stream(seed=-(2**63) - 1)),
    "save none": (ArtifactError, "the directory is None; give a path", lambda: compiled().save(cast(Any, None))),
    "save too long": (ArtifactError, "cannot be looked up: File name too long", lambda: compiled().save("a" * 5000)),
    "load none": (ArtifactError, "the directory is None;", lambda: lissom.load_generation(cast(Any, None))),
    "load too long": (ArtifactError, "File name too long", lambda: lissom.load_generation("a" * 5000)),
    "load nothing": (ArtifactError, "holds no saved decoder", lambda: lissom.load_generation("nowhere")),
}


@table(STEPS)
def test_a_step(refusal: Refusal) -> None:
    check(refusal)


def compile_(model: object = None, **options: object) -> object:
    given = {"max_length": 16, **options}
    return lissom.compile_generation(cast(nn.Module, decoder("llama") if model is None else model), **cast(Any, given))


COMPILES: dict[str, Refusal] = {
    "a class": (CaptureError, "the model is the class Linear; pass an object", lambda: compile_(nn.Linear)),
    "text": (ArtifactError, "'llama' is neither a directory nor a packaged model", lambda: compile_("llama")),
    "a layer": (UnsupportedError, "Linear is not a transformers model", lambda: compile_(nn.Linear(2, 2))),
    "a decoder": (CaptureError, "is compiled already", lambda: compile_(compiled())),
    "length text": (InputError, "max_length is '16'; give a whole number", lambda: compile_(max_length="16")),
    "length none": (InputError, "max_length is None;", lambda: compile_(max_length=None)),
    "length a fraction": (InputError, "max_length is 16.0;", lambda: compile_(max_length=16.0)),
    "length too short": (InputError, "max_length is 2; give the tokens", lambda: compile_(max_length=2)),
    "length too long": (InputError, "max_length is 99, and LlamaForCausalLM knows", lambda: compile_(max_length=99)),
    "batch text": (InputError, "batch is '2'; give a whole number", lambda: compile_(batch="2")),
    "batch true": (InputError, "batch is True;", lambda: compile_(batch=True)),
    "batch zero": (InputError, "batch is 0; give how many", lambda: compile_(batch=0)),
    "metric": (UnsupportedError, "metric= is 'perplexity'; give a callable", lambda: compile_(metric="perplexity")),
    "drop": (UnsupportedError, "max_drop= is '0'; give a number", lambda: compile_(metric=lambda call: 1.0, max_drop="0")),
    "checks": (UnsupportedError, "checks='all' is not known", lambda: compile_(checks="all")),
    "progress": (UnsupportedError, "progress= is 1; give a callable", lambda: compile_(progress=1)),
    "device": (UnsupportedError, "device 1.5 is not known", lambda: compile_(device=1.5)),
    "passes": (UnsupportedError, "passes= is 0;", lambda: compile_(passes=0)),
    "backend": (UnsupportedError, "backend= is 1; give a name", lambda: compile_(backend=1)),
    "world_size": (UnsupportedError, "world_size= is '2';", lambda: compile_(world_size="2", backend="distributed")),
    "data a tensor": (InputError, "data= is a Tensor; give a list of batches", lambda: compile_(data=IDS)),
    "data a mapping": (InputError, "data= is a dict;", lambda: compile_(data={"input_ids": IDS})),
    "data of texts": (InputError, "data= of a decoder holds token ids", lambda: compile_(data=["a text"])),
    "data of none": (InputError, "data= of a decoder holds token ids", lambda: compile_(data=[None])),
    "data of floats": (InputError, "data= of a decoder holds token ids", lambda: compile_(data=[IDS.float()])),
    "data of one row": (InputError, "data= of a decoder holds token ids", lambda: compile_(data=[IDS[0]])),
    "data with another mask": (
        InputError,
        "data= has an attention_mask of [1, 2] for input_ids of [1, 3]",
        lambda: compile_(data=[{"input_ids": IDS, "attention_mask": torch.ones(1, 2)}]),
    ),
    "metric on two rows": (
        InputError,
        "metric gave input_ids of [2, 3], and this decoder reads [1, tokens]",
        lambda: compile_(metric=lambda call: float(call(IDS.repeat(2, 1)).mean())),
    ),
    "metric on no rows": (
        InputError,
        "metric gave input_ids of [0, 3]",
        lambda: compile_(metric=lambda call: float(call(IDS[:0]).mean())),
    ),
    "metric on a list": (InputError, "metric gave a list", lambda: compile_(metric=lambda call: float(call([[5]]).mean()))),
}


@table(COMPILES)
def test_compile_generation(refusal: Refusal) -> None:
    check(refusal)


def test_mask_does_not_outlive_step_that_is_refused() -> None:
    wanted = step()
    compiled().reset()
    wrong = torch.tensor([[5, 99, 7]])
    check((InputError, "row 99 of", lambda: compiled().step(wrong, torch.tensor([[0, 0, 1]]))))
    assert torch.equal(compiled().step(IDS), wanted)
    # And one that tells of the tokens read before as well leaves them as they were.
    follows = compiled().step(IDS[:, :1]).clone()
    compiled().crop(3)
    check((InputError, "row 99 of", lambda: compiled().step(wrong[:, 1:2], torch.tensor([[0, 0, 1, 1]]))))
    assert torch.equal(compiled().step(IDS[:, :1]), follows)


def test_flags_and_numbers_mean_the_same_in_a_mask() -> None:
    wanted = step(mask=torch.tensor([[0, 1, 1]]))
    assert torch.equal(step(mask=torch.tensor([[False, True, True]])), wanted)
    assert torch.equal(step(mask=torch.tensor([[0, 2, 3]])), wanted)


def test_the_smallest_temperature_takes_the_likeliest_token() -> None:
    assert stream(temperature=1e-45) == stream(temperature=0.0)


def test_a_head_is_trained_on_logits() -> None:
    head = nn.Linear(99, 2)
    head(step()).sum().backward()
    assert head.weight.grad is not None


def test_a_decoder_under_tracers() -> None:
    wanted, model = step(), compiled()
    model.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        check((InputError, "is compiled and cannot run under FakeTensorMode", lambda: model.step(IDS)))
    check((InputError, "cannot run under make_fx", lambda: make_fx(lambda ids: model.step(ids))(IDS)))
    assert model.length == 0
    torch.compiler.reset()
    assert torch.equal(torch.compile(lambda ids: model.step(ids) + 0, backend="eager")(IDS), wanted)
    assert model.length == 3


def test_a_decoder_is_loaded_for_its_backend_by_name(tmp_path: Path) -> None:
    compiled().save(tmp_path / "decoder")
    loaded = lissom.load_generation(tmp_path / "decoder", backend="eager")
    assert torch.equal(loaded.step(IDS), step())
