"""Remove token ids that no input is mapped to and whose logits are masked.

embedding(T, new_ids[ids])           only rows that new_ids names are looked up
masked_fill(x Wᵀ, dropped, -inf)     logits of dropped ids need no rows of W
"""

from __future__ import annotations

from lissom.compiler.analysis.token_ids import token_ids
from lissom.compiler.ir.editor import Editor
from lissom.compiler.transforms.vocabulary import reached_ids, removal, remove_ids


def eliminate_vocabulary(edit: Editor) -> None:
    """Remove the rows of embedding tables and LM heads that `prune-vocabulary` left without a use."""
    tokens = token_ids(edit.program)
    kept = None if tokens is None else reached_ids(edit, tokens)
    if tokens is None or kept is None or len(kept) == tokens.size:
        return
    selected = removal(edit, tokens, tokens.size)
    if isinstance(selected, str):
        edit.skip(tokens.lookups[0], f"dropped token ids stay: {selected}")
    else:
        remove_ids(edit, tokens, selected, kept)
