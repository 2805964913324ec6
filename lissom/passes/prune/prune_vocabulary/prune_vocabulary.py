"""Prune the vocabulary: token ids that are rare, or of scripts that are not needed, leave embedding tables and LM heads.

The approximation is which ids stay. Dropped ids are read as the unknown token, and their logits are -inf:

    embedding(T, new_ids[ids])              new_ids[i] = i, or the unknown token
    masked_fill(x Wᵀ + b, dropped, -inf)

`eliminate-dead`, which runs right after it, removes their rows. Logits of ids that stay are the same bits, except where a
product of one row sums in another order for another number of ids, as PyTorch's does. Abdaoui, Pradel, Sigel 2020, Load What
You Need: Smaller Versions of Multilingual BERT, §3, for vocabularies by the frequency of tokens in data of the languages that
are needed. https://arxiv.org/abs/2010.05609 Here the program can go on taking original ids, and a tokenizer for new ids is
closed under its merges.

With `ids=tokenizer` the program takes new ids, 0 to keep - 1, after the last pass. Passes and the metric before that, which run
on the caller's data, use original ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lissom.compiler.analysis.real_ids import count_ids
from lissom.compiler.analysis.token_ids import TokenIds, token_ids
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.transforms.new_ids import obstacle_to_new_ids
from lissom.compiler.transforms.vocabulary import mask_vocabulary, removal
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes.prune.prune_vocabulary.choice import Choice, cover, most_frequent
from lissom.passes.prune.prune_vocabulary.closure import closure_of
from lissom.passes.prune.prune_vocabulary.scripts import check_scripts, ids_in_scripts
from lissom.passes.prune.prune_vocabulary.stored_tokenizer import StoredTokenizer, find_tokenizer
from lissom.passes.prune.prune_vocabulary.token_list import read_tokens


@dataclass(frozen=True)
class PruneVocabulary(Approximation):
    """Keeps the most frequent token ids, or those of some scripts, and removes all others from embedding tables and LM heads.

    Special, unknown and byte-fallback tokens always stay; they are known from the model's configuration and its tokenizer.

    Attributes:
        keep: the number of ids that stay: the most frequent ones in calibration data, and the first ones without data.
        coverage: instead of `keep`, the fraction of the tokens in calibration data whose ids stay, above 0 and at most 1: the
            fewest ids that reach it.
        scripts: Unicode scripts, `"latin,cyrillic"`; ids whose text has letters of others are dropped. Needs a tokenizer.
        tokens: a file with ids or tokens that stay, one per line; a line of digits is an id.
        tokenizer: a folder with `tokenizer.json`, or that file; by default that of the folder the model came from.
        ids: `graph`: the program maps original ids to rows. `tokenizer`: it takes the ids of a new tokenizer, which
            `lissom.pruned_tokenizer` gives.
        logits: with `ids=graph`, `full` has the original width, with -inf for dropped ids; `compact` has one logit for each id
            that stays, `program.vocabulary.kept`.
    """

    keep: int | None = None
    coverage: float | None = None
    scripts: str = ""
    tokens: str = ""
    tokenizer: str = ""
    ids: Literal["graph", "tokenizer"] = "graph"
    logits: Literal["full", "compact"] = "full"
    leaves_dead = True
    redefines = True

    def __post_init__(self) -> None:
        if self.keep is None and self.coverage is None and not self.scripts and not self.tokens:
            raise UnsupportedError("prune-vocabulary needs to know which ids stay; give keep=, coverage=, scripts= or tokens=")
        if self.keep is not None and self.coverage is not None:
            raise UnsupportedError("prune-vocabulary takes keep= or coverage=, not both; leave one out")
        if self.keep is not None and self.keep < 1:
            raise UnsupportedError(f"prune-vocabulary{{keep={self.keep}}} keeps no token id; give 1 or more")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise UnsupportedError(f"prune-vocabulary takes coverage= above 0 and at most 1, not {self.coverage:g}")
        check_scripts(self.scripts)

    def run(self, edit: Editor) -> None:
        if edit.program.vocabulary is not None:
            raise UnsupportedError("prune-vocabulary ran on this program already; give all options to one pass")
        tokens = token_ids(edit.program)
        if tokens is None:
            raise UnsupportedError(
                f"prune-vocabulary finds no embedding of token ids in {edit.program.name}: no input is looked up in a table; "
                f"leave it out for this model"
            )
        if isinstance(reason := removal(edit, tokens, tokens.size), str):
            raise UnsupportedError(
                f"prune-vocabulary cannot remove rows of the token embedding or the LM head: {reason}; put it before the pass "
                f"that made it so, or leave it out"
            )
        tokenizer = find_tokenizer(self.tokenizer, edit.program.about)
        counts = count_ids(edit.program, tokens, edit.data) if edit.data else None
        kept = torch.tensor(sorted(self._choose(edit.program, tokens, tokenizer, counts)), dtype=torch.int64)
        if len(kept) == tokens.size:
            edit.note(f"all {tokens.size:,} token ids stay")
            return
        unknown = _unknown(edit.program, tokenizer, tokens.size)
        vocabulary = Vocabulary(kept, tokens.size, unknown, self.ids, "compact" if self.ids == "tokenizer" else self.logits)
        if self.ids == "tokenizer":
            vocabulary = _with_tokenizer(edit, tokens, vocabulary, tokenizer)
        mask_vocabulary(edit, tokens, vocabulary)
        edit.program.vocabulary = vocabulary
        _report(edit, vocabulary, counts)

    def _choose(
        self, program: Program, tokens: TokenIds, tokenizer: StoredTokenizer | None, counts: torch.Tensor | None
    ) -> set[int]:
        """The ids that stay."""
        size = tokens.size
        if self.keep is not None and self.keep > size:
            raise UnsupportedError(f"prune-vocabulary{{keep={self.keep}}} is more than the vocabulary has, {size}; give less")
        if self.coverage is not None and counts is None:
            raise RequirementError("prune-vocabulary{coverage=} needs calibration data: pass data=, or give keep=")
        if self.scripts and tokenizer is None:
            raise RequirementError(
                "prune-vocabulary{scripts=} needs the tokenizer, and the model's folder has none; give tokenizer=FOLDER"
            )
        must = {index for index in _config_ids(program.about) if index < size}
        must |= set() if tokenizer is None else {index for index in tokenizer.required if index < size}
        must |= read_tokens(self.tokens, size, tokenizer) if self.tokens else set()
        allowed = ids_in_scripts(self.scripts, tokenizer, size) if tokenizer is not None and self.scripts else set(range(size))
        close = closure_of(tokenizer if self.ids == "tokenizer" else None)
        if self.ids == "tokenizer" and tokenizer is not None:
            must, allowed = must & tokenizer.names.keys(), allowed & tokenizer.names.keys()
        if self.keep is None and self.coverage is None:
            return Choice(close, must | (allowed if self.scripts else set())).kept
        choice = Choice(close, must)
        ranked = most_frequent(allowed - choice.kept, counts)
        if self.keep is not None:
            if len(choice.kept) > self.keep:
                raise UnsupportedError(
                    f"prune-vocabulary{{keep={self.keep}}} is less than the {len(choice.kept)} tokens that must stay: special, "
                    f"unknown and byte-fallback tokens, those of tokens=, and their parts; give {len(choice.kept)} or more"
                )
            choice.fill(ranked, self.keep)
        elif self.coverage is not None and counts is not None:
            cover(choice, ranked, counts, self.coverage)
        return choice.kept


def _with_tokenizer(edit: Editor, tokens: TokenIds, vocabulary: Vocabulary, tokenizer: StoredTokenizer | None) -> Vocabulary:
    """The vocabulary with the tokenizer for its new ids. Raises RequirementError, UnsupportedError."""
    if tokenizer is None:
        raise RequirementError(
            "prune-vocabulary{ids=tokenizer} needs the tokenizer, and the model's folder has none; give tokenizer=FOLDER"
        )
    if (reason := obstacle_to_new_ids(edit.program, tokens)) is not None:
        raise UnsupportedError(f"prune-vocabulary{{ids=tokenizer}} cannot renumber the ids: {reason}; use ids=graph")
    renumbered = tokenizer.renumbered(vocabulary)
    return Vocabulary(
        vocabulary.kept, vocabulary.size, vocabulary.unknown, "tokenizer", "compact", json.dumps(renumbered, ensure_ascii=False)
    )


def _config_ids(about: object) -> set[int]:
    """The ids that the configuration of the model names: `eos_token_id` and the like, one or several each."""
    configuration = getattr(about, "configuration", None)
    named: list[object] = []
    levels = [configuration]
    for level in levels:
        if isinstance(level, Mapping):
            levels += [value for value in level.values() if isinstance(value, Mapping)]
            for name, value in level.items():
                if str(name).endswith("_token_id"):
                    named += value if isinstance(value, list) else [value]
    return {index for index in named if isinstance(index, int) and not isinstance(index, bool) and index >= 0}


def _unknown(program: Program, tokenizer: StoredTokenizer | None, size: int) -> int | None:
    """The id of the unknown token; None if there is none."""
    configuration = getattr(program.about, "configuration", None)
    named = configuration.get("unk_token_id") if isinstance(configuration, Mapping) else None
    index = named if tokenizer is None or tokenizer.unknown is None else tokenizer.unknown
    return index if isinstance(index, int) and 0 <= index < size else None


def _report(edit: Editor, vocabulary: Vocabulary, counts: torch.Tensor | None) -> None:
    """Note how many ids stay, and how many tokens of the data have others."""
    edit.note(f"{len(vocabulary.kept):,} of {vocabulary.size:,} token ids stay")
    if counts is not None:
        total, missed = int(counts.sum()), int(counts[vocabulary.dropped].sum())
        covered = (total - missed) / max(total, 1)
        edit.note(f"{covered:.2%} of {total:,} tokens of data= have ids that stay; {missed:,} have dropped ids")
    if vocabulary.ids == "graph":
        read = f"is read as the unknown token, id {vocabulary.unknown}" if vocabulary.unknown is not None else "is refused"
        edit.note(f"a dropped id in a call {read}")
    else:
        edit.note(
            "the finished program takes the ids of a new tokenizer: lissom.pruned_tokenizer gives it, and save() writes it"
        )
