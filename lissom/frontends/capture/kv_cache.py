"""Models of transformers that return a KV cache where none was asked for: they are captured without it."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from lissom.errors import CaptureError
from lissom.frontends.capture.isolation import exchanged

_SWITCH = "use_cache"
WITHOUT_CACHE = "captured without the KV cache that the model returns by default"
GENERATION = "lissom.compile_generation(model, max_length=...) compiles it with one, for generate"


class ReturnedCacheError(CaptureError):
    """The model returned a KV cache of transformers."""


def is_kv_cache_object(value: object) -> bool:
    """True for a cache of transformers. Does not import transformers: without it there is none."""
    made = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return made is not None and isinstance(value, made)


def check_switch(model: nn.Module, kwargs: Mapping[str, object]) -> None:
    """Refuse a KV cache that the caller asked for. Raises CaptureError."""
    if kwargs.get(_SWITCH):
        raise CaptureError(
            f"the example inputs have {_SWITCH}={kwargs[_SWITCH]!r}, and a program keeps no KV cache between calls; leave it "
            f"out: {type(model).__name__} is then {WITHOUT_CACHE}; {GENERATION}"
        )


@contextmanager
def without_kv_cache(model: nn.Module) -> Generator[None]:
    """Let the model and its parts return no KV cache by default, until the block ends."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    with ExitStack() as stack:
        for config in configs.values():
            if getattr(config, _SWITCH, False):
                stack.enter_context(exchanged(config, _SWITCH, False))
        yield


def describe_dropped_cache(model: nn.Module) -> str:
    """The note on a capture without the cache; it names `compile_generation` for the models that this takes."""
    generates = getattr(model, "can_generate", None)
    return f"{WITHOUT_CACHE}; {GENERATION}" if callable(generates) and generates() else WITHOUT_CACHE
