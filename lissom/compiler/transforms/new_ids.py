"""The last step of a pruned vocabulary: the program takes the ids that its `Vocabulary` says, and no others."""

from __future__ import annotations

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import is_id_table
from lissom.compiler.analysis.token_ids import TokenIds, id_inputs, id_sources, is_masked_logits
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.compiler.verify.divergence import answers, run_samples
from lissom.errors import UnsupportedError, VerifyError

aten = torch.ops.aten

_COMPARED = {aten.eq.Scalar, aten.ne.Scalar, aten.eq.Tensor, aten.ne.Tensor}
_SIZES = {aten.sym_size.int}


def obstacle_to_new_ids(program: Program, tokens: TokenIds) -> str | None:
    """The reason why ids cannot be renumbered; None if they can: only tables, and comparisons with one id, read them."""
    sources = id_sources(program)
    lookups = {*tokens.lookups}
    for node in [held for held, source in sources.items() if source in tokens.inputs]:
        for user in node.users:
            compared = user.target in _COMPARED and _constant(program, user) is not None
            if not (user in sources or user in lookups or compared or user.target in _SIZES or is_id_table(user)):
                what = "returns" if user.op == "output" else "computes with"
                return f"'{user.name}' {what} them"
    return None


def with_final_ids(program: Program, example: Sample, *, check: bool) -> tuple[Program, Sample]:
    """The program that callers get, and the example with ids that it takes.

    Of a program that takes original ids and has no unknown token, dropped ids fail from now on. A program for the ids of a new
    tokenizer takes these.

    Args:
        check: whether outputs on the example are compared.

    Raises:
        VerifyError: if the outputs differ.
        UnsupportedError: if the program is partitioned or was changed so that it cannot take these ids.
    """
    vocabulary = program.vocabulary
    if vocabulary is None:
        return program, example
    if program.is_simulation:
        _require_unchanged(program, vocabulary)
        return program, example
    places = [program.placeholders.index(node) for node in id_inputs(program)]
    edit = Editor(program.copy(), "prune-vocabulary")
    readable = [vocabulary.readable(ids) if place in places else ids for place, ids in enumerate(example)]
    final = readable
    if vocabulary.ids == "tokenizer":
        final = [vocabulary.renumbered(ids) if place in places else ids for place, ids in enumerate(example)]
        _take_new_ids(edit, vocabulary)
    elif vocabulary.unknown is None:
        _refuse_dropped_ids(edit, vocabulary)
    if vocabulary.logits == "compact":
        _leave_compact(edit)
    edit.program.drop_dead()
    _require_done(edit.program)
    if check:
        _compare(program, edit.program, readable, final)
    return edit.program, final


def _require_unchanged(program: Program, vocabulary: Vocabulary) -> None:
    """Refuse a vocabulary that the ranks of a partitioned program would have to take in another form.

    Raises:
        UnsupportedError: for new ids, compact logits, and dropped ids without an unknown token.
    """
    if vocabulary.ids == "tokenizer" or vocabulary.logits == "compact" or vocabulary.unknown is None:
        raise UnsupportedError(
            f"{program.name} is partitioned, which prune-vocabulary supports with ids=graph, logits=full and an unknown token "
            f"only; write an ordinary checkpoint with ids=tokenizer, and partition the model loaded from it"
        )


def _require_done(program: Program) -> None:
    """Refuse a program in which a pass left the maps of ids in another form. Raises UnsupportedError."""
    vocabulary = program.vocabulary
    assert vocabulary is not None, "the vocabulary was pruned"
    gone = ["vocabulary.new_ids"] if vocabulary.ids == "tokenizer" else []
    gone += ["vocabulary.places", "vocabulary.dropped"] if vocabulary.logits == "compact" else []
    left = next((name for name in program.weights() if name.startswith(tuple(gone))), None) if gone else None
    if left is not None:
        raise UnsupportedError(
            f"prune-vocabulary cannot give {program.name} new ids: other passes changed how it reads '{left}'; use ids=graph, "
            f"logits=full"
        )


