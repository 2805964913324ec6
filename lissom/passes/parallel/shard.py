"""Plan tensor parallelism: the placement of every value across ranks, and the collectives between them.

Layers are sharded in pairs, the first column-wise and the second row-wise. Each rank computes its heads and its neurons from
the input of the pair to its output, and one sum over the ranks ends the pair:

    Y = f(X [A₁ A₂]) [B₁; B₂] = f(X A₁) B₁ + f(X A₂) B₂                            one all-reduce

So a transformer layer has two all-reduces, one after its attention and one after its feed-forward; a layer that computes both
in parallel has one. Embedding tables and LM heads are sharded by vocabulary, mixtures of experts within each expert, and
key/value heads with the query heads that read them. Rank 0 holds the bias of a row-wise layer, the others zeros. An axis whose
size is no multiple of the world size is padded with zeros, so that all ranks run one program: a head or a neuron of zeros
contributes nothing.

Where such pairs hold less than `fraction` of the weights, other layers are sharded by themselves, the largest first:
column-wise with an all-gather of the output (`lissom/compiler/parallel/rules/gathered.py`), or row-wise where the output has
fewer features than there are ranks.

Operators that read logits along a sharded vocabulary (`argmax`, `log_softmax`, `topk`) work on each rank's shard and exchange a
few numbers per token. With `sequence`, values between the layers are sharded by position
(`lissom/compiler/parallel/rules/sequence.py`).

Placements are those of `torch.distributed.tensor`: `Shard(dim)`, `Replicate`, `Partial`. One rule per operator infers the
placement of its result from those of its arguments (`lissom/compiler/parallel/rules/table.py`); an operator without a rule gets
its arguments replicated. The graph stays as it is; `partition` carries out the plan.

Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
arXiv:1909.08053, §3. They add the bias after the sum, and mask look-ups in the same way. Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", arXiv:2205.05198, §4.2.2: sequence parallelism.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.analysis.structure.linear import weight_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.printer import target_text
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.parallel.plan import SHARDED, Plan, make_plan
from lissom.compiler.parallel.rules.joint import JOINT, numbers_a_row
from lissom.compiler.parallel.rules.sequence import position_obstacle
from lissom.compiler.parallel.sites import linear_layers, shard_sites
from lissom.compiler.pipeline.pass_kinds import Annotation
from lissom.errors import UnsupportedError

_LAYER_WORDS = ("column-wise", "row-wise")


@dataclass(frozen=True)
class Shard(Annotation):
    """Gives every value of the program a placement across ranks.

    Attributes:
        world_size: number of ranks, 2 or more.
        plan: exceptions, each `PATTERN:replicate`, `PATTERN:column-wise` or `PATTERN:row-wise`. A pattern matches module paths
            and covers the modules inside: `*.mlp:replicate`. `replicate` keeps sites and layers whole on every rank; the others
            shard linear layers that belong to no site.
        fraction: least part of the weights of linear layers to shard, 0 to 1. Where pairs of layers hold less, other layers are
            sharded by themselves, each with a collective of its own; 0 shards pairs only.
        sequence: shards values between the layers, such as the residual stream and norms, by position. Each all-reduce becomes
            a reduce-scatter and an all-gather, which send as many bytes together, and these values take less memory per rank.
    """

    world_size: int
    plan: tuple[str, ...] = ()
    fraction: float = SHARDED
    sequence: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 2:
            raise ValueError(f"world_size is {self.world_size}; tensor parallelism takes 2 ranks or more")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it is a part of the weights of linear layers, from 0 to 1")
        for entry in self.plan:
            pattern, _, how = entry.rpartition(":")
            if not pattern or how not in ("replicate", *_LAYER_WORDS):
                raise ValueError(f"plan has '{entry}'; write PATTERN:replicate, PATTERN:column-wise or PATTERN:row-wise")

    def run(self, edit: Editor) -> None:
        if isinstance(edit.program, PartitionedProgram):
            raise UnsupportedError(f"shard: the program is partitioned for {len(edit.program.ranks)} ranks already")
        whole, layers = self._overrides(edit)
        plan = make_plan(
            edit.program, self.world_size, whole=whole, layers=layers, fraction=self.fraction, sequence=self.sequence
        )
        for node, placed in plan.placed.items():
            nodes.set_placed(node, placed)
        edit.rewritten += len(plan.sites)
        for site in plan.left:
            edit.skip(site.node, f"its {site.kind} stays whole on every rank: {site.obstacle}")
        for node in plan.gathered:
            edit.skip(node, f"no rule says how {target_text(node.target)} works on shards; it gets its arguments whole")
        for sentence in _notes(plan):
            edit.note(sentence)

    def _overrides(self, edit: Editor) -> tuple[dict[fx.Node, str], dict[fx.Node, str]]:
        """The sites to replicate, each with its entry of `plan`, and the layers to shard, each `column-wise` or `row-wise`.

        Raises:
            UnsupportedError: when an entry matches nothing.
        """
        whole: dict[fx.Node, str] = {}
        layers: dict[fx.Node, str] = {}
        for entry in self.plan:
            pattern, _, how = entry.rpartition(":")
            if how == "replicate":
                places = [(node, nodes.origin(node).module_path) for node, _ in linear_layers(edit.program)]
                places += [(site.node, site.path) for site in shard_sites(edit.program, self.world_size, {})]
                fits = {node: entry for node, path in places if is_path_protected(path, pattern)}
                whole |= fits
            else:
                pairs = [node for node, _ in linear_layers(edit.program) if weight_of(node) is not None]
                fits = {node: how for node in pairs if fnmatchcase(nodes.origin(node).module_path, pattern)}
                layers |= fits
            if not fits:
                raise UnsupportedError(f"shard: plan has '{entry}', but no shardable module has a path like '{pattern}'")
        return whole, layers


def _notes(plan: Plan) -> list[str]:
    """The plan in sentences: the sharded sites, the collectives, and the padding."""
    kinds = Counter(site.kind for site in plan.sites)
    sites = ", ".join(f"{count} {kind}{'s' if count > 1 and kind != 'experts' else ''}" for kind, count in kinds.items())
    steps = Counter(step for move in plan.moves for step in move.steps)
    inside = [exchange for node, items in plan.joint.items() if node.target not in JOINT for exchange in items]
    steps["all-gather"] += sum(exchange.kind == "all-gather" for exchange in inside)
    moves = ", ".join(f"{count} {step}{'s' if count > 1 else ''}" for step, count in steps.items() if count)
    sentences = [f"on {plan.world_size} ranks: {sites or 'nothing'} sharded; {moves or 'nothing'} to redistribute"]
    if plan.sequence:
        sentences += _all_reduced(plan)
    joint = Counter(
        (target_text(node.target), numbers_a_row(exchanges, node))
        for node, exchanges in plan.joint.items()
        if node.target in JOINT
    )
    for (operator, numbers), count in joint.items():
        who = f"{operator} reads" if count == 1 else f"{count} calls of {operator} read"
        each = f"{numbers} number{'s' if numbers > 1 else ''} per row exchanged, not gathered"
        sentences.append(f"{who} a sharded dimension: {each}")
    for site in plan.sites:
        padded = [
            f"{atom.size} as {-(-int(atom.size) // parts) * parts}"
            for atom, (parts, _) in site.sharded_axes.items()
            if int(atom.size) % parts
        ]
        if padded:
            sentences.append(f"the {site.kind} at {site.path} is padded with zeros: {', '.join(padded)}")
    return sentences


def _all_reduced(plan: Plan) -> list[str]:
    """The sums that stay all-reduces although `sequence` is true, with the reasons."""
    reasons = Counter(
        position_obstacle(move.value, plan.world_size) or f"{target_text(move.reader.target)} takes it whole"
        for move in plan.moves
        if "all-reduce" in move.steps
    )
    sums = {count: f"{count} sums stay all-reduces" if count > 1 else "a sum stays an all-reduce" for count in reasons.values()}
    return [f"{sums[count]}: {reason}" for reason, count in reasons.items()]
