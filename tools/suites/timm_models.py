"""The model list of timm: random weights and the smallest input that a model takes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.support.models import normal
from tools.suites.models import RESULTS, check_model
from tools.suites.suite import Item, Record, Report, Suite, result_of
from tools.zoo.coverage import cell, table
from tools.zoo.weights import woken

SIZES = (32, 64, 96, 128, 192, 256)
"""The sides of square images that are tried before the model's own, in pixels."""
MOST_PARAMETERS = 150_000_000
"""The most parameters of a model that is run."""
_SMALL = (
    *("test", "atto", "femto", "pico", "zepto", "nano", "xxxs", "xxs", "xxtiny", "xtiny", "xs", "tiny", "ti", "t", "mini"),
    *("little", "small", "s", "sm", "lite", "xsmall"),
)
"""Words in the names of small models, the smallest first."""


def items(everything: bool) -> list[Item]:
    """Every model of timm, or the smallest of each of its modules, judged by the names."""
    timm = importlib.import_module("timm")
    chosen = [
        (family, name)
        for family in timm.list_modules()
        for name in _ordered(timm.list_models(module=family))[: None if everything else 1]
    ]
    return [Item(name, family, partial(build, name)) for family, name in chosen]


def _ordered(names: Sequence[str]) -> list[str]:
    """The names, those of small models first."""

    def key(name: str) -> tuple[int, int, str]:
        words = re.split(r"[_.]", name)
        place = min((_SMALL.index(word) for word in words if word in _SMALL), default=len(_SMALL))
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        return place, sum(numbers), name

    return sorted(names, key=key)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model with random weights, and two images of the smallest size at which it runs.

    Raises: RuntimeError for a model that is too large, or runs at none of the sizes.
    """
    errors: list[str] = []
    for model, size in _candidates(name):
        image = normal(2, 3, size, size)
        try:
            with torch.no_grad():
                output = model(image)
        # Models refuse small images by any error.
        except Exception as error:
            errors.append(f"{size}: {type(error).__name__}: {str(error)[:100]}")
            continue
        if torch.is_tensor(output) and output.numel() and bool(output.isfinite().all()):
            return model, image
        errors.append(f"{size}: no finite output")
    raise RuntimeError(f"{name} runs at none of the sizes: {errors[-1] if errors else 'it takes no such size'}")


def _candidates(name: str) -> Iterator[tuple[nn.Module, int]]:
    """The model for each size: built for it where models of this kind have a fixed size, else the same for all."""
    timm = importlib.import_module("timm")
    create = partial(timm.create_model, name, pretrained=False, num_classes=10)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in create().parameters())
    if count > MOST_PARAMETERS:
        raise RuntimeError(f"it has {count / 1e6:.0f} million parameters, and at most {MOST_PARAMETERS / 1e6:.0f} are run")
    configuration = timm.get_pretrained_cfg(name)
    own = configuration.input_size[-1] if configuration is not None else 224
    if configuration is None or not configuration.fixed_input_size:
        model = woken(partial(_evaluating, create))
        yield from ((model, size) for size in (*SIZES, own))
        return
    for size in (*SIZES[1::2], own):
        # The constructor refuses sizes that do not fit its windows, by any error.
        with suppress(Exception):
            yield woken(partial(_evaluating, partial(create, img_size=size))), size
    yield woken(partial(_evaluating, create)), own


def _evaluating(create: Any) -> nn.Module:
    return create().eval()


def check(item: Item, report: Report) -> None:
    """Check one model. report: called with the record after every phase."""
    report({"phase": "build"})
    torch.manual_seed(0)
    try:
        model, image = item.build()
    # What timm cannot build or run is no fault of ours.
    except Exception as error:
        report({"phase": None, "result": "not run", "reason": f"{type(error).__name__}: {str(error)[:300]}"})
        return
    report(
        {"phase": "capture", "size": image.shape[-1], "parameters": sum(parameter.numel() for parameter in model.parameters())}
    )
    report({"phase": None} | check_model(model, ((image,), {})))


def details(records: Sequence[Record]) -> str:
    """A table of the models."""
    rows = [
        [
            record["family"],
            record["name"],
            str(record.get("size", "")),
            f"{record['parameters'] / 1e6:.1f}" if "parameters" in record else "",
            ", ".join(record.get("dynamic", ())),
            result_of(record),
            cell(record.get("error") or record.get("reason") or ""),
        ]
        for record in sorted(records, key=lambda record: (record["family"], record["name"]))
    ]
    return table(["module", "model", "pixels", "million parameters", "dynamic", "result", "remarks"], rows)


def warm() -> None:
    """Import timm, and fill the caches of the capture."""
    importlib.import_module("timm")
    check_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), ((normal(2, 3, 8, 8),), {}))


SUITE = Suite(
    title="timm",
    introduction="""\
The models of `timm.list_models()`: by default the smallest of each module, judged by the names, with `--all` all. Weights are
random, and the image is the smallest of 32, 64, 96, 128, 192 and 256 pixels, or the model's own size, at which the model runs.
""",
    noun="models",
    items=items,
    check=check,
    warm=warm,
    results=RESULTS | {"not run": "it has more than 150 million parameters, or timm cannot run it at these sizes"},
    faults=frozenset({"failure", "wrong"}),
    details=details,
    seconds=400.0,
)
