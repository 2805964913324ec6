"""The program: a flat graph of ATen operators with its weights, its signature, and types and origins on every node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lissom.compiler.ir import fake, printer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import Observer, ObserverOfEach, run, run_each
from lissom.compiler.ir.signature import Signature
from lissom.compiler.ir.trainable import TrainableModule
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.compiler.paging import spill
from lissom.errors import InputError

Fact = TypeVar("Fact")


class Program:
    """A transformer as a flat `torch.fx` graph in one dialect: functional, pre-dispatch ATen.

    Attributes:
        name: the class of the model it was captured from.
        graph_module: the graph and, as attributes under their original names, the weights and buffers it reads. They share
            memory with the model's own, require no gradients, and are read only; `trainable` gives a module with copies.
        signature: how the program is called.
        state: the names of the buffers it may write; everything else is read only.
        about: what the runtime keeps of the model besides the program, such as its configuration; None where there is nothing.
        vocabulary: the token ids that stay after `prune-vocabulary`; None where all do.
        edits: the number of changes made, so that facts about the program can be cached until the next one.
        is_simulation: whether `run` simulates several processes. The weights are then fixed, and outputs may share memory where
            those of the processes do not.

    Examples:
        >>> import torch, lissom
        >>> program = lissom.optimize(torch.nn.Linear(4, 2), torch.randn(3, 4)).program
        >>> program(torch.ones(5, 4)).shape
        torch.Size([5, 2])
        >>> {name: tuple(weight.shape) for name, weight in program.weights().items()}
        {'weight': (2, 4), 'bias': (2,)}
    """

    is_simulation: ClassVar[bool] = False

    def __init__(self, name: str, graph_module: fx.GraphModule, signature: Signature, state: tuple[str, ...] = ()) -> None:
        self.name = name
        self.graph_module = graph_module
        self.signature = signature
        self.state = state
        self.about: object = None
        self.vocabulary: Vocabulary | None = None
        self.edits = 0
        self._facts: dict[Callable[[Program], object], tuple[int, Any]] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def takes_new_ids(self) -> bool:
        """True if the program takes the ids of a new tokenizer, after `prune-vocabulary{ids=tokenizer}`."""
        return self.vocabulary is not None and self.vocabulary.ids == "tokenizer"

    @property
    def fake_mode(self) -> FakeTensorMode:
        return self.fact(_fake_mode_of)

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def leaves(self) -> Sequence[object]:
        """The flat values the program returns: nodes, and numbers."""
        return nodes.leaves(self.output)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def nodes(self, *targets: object) -> list[fx.Node]:
        """The call nodes in order, or those that call one of the targets."""
        calls = (node for node in self.graph.nodes if node.op == "call_function")
        return [node for node in calls if not targets or node.target in targets]

    def fact(self, analysis: Callable[[Program], Fact]) -> Fact:
        """The analysis of this program, computed once for each state of the graph."""
        known = self._facts.get(analysis)
        if known is not None and known[0] == self.edits:
            return known[1]
        fact = analysis(self)
        self._facts[analysis] = (self.edits, fact)
        return fact

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors the graph reads, by name, in the order of their first use."""
        reads = dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "get_attr")
        return {name: self.weight(name) for name in reads}

    def weight(self, name: str) -> torch.Tensor:
        """The weight or buffer of that name.

        Raises:
            AttributeError: when the program has none.
        """
        return attrgetter(name)(self.graph_module)

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The weight a node reads that no call writes; None for any other node."""
        is_read = node.op == "get_attr" and str(node.target) not in self.state
        return self.weight(str(node.target)) if is_read else None

    def has_weight(self, name: str) -> bool:
        """True when the program has a weight or buffer of that name."""
        return isinstance(self._attribute(name), torch.Tensor)

    def is_taken(self, name: str) -> bool:
        """True when a weight, a container of weights or a module's own attribute already has the name."""
        return self._attribute(name) is not None

    def _attribute(self, name: str) -> object:
        owner: object = self.graph_module
        for part in name.split("."):
            owner = getattr(owner, part, None)
        return owner

    def set_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Set the tensor of that name in this program alone; programs that shared the old one keep it."""
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.graph_module
        for part in path.split(".") if path else ():
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        spill(tensor)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
        self.edits += 1

    @property
    def parameter_count(self) -> int:
        """The elements of all weights and buffers the graph reads."""
        return sum(tensor.numel() for tensor in self.weights().values())

    @property
    def parameter_bytes(self) -> int:
        """The bytes of all weights and buffers the graph reads, those that share memory counted once."""
        places = {(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in self.weights().values()}
        return sum(size for _, size in places)

    def copy(self) -> Program:
        """A program with its own graph that shares every weight with this one."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        program = Program(self.name, fake.FlatModule(self.graph_module, graph), self.signature, self.state)
        program.about, program.vocabulary = self.about, self.vocabulary
        return program

    def trainable(self) -> TrainableModule:
        """The program as a module with copies of the weights, for a training loop of one's own; see `with_weights`.

        Parameters have the model's names, require gradients, and are shared where the program shares them. Weights that were
        frozen in the model are buffers.

        Examples:
            >>> import torch, lissom
            >>> program = lissom.optimize(torch.nn.Linear(4, 2), torch.randn(3, 4)).program
            >>> module = program.trainable()
            >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            >>> module(torch.ones(3, 4)).square().sum().backward()
            >>> optimizer.step()
            >>> trained = program.with_weights(module)
        """
        owned = self.own_copy()
        return TrainableModule(owned.graph_module, owned)

    def with_weights(self, module: nn.Module) -> Program:
        """This program with the weights of a module that `trainable` gave, which are copied.

        Raises:
            InputError: when a weight is missing, has another shape or dtype, or is not finite.
        """
        given = module.state_dict(keep_vars=True)
        for name, old in self.weights().items():
            new = given.get(name)
            if new is None:
                raise InputError(f"the module has no weight '{name}'; give the module that program.trainable() returned")
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                raise InputError(
                    f"the weight '{name}' is {list(new.shape)} of {new.dtype}, and {list(old.shape)} of {old.dtype} in the "
                    f"program"
                )
            if new.is_floating_point() and bool(old.isfinite().all()) and not bool(new.isfinite().all()):
                raise InputError(f"the weight '{name}' holds infinities or NaN; train with a lower learning rate")
        return self._with_copies_of(given, learns=False)

    def own_copy(self, fixed: Collection[str] = ()) -> Program:
        """A copy with weights of its own, whose parameters require gradients.

        A program shares its weights with the model it was captured from. Training needs copies, or the model would change.
        Weights that were frozen in the model stay frozen.

        Args:
            fixed: names of weights that are still shared, without gradients.
        """
        return self._with_copies_of(self.weights(), learns=True, fixed=fixed)

    def _with_copies_of(self, given: Mapping[str, torch.Tensor], *, learns: bool, fixed: Collection[str] = ()) -> Program:
        """A copy with copies of these tensors as its weights; those that share memory still do.

        Args:
            learns: whether parameters require gradients; otherwise they do where those of this program do.
            fixed: not copied.
        """
        program, made = self.copy(), dict[object, torch.Tensor]()
        for name, old in self.weights().items():
            new = given[name]
            if name in fixed:
                detached = new.detach()
                program.set_weight(
                    name, nn.Parameter(detached, requires_grad=False) if isinstance(old, nn.Parameter) else detached
                )
                continue
            learned = isinstance(old, nn.Parameter) and new.is_floating_point()
            place = (new.data_ptr(), new.shape, new.stride(), learned) if new.numel() else name
            if place not in made:
                copied = new.detach().to(old.device, copy=True)
                made[place] = nn.Parameter(copied, requires_grad=learns or old.requires_grad) if learned else copied
            program.set_weight(name, made[place])
        return program

    def state_tensors(self) -> list[torch.Tensor]:
        """The buffers a call may write."""
        return [self.weight(name) for name in self.state]

    def state_values(self) -> list[torch.Tensor]:
        """Copies of the buffers a call may write."""
        return [self.weight(name).clone() for name in self.state]

    def run(self, inputs: Sequence[torch.Tensor], observe: Observer | None = None) -> list[object]:
        """The flat outputs for flat inputs, without checks; gradients flow to the inputs unless they are switched off.

        Args:
            observe: sees every call's result in order, and may return another value in its place.
        """
        return run(self.graph, self.graph_module, inputs, observe)

    def run_each(self, samples: Sequence[Sequence[torch.Tensor]], observe: ObserverOfEach | None = None) -> list[list[object]]:
        """For each sample the flat outputs, then the state after the call, as by `run`, but call by call for all of them.

        Every sample starts from the state of the program, which stays as it is.
        """
        states = [dict(zip(self.state, self.state_values(), strict=True)) for _ in samples]
        outputs = run_each(self.graph, self.graph_module, samples, states, observe)
        return [[*found, *state.values()] for found, state in zip(outputs, states, strict=True)]

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the program as the original model is called; gradients flow to the inputs unless they are switched off.

        Raises:
            InputError: when the arguments do not fit the signature.
        """
        return self.signature.unflatten(self.run(self.signature.flatten(args, kwargs)))

    def text(self) -> str:
        """The program as text, one node per line: the same for the same program on every machine."""
        return printer.program_text(self)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Program {self.name}{self.signature.describe()}: {len(self.nodes())} calls; print it to read them>"

    def drop_dead(self) -> int:
        """Remove the nodes nothing reads, and the weights no node reads; returns the number of removed nodes."""
        dropped = 0
        for node in reversed(self.graph.nodes):
            if node.users or node.op in ("placeholder", "output") or _has_effect(node):
                continue
            self.graph.erase_node(node)
            dropped += 1
        if dropped:
            self.graph_module = fake.FlatModule(self.graph_module, self.graph)
            self.edits += 1
        return dropped

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.graph.nodes)


@contextmanager
def kept_state(program: Program) -> Generator[None]:
    """Restore the program's state on exit."""
    saved = [(tensor, tensor.clone()) for tensor in program.state_tensors()]
    try:
        yield
    finally:
        for tensor, value in saved:
            tensor.copy_(value)


def _fake_mode_of(program: Program) -> FakeTensorMode:
    return fake.fake_mode(program.graph)


def _has_effect(node: fx.Node) -> bool:
    """True for writes and for checks: operators that change something or return nothing."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or not schema.returns)
