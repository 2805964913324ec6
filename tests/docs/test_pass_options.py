"""Every option on the pages of passes, with every value its table lists: it runs on the page's model, or says why it cannot."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal, get_args, get_origin

import pytest
import torch

import lissom
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.spelling import format_pass, options_of, parse_pipeline
from lissom.passes import PASSES, RECIPES
from tools.docs.examples import EXAMPLES

TEXTS = {
    "prune-heads": ["{keep=0.5,protect=q}", "{keep=0.5,round_to=2}", '{amounts="*=4"}'],
    "prune-neurons": ["{keep=0.5,protect=none.*}", "{keep=0.5,round_to=64}", '{amounts="*=0.25"}'],
    "prune-experts": ["{keep=0.5,protect=none.*}", '{amounts="*=4"}'],
    "prune-layers": ["{keep=0.5,protect=downs.0}", '{amounts="downs.0=0,downs.1=1"}'],
    "prune-hidden": ["{keep=0.5,round_to=16}", '{amounts="*=32"}'],
    "prune-vocabulary": [
        *("{coverage=1.0}", "{scripts=latin}", "{keep=200,tokens=FOLDER}", "{keep=200,tokenizer=FOLDER}"),
    ],
    "sparsify": [
        "{keep=0.5,protect=up}",
        "{pattern=2:4}",
        '{amounts="up=0.25,down=2:4"}',
        "{keep=0.5,damping=0.1,block_size=64}",
    ],
    "low-rank": [
        "{keep=0.5}",
        "{budget=0.5,skip=up}",
        "{rank=32,only=up,damping=0.1}",
        "{keep=0.4,round_to=16}",
        '{amounts="up=8,down=0.5"}',
    ],
    "linear-attention": ["{skip=none.*}", "{only=*}"],
    "depthwise-separable": ["{rank=2,skip=first}", "{keep=0.5,only=second}", '{amounts="first=1,second=0.5"}'],
    "share-layers": ["{groups=2}", "{every=4}", "{every=2,skip=none.*,only=layers}"],
    "pool-heads": ["{groups=4,protect=none.*}", "{keep=0.5}", '{amounts="*=2"}'],
    "sparsify-attention": [
        *("{window=32,skip=none.*}", "{window=32,only=*}", "{pattern=block,block=64,global_tokens=2}"),
        *("{pattern=global-window-random,window=64,block=64,random_blocks=1,seed=3}", "{pattern=strided,window=64,stride=64}"),
        *("{pattern=dilated,window=64,dilation=2}", "{pattern=measured,mass=0.9,block=64}", '{patterns="*=window:64"}'),
    ],
    "equalize": ["{skip=none.*}", "{only=*}"],
    "smooth-quant": ["{alpha=0.25,skip=none.*}", "{only=*}"],
    "rotate": ["{where=heads,basis=random,seed=3}"],
    "awq": ["{group=64,skip=none.*}", "{only=*}"],
    "quantize": [
        *("{scheme=int4-weight,group=64}", "{observer=percentile,scheme=int8-static,fraction=0.99}", "{skip=up}", "{only=up}"),
        '{schemes="*=none,up=int4-weight"}',
    ],
    "gptq": ["{pull=0.5,skip=up}", "{damping=0.1,only=up}", "{table_damping=0.1,block_size=64}"],
    "correct-bias": ["{skip=up}", "{only=down}"],
    "distill": [
        *("{steps=4,batch=2,learning_rate=0.01}", "{minutes=0.02}", "{steps=4,held_out=0.25,seed=3,skip=up}"),
        *("{steps=4,only=up,alpha=0.9,temperature=2.0}", "{steps=4,hidden=0.5}", "{steps=4,blockwise=0.5}"),
        "{steps=4,checkpoint=FOLDER}",
    ],
    "finetune": [
        *("{steps=4,batch=2,learning_rate=0.01}", "{minutes=0.02}", "{steps=4,held_out=0.25,seed=3,skip=up}"),
        *("{steps=4,only=up}", "{steps=4,checkpoint=FOLDER}"),
    ],
    "cast": ["{dtype=fp16,margin=8.0,underflow=0.9}", "{dtype=bf16,skip=up}"],
    "shard": ["{world_size=4,fraction=0.5}", "{world_size=2,plan=[up:column-wise,down:row-wise]}"],
}
"""Values that a table does not list: numbers, words and lists, as options of the page's own pass."""
BASES = {
    "distill": "prune-neurons{keep=0.5},distill{steps=4}",
    "finetune": "finetune{steps=4}",
    "prune-layers": "prune-layers{keep=0.5}",
    "prune-hidden": "prune-hidden{keep=0.5}",
    "smooth-quant": "smooth-quant,quantize{scheme=int8-static}",
    "sparsify-attention": "sparsify-attention",
}
"""The pipeline that listed values are tried in, where it is not the page's."""
TOGETHER: dict[tuple[str, str], dict[str, object]] = {("gptq", "rescale"): {"act_order": False}}
"""What an option's values go with."""
REFUSED = {
    "part=attention": "finds no attentions in this program",
    "steps=4,shard=true": "there is one process; start it with torchrun",
    "where=residual": "finds no residual stream in this program",
    "basis=pca": "takes no basis=pca, which is for where=residual",
    "ids=tokenizer": "needs the tokenizer, and the model's folder has none",
    "scripts=latin": "needs the tokenizer, and the model's folder has none",
    "tokens=": "there is no file",
    "tokenizer=": "there is no file",
}
"""Values that the page's model cannot have, or one process, with a part of what is said."""
ONLY_IN_PYTHON = {"loss"}


