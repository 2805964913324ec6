"""The files of a Hugging Face folder in an artifact: configuration, tokenizer, processors; and the upload to the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from lissom.artifacts.facts import Facts
from lissom.artifacts.manifest import MODEL_TYPE
from lissom.compiler.analysis.embedding_bounds import vocabulary_size
from lissom.compiler.ir.program import Program
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.capture.failures import first_line

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_ORIGINAL = MODEL_TYPE
"""The field of a saved model's configuration with the original's model type."""
_OF_TOKENIZERS = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json"),
    *("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *("chat_template.jinja", "chat_template.json", "normalizer.json"),
)
_OF_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


class Saveable(Protocol):
    """A tokenizer, processor, image processor or feature extractor of transformers."""

    def save_pretrained(self, save_directory: str, /) -> object: ...


def saved_config(configuration: Mapping[str, object], folder: Path) -> None:
    """Write the configuration that `AutoConfig` reads from a saved model: the original's fields, and its model type."""
    fields = {**configuration, "model_type": MODEL_TYPE, _ORIGINAL: {"model_type": configuration.get("model_type")}}
    (folder / CONFIG).write_text(json.dumps(fields, indent=1, sort_keys=True), encoding="utf-8")


def original_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """The original configuration's fields from those that `saved_config` wrote; others are returned as they are."""
    kept = {name: value for name, value in fields.items() if name != _ORIGINAL}
    original = fields.get(_ORIGINAL)
    if fields.get("model_type") == MODEL_TYPE and isinstance(original, Mapping):
        kept["model_type"] = original.get("model_type")
    return kept


def write_model_files(folder: Path, facts: Facts, tokenizer: Saveable | None, processor: Saveable | None) -> None:
    """Write the configuration, tokenizer and processor of a model for other libraries. Errors as of `write_processors`."""
    # Without the place on this machine that the model came from.
    fields = {name: value for name, value in facts.configuration.items() if name != "_name_or_path"}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_processors(folder, facts.source, tokenizer, processor)


def write_processors(folder: Path, source: str | None, tokenizer: Saveable | None, processor: Saveable | None) -> None:
    """Write tokenizer and processor; those not given are copied from where the model came from, if they are there.

    Args:
        source: a directory, or a model of the Hub that is in its local cache.

    Raises:
        InputError: for an object that is neither.
        ArtifactError: if it cannot be written.
    """
    for name, given in (("tokenizer", tokenizer), ("processor", processor)):
        if given is not None and not callable(getattr(given, "save_pretrained", None)):
            raise InputError(f"{name}= is {given!r:.80}; give one of transformers, which has save_pretrained")
    if source is not None:
        names = (*(_OF_TOKENIZERS if tokenizer is None else ()), *(_OF_PROCESSORS if processor is None else ()))
        for name in names:
            path = _find(source, name)
            if path is not None:
                shutil.copyfile(path, folder / name)
    for given in (processor, tokenizer):
        if given is not None:
            given.save_pretrained(str(folder))
            _without_indents(folder / TOKENIZER)
    inner = next((path.name for path in folder.iterdir() if path.is_dir()), None)
    if inner is not None:
        raise ArtifactError(
            f"the tokenizer or processor writes a folder '{inner}', and an artifact has none; save it in a directory of its own"
        )


def _without_indents(path: Path) -> None:
    """Take indents and line breaks out of a JSON file: half of a large vocabulary, which transformers reads twice."""
    if path.is_file():
        short = path.with_name(f"{path.name}.short")
        with path.open("rb") as source, short.open("wb") as target:
            target.writelines(line.strip() for line in source)  # no text of JSON contains the end of a line
        short.replace(path)


def _find(source: str, name: str) -> Path | None:
    """A file of the model's directory, or of the local cache of the Hub; None if there is none."""
    with suppress(OSError):
        if Path(source).is_dir():
            return path if (path := Path(source) / name).is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, name)
    except (ImportError, ValueError):  # a source that is no name of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None


def check_tokenizer(program: Program, main_input: str, tokenizer: object) -> None:
    """Refuse a tokenizer with a larger vocabulary than the model's embedding table.

    Added tokens are not counted: some models, such as Gemma 3, come with more of them than rows. A call with one is refused.

    Raises:
        InputError: if it is larger.
    """
    rows, tokens = vocabulary_size(program, main_input), getattr(tokenizer, "vocab_size", None)
    if rows is not None and isinstance(tokens, int) and tokens > rows:
        own = "leave it out, or give lissom.pruned_tokenizer(model)"
        remedy = own if program.takes_new_ids else "give the tokenizer of this model"
        raise InputError(f"the tokenizer has {tokens} tokens, and {program.name} has embeddings for {rows}; {remedy}")


def upload(save: Callable[[Path], None], name: str, repo_id: str, private: bool | None, token: str | None, message: str) -> str:
    """Save into a temporary directory and upload it to a repository of the Hub; returns its address.

    Args:
        name: of the model, for errors.

    Raises:
        ArtifactError: if the Hub cannot be reached, or refuses it.
        UnsupportedError: without huggingface_hub.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UnsupportedError("push_to_hub needs huggingface_hub: pip install huggingface_hub") from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        try:
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message)
        # The Hub's client raises errors of no common class, of its own and of its HTTP library.
        except Exception as error:
            raise ArtifactError(
                f"{name} cannot be uploaded to '{repo_id}': {first_line(error)}; check the name, the token and the network, or "
                f"save() it and upload the directory"
            ) from error
    return str(repo)
