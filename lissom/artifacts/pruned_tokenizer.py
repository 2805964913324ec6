"""The tokenizer of a pruned vocabulary as transformers has it, and the configuration for its ids."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lissom.artifacts.facts import Facts
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.models.huggingface import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_KEPT = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")
_IDS = ("suppress_tokens", "begin_suppress_tokens")
"""Fields of configurations with lists of ids, besides those that end in `_token_id`."""


def tokenizer_of_program(
    program: Program, original: PreTrainedTokenizerBase | None, source: str | None
) -> PreTrainedTokenizerFast:
    """The tokenizer for the ids that a program takes after `prune-vocabulary{ids=tokenizer}`.

    Args:
        original: the model's own tokenizer, for special tokens, chat template and lengths; by default that in `source`.
        source: the folder that the model came from.

    Raises:
        UnsupportedError: if the program takes its original ids, or transformers is missing.
        InputError: if `original` is no tokenizer of transformers.
    """
    vocabulary = program.vocabulary
    if vocabulary is None or vocabulary.tokenizer is None:
        raise UnsupportedError(
            f"{program.name} takes the ids of its original tokenizer; compile it with prune-vocabulary{{ids=tokenizer}} to get "
            f"another"
        )
    try:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UnsupportedError("a tokenizer needs transformers: pip install 'lissom[demo]'") from error
    if original is not None and not hasattr(original, "special_tokens_map"):
        raise InputError(f"tokenizer= is {original!r:.80}; give the model's tokenizer, of transformers")
    if original is None and source is not None and Path(source).is_dir():
        with suppress(ArtifactError):  # the folder may have no tokenizer: prune-vocabulary takes another
            original = tokenizer_of(Path(source))
    library = Tokenizer.from_str(vocabulary.tokenizer)
    known = library.get_vocab(with_added_tokens=True)
    further: dict[str, Any] = {}
    if original is not None:
        further = {name: value for name in _KEPT if (value := getattr(original, name, None)) is not None}
        further |= {name: token for name, token in original.special_tokens_map.items() if _is_known(token, known)}
        further |= {"chat_template": template} if (template := getattr(original, "chat_template", None)) else {}
    return PreTrainedTokenizerFast(tokenizer_object=library, **further)


def _is_known(token: object, known: Mapping[str, int]) -> bool:
    """True for a special token, or several, that the tokenizer has."""
    return all(str(one) in known for one in token) if isinstance(token, (list, tuple)) else str(token) in known


def saved_tokenizer(program: Program, given: Any, source: str | None) -> Any:
    """The tokenizer to save with a program: the given one; else that for its new ids, None where it takes original ids."""
    has_own = program.vocabulary is not None and program.vocabulary.tokenizer is not None
    return tokenizer_of_program(program, None, source) if given is None and has_own else given


def check_original_ids_unmapped(program: Program, what: str) -> None:
    """Refuse to export a program that maps original ids in its graph. Raises UnsupportedError.

    Args:
        what: is written, `a checkpoint`.
    """
    if program.vocabulary is not None and program.vocabulary.ids == "graph":
        raise UnsupportedError(
            f"{program.name} maps token ids in its graph, which {what} cannot say; use prune-vocabulary{{ids=tokenizer}}"
        )


def check_original(program: Program, original: object) -> None:
    """Refuse to compare a program for new ids with the original model. Raises UnsupportedError."""
    if original is not None and program.takes_new_ids:
        raise UnsupportedError(
            f"original= takes other token ids than {program.name}, whose vocabulary was pruned; leave it out"
        )


def renumbered_config(config: Any, program: Program) -> Any:
    """A configuration object of transformers for the ids that a program takes: a copy, or itself where they are original."""
    vocabulary = program.vocabulary
    if vocabulary is None or vocabulary.ids != "tokenizer":
        return config
    made = copy.deepcopy(config)
    fields: dict[str, Any] = made.to_dict()
    for name, value in renumbered_fields(fields, vocabulary).items():
        if hasattr(inner := getattr(made, name, None), "to_dict"):
            setattr(made, name, renumbered_config(inner, program))
        elif not isinstance(value, Mapping) and value != fields[name]:
            setattr(made, name, value)
    return made


def configs_of(model: Any, program: Program) -> tuple[Any, Any]:
    """The configuration and the generation configuration of a transformers model, for the ids that a program takes."""
    return renumbered_config(model.config, program), renumbered_config(model.generation_config, program)


def renumbered_facts(facts: Facts | None, program: Program) -> Facts | None:
    """The metadata of a model with the configuration for the ids that its program takes."""
    vocabulary = program.vocabulary
    if facts is None or vocabulary is None or vocabulary.ids != "tokenizer":
        return facts
    return replace(facts, configuration=renumbered_fields(facts.configuration, vocabulary))


def renumbered_fields(fields: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The fields of a configuration with the new size of the vocabulary and new ids; None for ids that were dropped."""
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            changed[name] = renumbered_fields(value, vocabulary)
        elif name == "vocab_size" and value == vocabulary.size:
            changed[name] = len(vocabulary.kept)
        elif str(name).endswith("_token_id") or name in _IDS:
            changed[name] = _renumbered(value, vocabulary)
        else:
            changed[name] = value
    return changed


def _renumbered(value: object, vocabulary: Vocabulary) -> object:
    if isinstance(value, list):
        new = [_renumbered(index, vocabulary) for index in value]
        return [index for index in new if index is not None]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    new = int(vocabulary.new_ids[value]) if 0 <= value < vocabulary.size else -1
    return None if new < 0 else new
