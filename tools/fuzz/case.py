"""One case: a model, a pipeline, a backend and inputs, drawn from a number; and its outcome."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import lissom
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Approximation, Training
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.compiler.transforms.new_ids import with_final_ids
from lissom.driver.compile import compile_captured
from lissom.driver.options import Settings, resolve_passes
from lissom.errors import InputError, LissomError, PassError, VerifyError
from lissom.frontends.capture.export import Capture, capture
from lissom.passes import PASSES
from tools.fuzz import models, oracle
from tools.fuzz.models import Spec
from tools.fuzz.pipelines import draw_pipeline, draw_recovery
from tools.zoo import fresh

PER_MODEL = 20
"""The number of consecutive cases that share a model."""
_PADDINGS = ("none", "right", "left", "holes", "single")
_BACKENDS = {"onnxruntime": lissom.OnnxRuntime(timing_seconds=0.0)}
"""A backend with the shortest timing runs: it does not matter here which variant is fastest."""
_ROUNDING = ("quantize", "quantize-cache", "gptq", "correct-bias")


@dataclass(frozen=True)
class Call:
    """The sizes of one call, the position of its padding, and the seed of its values."""

    batch: int
    length: int
    padding: str
    seed: int


@dataclass(frozen=True)
class Case:
    """Everything that determines a run.

    zoo: the name of an architecture of tools/zoo that replaces `spec`. example: the call the model is captured with.
    captured_before: use the capture of an earlier case of the same model, which saves half the time of a case.
    """

    spec: Spec
    passes: tuple[str, ...]
    zoo: str = ""
    backend: str = "eager"
    checks: str = "numeric"
    dynamic: bool = True
    saved: bool = False
    captured_before: bool = False
    example: Call = Call(2, 5, "none", 0)
    calls: tuple[Call, ...] = (Call(2, 5, "right", 1),)

    def to_json(self) -> str:
        """The case as text for `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case from the text of `to_json`."""
        data = json.loads(text)
        calls = tuple(Call(**fields) for fields in data.pop("calls"))
        spec, example = Spec(**data.pop("spec")), Call(**data.pop("example"))
        return cls(spec, tuple(data.pop("passes")), example=example, calls=calls, **data)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    kind: `equal`, `refused` (an error before anything was computed), `caught` (the verifier or the pipeline found a fault of
    ours and named it), or a failure: `wrong`, `traceback`, `changed` (the model or a global state), `file`.
    """

    kind: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        """True for kinds of outcome that are faults."""
        return self.kind not in ("equal", "refused", "caught")


def draw_case(
    number: int,
    backends: tuple[str, ...] = ("eager",),
    zoo: tuple[str, ...] = (),
    zoo_share: float = 0.0,
    *,
    recovery: bool = False,
) -> Case:
    """Draw the case of a number.

    zoo: names of architectures; zoo_share: the fraction of cases that use one. recovery: every pipeline is two lossy passes and
    `distill`.
    """
    shared, own = random.Random(f"model {number // PER_MODEL}"), random.Random(f"case {number}")
    case = drawn(shared, own, backends, zoo, zoo_share)
    if recovery:
        case = dataclasses.replace(case, passes=draw_recovery(own))
    return dataclasses.replace(case, captured_before=number % PER_MODEL > 0)


def drawn(
    shared: random.Random,
    own: random.Random,
    backends: tuple[str, ...] = ("eager",),
    zoo: tuple[str, ...] = (),
    zoo_share: float = 0.0,
) -> Case:
    """Draw a case from two generators: `shared` for the model and its example, `own` for the rest."""
    spec = models.draw_spec(shared)
    name = shared.choice(zoo) if zoo and shared.random() < zoo_share else ""
    example = Call(shared.choice((1, 2, 3)), shared.choice((3, 4, 5, 8)), shared.choice(("none", "none", "right", "left")), 0)
    sizes = [(example.batch, example.length), (own.randrange(1, 6), own.randrange(1, 13)), (own.randrange(1, 3), 32)]
    calls = tuple(Call(*size, own.choice(_PADDINGS), own.randrange(1, 1 << 30)) for size in sizes)
    return Case(
        spec=spec,
        passes=draw_pipeline(own),
        zoo=name,
        backend=own.choice(backends),
        checks=own.choice(("numeric", "numeric", "structural", "off", "off")),
        dynamic=own.random() < 0.9,
        saved=own.random() < 0.2,
        example=example,
        calls=calls,
    )


@lru_cache(maxsize=2)
def _model(spec: Spec, zoo: str) -> tuple[nn.Module, Mapping[str, object]]:
    """The model, and the example inputs of a model of the zoo."""
    if not zoo:
        return models.build(spec), {}
    from tools.zoo import catalogue

    case = next(entry for entry in catalogue.entries() if entry.name == zoo).build()
    return case.model, case.kwargs or {str(at): value for at, value in enumerate(case.args)}


def _capture(case: Case) -> Capture:
    """The capture of a case's model, made once for all cases that share it."""
    return _captured(case.spec, case.zoo, case.example, case.dynamic)


@lru_cache(maxsize=4)
def _captured(spec: Spec, zoo: str, example: Call, dynamic: bool) -> Capture:
    case = Case(spec, (), zoo, example=example)
    model, given = _model(spec, zoo)
    args, kwargs = _split(_given(case, _inputs(case, example, given)))
    return capture(model, args, kwargs, dynamic=dynamic)


def run(case: Case, address: str = "") -> Outcome:
    """Compile the model of a case, call it, and judge the outputs. address: of the artifact loader, see tools/zoo/fresh.py."""
    model, given = _model(case.spec, case.zoo)
    before, noise = _snapshot(model), _noise()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = _judge(case, model, given, address)
    except (VerifyError, PassError) as error:
        outcome = Outcome("caught", f"{type(error).__name__}: {_first_line(error)}")
    except LissomError as error:
        outcome = Outcome("refused", f"{type(error).__name__}: {_first_line(error)}")
    except Exception:
        outcome = Outcome("traceback", traceback.format_exc()[-3000:])
    changed = _changed(before, model) or ("" if noise == _noise() else "the state of a random generator")
    return Outcome("changed", f"{changed} was changed; {outcome.kind}: {outcome.detail}") if changed else outcome


def _judge(case: Case, model: nn.Module, given: Mapping[str, object], address: str) -> Outcome:
    inputs = _inputs(case, case.example, given)
    data = [_given(case, _inputs(case, call, given)) for call in case.calls[:1]] * 2
    settings = Settings(
        passes=",".join(case.passes) or "exact",
        backend=_BACKENDS.get(case.backend, case.backend),
        dynamic=case.dynamic,
        checks=case.checks,
        data=data,
        goal=None,
        simulate=True,
    )
    if case.captured_before:
        fast = compile_captured(lambda: _capture(case), torch.device("cpu"), settings)
    else:
        fast = lissom.compile(model, _given(case, inputs), **vars(settings))
    wanted = _oracle(case, model, data)
    answers: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for at, call in enumerate((case.example, *case.calls)):
        called = _readable(fast.program, inputs if at == 0 else _inputs(case, call, given))
        try:
            outputs = _called(case, fast, called)
        except InputError as error:
            if at == 0:
                # Ids that prune-vocabulary dropped are refused where the model has no unknown token.
                kind = "wrong" if fast.program.vocabulary is None else "refused"
                return Outcome(kind, f"the example is refused: {_first_line(error)}")
            continue
        again = _called(case, fast, called)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(outputs, again, strict=True)):
            return Outcome("wrong", f"call {at} gives another answer the second time")
        sentence = wanted(called, outputs)
        if sentence is not None:
            return Outcome("wrong", f"call {at}: {sentence}")
        answers.append((fast.program.signature.flatten(*_split(_given(case, called))), outputs))
    return _reloaded(fast, answers, address) if case.saved and address else Outcome("equal")


def _oracle(
    case: Case, model: nn.Module, data: Sequence[tuple[object, ...] | dict[str, object]]
) -> Callable[[Mapping[str, object], list[torch.Tensor]], str | None]:
    """The reference for the outputs: the model if every pass is exact, else the program up to the last lossy pass."""
    passes = parse_pipeline(",".join(case.passes), PASSES) if case.passes else []
    lossy = [at for at, pass_ in enumerate(passes) if isinstance(pass_, (Approximation, Training))]
    packs = any(pass_.name() in ("pack-tokens", "zero-padding") for pass_ in passes)
    if not lossy:
        precise = copy.deepcopy(model).double()

        def by_model(inputs: Mapping[str, object], outputs: list[torch.Tensor]) -> str | None:
            with torch.no_grad():
                plain = _called(case, model, inputs)
                exact = _called(case, precise, {name: _doubled(value) for name, value in inputs.items()})
            return oracle.differs_from_float64(outputs, plain, exact, _kept(case, inputs) if packs else None)

        return by_model
    prefix = ",".join(case.passes[: lossy[-1] + 1])
    captured = _capture(case).program
    samples = [captured.signature.flatten(*_split(batch)) for batch in data]
    # Checks are off so that the oracle does not depend on the verifier.
    program, _ = Pipeline(resolve_passes(prefix), checks="off", data=samples).run(captured)
    program, _ = with_final_ids(program, _capture(case).example, check=False)
    names = {pass_.name() for pass_ in passes}
    # Under a pattern, a padding query sees padding only, and adding a mask to its scores twice rounds in many ways.
    padded = "sparsify-attention" in names
    precision = "quantized" if names.intersection(_ROUNDING) else "bf16" if "cast" in names else "fp32"

    def by_program(inputs: Mapping[str, object], outputs: list[torch.Tensor]) -> str | None:
        sample = program.signature.flatten(*_split(_given(case, inputs)))
        kept = _kept(case, inputs) if padded or precision != "fp32" else None
        return oracle.differs_from_program(
            outputs, _tensors_of(program, sample), precision, kept, lambda: _with_perturbed_weights(program, sample)
        )

    return by_program


_ROUNDINGS = 8


def _with_perturbed_weights(program: Program, sample: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The outputs of a program whose weights are moved by half a rounding step, up or down at random."""
    for seed in range(_ROUNDINGS):
        generator, other = torch.Generator().manual_seed(seed), program.copy()
        for name, weight in program.weights().items():
            if weight.is_floating_point() and name not in program.state:
                step = torch.finfo(weight.dtype).eps * (torch.rand(weight.shape, generator=generator) - 0.5)
                other.set_weight(name, (weight.detach().double() * (1 + step)).to(weight.dtype))
        yield _tensors_of(other, sample)


def _tensors_of(program: Program, sample: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [value for value in program.run(sample) if isinstance(value, torch.Tensor)]


def _kept(case: Case, inputs: Mapping[str, object]) -> torch.Tensor | None:
    mask = inputs.get("mask")
    return models.kept_tokens(case.spec, mask) if isinstance(mask, torch.Tensor) else None


def _reloaded(
    fast: lissom.CompiledModel, answers: list[tuple[list[torch.Tensor], list[torch.Tensor]]], address: str
) -> Outcome:
    """Save the model, load it in a fresh process, and compare its outputs with those before."""
    with tempfile.TemporaryDirectory(prefix="lissom-fuzz-") as folder:
        artifact = Path(folder) / "artifact"
        fast.save(artifact)
        try:
            loaded = fresh.answers(address, artifact, [flat for flat, _ in answers])
        except RuntimeError as error:
            return Outcome("file", f"the artifact does not load or run: {error}")
    for at, ((_, wanted), (_, leaves)) in enumerate(zip(answers, loaded, strict=True)):
        outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(outputs, wanted, strict=True)):
            return Outcome("file", f"the loaded model gives another answer to call {at}")
    return Outcome("equal")


def _inputs(case: Case, call: Call, given: Mapping[str, object]) -> dict[str, object]:
    """Inputs of one call. For a model of the zoo, its example with rows and values permuted."""
    if not given:
        return dict(models.draw_inputs(case.spec, call.batch, call.length, call.padding, call.seed))
    generator = torch.Generator().manual_seed(call.seed)
    inputs = dict(given)
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and call.seed and value.dim() >= 2 and value.dtype in (torch.long, torch.float32):
            inputs[name] = value[:, torch.randperm(value.shape[1], generator=generator)] if value.dim() == 2 else value.flip(0)
    return inputs


def _readable(program: Program, inputs: Mapping[str, object]) -> Mapping[str, object]:
    """Inputs without token ids that prune-vocabulary dropped."""
    tokens = inputs.get("tokens")
    if program.vocabulary is None or not isinstance(tokens, torch.Tensor):
        return inputs
    return {**inputs, "tokens": program.vocabulary.readable(tokens)}


def _given(case: Case, inputs: Mapping[str, object]) -> tuple[object, ...] | dict[str, object]:
    """Inputs as the case passes them: by position or by name."""
    by_name = not next(iter(inputs)).isdigit() if case.zoo else case.spec.keywords or "types" in inputs
    return dict(inputs) if by_name else tuple(inputs.values())


def _split(given: tuple[object, ...] | dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    return ((), given) if isinstance(given, dict) else (given, {})


def _called(case: Case, model: Callable[..., object], inputs: Mapping[str, object]) -> list[torch.Tensor]:
    args, kwargs = _split(_given(case, inputs))
    with torch.no_grad():
        return [leaf.clone() for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def _doubled(value: object) -> object:
    return value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def _snapshot(model: nn.Module) -> list[tuple[str, object, object]]:
    """Every tensor of the model by identity and value, and every module's mode and attributes."""
    snapshot: list[tuple[str, object, object]] = []
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        snapshot.append((name, id(tensor), (tensor.detach().clone(), tensor.requires_grad, tensor.grad is None)))
    for name, module in model.named_modules():
        snapshot.append((name, module.training, sorted(vars(module))))
    return snapshot


def _changed(before: list[tuple[str, object, object]], model: nn.Module) -> str:
    """The name of a value that changed; empty if nothing did."""
    after = _snapshot(model)
    if len(after) != len(before):
        return "the list of the model's tensors"
    for (name, one, value), (_, other, now) in zip(before, after, strict=True):
        tensors = isinstance(value, tuple) and isinstance(now, tuple)
        same = torch.equal(value[0], now[0]) and value[1:] == now[1:] if tensors else value == now
        if one != other or not same:
            return f"the model's '{name}'"
    return ""


def _noise() -> tuple[object, ...]:
    """The state of every global random generator, and PyTorch's global settings."""
    keys = np.random.get_state(legacy=False)["state"]["key"]  # pyright: ignore[reportArgumentType, reportCallIssue]
    settings = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), keys.tobytes(), settings)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:400]
