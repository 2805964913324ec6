"""A compiled model as a folder that other runtimes load: ONNX files, configuration, tokenizer, and a card with measurements.

The layout is that of models on the Hugging Face hub for transformers.js, Optimum and FastEmbed: `onnx/model.onnx`,
`onnx/model_quantized.onnx`, and the files that `save_pretrained` writes beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lissom.artifacts.directory import check_new, write_directory
from lissom.artifacts.facts import Facts
from lissom.artifacts.model_files import CONFIG, TOKENIZER, Saveable, write_model_files
from lissom.backends.base import confirm
from lissom.compiler.analysis.structure.linear import is_quantizer
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.divergence import Divergence, compare
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.capture.confirm import answer_to
from lissom.frontends.capture.export import evaluating
from lissom.frontends.capture.kv_cache import without_kv_cache
from lissom.measure.timing import Timing, time_calls
from lissom.passes.precision.cast import Cast
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights
from lissom.passes.quantize.quantize import Quantize
from lissom.version import __version__

Layout = Literal["huggingface"]
Dtype = Literal["fp32", "fp16", "q8", "q4"]
"""The names of transformers.js for the files."""
FILES: Mapping[Dtype, str] = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "q8": "model_quantized.onnx",
    "q4": "model_q4.onnx",
}
PASSES: Mapping[Dtype, Sequence[Pass]] = {
    "fp32": (),
    "fp16": (Cast("fp16"),),
    "q8": (Quantize("int8-dynamic", activations="tensor"), FoldQuantizedWeights()),
    "q4": (Quantize("int4-weight"), FoldQuantizedWeights()),
}
_REQUANTIZED = 0.5
"""The relative error that ONNX Runtime may cause, which by default quantizes the activations of int4 layers to int8."""
_SECONDS = 0.3


@dataclass(frozen=True)
class Export:
    """The program to write, and the model it is compared with.

    Attributes:
        program: after the passes.
        samples: flat inputs, the first for tracing and timing.
        passes: those that changed its outputs.
        original: the model before all passes; the program itself stands in for None.
    """

    program: Program
    facts: Facts | None
    passes: Sequence[str]
    samples: Sequence[Sample]
    calibrated: bool
    tokenizer: Saveable | None
    processor: Saveable | None
    original: nn.Module | None
    contrib: bool


@dataclass(frozen=True)
class Written:
    """One file: its size in MB, its opset, its divergence, and the time of a call."""

    name: str
    megabytes: float
    opset: int
    divergence: Divergence
    timing: Timing


def write_folder(directory: Path, layout: Layout, dtypes: Sequence[Dtype] | None, export: Export) -> None:
    """Write the folder, completely or not at all.

    Raises:
        UnsupportedError: for a layout or dtype that does not fit the model.
        VerifyError: for a file that ONNX Runtime answers otherwise than the program.
        ArtifactError: when the directory holds something else, or cannot be written.
    """
    if layout not in get_args(Layout):
        raise UnsupportedError(f"layout= is {layout!r}; choose {', '.join(get_args(Layout))}")
    if export.facts is None:
        raise UnsupportedError(f"the layout 'huggingface' needs a config of transformers, and {export.program.name} has none")
    if export.program.state:
        raise UnsupportedError(
            f"the layout 'huggingface' has no place for state, and {export.program.name} keeps '{export.program.state[0]}'; "
            "compile the model without a KV cache, or save it with save()"
        )
    check_new(directory)
    write_directory(directory, partial(_write, export.facts, _chosen(dtypes, export), export))


def _chosen(dtypes: Sequence[Dtype] | None, export: Export) -> dict[Dtype, Sequence[Pass]]:
    """The files to write, each with further passes. A program that is quantized already is one file."""
    quantizers = [node for node in export.program.nodes() if is_quantizer(node)]
    if quantizers:
        bits = min(_bits(node.kwargs.get("format")) for node in quantizers)
        only: Dtype = "q4" if bits < 8 else "q8"
        if dtypes not in (None, (only,), [only]):
            raise UnsupportedError(f"{export.program.name} is quantized already, which is the file '{only}'; leave dtypes= out")
        return {only: ()}
    wanted: tuple[Dtype, ...] = tuple(FILES) if dtypes is None else tuple(dtypes)
    unknown = [name for name in wanted if name not in FILES]
    if unknown or not wanted:
        raise UnsupportedError(f"dtypes= is {dtypes!r}; choose some of {', '.join(FILES)}")
    if not export.calibrated and "fp16" in wanted:
        if dtypes is not None:
            raise UnsupportedError("'fp16' in dtypes= needs data= to find what overflows; pass some batches, or leave it out")
        return {name: PASSES[name] for name in wanted if name != "fp16"}
    return {name: PASSES[name] for name in wanted}


def _bits(format: object) -> int:
    return 4 if "4" in str(format) else 8


def _write(facts: Facts, chosen: Mapping[Dtype, Sequence[Pass]], export: Export, folder: Path) -> None:
    write_model_files(folder, facts, export.tokenizer, export.processor)
    (folder / "onnx").mkdir()
    wanted, metadata = _wanted(export), _metadata(folder)
    files = [_write_file(folder / "onnx", dtype, passes, export, wanted, metadata) for dtype, passes in chosen.items()]
    (folder / "README.md").write_text(_card(facts, files, export), encoding="utf-8")


def _metadata(folder: Path) -> dict[str, str]:
    """The entries of an ONNX file's metadata: labels that have names of their own, and the tokenizer, both as JSON."""
    entries = dict[str, str]()
    labels = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("id2label") or {}
    if any(label != f"LABEL_{index}" for index, label in labels.items()):
        entries["id2label"] = json.dumps(labels)
    if (folder / TOKENIZER).is_file():
        entries[TOKENIZER] = (folder / TOKENIZER).read_text(encoding="utf-8")
    return entries


