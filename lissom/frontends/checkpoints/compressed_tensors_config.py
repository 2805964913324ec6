"""The configuration of a compressed-tensors checkpoint: its schemes, and the layers that each is for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import cast

from lissom.errors import ArtifactError
from lissom.frontends.checkpoints.quantized_layers import Settings

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense", "mixed-precision")
_STRATEGIES = ("tensor", "channel", "group", "block")
_LONGEST_PATTERN, _MOST_REPEATS = 500, 5
"""Of a pattern, in characters, and repeats without end: the time that a search takes grows with their power."""
_REPEAT, _REPEATED_GROUP = re.compile(r"[*+]|\{\d*,\}"), re.compile(r"\)[*+{]")
_PATTERNS = f"names, classes and re: patterns of up to {_LONGEST_PATTERN} characters and {_MOST_REPEATS} repeats, of no group"


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized.

    Attributes:
        type: `int`, or `float` for fp8.
        strategy: what a scale is for: `tensor`, `channel`, `group` or `block`.
        group: inputs of a scale; None for all.
        block_rows: outputs of a scale, with `block`.
        quantizes_inputs: the format rounds activations too.
    """

    bits: int
    type: str
    strategy: str
    symmetric: bool
    group: int | None
    block_rows: int = 1
    quantizes_inputs: bool = False


@dataclass(frozen=True)
class Schemes:
    """The schemes of a checkpoint.

    Attributes:
        targets: for each scheme the names, `re:` patterns and classes of its layers.
        ignore: those of layers that are not quantized.
        is_dense: weights are stored in floating point, rounded.
    """

    file: Path
    targets: Sequence[tuple[Sequence[str], Scheme]]
    ignore: Sequence[str]
    is_dense: bool

    @classmethod
    def read(cls, file: Path, fields: Mapping[str, object]) -> Schemes:
        """The schemes of a quantization configuration. Raises UnsupportedError for what is not read."""
        settings = Settings(file, fields)
        format = settings.one_of("format", _FORMATS, "the format of compressed-tensors")
        _refuse_others(settings)
        groups = _fields(settings, "config_groups")
        parts = [(name, _scheme(file, name, group)) for name, group in groups.items() if not _is_for_activations(group)]
        targets = [
            (_names(file, f"config_groups.{name}.targets", _part(groups, name, "targets")), scheme) for name, scheme in parts
        ]
        return cls(file, targets, _names(file, "ignore", fields.get("ignore") or []), format == "dense")

    def of(self, layer: str, classes: Sequence[str]) -> Scheme:
        """The scheme of a layer: the one that names it, else whose pattern matches, first by its text, else for its class.

        Raises:
            ArtifactError: if there is none, though the layer is stored in integers.
        """
        if not any(_matches(target, layer, classes) for target in self.ignore):
            by_target = sorted(((target, scheme) for targets, scheme in self.targets for target in targets), key=itemgetter(0))
            for kind in (_is_name, _is_pattern, _is_class):
                for target, scheme in by_target:
                    if kind(target, layer, classes):
                        return scheme
        raise ArtifactError(
            f"{self.file}: no group of quantization_config is for '{layer}', or it is among those to ignore, and its weight is "
            f"stored quantized; copy config.json and the weights of one checkpoint"
        )


def _refuse_others(settings: Settings) -> None:
    """Refuse what changes the model's arithmetic, or how its weights are stored."""
    for name, what in (("transform_config", "a transform of activations"), ("sparsity_config", "sparse storage")):
        value = settings.fields.get(name)
        if isinstance(value, dict) and (value.get("format") == "dense" or not any(value.values())):
            continue
        if value:
            settings.refuse(f"{what} ({name})", value, "checkpoints without it", "save the model without it")


def _fields(settings: Settings, name: str) -> Mapping[str, object]:
    value = settings.fields.get(name)
    if not isinstance(value, dict) or not value:
        settings.refuse(name, value, "an object with its fields")
    return cast("Mapping[str, object]", value)


def _part(groups: Mapping[str, object], name: str, key: str) -> object:
    group = groups[name]
    return cast("Mapping[str, object]", group).get(key) if isinstance(group, dict) else None


def _is_for_activations(group: object) -> bool:
    """True for a group that quantizes no weights."""
    return isinstance(group, dict) and cast("Mapping[str, object]", group).get("weights") is None


def _scheme(file: Path, name: str, group: object) -> Scheme:
    """The scheme of a group. Raises UnsupportedError for what is not read."""
    named = Settings(file, {name: group})
    if not isinstance(group, dict):
        named.refuse(f"the group '{name}'", group, "groups with their schemes written out")
    fields = cast("Mapping[str, object]", group)
    part = Settings(file, fields)
    if fields.get("format") is not None:
        part.one_of("format", _FORMATS, f"the format of '{name}'")
    weights = Settings(file, _fields(part, "weights"))
    kind = weights.one_of("type", ("int", "float"), f"the type of the weights of '{name}'", "int")
    allowed = (8,) if kind == "float" else (4, 8)
    bits = weights.one_of("num_bits", allowed, f"the number of bits of '{name}'", 8)
    group_size, blocks = weights.fields.get("group_size"), weights.fields.get("block_structure")
    implied = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    given = weights.fields.get("strategy") or implied
    strategy = Settings(file, {"strategy": given}).one_of("strategy", _STRATEGIES, f"the scales of '{name}'")
    symmetric = weights.fields.get("symmetric", True)
    rows, columns = _block(weights, blocks) if strategy == "block" else (1, None)
    return Scheme(
        bits,
        kind,
        strategy,
        bool(symmetric),
        weights.group_size() if strategy == "group" else columns,
        rows,
        fields.get("input_activations") is not None,
    )


def _block(weights: Settings, blocks: object) -> tuple[int, int]:
    """The outputs and inputs of a block."""
    sizes = [size for size in _items(blocks) if isinstance(size, int) and size > 0] if isinstance(blocks, list) else []
    if len(sizes) != 2:
        weights.refuse("block_structure", blocks, "two sizes, of outputs and inputs")
    return sizes[0], sizes[1]


def _items(values: object) -> Iterator[object]:
    return iter(cast("list[object]", values))


def _names(file: Path, what: str, values: object) -> list[str]:
    """Names, patterns and classes. Raises UnsupportedError for others."""
    settings = Settings(file, {})
    if not isinstance(values, list):
        settings.refuse(what, values, f"a list of {_PATTERNS}")
    names = [value for value in _items(values) if isinstance(value, str)]
    for value in _items(values):
        if not isinstance(value, str) or (value.startswith("re:") and not _is_usable(value)):
            settings.refuse(what, value, _PATTERNS, "name the layers in config.json")
    return names


def _is_usable(target: str) -> bool:
    """True for a pattern that is one, and that is searched for in a short time."""
    pattern = target.removeprefix("re:")
    if len(pattern) > _LONGEST_PATTERN or _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_name(target: str, layer: str, _: Sequence[str]) -> bool:
    return target == layer


def _is_pattern(target: str, layer: str, _: Sequence[str]) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), layer) is not None


def _is_class(target: str, _: str, classes: Sequence[str]) -> bool:
    return target in classes


def _matches(target: str, layer: str, classes: Sequence[str]) -> bool:
    return any(kind(target, layer, classes) for kind in (_is_name, _is_pattern, _is_class))