def _base(name: str) -> str:
    return BASES.get(name, EXAMPLES[name].passes)


def _with(name: str, own: str) -> str:
    """The page's pipeline with these options for its pass."""
    return ",".join(f"{name}{own}" if item.name() == name else format_pass(item) for item in _parse(_base(name)))


def _listed(name: str) -> list[str]:
    """The page's pipeline with each value that the table of options lists."""
    texts: list[str] = []
    for option, hint in options_of(PASSES[name]).items():
        for value in _values(hint):
            texts.append(
                ",".join(
                    format_pass(_set(item, option, value) if item.name() == name else item) for item in _parse(_base(name))
                )
            )
    return texts


def _set(item: Pass, option: str, value: object) -> Pass:
    return replace(item, **TOGETHER.get((item.name(), option), {}), **{option: value})


def _values(hint: object) -> tuple[object, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) is tuple:
        return tuple((value,) for value in _values(get_args(hint)[0]))
    return (True, False) if hint is bool else tuple(value for part in get_args(hint) for value in _values(part))


def _parse(text: str) -> list:
    return parse_pipeline(text, PASSES, RECIPES)


CASES = [
    (name, text)
    for name in PASSES
    if options_of(PASSES[name])
    for text in dict.fromkeys([*_listed(name), *(_with(name, own) for own in TEXTS.get(name, ()))])
]


@cache
def _captured(name: str) -> tuple[object, object, list]:
    """The page's model, captured, with its inputs and calibration data."""
    example = EXAMPLES[name]
    torch.manual_seed(0)
    model = example.model()
    inputs = eval(example.inputs, {"torch": torch})
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    data = eval(example.data, {"torch": torch}) if example.data else [inputs]
    return lissom.optimize(model, inputs).program, inputs, data


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), CASES, ids=[f"{name}-{text.partition(name)[2]}" for name, text in CASES])
def test_every_option_of_a_pass(name, text, tmp_path):
    program, inputs, data = _captured(name)
    text = text.replace("FOLDER", f'"{tmp_path / "training"}"')
    told = next((reason for part, reason in REFUSED.items() if part in text), None)
    if told is not None:
        with pytest.raises(lissom.LissomError, match=told):
            lissom.optimize(program, inputs, passes=text, data=data)
        return
    found = lissom.optimize(program, inputs, passes=text, data=data)
    spelled = {step.spelling for step in found.report.history.steps}
    assert {format_pass(item) for item in _parse(text)} <= spelled
    outputs = found.program(*inputs)
    masked = -torch.inf if name == "prune-vocabulary" else 0.0
    assert all(bool((leaf.isfinite() | (leaf == masked)).all()) for leaf in torch.utils._pytree.tree_leaves(outputs))


def test_no_option_is_left_out():
    for name, item in PASSES.items():
        spelled = " ".join(text for known, text in CASES if known == name)
        assert [option for option in options_of(item) if f"{option}=" not in spelled and option not in ONLY_IN_PYTHON] == []