def _wanted(export: Export) -> list[list[object]]:
    """The outputs of the original model, or of the program, on the samples.

    Raises:
        InputError: for an original with other outputs.
        CaptureError: if it fails.
    """
    if export.original is None:
        with torch.no_grad():
            return [export.program.run(sample) for sample in export.samples]
    calls = map(export.program.signature.arguments, export.samples)
    with evaluating(export.original), without_kv_cache(export.original), torch.no_grad():
        expected = [answer_to(export.original, args, kwargs) for args, kwargs in calls]
    count = export.program.signature.out_spec.num_leaves
    odd = next((len(outputs) for outputs in expected if len(outputs) != count), None)
    if odd is not None:
        raise InputError(
            f"original= returns {odd} outputs, and {export.program.name} returns {count}; give the model it was compiled from"
        )
    return expected


def _write_file(
    folder: Path,
    dtype: Dtype,
    passes: Sequence[Pass],
    export: Export,
    wanted: Sequence[Sequence[object]],
    metadata: Mapping[str, str],
) -> Written:
    # ONNX is an optional dependency.
    from lissom.backends.onnx.portable import PlainSession, portable_model, save_portable

    program, example = export.program, export.samples[0]
    if passes:
        program, _ = Pipeline(passes, [example], data=export.samples).run(program)
    path = folder / FILES[dtype]
    model = portable_model(program, example, contrib=export.contrib)
    model.metadata_props.update(metadata)
    opset = save_portable(model, path)
    # The session has weights of its own.
    del model
    session = PlainSession(program, path)
    confirm("onnxruntime", session, program, example, _REQUANTIZED if dtype == "q4" else 0.0)
    divergence = compare(wanted, [session(sample) for sample in export.samples])
    timing = time_calls({path.name: partial(session, example)}, _SECONDS)[path.name]
    size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
    return Written(path.name, size / 1e6, opset, divergence, timing)


def _card(facts: Facts, files: Sequence[Written], export: Export) -> str:
    from onnxruntime import __version__ as runtime

    subject = "the original model" if export.original is not None else "the compiled program in PyTorch"
    rows = "\n".join(
        f"| `onnx/{file.name}` | {file.megabytes:.1f} | {file.opset} | {file.divergence.cosine:.5f} | "
        f"{file.divergence.relative_error:.1e} | {file.timing} |"
        for file in files
    )
    shapes = ", ".join(f"`{leaf.path}` {list(tensor.shape)}" for leaf, tensor in _inputs(export))
    base = facts.source or ""
    # A name on the Hub, and no relative path.
    named = f"base_model: {base}\n" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not Path(base).exists() else ""
    return (
        f"---\nlibrary_name: transformers.js\n{named}tags: [onnx, lissom]\n---\n\n"
        f"# {export.program.name}, exported by Lissom {__version__}\n\n"
        f"Passes that change the outputs: {', '.join(f'`{name}`' for name in export.passes) or 'none'}.\n\n"
        f"| file | MB | opset | smallest cosine | relative error | ms |\n|---|---|---|---|---|---|\n{rows}\n\n"
        f"Cosine and error compare the outputs with those of {subject}, on {len(export.samples)} "
        f"{'batch' if len(export.samples) == 1 else 'batches'}. Times are the median (middle half) of a call with {shapes} "
        f"in ONNX Runtime {runtime} on a CPU with {torch.get_num_threads()} threads.\n\n"
        f"Operators are {'those of ONNX and of ONNX Runtime' if export.contrib else 'standard ONNX'}. On x86 processors "
        "without VNNI, ONNX Runtime's default products of the int8 file saturate; set `session.x64quantprecision` to `1`.\n"
    )


def _inputs(export: Export) -> Any:
    return zip(export.program.signature.tensors, export.samples[0], strict=True)
