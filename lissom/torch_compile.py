"""`torch.compile(model, backend="lissom")`: runs the passes on Dynamo's graphs, lowers them, and guards their weights.

A compiled graph holds the weights it was compiled with. Every call compares them with the weights Dynamo passes, and compiles
the graph again if one was changed or replaced. A graph that cannot be captured runs uncompiled, with a warning that says why.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._guards import tracing

from lissom.backends import FASTEST
from lissom.compiler.ir import fake
from lissom.compiler.ir.samples import Sample
from lissom.driver.compile import compile_captured
from lissom.driver.options import Settings, check_settings
from lissom.errors import (
    BudgetError,
    CaptureError,
    InputError,
    LissomError,
    PipelineTextError,
    RequirementError,
    UnsupportedError,
    nearest,
)
from lissom.frontends.capture.device import device_of
from lissom.frontends.capture.untouched import ordinary
from lissom.frontends.dynamo.graphs import Graph, capture_graph, guard_sizes, read_graph, refuse, tensor_of
from lissom.frontends.dynamo.reuse import computes_the_same, forget_sizes, restart_with_dynamic_sizes, restart_with_static_sizes
from lissom.inspect.report import Report
from lissom.runtime.compiled_model import CompiledModel

Function = Callable[..., Sequence[object]]

_ASKED_FOR = (PipelineTextError, RequirementError, BudgetError, InputError)
"""Errors passed on to the caller; after any other error the uncompiled graph runs and gives correct outputs."""
_LOG = logging.getLogger(__name__)
_MODES: Mapping[str, Mapping[str, Any]] = {"default": {}, "reduce-overhead": {}, "max-autotune": {"backend": FASTEST}}
"""The options of each mode of torch.compile. On CUDA the backend eager records CUDA graphs by itself."""
_MOST_CHANGES = 8
"""After this many recompilations, they must have served this many calls each, on average."""
_NO_OPTIONS = ("world_size", "device", "dynamic", "progress")
"""Settings that are not options here: Dynamo determines the device and the sizes, and decides when to compile."""
_KEPT_REPORTS = 100
"""The number of reports kept: each holds the program's text after every pass."""
_PROBED = 16
"""The number of elements of a weight probed for writes that PyTorch does not count."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class GraphReport:
    """The result of compiling one Dynamo graph.

    Attributes:
        name: `Graph_` and the number Dynamo gives it in its logs.
        report: what every pass did; None when the graph runs uncompiled, and `reason` says why.

    Examples:
        >>> from lissom.torch_compile import GraphReport
        >>> print(GraphReport("Graph_0", None, "its inputs are sparse"))
        Graph_0 runs as it is: its inputs are sparse
        <BLANKLINE>
    """

    name: str
    report: Report | None
    reason: str | None

    def __str__(self) -> str:
        return f"{self.name} runs as it is: {self.reason}\n" if self.report is None else str(self.report)


REPORTS: deque[GraphReport] = deque(maxlen=_KEPT_REPORTS)
_said: set[str] = set()
_live: weakref.WeakSet[_Compiled] = weakref.WeakSet()
"""The graphs that Dynamo holds, whose programs serve equal graphs too."""


def dynamo_reports() -> tuple[GraphReport, ...]:
    """The reports of the last 100 graphs of `torch.compile(..., backend="lissom")`; `torch.compiler.reset` clears them.

    Examples:
        >>> import torch, lissom
        >>> torch.compiler.reset()
        >>> fast = torch.compile(torch.nn.Linear(4, 2), backend="lissom")
        >>> with torch.no_grad():
        ...     fast(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> len(lissom.dynamo_reports())
        1
    """
    return tuple(REPORTS)


def compile_graph(
    module: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    mode: str = "default",
    options: Mapping[str, object] | None = None,
) -> Function:
    """Compile a Dynamo graph: the backend `lissom` of `torch.compile`.

    Args:
        mode: `default` and `reduce-overhead` use the backend eager, `max-autotune` the fastest.
        options: the keywords of `lissom.compile` except world_size, device, dynamic and progress; batches of `data` are
            mappings from the names of the graph's inputs to tensors, and `metric` scores a callable that takes these and
            returns the graph's outputs in a tuple.

    Raises:
        LissomError: as `lissom.compile`, for wrong options and for passes that cannot be applied.
    """
    settings = _settings(mode, options or {})
    check_settings(settings)
    graph = read_graph(module)
    args = [fake.hint(value) if isinstance(value, torch.SymInt) else value for value in example_inputs]
    if graph.computes and _is_taken(graph, args):
        restart_with_dynamic_sizes(graph)
    return _Compiled(graph, settings).start(args)


def _is_taken(graph: Graph, args: Sequence[object]) -> bool:
    try:
        refuse(graph, args)
    except CaptureError:
        return False
    return True


def _reset() -> None:
    REPORTS.clear()
    _said.clear()
    _live.clear()
    forget_sizes()


compile_graph.reset = _reset  # pyright: ignore[reportFunctionMemberAccess]


def _settings(mode: str, options: Mapping[str, Any]) -> Settings:
    """The settings for a mode and options of `torch.compile`. Raises UnsupportedError for unknown ones."""
    if not isinstance(mode, str) or mode not in _MODES:
        hint = nearest(str(mode), _MODES) or ";"
        raise UnsupportedError(f"backend 'lissom' has no mode {mode!r:.80}{hint} choose {', '.join(_MODES)}")
    if not isinstance(options, Mapping):
        raise UnsupportedError(f"options= is {options!r:.80}; give a mapping from names of options to their values")
    known = [field.name for field in fields(Settings) if field.name not in _NO_OPTIONS]
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        hint = nearest(str(unknown), known) or ";"
        raise UnsupportedError(f"backend 'lissom' has no option {unknown!r:.80}{hint} it has {', '.join(known)}")
    if isinstance(options.get("data"), Iterator):
        raise UnsupportedError("data is an iterator, which can be read once, and every graph reads it; give a list of batches")
    return Settings(**{**_MODES[mode], **options})


def _are_alike(one: Settings, other: Settings) -> bool:
    """True if two settings are the same objects, or equal texts and numbers."""
    values = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Settings)]
    return all(a is b or (isinstance(a, (str, int, float)) and a == b) for a, b in values)


class _Compiled:
    """A graph with one compiled variant per set of weights and numbers it was called with."""

    def __init__(self, graph: Graph, settings: Settings) -> None:
        self._graph = graph
        self._settings = settings
        self._variants: dict[tuple[object, ...], _Variant] = {}
        self._calls = 0
        self._changes = 0

    def start(self, args: Sequence[object]) -> Function:
        """Compile for Dynamo's example; returns the graph itself if that fails."""
        if not self._graph.computes:
            _LOG.info("%s runs as it is: it has no tensor operator", self._graph.name)
            return self._graph.module
        return self if self._compile(args, guard=True) else self._graph.module

    def __call__(self, *args: object) -> Sequence[object]:
        self._calls += 1
        key = self._key(args)
        variant = self._variants.get(key)
        if variant is None or not variant.fits(args):
            variant = self._again(args, key, variant)
        return self._graph.module(*args) if variant is None else variant(self._graph.sample(args))

    def _key(self, args: Sequence[object]) -> tuple[object, ...]:
        """The identity of a call's weights and numbers."""
        numbers = (args[index] for index in self._graph.numbers)
        values = (value.item() if isinstance(value, torch.Tensor) else value for value in numbers)
        return (*(id(args[index]) for index in self._graph.weights), *values)

    def _again(self, args: Sequence[object], key: tuple[object, ...], stale: _Variant | None) -> _Variant | None:
        """Compile for other weights or numbers; None if they change too often, or if compiling fails."""
        weights = len(self._graph.weights)
        gone = [other for other, variant in self._variants.items() if variant.is_gone()]
        renumbered = any(other[:weights] == key[:weights] for other in self._variants)
        for other in gone:
            del self._variants[other]
        # Layers that share their code reach this line too, once each, without any change.
        self._changes += bool(stale or gone or renumbered)
        if self._changes > _MOST_CHANGES and self._calls < self._changes * _MOST_CHANGES:
            self._variants.pop(key, None)
            self._run_as_it_is("its weights or numbers change too often to compile it for each")
            return None
        _LOG.info("%s is compiled again: its weights or numbers are not those it was compiled with", self._graph.name)
        self._variants.pop(key, None)
        return self._compile(args, guard=False)

    def _compile(self, args: Sequence[object], *, guard: bool) -> _Variant | None:
        """Compile for these weights and numbers; None if that fails, with a warning."""
        graph, device = self._graph, device_of(None, self._graph.tensors(args))
        settings = replace(self._settings, data=_batches(graph, self._settings.data))
        take = partial(capture_graph, graph, args)
        try:
            # Passes and backends export programs, and Dynamo's own context would take the sizes of these for its guards.
            with tracing(None):
                shared = self._compiled_before(args)
                compiled = shared or compile_captured(take, device, settings, title="torch.compile")
                variant = _Variant(graph, compiled, args)
            if guard:
                # Other sizes than those that the program takes get their own graph.
                guard_sizes(graph, compiled.program.signature)
        except _ASKED_FOR:
            raise
        except Exception as error:
            if guard:
                restart_with_static_sizes()
            self._run_as_it_is(str(error) if isinstance(error, LissomError) else f"{type(error).__name__}: {error}")
            return None
        self._variants[self._key(args)] = variant
        _live.add(self)
        if shared is None:
            # Without the timer, which holds the program and its weights.
            REPORTS.append(GraphReport(graph.name, replace(compiled.report, timer=None), None))
        return variant

    def _compiled_before(self, args: Sequence[object]) -> CompiledModel | None:
        """The model of an equal graph with the same weights, which Dynamo made for other sizes or in another gradient mode.
        Raises CaptureError for a graph that is not compiled in this mode.
        """
        refuse(self._graph, args)
        for other in list(_live):
            if not _are_alike(other._settings, self._settings) or not computes_the_same(other._graph, self._graph):
                continue
            variant = next((known for known in list(other._variants.values()) if known.serves(self._graph, args)), None)
            if variant is not None:
                _LOG.info("%s runs the program of %s", self._graph.name, other._graph.name)
                return variant.compiled
        return None

    def _run_as_it_is(self, reason: str) -> None:
        reason = reason.partition("\n")[0]
        report = GraphReport(self._graph.name, None, reason)
        if report not in REPORTS:
            REPORTS.append(report)
        sentence = f"torch.compile with backend 'lissom' runs {self._graph.name} as it is: {reason}"
        if sentence not in _said:
            _said.add(sentence)
            warnings.warn(sentence, stacklevel=2)


def _batches(graph: Graph, data: Iterable[object]) -> list[dict[str, object]]:
    """Calibration batches with the tensors this graph takes. Raises InputError for a batch that does not name its own."""
    # Dynamo orders a graph's inputs by their use, so a tuple does not say which is which.
    whole = list(data)
    batches = [batch for batch in whole if isinstance(batch, Mapping)]
    if len(batches) < len(whole):
        names = ", ".join(graph.inputs.values())
        raise InputError(f"a batch of data is not a mapping; name the tensors as the graph does, which takes {names}")
    return [{name: batch[name] for name in graph.inputs.values() if name in batch} for batch in batches]


class _Weights:
    """The weights a graph was compiled for, and a check whether they are unchanged.

    PyTorch counts the writes to a tensor, but not those through `.data` or a NumPy array. Probing some elements finds most of
    these; CUDA weights are not probed, because reading them waits for the device. Tensors made under inference mode have no
    write counter and are compared completely.
    """

    def __init__(self, tensors: Mapping[int, torch.Tensor]) -> None:
        self._owners = [(index, weakref.ref(tensor), tensor.data_ptr(), _writes(tensor)) for index, tensor in tensors.items()]
        probed = [_bits(tensor) for tensor in tensors.values() if tensor.is_cpu or tensor.is_inference()]
        kinds = {(view.dtype, view.device) for view in probed}
        self._groups = [[view for view in probed if (view.dtype, view.device) == kind] for kind in kinds]
        self._values = [torch.cat(group) for group in self._groups]

    def hold(self, args: Sequence[Any] | Mapping[int, Any]) -> bool:
        """True if the arguments hold the same tensors, in the same memory, and no write to one is found."""
        for index, owner, place, writes in self._owners:
            tensor = args[index]
            if owner() is not tensor or tensor.data_ptr() != place or _writes(tensor) != writes:
                return False
        return all(torch.equal(torch.cat(group), values) for group, values in zip(self._groups, self._values, strict=True))

    def are_gone(self) -> bool:
        """True if one of the tensors was freed."""
        return any(owner() is None for _, owner, _, _ in self._owners)


def _writes(tensor: torch.Tensor) -> int | None:
    """PyTorch's count of writes to the tensor; None if it has no counter."""
    return None if tensor.is_inference() else tensor._version


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view of the weight's memory as integers, to compare bit by bit: a NaN does not equal itself."""
    view = ordinary(tensor.detach())
    if not view.is_contiguous():
        view = view.as_strided(view.shape[:1], view.stride()[:1])
    view = view.view(-1)
    if not tensor.is_inference():
        view = view[:: max(1, -(-len(view) // _PROBED))]
    bits = _BITS.get(view.element_size())
    return view if bits is None else view.view(bits)


class _Variant:
    """A graph compiled for given weights, and the aliasing of its outputs."""

    def __init__(self, graph: Graph, compiled: CompiledModel, args: Sequence[object]) -> None:
        self.compiled = compiled
        self._graph = graph
        self._run = compiled.run
        self._weights = _Weights({index: tensor_of(args[index]) for index in graph.weights})
        example = graph.sample(args)
        with torch.no_grad():
            wanted = graph.module(*args)
        constants = (*compiled.program.weights().values(), *graph.tensors(args))
        self._constants = {_memory(tensor) for tensor in constants} - {_memory(tensor) for tensor in example}
        self._owners = [owner for _, owner in self._with_owners(example, wanted)]
        for index, (_, owner) in enumerate(self._with_owners(example, self._run(example))):
            if owner != self._owners[index] and isinstance(self._owners[index], int):
                raise UnsupportedError(
                    f"its output {index} shares memory with an input, and the output of backend '{compiled.backend}' does not"
                )

    def fits(self, args: Sequence[object]) -> bool:
        """True if no weight was changed or replaced since compiling."""
        return self._weights.hold(args)

    def serves(self, graph: Graph, args: Sequence[object]) -> bool:
        """True if it has the weights that an equal graph is called with, and takes its sizes."""
        weights = {known: args[other] for known, other in zip(self._graph.weights, graph.weights, strict=True)}
        if not self._weights.hold(weights):
            return False
        try:
            self.compiled.program.signature.check_sizes(graph.sample(args))
        except InputError:
            return False
        return True

    def is_gone(self) -> bool:
        """True if it cannot be called any more, because a weight was freed."""
        return self._weights.are_gone()

    def __call__(self, sample: Sample) -> list[object]:
        """The graph's outputs; an output is copied if it aliases a tensor that it does not alias in the original graph."""
        owned = self._with_owners(sample, self._run(sample))
        return [
            value.clone() if owner is not None and owner != usual and isinstance(value, torch.Tensor) else value
            for (value, owner), usual in zip(owned, self._owners, strict=True)
        ]

    def _with_owners(self, sample: Sample, values: Sequence[object]) -> list[tuple[object, object]]:
        """Each value, usable outside of inference mode, with the owner of its memory.

        The owner is the index of an input, the name of an earlier output, `constant`, or None if the value owns its memory.
        """
        owners: dict[int, object] = {_memory(tensor): index for index, tensor in enumerate(sample)}
        owned: list[tuple[object, object]] = []
        for index, value in enumerate(values):
            if not isinstance(value, torch.Tensor):
                owned.append((value, None))
                continue
            memory = _memory(value)
            owner = "constant" if memory in self._constants else owners.get(memory)
            owned.append((value if torch.is_inference_mode_enabled() else ordinary(value), owner))
            if memory:
                owners.setdefault(memory, f"output {index}")
        return owned


def _memory(tensor: torch.Tensor) -> int:
    """The address of the tensor's storage; 0 for an empty one."""
    return tensor.untyped_storage().data_ptr()
