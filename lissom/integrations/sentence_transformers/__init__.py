"""Models of Sentence Transformers: recognized, compiled whole, saved and loaded. Importing the package imports none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

_SENTENCE_MODEL = ("sentence_transformers.base.model", "BaseModel")


def is_sentence_model(model: object) -> TypeGuard[BaseModel]:
    """True for a model of Sentence Transformers, which is not imported to find out."""
    return any((kind.__module__, kind.__qualname__) == _SENTENCE_MODEL for kind in type(model).__mro__)
