"""The nesting of arguments and outputs as JSON, and a substitute for transformers' output classes if it is not installed.

A leaf is `"*"`; a container is an object that names its kind: `{"tuple": ["*", {"dict": [["key", "*"]]}]}`.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import make_dataclass
from functools import cache
from typing import Any

from torch.utils import _pytree as pytree

from lissom.artifacts.values import decode_argument, encode_argument
from lissom.errors import ArtifactError
from lissom.io.fields import shown, take, take_list, text

_LEAF = "*"
_MODEL_OUTPUTS = "transformers.modeling_outputs"


class Output(Mapping[str, object]):
    """The output of a transformers model if transformers is not installed.

    Fields are items and attributes; missing fields are None as attributes, and not among the items. Integers and slices index
    the items in order, as in transformers.
    """

    def __init__(self, name: str, fields: Sequence[str], items: Mapping[str, object]) -> None:
        self._name = name
        self._fields = tuple(fields)
        self._items = dict(items)

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._items[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getattr__(self, name: str) -> Any:
        # A copy is asked for attributes before it has any.
        if name.startswith("_"):
            raise AttributeError(f"an output of a model has no attribute '{name}'")
        if name not in self._fields:
            raise AttributeError(f"{self._name} has no field '{name}'; it has {', '.join(self._fields)}")
        return self._items.get(name)

    def to_tuple(self) -> tuple[object, ...]:
        """The items in order, without their names."""
        return tuple(self._items.values())

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(f'{key}={value!r}' for key, value in self._items.items())})"


def _flatten_output(output: Output) -> tuple[list[object], tuple[str, tuple[str, ...], tuple[str, ...]]]:
    return list(output.values()), (output._name, output._fields, tuple(output))


def _unflatten_output(values: Any, context: tuple[str, tuple[str, ...], tuple[str, ...]]) -> Output:
    name, fields, keys = context
    return Output(name, fields, dict(zip(keys, values, strict=True)))


pytree.register_pytree_node(Output, _flatten_output, _unflatten_output, serialized_type_name="lissom.Output")


def encode_nesting(spec: pytree.TreeSpec, where: str) -> object:
    """The nesting of a structure as JSON.

    Args:
        where: its description for an error.

    Raises:
        ArtifactError: for a container an artifact cannot hold.
    """
    leaf = object()
    try:
        tree = pytree.tree_unflatten([leaf] * spec.num_leaves, spec)
    # The caller's own containers may refuse these placeholder leaves with any error.
    except Exception as error:
        raise ArtifactError(f"{where} is nested in a way an artifact cannot hold: {shown(spec)}") from error
    return _encode(tree, leaf, where)


def _encode(tree: object, leaf: object, where: str) -> object:
    if tree is leaf:
        return _LEAF
    kind = type(tree)
    if isinstance(tree, (list, tuple)) and kind in (list, tuple):
        return {kind.__name__: [_encode(child, leaf, where) for child in tree]}
    if isinstance(tree, tuple) and (names := getattr(tree, "_fields", None)) is not None:
        return {"namedtuple": kind.__name__, "items": _encode_items(zip(names, tree, strict=True), leaf, where)}
    if isinstance(tree, dict) and kind in (dict, OrderedDict):
        return {kind.__name__: _encode_items(tree.items(), leaf, where)}
    output: Any = tree
    if isinstance(tree, Output) or _is_model_output(kind):
        items = _encode_items(output.items(), leaf, where)
        if isinstance(tree, Output):
            return {"output": tree._name, "module": _MODEL_OUTPUTS, "fields": list(tree._fields), "items": items}
        fields = [field.name for field in dataclass_fields(output)]
        return {"output": kind.__name__, "module": kind.__module__, "fields": fields, "items": items}
    raise ArtifactError(
        f"{where} holds a value of type '{kind.__name__}', which an artifact cannot hold; "
        f"it holds lists, tuples, dicts and outputs of transformers"
    )


def _encode_items(items: Any, leaf: object, where: str) -> list[object]:
    return [[encode_argument(key), _encode(child, leaf, where)] for key, child in items]


def _is_model_output(kind: type) -> bool:
    return any(base.__name__ == "ModelOutput" and base.__module__.startswith("transformers.") for base in kind.__mro__)


def decode_nesting(data: object) -> pytree.TreeSpec:
    """The nesting from JSON. Raises ValueError for anything `encode_nesting` does not write."""
    return pytree.tree_flatten(_decode(data))[1]


def _decode(data: object) -> object:
    match data:
        case "*":
            return 0
        case {"list": _}:
            return list(take_list(data, "list", _decode))
        case {"tuple": _}:
            return take_list(data, "tuple", _decode)
        case {"dict": _}:
            return _distinct(take_list(data, "dict", _decode_item))
        case {"OrderedDict": _}:
            return OrderedDict(_distinct(take_list(data, "OrderedDict", _decode_item)))
        case {"namedtuple": str() as name}:
            items = take_list(data, "items", _decode_item)
            return _named_tuple(name, tuple(text(key) for key, _ in items))(*(value for _, value in items))
        case {"output": str() as name}:
            items = _distinct([(text(key), value) for key, value in take_list(data, "items", _decode_item)])
            fields = take_list(data, "fields", text)
            kind = _output_class(name, take(data, "module", str), fields)
            return Output(name, fields, items) if kind is None else kind(**items)
        case _:
            raise ValueError(f"{shown(data)} is not a nesting")


def _decode_item(data: object) -> tuple[Any, object]:
    if not isinstance(data, list) or len(data) != 2:
        raise ValueError(f"{shown(data)} is not a key with an item")
    key, value = data
    return decode_argument(key), _decode(value)


def _distinct(items: Sequence[tuple[Any, object]]) -> dict[Any, object]:
    """The items by key. Raises ValueError for a key that is given twice, or is of a type that is no key."""
    try:
        by_key = dict(items)
    except TypeError as error:
        raise ValueError(f"{shown([key for key, _ in items])} are not keys") from error
    if len(by_key) < len(items):
        raise ValueError(f"{shown([key for key, _ in items])} are not keys that differ")
    return by_key


@cache
def _named_tuple(name: str, fields: tuple[str, ...]) -> Callable[..., object]:
    """A new class of that name, so that loading does not need the caller's code."""
    return namedtuple(name, fields)  # pyright: ignore[reportUntypedNamedTuple]


@cache
def _output_class(name: str, module: str, fields: tuple[str, ...]) -> type | None:
    """The output class of transformers, or a new one with its fields if its module is not imported; None without transformers.

    Nothing named by a file is imported: the class is looked up in transformers' output module and in modules already imported.
    """
    try:
        import transformers.modeling_outputs as outputs
        from transformers.utils.generic import ModelOutput
    except ImportError:
        return None
    source = outputs if module == _MODEL_OUTPUTS else sys.modules.get(module)
    # Not `getattr`: lazy packages such as transformers would import the attribute.
    output_class = vars(source).get(name) if source is not None else None
    if isinstance(output_class, type) and issubclass(output_class, ModelOutput):
        return output_class
    if not fields or not all(field.isidentifier() and not field.startswith("_") for field in (name, *fields)):
        raise ValueError(f"{shown(name)} with the fields {shown(fields)} is not an output of a model")
    return make_dataclass(name, [(field, object, None) for field in fields], bases=(ModelOutput,))
