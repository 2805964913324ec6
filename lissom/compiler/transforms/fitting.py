"""Base of the passes that train weights: options, the parameters that learn, and the run."""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx, nn

from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.analysis.structure.linear import is_quantizer
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import FakeQuantize
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import FAKE_QUANTIZES
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.pipeline.pass_kinds import Training
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.training.batches import Batch, amount, hold_out, resized, rows_of_rank
from lissom.compiler.training.buckets import by_length
from lissom.compiler.training.checkpoint import Checkpoint
from lissom.compiler.training.gradients import Precision
from lissom.compiler.training.identity import identity_of
from lissom.compiler.training.loop import SLOWED, Plan, Run, Scale, Trained
from lissom.compiler.training.losses import outputs_of, predicts_next_tokens
from lissom.compiler.training.ranks import Ranks, data_parallel
from lissom.compiler.training.shards import Shards
from lissom.errors import RequirementError
from lissom.ops.formats import LEAST
from lissom.ops.native import load_kernels
from lissom.ops.quantization import fake_quantize

MINUTES = 5.0
"""The length of a run without `minutes` and `steps`."""


@dataclass(frozen=True)
class Objective:
    """The training loss and the held-out loss of a run.

    Attributes:
        loss: of a training batch; takes its index and the fraction of the run that is over.
        held_out: of a held-out batch; takes its index.
        close: frees what both use, after the run.
    """

    loss: Callable[[int, float], torch.Tensor]
    held_out: Callable[[int], torch.Tensor]
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Fitting(Training):
    """A pass that trains weights with gradients.

    Attributes:
        minutes: the length of the run, 5 by default.
        steps: the length in steps instead; only then do two runs give the same weights.
        learning_rate: the highest; it falls to zero at the end. none takes 3e-4, or 2e-5 for the logits of next tokens; where
            weights are quantized in the graph 1e-4 and 1e-5.
        batch: rows of a step; none takes the batches of the data as they are.
        precision: of products and activations, `fp32`, `bf16`, or `fp16` with a scale of losses that adapts, with weights in
            float32; `auto` takes bf16 where a step on a CPU is faster in it and the gradients agree, but fp32 with `steps`:
            what is faster may differ from run to run.
        held_out: the fraction of the data that decides which weights stay, and is not trained on; 32 batches at most, and of
            next tokens as many batches as have 4,096.
        embeddings: trains embedding tables too, and LM heads tied to them.
        scales: trains the scales of quantizers in the graph too.
        seed: of the held-out part and of the order of the batches.
        skip: module paths whose weights stay as they are, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        only: module paths whose weights learn, in the same form; others stay.
        checkpoint: a directory for the state of the run: after a kill the same call goes on where it was, and a finished run
            gives its result again. By default there is none.
        shard: under torchrun, shards the weights that learn, their gradients and the optimizer's state over the ranks.
    """

    minutes: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch: int | None = None
    precision: Precision = "auto"
    held_out: float = 0.1
    embeddings: bool = False
    scales: bool = True
    seed: int = 0
    skip: str = ""
    only: str = ""
    checkpoint: str | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise ValueError("minutes and steps are both given; give one of them")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; give a number above 0")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; give a number above 0")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}; give 1 or more")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; give a fraction between 0 and 1")
        if self.checkpoint is not None and (not isinstance(self.checkpoint, str) or not self.checkpoint):
            raise ValueError(f"checkpoint is {self.checkpoint!r:.80}; give the path of a directory, as text")

    @abstractmethod
    def objective(self, edit: Editor, batches: Sequence[Batch], judged: Sequence[Batch]) -> Objective:
        """The losses of a run that trains on `batches` and holds out `judged`."""

    def run(self, edit: Editor) -> None:
        if not edit.data:
            raise RequirementError(f"{self.name()} needs data to train on: pass data=")
        program = edit.program
        precision, predicts = self._precision(program), predicts_next_tokens(outputs_of(program)[0])
        rate = self.learning_rate or _default_rate(program, predicts)
        if program.nodes(*FAKE_QUANTIZES):
            load_kernels_for(edit, "the quantizers in the graph")
        every = self._batches(edit)
        batches, judged = hold_out(program, every, self.held_out, self.seed, self.name(), next_tokens=predicts)
        learned = self._learned(program)
        scales = _learning_scales(program, self._stays(program)) if self.scales else {}
        learned |= {name: scale for name, (scale, _) in scales.items()}
        with data_parallel(next(iter(learned.values())).device) as ranks, ExitStack() as held:
            checkpoint = self._checkpoint(edit, every, ranks)
            if checkpoint is not None:
                held.callback(checkpoint.close)
            parts = _Parts.of(program, batches, judged, ranks)
            objective = held.enter_context(closing(self.objective(edit, parts.batches, parts.judged)))
            held.enter_context(_only_these_learn(program, learned))
            rates = _rates(program, scales) if scales else {}
            trained, zeros, shards = learned, _zeros(learned), None
            if self.shard:
                shards = held.enter_context(closing(Shards(program, learned, ranks)))
                trained, zeros = shards.parameters, {name: shards.partition(places) for name, places in zeros.items()}
                rates = {name: shards.partition(each) for name, each in rates.items()}
            done = Run(
                trained,
                zeros,
                parts.loss(objective),
                len(batches),
                parts.judge(objective),
                Plan(
                    None if self.steps is not None else 60 * (self.minutes or MINUTES),
                    self.steps,
                    rate,
                    precision,
                    self.seed,
                ),
                lambda what, fraction: edit.report(what, round(1000 * fraction), 1000),
                {name: Scale(each, max(LEAST, torch.finfo(scales[name][1]).tiny)) for name, each in rates.items()},
                ranks,
                shards,
                checkpoint,
            ).train()
        for name, (_, dtype) in scales.items():
            program.set_weight(name, program.weight(name).detach().to(dtype))
        self._note(edit, done, checkpoint, ranks)
        self._record(edit, done, len(learned), rate, batches, judged)

    def _batches(self, edit: Editor) -> list[Batch]:
        """The data in batches, by length where padding is cut so."""
        given = [Batch(sample, label) for sample, label in zip(edit.data, edit.labels or [None] * len(edit.data), strict=True)]
        buckets = by_length(edit.program, given, self.batch)
        if buckets is None:
            return given if self.batch is None else resized(edit.program, given, self.batch)
        before, after = buckets.padding_before, buckets.padding_after
        edit.note(f"rows of similar length share a batch: {before:.0%} of the tokens were padding, now {after:.0%}")
        return buckets.batches

    def _checkpoint(self, edit: Editor, batches: Sequence[Batch], ranks: Ranks) -> Checkpoint | None:
        """The directory of the state, if there is one; ranks with another program, data or options are refused."""
        if self.shard and ranks.world_size == 1:
            raise RequirementError(
                f"{self.name()}: shard=true divides weights among the ranks of a process group, and there is one process; "
                f"start it with torchrun, or leave shard= out"
            )
        if self.checkpoint is None and ranks.world_size == 1:
            return None
        programs = [edit.program] if edit.reference is None else [edit.program, edit.reference]
        identity = identity_of(programs, batches, format_pass(replace(self, checkpoint=None)))
        ranks.agree(identity | {"checkpoint": str(self.checkpoint)})
        return None if self.checkpoint is None else Checkpoint(self.checkpoint, identity, ranks, sharded=self.shard)

    def _note(self, edit: Editor, done: Trained, checkpoint: Checkpoint | None, ranks: Ranks) -> None:
        if ranks.world_size > 1:
            edit.note(f"{ranks.world_size} ranks trained together, each on its rows of every batch")
        if checkpoint is not None and done.resumed is not None:
            edit.note(f"went on from step {done.resumed}, whose state was in '{checkpoint.directory}'")
        if checkpoint is not None and checkpoint.problem is not None:
            edit.note(checkpoint.problem)

    def _precision(self, program: Program) -> Precision:
        """The precision of products; a program that computes in half precision does not mix with the other one."""
        computed = {nodes.tensor_type(node).dtype for node in program.nodes() if nodes.is_tensor(node)}
        if self.precision == "auto":
            return "fp32" if self.steps is not None or torch.float16 in computed else "auto"
        other = {"bf16": torch.float16, "fp16": torch.bfloat16}.get(self.precision)
        if other in computed:
            raise RequirementError(
                f"{self.name()}: precision={self.precision} does not go with a program in {str(other).removeprefix('torch.')}; "
                f"cast after it, or leave precision= out"
            )
        return self.precision

    def fixed(self, program: Program) -> Collection[str]:
        """All weights that do not learn. Those that share memory with one that does are copied with it."""
        own = self._names(program)
        copied = {program.weight(name).data_ptr() for name in own}
        return {name for name, weight in program.weights().items() if weight.data_ptr() not in copied} - set(program.state)

    def _names(self, program: Program) -> list[str]:
        """The names of the parameters that learn."""
        stays = self._stays(program)
        return [
            name
            for name, tensor in program.weights().items()
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not stays(name)
        ]

    def _stays(self, program: Program) -> Callable[[str], bool]:
        """A predicate of names: True if the options leave a weight, or the scale of a quantizer, as it is."""
        tables = set[str]()
        for embedding in () if self.embeddings else program.fact(structure).embeddings:
            table = embedding.node.all_input_nodes[0]
            while is_quantizer(table):
                tables |= {str(part.target) for part in table.all_input_nodes[1:]}
                table = table.all_input_nodes[0]
            tables.add(str(table.target))

        def stays(name: str) -> bool:
            path = name.rpartition(".")[0]
            return (
                name in tables
                or is_path_protected(path, self.skip)
                or bool(self.only and not is_path_protected(path, self.only))
            )

        return stays

    def _learned(self, program: Program) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        weights = {name: program.weight(name) for name in self._names(program)}
        learned = {name: value for name, value in weights.items() if isinstance(value, nn.Parameter) and value.requires_grad}
        if not learned:
            raise RequirementError(
                f"{self.name()} has no weights to train: stored integers do not learn, and skip=, only= and embeddings= may "
                f"leave none; put it before the pass that stores integers, or change these options"
            )
        return learned

    def _record(
        self, edit: Editor, done: Trained, learned: int, rate: float, batches: Sequence[Batch], judged: Sequence[Batch]
    ) -> None:
        edit.curve = done.curve
        if done.stopped is not None:
            where = _not_finite(edit.program, [*batches, *judged]) if "finite" in done.stopped else ""
            edit.note(f"stopped early: {done.stopped}{where}; the best weights so far are kept")
        if not done.curve or done.best is None:
            return
        first, last = done.curve[0], done.curve[-1]
        if done.slowed is not None:
            edit.note(
                f"the first {done.slowed} steps made it worse, so it went back to the start and on with a thirtieth of the "
                f"learning rate; learning_rate={rate * SLOWED:.2g} takes all the time for it"
            )
        if done.scale is not None and done.scale.skipped:
            edit.note(f"{done.scale.skipped} of {last.step} steps overflowed float16 and changed only the scale of losses")
        if done.gained:
            size, unit = amount(edit.program, batches)
            speed = f"{size * last.step / max(last.seconds, 1e-3):,.0f} {unit}/s"
            edit.rewritten = learned
            edit.note(
                f"{last.step} steps in {last.seconds:.0f} s in {done.precision}, {speed}; the held-out loss went from "
                f"{first.held_out:.4g} to {done.best.held_out:.4g}, its smallest, after step {done.best.step}"
            )
        else:
            edit.note(
                f"{last.step} steps gained nothing, the held-out loss was {first.held_out:.4g} before and never "
                f"smaller{done.shortfall}; the weights are as they were"
            )


