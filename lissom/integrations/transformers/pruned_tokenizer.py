"""The tokenizer for a model whose vocabulary was pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lissom.artifacts.pruned_tokenizer import tokenizer_of_program
from lissom.compiler.ir.program import Program
from lissom.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class HasProgram(Protocol):
    """A compiled model, a decoder, or what `optimize` returns."""

    @property
    def program(self) -> Program: ...


def pruned_tokenizer(model: HasProgram | Program, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer for the ids that a model takes after `prune-vocabulary{ids=tokenizer}`; `save` writes it too.

    Args:
        model: what `lissom.compile`, `compile_generation` or `optimize` returned, or a program.
        tokenizer: the original one, whose special tokens, chat template and maximum length the new one gets; by default that of
            the folder that the model came from.

    Raises:
        UnsupportedError: if the model takes original ids, or transformers is missing.
        InputError: if an argument is of another kind.

    Examples:
        >>> import lissom
        >>> passes = "prune-vocabulary{keep=3000,ids=tokenizer}"
        >>> encoder = lissom.compile("minilm", passes=passes, goal=None)
        >>> tokenizer = lissom.pruned_tokenizer(encoder)
        >>> encoder(**tokenizer("a smaller vocabulary", return_tensors="pt")).last_hidden_state.shape[-1], len(tokenizer)
        (384, 3000)
    """
    program = model if isinstance(model, Program) else getattr(model, "program", None)
    if not isinstance(program, Program):
        raise InputError(f"model= is {model!r:.80}; give what lissom.compile, compile_generation or optimize returned")
    config = getattr(model, "config", None)
    source = getattr(program.about, "source", None) or getattr(config, "_name_or_path", None)
    return tokenizer_of_program(program, tokenizer, source or None)
