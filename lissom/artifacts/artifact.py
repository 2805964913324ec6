"""Save and load a compiled model: its program, weights, history, and the backend's own files."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lissom.artifacts.directory import check_target, verified_bytes, verifying, write_directory
from lissom.artifacts.manifest import NAME, Content, Manifest, write_manifest
from lissom.artifacts.program_file import ReadWeights, decode_program, encode_program
from lissom.artifacts.weights import Place, load_weights, save_weights
from lissom.backends import BACKENDS, check_name
from lissom.backends.base import WEIGHTS_FILE, Backend, Executable
from lissom.backends.exported import kind_and_reason
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import TensorType
from lissom.compiler.memory import collector_paused
from lissom.compiler.pipeline.history import Changes, History, programs_from_json
from lissom.errors import ArtifactError, UnsupportedError, nearest
from lissom.io.fields import parse_json, take
from lissom.measure.machine import device_name
from lissom.ops import KERNELS, block_sparse_attention
from lissom.ops.native import SWITCH, load_kernels, missing_kernel
from lissom.version import __version__

PROGRAM, WEIGHTS, STEPS = "program.json", WEIGHTS_FILE, "steps.json"
CHECKED_HERE = frozenset((PROGRAM, WEIGHTS, STEPS))
"""The files whose hash is checked when they are read, through the same handle."""


Result = TypeVar("Result")
WriteMore = Callable[[Path], None]
"""Writes additional files into the folder of an artifact: regular files, which the manifest lists like all others."""


def write_nothing(folder: Path) -> None:
    """Write no additional files."""


@dataclass(frozen=True)
class Loaded:
    """The content of an artifact.

    Attributes:
        notes: sentences on differences from the machine that made the artifact.
        files: size and hash of each, by name.
    """

    program: Program
    executable: Executable
    history: History
    backend: Backend
    facts: Mapping[str, object]
    notes: tuple[str, ...]
    files: Mapping[str, Content]


@dataclass(frozen=True)
class Trust:
    """The load policy of an artifact: native code, signatures and memory mapping.

    Attributes:
        allow_native: load native code, such as a compiled library, that it holds or names.
        keys: files of public keys, one of which must have signed it; None requires no signature.
        map_weights: map the weights from their file instead of reading them into memory.
    """

    allow_native: bool = False
    keys: tuple[Path, ...] | None = None
    map_weights: bool = True


NO_TRUST = Trust()


@dataclass(frozen=True)
class Compiled:
    """A compiled model, from which an artifact is written.

    Attributes:
        facts: the model's metadata as JSON, returned when loaded.
        write_more: writes additional files into the directory.
    """

    program: Program
    executable: Executable
    history: History
    backend: Backend
    facts: Mapping[str, object]
    write_more: WriteMore = write_nothing


def save_artifact(directory: Path, compiled: Compiled) -> None:
    """Write an artifact, completely or not at all; an existing one is replaced.

    Raises:
        ArtifactError: if it cannot be written, or the program holds something an artifact cannot.
    """
    check_target(directory.absolute())

    def write(folder: Path) -> None:
        backend, program = compiled.backend, compiled.program
        backend.save_files(compiled.executable, folder)
        entries = save_weights(program, folder / WEIGHTS, transposed=backend.transposed_weights(program, folder))
        backend.share_weights(folder)
        write_program(compiled, entries, folder)

    write_directory(directory, write)


def write_program(compiled: Compiled, entries: Mapping[str, object], folder: Path) -> None:
    """Write an artifact into a folder that has the weights and the backend's files already.

    Args:
        entries: from `save_weights`.

    Raises:
        ArtifactError: if the program holds something an artifact cannot, or is read back otherwise.
        OSError: if a file cannot be written.
    """
    program, history, backend = compiled.program, compiled.history, compiled.backend
    _write_json(folder / PROGRAM, encode_program(program, entries))
    _write_json(folder / STEPS, history.programs_to_json())
    compiled.write_more(folder)
    _confirm(program, folder)
    manifest = Manifest(
        name=program.name,
        backend=backend.name,
        options=_options(backend),
        device=str(_device_of(program)),
        signature=program.signature.describe(),
        pipeline=history.pipeline,
        history=history.to_json(),
        facts=compiled.facts,
        environment=_environment(program),
        files={path.name: Content.of(path) for path in sorted(folder.iterdir())},
    )
    write_manifest(manifest, folder / NAME)


def _options(backend: Backend) -> Mapping[str, object]:
    """The options of a backend by name. Raises ArtifactError for one that JSON cannot hold."""
    for field in fields(backend):
        value = getattr(backend, field.name)
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"option '{field.name}' of backend '{backend.name}' is a {type(value).__name__}, and an artifact holds "
                f"numbers, texts, and lists and mappings of them; keep the option as one of these"
            ) from error
    return asdict(backend)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


def _confirm(program: Program, folder: Path) -> None:
    """Read the program back as loading will, with the weights in memory. Raises ArtifactError if the program differs."""
    content = (folder / PROGRAM).read_bytes()
    again = _decode(content, folder / PROGRAM, lambda entries, place: program.weights(), lambda device: device)
    try:
        # Fake values are created at first access, so access all of them to find errors now.
        for node in filter(nodes.has_value, again):
            nodes.value(node)
    # PyTorch's fake tensors may raise anything.
    except Exception as error:
        raise ArtifactError(
            f"{program.name} cannot be saved: the types of its values cannot be read back: {kind_and_reason(error)}"
        ) from error
    if again.text() != program.text():
        raise ArtifactError(f"{program.name} cannot be saved: read back, its program is another; please report this model")


@collector_paused()
def load_whole(
    directory: Path, manifest: Manifest, device: torch.device | None, backend: str | Backend | None, trust: Trust = NO_TRUST
) -> Loaded:
    """The artifact in a directory whose files were checked, except those named in `CHECKED_HERE`.

    Args:
        device: where it runs; by default the device it was saved for.
        backend: None or a name for the saved backend, or an object of the same name whose options replace the saved ones.

    Raises:
        ArtifactError: if it is damaged or cannot run here.
        UnsupportedError: if a package of its backend is missing.
    """
    backend = find_saved_backend(manifest, directory, backend, trust)
    saved, wanted = find_devices(manifest, directory, device)
    if saved.type != wanted.type and not backend.movable:
        raise ArtifactError(
            f"'{directory}' was made for {saved.type} by backend '{backend.name}', and runs nowhere else; "
            f"compile the model again for {wanted.type}"
        )
    if backend.maps_files and not trust.map_weights:
        raise UnsupportedError(f"backend '{backend.name}' maps the files of an artifact itself; leave map_weights= out")

    with verifying(directory / WEIGHTS, manifest.content_of(WEIGHTS, directory)) as weights:

        def read_weights(entries: Mapping[str, object], place: Place) -> dict[str, torch.Tensor]:
            return load_weights(entries, weights, place, mapped=trust.map_weights)

        program = read_program(
            directory, manifest, read_weights, lambda stored_on: wanted if stored_on.type == saved.type else stored_on
        )
        history = read_history(manifest, directory)
    notes = _check_kernels(program, directory)
    executable = backend.load_executable(program, directory)
    return Loaded(program, executable, history, backend, manifest.facts, notes, manifest.files)


def find_saved_backend(manifest: Manifest, directory: Path, wanted: str | Backend | None, trust: Trust = NO_TRUST) -> Backend:
    """The backend the artifact was saved with, or the given one with its options; a name gives the saved one.

    A backend of another package has to be given: nothing is imported because an artifact names it.

    Raises:
        ArtifactError: if this installation lacks the backend or its options, or it would run native code that is not allowed.
        UnsupportedError: if `wanted` is another backend, or none.
    """
    name = manifest.backend
    if not isinstance(wanted, (str, Backend, type(None))):
        raise UnsupportedError(f"backend= is {wanted!r:.80}; give '{name}', or an object with options of it")
    if name not in BACKENDS and not isinstance(wanted, Backend):
        hint = nearest(name, BACKENDS) or ";"
        raise ArtifactError(
            f"'{directory}' was made by a backend '{name}'{hint} this Lissom has {', '.join(BACKENDS)}; "
            f"pass a backend of another package as an object, backend="
        )
    if isinstance(wanted, Backend):
        check_name(wanted)
    asked = wanted.name if isinstance(wanted, Backend) else wanted
    if asked not in (None, name):
        raise UnsupportedError(
            f"'{directory}' was saved for backend '{name}', and backend= is '{asked}'; compile the model again for that one"
        )
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in manifest.options.items()}
    try:
        backend = wanted if isinstance(wanted, Backend) else BACKENDS[name](**options)
        native = backend.native_code(saved_options=not isinstance(wanted, Backend))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"'{directory}' has options of backend '{name}' that this Lissom lacks: {error}") from error
    if native is not None and not trust.allow_native:
        raise ArtifactError(
            f"'{directory}' would load {native}, and that is code which can do whatever you can; if you trust who made it, "
            f"allow it: allow_native=True, or --allow-native on the command line"
        )
    return backend


def find_devices(manifest: Manifest, directory: Path, device: torch.device | None) -> tuple[torch.device, torch.device]:
    """The device the artifact was saved for, and the device it will run on. Raises ArtifactError."""
    try:
        saved = torch.device(manifest.device)
    except RuntimeError as error:
        raise ArtifactError(f"'{directory}' was made for '{manifest.device}', which is not a device of this PyTorch") from error
    if device is not None:
        return saved, device
    if saved.type == "cpu":
        return saved, saved
    count = torch.cuda.device_count() if saved.type == "cuda" else 0
    if count == 0:
        raise ArtifactError(
            f"'{directory}' was made for {saved}, and this machine has no such device; "
            f"load it with device='cpu', or compile the model again here"
        )
    return saved, saved if (saved.index or 0) < count else torch.device("cuda", 0)


def read_program(directory: Path, manifest: Manifest, read_weights: ReadWeights, place: Place) -> Program:
    """The program in a directory; arguments as for `decode_program`. Raises ArtifactError if it holds none."""
    path = directory / PROGRAM
    return _decode(verified_bytes(path, manifest.content_of(PROGRAM, directory)), path, read_weights, place)


def _decode(content: bytes, path: Path, read_weights: ReadWeights, place: Place) -> Program:
    """The program from the bytes of a file. Raises ArtifactError if they hold none."""
    try:
        return decode_program(parse_json(content, path), read_weights, place)
    except ArtifactError:
        raise
    # A file may be wrong in any way, and torch and sympy raise errors of their own.
    except Exception as error:
        raise ArtifactError(f"'{path}' is not a program this Lissom can read: {kind_and_reason(error)}") from error


def read_history(manifest: Manifest, directory: Path) -> History:
    """The history of the program, with texts and facts that are parsed when they are asked for first.

    Raises:
        ArtifactError: if the files hold none, also when they are parsed.
    """
    path = directory / STEPS
    content = verified_bytes(path, manifest.content_of(STEPS, directory))
    # Not a local function, because a history can be pickled.
    read = partial(_read_history, directory, partial(_read_programs, content, path, manifest.history))
    return _read_history(directory, lambda: History.unread(manifest.history, read))


def _read_programs(content: bytes, path: Path, history: Mapping[str, object]) -> tuple[list[str], Changes]:
    """The texts and facts in the bytes of a file. Raises ArtifactError, ValueError, TypeError, KeyError or AttributeError."""
    found = parse_json(content, path)
    # Older artifacts hold the texts alone.
    texts, changes = programs_from_json(found if isinstance(found, dict) else {"texts": found, "changes": {}})
    steps = len(take(history, "steps", list))
    if len(texts) != steps:
        raise ValueError(f"it has {steps} steps, and {len(texts)} texts")
    return texts, changes


def _read_history(directory: Path, read: Callable[[], Result]) -> Result:
    """The result of `read`. Raises ArtifactError if the directory holds no history."""
    try:
        return read()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"'{directory}' holds no history this Lissom can read: {kind_and_reason(error)}") from error


def _check_kernels(program: Program, directory: Path) -> tuple[str, ...]:
    """Load the kernels the program uses; returns a note if they are missing, which makes it slow.

    Raises:
        ArtifactError: if it was lowered for a CPU and runs elsewhere, or this processor's kernels lack its dtype.
    """
    called = [node for node in program.nodes(*KERNELS) if node.target is not block_sparse_attention or _has_kernel(node)]
    types = {nodes.tensor_type(node) for node in called}
    if not types:
        return ()
    elsewhere = next((tensor_type.device for tensor_type in types if tensor_type.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ArtifactError(f"'{directory}' was lowered to kernels of a CPU; compile the model again for {elsewhere}")
    reason = load_kernels()
    if reason:
        return (f"{program.name} was compiled for C++ kernels and runs slowly without them: {reason}",)
    for tensor_type in sorted(types, key=str):
        # Integers only appear in embedding tables, whose rows are copied whatever their dtype.
        lacking = missing_kernel(tensor_type.dtype, tensor_type.device) if tensor_type.dtype.is_floating_point else None
        if lacking is not None:
            raise ArtifactError(
                f"'{directory}' was compiled for another processor: {lacking}; "
                f"compile the model again here, or set {SWITCH}=0 to run it without kernels, slowly"
            )
    return ()


def _has_kernel(node: fx.Node) -> bool:
    """False if the operator's reference implementation computes it, here and on the machine that lowered it."""
    tensor_type = nodes.tensor_type(node)
    return tensor_type.device.type == "cpu" and missing_kernel(tensor_type.dtype, tensor_type.device) is None


def _environment(program: Program) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lissom": __version__,
        "cpu": device_name(torch.device("cpu")),
        "kernels": (load_kernels() or "loaded") if program.nodes(*KERNELS) else "not used",
    }


def _device_of(program: Program) -> torch.device:
    """The CUDA device of the program, else the CPU."""
    types = [nodes.node_type(node) for node in program.graph.nodes if nodes.has_value(node)]
    devices = {leaf.device for leaf in pytree.tree_leaves(types) if isinstance(leaf, TensorType)}
    return next((device for device in sorted(devices, key=str) if device.type != "cpu"), torch.device("cpu"))
