"""The options of ONNX Runtime that an untrusted artifact may set: none that name a file, a library or an address."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
"""Others compile for devices of their own, or send data elsewhere, and their options are not reviewed."""
OPTIONS = {
    *("device_id", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace"),
    *("cudnn_conv1d_pad_to_nc1d", "do_copy_in_default_stream", "enable_cuda_graph", "prefer_nhwc", "use_tf32"),
}
_WORD = re.compile(r"[A-Za-z0-9_]{1,40}")
MOST_THREADS = 1024


def unlisted_option(providers: Sequence[str], options: Mapping[str, Mapping[str, str]], threads: int | None) -> str | None:
    """The first provider or provider option that an artifact may not set, in words; None when there is none.

    Raises:
        ValueError: for a wrong type or a value out of range: all three come from a file.
    """
    _check_kinds(providers, options, threads)
    for name in (*providers, *options):
        if name not in PROVIDERS:
            return f"the execution provider '{name:.60}' of ONNX Runtime"
    for name, given in options.items():
        for key, value in given.items():
            if key not in OPTIONS or not _WORD.fullmatch(str(value)):
                return f"what the option '{key:.60}' of {name} names, '{value!s:.60}'"
    return None


def _check_kinds(providers: object, options: object, threads: object) -> None:
    if not isinstance(providers, tuple) or not all(isinstance(name, str) for name in providers):
        raise ValueError("providers are no list of names")
    tables = list(options.values()) if isinstance(options, dict) else [None]
    if not all(isinstance(given, dict) for given in tables):
        raise ValueError("provider_options are no table of tables")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise ValueError(f"threads is {threads!r:.20}, and {MOST_THREADS} are the most")
