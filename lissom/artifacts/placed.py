"""Placements of values across ranks as JSON and back."""

from __future__ import annotations

from typing import cast

from lissom.artifacts.expression import encode_expression
from lissom.artifacts.fields import number, take, take_list
from lissom.artifacts.values import Reader
from lissom.compiler.ir.placement import Placed, Span, Spans


def encode_placed(placed: Placed | tuple[Placed, ...]) -> object:
    """The placement of a value, or of several, as JSON; dynamic sizes are expressions."""
    if isinstance(placed, tuple):
        return [encode_placed(item) for item in placed]
    dims = [{"dim": dim, "spans": [_encode_span(span) for span in spans]} for dim, spans in placed.dims]
    return {"dims": dims, "partial": placed.partial}


def decode_placed(data: object, reader: Reader) -> Placed | tuple[Placed, ...]:
    """The placement from JSON. Raises: ValueError for anything `encode_placed` does not write."""
    if isinstance(data, list):
        return tuple(_decode_one(item, reader) for item in cast("list[object]", data))
    return _decode_one(data, reader)


def _decode_one(data: object, reader: Reader) -> Placed:
    def dim(item: object) -> tuple[int, Spans]:
        return number(take(item, "dim", int)), take_list(item, "spans", lambda span: _decode_span(span, reader))

    return Placed(take_list(data, "dims", dim), take(data, "partial", bool))


def _encode_span(span: Span) -> dict[str, object]:
    sizes = {key: encode_expression(size) for key, size in (("outer", span.outer), ("size", span.size), ("inner", span.inner))}
    return {**sizes, "parts": span.parts, "every": span.every}


def _decode_span(data: object, reader: Reader) -> Span:
    outer, size, inner = (reader.size(cast("dict[str, object]", data)[key]) for key in ("outer", "size", "inner"))
    return Span(outer, size, inner, take(data, "parts", int), take(data, "every", int))
