"""The command that writes a model for another runtime: `lissom export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from lissom import api
from lissom.artifacts.directory import check_new
from lissom.artifacts.model_files import TOKENIZER, Saveable
from lissom.cli.options import Checks, Data, MaxDrop, MetricName, Model, Passes, Quality
from lissom.compiler.pipeline.options import check_options
from lissom.driver.options import resolve_passes
from lissom.driver.torchrun import refuse_torchrun
from lissom.export.compressed_tensors.kv_cache import KvCache, check_kv_cache
from lissom.export.gguf.k_types import Types, check_types
from lissom.export.gguf.writer import Dtype, check_dtype
from lissom.frontends.capture.device import check_device
from lissom.frontends.models.sources import Source, load
from lissom.inspect.terminal import Terminal
from lissom.io.files import check_writable

console = Terminal()

Format = Literal["gguf", "pt2", "compressed-tensors", "genai", "openvino", "tp-plan"]
_FILES: Mapping[Format, tuple[str, str]] = {
    "gguf": (".gguf", "GGUF files"),
    "pt2": (".pt2", "packages of AOTInductor"),
    "tp-plan": (".json", "plans of tensor parallelism"),
}
"""The suffix of each format of one file, and the format in words; the others are directories."""


def run_export(
    model: Model,
    file: Annotated[Path, typer.Argument(help="The file to write, named something.gguf, .pt2 or .json, or the directory.")],
    format: Annotated[
        Format,
        typer.Option(
            help="gguf: a file for llama.cpp; pt2: for AOTInductor; tp-plan: for ranks of transformers; else a directory."
        ),
    ] = "gguf",
    passes: Passes = "exact",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of a GGUF file's matrices in floating point: f32, f16 or bf16; the program's own by default."),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(help="K types for a GGUF file's matrices in floating point: q4_k, q5_k, q6_k, q4_k_m or q5_k_m."),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="Of a compressed-tensors checkpoint: fp8 adds scales for keys and values, measured on --data."),
    ] = None,
    checks: Checks = "numeric",
    data: Data = None,
    metric: MetricName = None,
    max_drop: MaxDrop = None,
) -> None:
    """Write a model after the passes for llama.cpp, AOTInductor, transformers and vLLM, ONNX Runtime GenAI, or OpenVINO."""
    refuse_torchrun("export")
    chosen, kinds = _check_file(file, format, dtype), _check_types(format, types)
    cached = _check_kv_cache(format, kv_cache)
    pipeline, quality = resolve_passes(passes), Quality(data, metric, max_drop)
    quality.check()
    source = load(model)
    arguments = quality.arguments(source, check_device(None))
    optimized = api.optimize(source.model, source.example_inputs, passes=pipeline, checks=check_options(checks), **arguments)
    match format:
        case "gguf":
            written = optimized.export_gguf(file, dtype=chosen, types=kinds)
        case "pt2":
            written = optimized.export_pt2(file)
        case "compressed-tensors":
            written = optimized.save_compressed(file, kv_cache=cached, data=arguments["data"])
        case "genai":
            written = optimized.save_genai(file, tokenizer=_other_tokenizer(model, source))
        case "openvino":
            written = optimized.export_openvino(file)
        case "tp-plan":
            written = optimized.export_tp_plan(file)
    for note in source.notes:
        Terminal(stderr=True).print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{file}: {written}", highlight=False, soft_wrap=True, markup=False)


def _other_tokenizer(model: str, source: Source) -> Saveable | None:
    """The tokenizer of a model that has no file with it, such as that of a GGUF file; None where it is copied."""
    return None if source.checkpoint is None or (Path(model) / TOKENIZER).is_file() else source.checkpoint.tokenizer


def _check_types(format: Format, types: str | None) -> Types | None:
    """The K types of a GGUF file."""
    if format != "gguf" and types is not None:
        raise typer.BadParameter(f"--types is for GGUF files, and --format is {format}; use quantize{{scheme=int4-weight}}")
    return check_types(types)


def _check_kv_cache(format: Format, kv_cache: str | None) -> KvCache | None:
    """The format of a checkpoint's KV cache. Raises UnsupportedError."""
    if format != "compressed-tensors" and kv_cache is not None:
        raise typer.BadParameter(f"--kv-cache is for --format compressed-tensors, and --format is {format}")
    return check_kv_cache(kv_cache)


def _check_file(file: Path, format: Format, dtype: str | None) -> Dtype | None:
    """The dtype of a GGUF file, after checking what is written. Raises ArtifactError."""
    if format != "gguf" and dtype is not None:
        raise typer.BadParameter(f"--dtype is for GGUF files, and --format is {format}; use cast{{dtype=bf16}} in --passes")
    if format not in _FILES:
        check_new(file)
        return None
    suffix, what = _FILES[format]
    if file.suffix != suffix:
        raise typer.BadParameter(
            f"lissom export writes {what}, named something{suffix}, and not '{file.name}'; --format chooses another "
            f"of {', '.join(get_args(Format))}"
        )
    check_writable(file)
    return check_dtype(dtype)