@dataclass(frozen=True)
class _Parts:
    """The rows of this rank in every batch, and the fraction of the batch that they are; all of them in one process."""

    batches: Sequence[Batch]
    judged: Sequence[Batch]
    fractions: Sequence[float]
    ranks: Ranks

    @classmethod
    def of(cls, program: Program, batches: Sequence[Batch], judged: Sequence[Batch], ranks: Ranks) -> _Parts:
        if ranks.world_size == 1:
            return cls(batches, judged, [1.0] * (len(batches) + len(judged)), ranks)
        parts, fractions = rows_of_rank(program, [*batches, *judged], ranks.rank, ranks.world_size)
        return cls(parts[: len(batches)], parts[len(batches) :], fractions, ranks)

    def loss(self, objective: Objective) -> Callable[[int, float], torch.Tensor]:
        """This rank's part of the loss of a training batch."""
        return lambda index, done: self._counted(index, partial(objective.loss, index, done))

    def judge(self, objective: Objective) -> Callable[[], float]:
        """The mean loss of the held-out batches, of all ranks."""

        def held_out() -> float:
            first, count = len(self.batches), len(self.judged)
            losses = [float(self._counted(first + at, partial(objective.held_out, at))) for at in range(count)]
            return self.ranks.sums([sum(losses) / count])[0]

        return held_out

    def _counted(self, index: int, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.ranks.fraction = self.fractions[index]
        return loss() * float(self.ranks.fraction > 0)


def load_kernels_for(edit: Editor, what: str) -> None:
    """Load the kernels on a CPU; note why there are none for what they run, such as `the quantizers in the graph`."""
    on_cpu = all(nodes.tensor_type(node).device.type == "cpu" for node in edit.program.output.all_input_nodes)
    if on_cpu and (missing := load_kernels()):
        edit.note(f"{what} run without Lissom's kernels, which makes a step slower: {missing}")


def _learning_scales(program: Program, stays: Callable[[str], bool]) -> dict[str, tuple[nn.Parameter, torch.dtype]]:
    """The scales of quantizers in the graph as float32 parameters in place, and their dtypes; those of eight bits stay."""
    reads = [FakeQuantize(node).scale for node in program.nodes(fake_quantize)]
    held = {str(read.target): program.weight(str(read.target)) for read in reads if read.op == "get_attr"}
    learn = {name: scale.detach() for name, scale in held.items() if scale.itemsize > 1 and not stays(name)}
    scales = {name: (nn.Parameter(scale.to(torch.float32, copy=True)), scale.dtype) for name, scale in learn.items()}
    for name, (scale, _) in scales.items():
        program.set_weight(name, scale)
    return scales


def _default_rate(program: Program, predicts: bool) -> float:
    """The learning rate that recovered most of all-MiniLM-L6-v2 and Gemma 3 270M, pruned and quantized, in minutes."""
    if program.nodes(fake_quantize):
        return 1e-5 if predicts else 1e-4
    return 2e-5 if predicts else 3e-4


def _rates(program: Program, scales: Collection[str]) -> dict[str, torch.Tensor]:
    """The learning rates of scales against that of weights, by which each changes by the same fraction in a step as matrices.

    A step of Adam has the size of the learning rate. Esser et al. 2020, Learned Step Size Quantization, §2.2, balance both too.
    With one rate for a tensor of scales, the small ones among them can reach 0 in some hundred steps.
    """
    weights = program.weights()
    others = [weight for name, weight in weights.items() if name not in scales and isinstance(weight, nn.Parameter)]
    matrices = [weight.detach() for weight in others if weight.is_floating_point() and weight.dim() > 1 and weight.numel()]
    sizes = [float(torch.linalg.vector_norm(matrix, dtype=torch.float32)) / matrix.numel() ** 0.5 for matrix in matrices]
    typical = max(statistics.median(sizes), LEAST) if sizes else 1.0
    return {name: weights[name].detach().abs() / typical for name in scales}


@contextmanager
def _only_these_learn(program: Program, learned: Mapping[str, nn.Parameter]) -> Generator[None]:
    """Switch off the gradients of all other parameters inside."""
    parameters = {name: parameter for name, parameter in program.weights().items() if parameter.requires_grad}
    others = [parameter for name, parameter in parameters.items() if name not in learned]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _zeros(learned: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The zeros of the matrices that learn, as booleans by name, which pruning made and training keeps."""
    zeros = {name: parameter.detach() == 0 for name, parameter in learned.items() if parameter.dim() > 1}
    return {name: places for name, places in zeros.items() if bool(places.any())}


def _not_finite(program: Program, batches: Sequence[Batch]) -> str:
    """The first node that holds NaN on one of the batches, as the end of a sentence; empty when there is none."""
    places: list[str] = []

    def observe(node: fx.Node, value: object) -> None:
        if not places and isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            places.append(place(program, node))

    with torch.no_grad(), kept_state(program):
        for batch in batches:
            program.run(batch.inputs, observe)
            if places:
                return f"; the first value that is not finite is that of {places[0]}"
    return ""
