"""Writes an optimized decoder as a folder for openvino-genai: IR with the KV cache as its state, configuration, tokenizer.

OpenVINO reads texts in parts, and openvino-genai generates in a fresh process; both are compared with the program before the
folder is there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lissom.artifacts.directory import check_new, write_directory
from lissom.artifacts.facts import Facts
from lissom.artifacts.model_files import TOKENIZER, Saveable, write_model_files
from lissom.backends.openvino.backend import check_program
from lissom.backends.simulated_layers import account
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import UnsupportedError
from lissom.export.causal_lm.names import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS, Layer, describe_layers
from lissom.export.causal_lm.text import count_equal, logits_of
from lissom.export.openvino.folder import IR, OpenVinoFolder, check_installed, precision_note
from lissom.export.openvino.generated import Conversion, Generation, convert_tokenizer, generate
from lissom.frontends.generation.decoder import longest_text, longrope_switch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lissom.export.openvino.decoder import Decoder

_TOKENS, _STEPS, _PADDING = 16, 8, 3
"""The tokens of a text that is compared, those generated after it, and by how many a second text is shorter."""
_LONGEST_WINDOW = 1024
"""The largest sliding window beyond which a text is compared."""
_F32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""For programs in bfloat16 too: OpenVINO would compute rotary angles in it."""
_PIPELINES = (_F32, _F32 | {"ATTENTION_BACKEND": "SDPA"})
"""Options of openvino-genai. By default it pages the attention of an IR that lets it; the other option leaves it as it is."""
_TEXT = "The quick brown fox jumps over 13 lazy dogs."


@dataclass(frozen=True)
class OpenVinoDecoderFolder(OpenVinoFolder):
    """The written folder of a decoder.

    Attributes:
        layers: with attention.
        texts: True if it reads several texts at a time.
    """

    layers: Sequence[Layer]
    texts: bool

    def __str__(self) -> str:
        together = "several texts at a time" if self.texts else "one text at a time"
        return f"decoder with {describe_layers(self.layers)}, {together}; {super().__str__()}"


def write_openvino_decoder(
    program: Program,
    model: PreTrainedModel,
    example: Sample,
    directory: Path,
    tokenizer: Saveable | None = None,
    processor: Saveable | None = None,
) -> OpenVinoDecoderFolder:
    """Write the folder, completely or not at all, after it was compared.

    Args:
        program: captured from the model without a KV cache, and not lowered.
        example: flat inputs, from which the program is traced.

    Raises:
        UnsupportedError: if OpenVINO or openvino-genai cannot run the program, or OpenVINO is not installed.
        ArtifactError: if the directory holds something, or cannot be written.
    """
    check_new(directory)
    check_installed()
    check_program(program)
    # OpenVINO is an optional dependency.
    from lissom.export.openvino.decoder import write_decoder

    written: list[OpenVinoDecoderFolder] = []

    def write(folder: Path) -> None:
        decoder = write_decoder(program, example, folder / IR)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        texts = _texts(model, decoder)
        compared = _compare(program, decoder, folder / IR, texts)
        facts = Facts.of(model)
        assert facts is not None
        write_model_files(folder, facts, tokenizer, processor)
        model.generation_config.save_pretrained(str(folder))
        notes = (*compared.notes, *_generated(program, texts, folder), *_of_texts(model))
        written.append(OpenVinoDecoderFolder(size, compared.error, notes, decoder.layers, decoder.texts))

    write_directory(directory, write)
    return written[0]


def _texts(model: PreTrainedModel, decoder: Decoder) -> list[torch.Tensor]:
    """One text, or two of different lengths; longer than sliding windows where these are not large."""
    windows = [layer.window for layer in decoder.layers if layer.window is not None and layer.window <= _LONGEST_WINDOW]
    longest = min((length for length in (longest_text(model), longrope_switch(model)) if length), default=_LONGEST_WINDOW * 2)
    size = min(_TOKENS + max(windows, default=0), longest - _STEPS)
    if size < _TOKENS // 2:
        raise UnsupportedError(
            f"{type(model).__name__} knows texts of {longest} tokens at most, and a comparison takes {_TOKENS // 2 + _STEPS}; "
            f"give its config a larger max_position_embeddings"
        )
    ids = torch.randint(0, decoder.vocabulary, (2, size), generator=torch.Generator().manual_seed(0))
    return [ids[0], ids[1, _PADDING:]] if decoder.texts else [ids[0]]


def _of_texts(model: PreTrainedModel) -> tuple[str, ...]:
    """Notes on the longest text, for a model whose rotary frequencies change with it, and on the end of texts."""
    switch = longrope_switch(model)
    notes = (
        () if switch is None else (f"texts of {switch} tokens at most, beyond which the model has other rotary frequencies",)
    )
    if getattr(model.generation_config, "eos_token_id", None) is None:
        notes = (*notes, "no id is known to end texts, and openvino-genai needs one: set eos_token_id in the model's config")
    return notes


@dataclass(frozen=True)
class _Compared:
    """The error of the logits, and notes."""

    error: float
    notes: tuple[str, ...]


