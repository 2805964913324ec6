"""Writes an optimized decoder as a folder for ONNX Runtime GenAI: ONNX model, `genai_config.json`, tokenizer.

ONNX Runtime reads a text in parts, and ONNX Runtime GenAI generates in a fresh process; both are compared with the program
before the folder is there.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lissom.artifacts.directory import check_new, write_directory
from lissom.artifacts.model_files import TOKENIZER, Saveable, write_processors
from lissom.backends.exported import kind_and_reason
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import UnsupportedError
from lissom.export.causal_lm.names import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, POSITION_IDS, PRESENT, Layer, describe_layers
from lissom.export.causal_lm.text import count_equal, logits_of
from lissom.export.genai.families import CONFIG, configuration, context_length, type_of
from lissom.export.genai.reload import Generated, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lissom.export.genai.decoder import OnnxDecoder

_PROMPT, _STEPS = 8, 8
"""The tokens of each of two prompts, and of the answer to it."""


@dataclass(frozen=True)
class GenaiFolder:
    """The written folder.

    Attributes:
        type: of the model in ONNX Runtime GenAI.
        layers: with attention, all of them `GroupQueryAttention`.
        products: the number of quantized layers of each kind, all of them `MatMulNBits`.
        megabytes: of the directory.
        relative_error: of the logits to the program's.
        notes: sentences on what was compared, and what was not.
    """

    type: str
    layers: Sequence[Layer]
    products: Mapping[str, int]
    megabytes: float
    relative_error: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        weights = ", ".join(f"{count} in {kind}" for kind, count in self.products.items()) or "in floating point"
        return (
            f"{self.megabytes:.1f} MB; type {self.type}; {describe_layers(self.layers)}; weights: {weights}; "
            f"logits in ONNX Runtime within {self.relative_error:.1e} relative; {'; '.join(self.notes)}"
        )


def write_genai(
    program: Program,
    model: PreTrainedModel,
    example: Sample,
    directory: Path,
    tokenizer: Saveable | None = None,
    processor: Saveable | None = None,
) -> GenaiFolder:
    """Write the folder, completely or not at all, after it was compared.

    Args:
        program: captured from the model without a KV cache, and not lowered.
        example: flat inputs, from which the program is traced.

    Raises:
        UnsupportedError: if ONNX Runtime GenAI cannot run the program, or a package is missing.
        ArtifactError: if the directory exists, or cannot be written.
    """
    check_new(directory)
    kind = type_of(model)
    context_length(model)
    missing = OnnxRuntime().missing()
    if missing is not None:
        raise UnsupportedError(
            "writing a folder for ONNX Runtime GenAI needs onnx, onnxscript and onnxruntime: pip install 'lissom[genai]'"
        )
    # ONNX is an optional dependency.
    from lissom.backends.onnx.export import save_onnx
    from lissom.export.genai.decoder import decoder_of

    decoder = decoder_of(program, example)
    content = configuration(model, kind, decoder.layers, decoder.vocabulary, tokenizer)
    compared: list[_Compared] = []

    def write(folder: Path) -> None:
        path = save_onnx(decoder.model, folder)
        (folder / CONFIG).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
        write_processors(folder, str(model.config._name_or_path) or None, tokenizer, processor)
        compared.append(_compare(program, decoder, folder, path, content["model"]))

    write_directory(directory, write)
    megabytes = sum(file.stat().st_size for file in directory.iterdir()) / 1e6
    notes = compared[0].notes
    if "eos_token_id" not in content["model"]:
        end = content["model"].get("pad_token_id", 0)
        told = f"no id is known to end texts, and ONNX Runtime GenAI takes {end} for it; set eos_token_id in the model's config"
        notes = (*notes, told)
    if not (directory / TOKENIZER).is_file():
        notes = (*notes, "without a tokenizer, so it is given token ids")
    return GenaiFolder(kind, decoder.layers, dict(decoder.products), megabytes, compared[0].error, notes)


@dataclass(frozen=True)
class _Compared:
    error: float
    notes: tuple[str, ...]


def _compare(program: Program, decoder: OnnxDecoder, folder: Path, path: Path, content: Mapping[str, Any]) -> _Compared:
    """Compare the written decoder with the program. Raises UnsupportedError if it computes something else.

    Args:
        content: what the configuration says of the model.
    """
    length = content["context_length"]
    size = min(_PROMPT, length // 4)
    ids = torch.randint(0, decoder.vocabulary, (2 * size,), generator=torch.Generator().manual_seed(0))
    allowed = tolerance_of(program)
    error = relative_error(logits_of(program, ids), _in_parts(program, decoder, path, ids))
    if not error <= allowed:
        raise UnsupportedError(
            f"{program.name} with a KV cache in ONNX Runtime differs from {program.name} by {error:.2g} relative, allowed "
            f"{allowed:.2g}: it depends on earlier tokens otherwise than by attention and positions"
        )
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return _Compared(error, ("not compared: ONNX Runtime GenAI, which is not installed, pip install 'lissom[genai]'",))
    steps = min(_STEPS, length // 4)
    prompts = [part.tolist() for part in ids.chunk(2)]
    counts: list[str] = []
    for shared in (True, False):
        text = generate(program.name, folder, prompts, steps, min(length, 2 * (size + steps) + 1), shared=shared)
        wanted = logits_of(program, text.tokens)[text.chosen - 1]
        found = relative_error(wanted, text.logits)
        if not found <= allowed:
            raise UnsupportedError(
                f"ONNX Runtime GenAI gives logits for {program.name} that differ by {found:.2g} relative, allowed {allowed:.2g}"
            )
        error = max(error, found)
        counts.append(_equal_tokens(wanted, text, content.get("eos_token_id", content.get("pad_token_id", 0))))
    return _Compared(
        error, (f"ONNX Runtime GenAI in a fresh process: {counts[0]}, with past and present in one buffer and in two",)
    )


def _equal_tokens(logits: torch.Tensor, text: Generated, ends: int | list[int]) -> str:
    """How many greedy tokens are the program's.

    Args:
        logits: of the program, before each token that was chosen; changed here.
        ends: ids that end texts, which were not chosen.
    """
    logits[:, ends] = -torch.inf
    wanted = logits.argmax(-1)
    found = text.tokens[text.chosen]
    equal = int((wanted == found).sum())
    return count_equal(equal, len(wanted))


def _in_parts(program: Program, decoder: OnnxDecoder, path: Path, ids: torch.Tensor) -> torch.Tensor:
    """The decoder's logits of a text that it reads in three parts, [tokens, vocabulary]. Raises UnsupportedError."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    ends = (len(ids) - 4, len(ids) - 1, len(ids))
    logits: list[torch.Tensor] = []
    try:
        session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        dtypes = {value.name: _DTYPES.get(value.type, torch.float32) for value in session.get_inputs()}
        past = {
            name.format(index): torch.zeros(1, layer.key_heads, 0, layer.head_dim, dtype=dtypes[name.format(index)]).numpy()
            for index, layer in enumerate(decoder.layers)
            for name in PAST
        }
        outputs = [LOGITS, *(name.format(index) for index in range(len(decoder.layers)) for name in PRESENT)]
        for begin, end in zip((0, *ends), ends, strict=False):
            mask, positions = torch.ones(1, end, dtype=torch.int64), torch.arange(begin, end)[None]
            given = {INPUT_IDS: ids[None, begin:end], ATTENTION_MASK: mask, POSITION_IDS: positions}
            feed = {name: tensor.numpy() for name, tensor in given.items() if name in names}
            found, *present = session.run(outputs, feed | past)
            past = dict(zip(past, present, strict=True))
            logits.append(torch.from_numpy(found)[0].float())
    # ONNX Runtime's errors have no common class.
    except Exception as error:
        raise UnsupportedError(f"ONNX Runtime does not run the decoder of {program.name}: {kind_and_reason(error)}") from error
    return torch.cat(logits)


_DTYPES = {"tensor(float16)": torch.float16, "tensor(double)": torch.float64}