def _refuse_dropped_ids(edit: Editor, vocabulary: Vocabulary) -> None:
    """Let dropped ids be looked up in a row behind the last."""
    for node in list(edit.nodes(aten.embedding.default)):
        if is_id_table(node):
            table = Embedding(node).table
            dropped = vocabulary.dropped.unsqueeze(1).to(edit.tensor(table).device)
            edit.set_weight(table, edit.tensor(table).masked_fill(dropped, vocabulary.size))


def _take_new_ids(edit: Editor, vocabulary: Vocabulary) -> None:
    """Leave out the tables of ids, and renumber the ids that inputs are compared with."""
    program = edit.program
    inputs, sources = id_inputs(program), id_sources(program)
    tables = [node for node in program.nodes(aten.embedding.default) if is_id_table(node)]
    mapped = _mapped(tables)
    for node in [user for held, source in sources.items() if source in inputs and held not in mapped for user in held.users]:
        if node.target in _COMPARED and (index := _constant(program, node)) is not None:
            new = int(vocabulary.new_ids[index]) if 0 <= index < vocabulary.size else -1
            edit.change_call(node, aten.eq.Scalar if "eq" in str(node.target) else aten.ne.Scalar, nodes.operand(node), new)
    for table in tables:
        ids = Embedding(table).ids
        with edit.before(table):
            new = ids if nodes.tensor_type(ids).dtype == torch.int64 else edit.call(aten.to.dtype, ids, torch.int64)
            columns = edit.call(aten.unsqueeze.default, new, -1)
        edit.replace(table, columns)
        # Other passes may have moved the squeeze that follows a table.
        for user in [user for user in columns.users if user.target is aten.squeeze.dim]:
            edit.replace(user, new)


def _mapped(tables: list[fx.Node]) -> set[fx.Node]:
    """The values that depend on a table of ids."""
    reached = set(tables)
    pending = list(tables)
    while pending:
        for user in pending.pop().users:
            if user not in reached:
                reached.add(user)
                pending.append(user)
    return reached


def _constant(program: Program, node: fx.Node) -> int | None:
    """The number that a comparison compares ids with; None for anything else."""
    other = node.args[1] if len(node.args) > 1 else None
    if isinstance(other, fx.Node) and other.op == "get_attr" and str(other.target) not in program.state:
        weight = program.weight(str(other.target))
        return int(weight) if weight.numel() == 1 and not weight.is_floating_point() else None
    return int(other) if isinstance(other, int) and not isinstance(other, bool) else None


def _leave_compact(edit: Editor) -> None:
    """Leave logits as narrow as the ids that stay."""
    narrow: list[fx.Node] = []
    for node in list(edit.nodes(aten.index_select.default)):
        if is_masked_logits(node):
            narrow.append(nodes.operand(nodes.operand(node)))
            node.replace_all_uses_with(narrow[-1])
            edit.program.graph.erase_node(node)
            edit.program.edits += 1
    edit.retype_readers(narrow)


def _compare(before: Program, after: Program, readable: Sample, final: Sample) -> None:
    """Compare the programs on one example: logits of ids that stay, and all other outputs, are the same bits."""
    vocabulary = after.vocabulary
    assert vocabulary is not None, "both programs have the vocabulary"
    wanted, actual = (
        answers(program, run_samples(program, [sample]))[0] for program, sample in ((before, readable), (after, final))
    )
    for old, new in zip(wanted, actual, strict=True):
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape != new.shape:
            old = old.index_select(-1, vocabulary.kept.to(old.device))
        same = torch.equal(old, new) if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) else old == new
        if not same and not (isinstance(old, torch.Tensor) and bool(old.isnan().any())):
            raise VerifyError("prune-vocabulary was rolled back: the program for new ids has other outputs on the example")