def _compare(program: Program, decoder: Decoder, path: Path, texts: Sequence[torch.Tensor]) -> _Compared:
    """Compare the logits of texts. Raises UnsupportedError if the decoder computes something else."""
    from lissom.backends.openvino.executed import kernels, unfused
    from lissom.backends.openvino.network import core, options_of, reason_of

    allowed = tolerance_of(program)
    try:
        compiled: Any = core().compile_model(path, "CPU", options_of(program, torch.get_num_threads(), 0) | _F32)
        found = _in_parts(compiled, texts)
    # OpenVINO's errors have no common class.
    except Exception as error:
        raise UnsupportedError(f"OpenVINO does not run the decoder of {program.name}: {reason_of(error)}") from error
    error = max(relative_error(logits_of(program, ids), logits) for ids, logits in zip(texts, found, strict=True))
    if not error <= allowed:
        raise UnsupportedError(
            f"{program.name} with a KV cache in OpenVINO differs from {program.name} by {error:.2g} relative, allowed "
            f"{allowed:.2g}: it depends on earlier tokens otherwise than by attention and positions"
        )
    notes: tuple[str, ...] = (precision_note("f32"),)
    if decoder.quantized.layers:
        left = unfused(compiled.get_runtime_model(), decoder.quantized)
        notes = (account(left, len(decoder.quantized.layers), kernels(decoder.quantized, left)), *notes)
    return _Compared(error, notes)


def _in_parts(compiled: Any, texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The decoder's logits of each text, [tokens, vocabulary]: it reads three parts, and exchanges its rows after the first."""
    size = len(texts[0])
    padding = [size - len(ids) for ids in texts]
    ids = torch.stack([torch.nn.functional.pad(ids, (front, 0)) for ids, front in zip(texts, padding, strict=True)])
    mask = torch.stack([(torch.arange(size) >= front).long() for front in padding])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    rows = torch.arange(len(texts))
    ends = (size - 4, size - 1, size)
    request = compiled.create_infer_request()
    parts: list[torch.Tensor] = []
    for number, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        exchanged = rows.flip(0) if number else rows
        given = {INPUT_IDS: ids[:, begin:end], ATTENTION_MASK: mask[:, :end], POSITION_IDS: positions[:, begin:end]}
        feed = {name: tensor[exchanged].numpy() for name, tensor in given.items()}
        # Once exchanged, each row goes on with itself.
        beams = exchanged if number == 1 else rows
        found = request.infer(feed | {"beam_idx": beams.int().numpy()})[LOGITS]
        parts.append(torch.from_numpy(found.copy())[exchanged].float())
    return [row[front:] for row, front in zip(torch.cat(parts, 1), padding, strict=True)]


def _generated(program: Program, texts: Sequence[torch.Tensor], folder: Path) -> tuple[str, ...]:
    """Convert the tokenizer, and generate in a fresh process; returns notes. Raises UnsupportedError."""
    notes: list[str] = []
    ids: list[int] = []
    if not (folder / TOKENIZER).is_file():
        notes.append("without a tokenizer, so openvino-genai is given token ids")
    elif importlib.util.find_spec("openvino_tokenizers") is None:
        notes.append("without OpenVINO's tokenizer: openvino-tokenizers is not installed, pip install 'lissom[openvino-genai]'")
    else:
        ids = convert_tokenizer(program.name, Conversion(str(folder), _TEXT))
    if importlib.util.find_spec("openvino_genai") is None:
        notes.append("not compared: openvino-genai, which is not installed, pip install 'lissom[openvino-genai]'")
        return tuple(notes)
    prompts = [text.tolist() for text in texts]
    answers, found = generate(program.name, Generation(str(folder), prompts, _STEPS, _PIPELINES, _TEXT if ids else ""))
    if found != ids:
        raise UnsupportedError(
            f"OpenVINO's tokenizer gives other ids than that of transformers for '{_TEXT}': {found[:12]} and {ids[:12]}"
        )
    counts = [_equal_tokens(program, texts, answer) for answer in answers]
    same = "with either attention" if counts[0] == counts[1] else f"and {counts[1]} with the attention of the IR"
    return (*notes, f"openvino-genai in a fresh process: {counts[0]}, {same}")


def _equal_tokens(program: Program, texts: Sequence[torch.Tensor], answers: Sequence[Sequence[int]]) -> str:
    """How many tokens of the answers are the program's likeliest. Raises UnsupportedError for one that is far from it."""
    equal, allowed = 0, tolerance_of(program)
    for ids, answer in zip(texts, answers, strict=True):
        found = torch.tensor(answer)
        logits = logits_of(program, torch.cat([ids, found]))[len(ids) - 1 : -1]
        largest, likeliest = logits.max(-1)
        equal += int((likeliest == found).sum())
        lower = (largest - logits.gather(-1, found[:, None])[:, 0]).max()
        # Two logits, each of which may be off by the tolerance.
        if not lower <= 2 * allowed * logits.abs().max():
            raise UnsupportedError(
                f"openvino-genai chooses a token for {program.name} whose logit is {float(lower):.2g} below the largest, and "
                f"those of OpenVINO differ by {allowed:.2g} relative at most"
            )
    return count_equal(equal, sum(map(len, answers)))
