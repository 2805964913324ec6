"""CompiledModel, the result of a compile; and `load`, which reads a saved one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from lissom.artifacts import rank_files
from lissom.artifacts.artifact import Compiled, Loaded, Trust, WriteMore
from lissom.artifacts.facts import Facts
from lissom.artifacts.model_files import Saveable, check_tokenizer, saved_config, upload, write_processors
from lissom.artifacts.pruned_tokenizer import check_original, saved_tokenizer
from lissom.artifacts.signature import TrustedKeys, key_files
from lissom.backends import is_ours
from lissom.backends.base import Backend, Executable, restored_state, state_of
from lissom.backends.distributed.backend import RankProgram
from lissom.backends.distributed.ranks import Ranks
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.compiler.analysis.embedding_bounds import outside_table
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample
from lissom.errors import InputError, UnsupportedError
from lissom.export.onnx_folder import Dtype, Export, Layout, write_folder
from lissom.frontends.capture.device import check_device
from lissom.frontends.capture.untouched import ordinary
from lissom.inspect.report import Report
from lissom.io.files import check_path
from lissom.runtime.hosted_model import HostedModel
from lissom.runtime.layer_timer import ProgramTimer
from lissom.runtime.pickled import files_of, loaded_from
from lissom.runtime.tracers import has_memory, refuse_tracer, tracer, untraced, with_memory


def own_state(model: Program | CompiledModel) -> AbstractContextManager[None]:
    """Restores the state of a program after the block: what it reads there does not change what it reads next."""
    return kept_state(model) if isinstance(model, Program) else restored_state(model._executable)


class CompiledModel(HostedModel):
    """An optimized model with the arguments and the output structure of the original.

    It is a module, and can replace a transformers model in pipelines and in Sentence Transformers.

    Several threads may call it, unless the program has state. Its outputs carry no gradients; other modules may be trained
    on them.

    Attributes:
        program: the optimized program.
        report: what every step did; prints as a table.
        backend: the name of the backend.

    Examples:
        >>> import torch, lissom
        >>> fast = lissom.compile(torch.nn.Linear(4, 2), torch.randn(3, 4))
        >>> fast(torch.randn(5, 4)).shape
        torch.Size([5, 2])
        >>> fast(torch.randn(5, 3))
        Traceback (most recent call last):
        lissom.errors.InputError: argument 'input' has size 3 in dimension 1; allowed: 4; compile again with an example of \
        that size, or mark the dimension dynamic
    """

    def __init__(
        self, program: Program, executable: Executable, report: Report, backend: Backend, facts: Facts | None = None
    ) -> None:
        super().__init__(program, facts)
        self.report = report
        self.backend = backend.name
        self._backend = backend
        self._executable = executable
        self._shared = _Shared(program)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's outputs.

        Under torch.compile the graph breaks here, and the call runs as it is.

        Raises:
            InputError: if the arguments do not fit the signature, or an index is out of range (a token id beyond the
                vocabulary, a position beyond the last), with the value found and the range allowed; or under another tracer,
                such as torch.export, FakeTensorMode or torch.jit.trace.
        """
        if torch.compiler.is_dynamo_compiling():
            return untraced(self.forward, args, kwargs)
        signature = self.program.signature
        with self.refusals():
            refuse_tracer(self.program.name)
            tensors = signature.flatten(args, self.asked(kwargs))
        return signature.unflatten(self.run(tensors))

    def run(self, tensors: Sample) -> Sequence[object]:
        """The flat outputs for flat inputs, in the order of the program's placeholders; sizes and types are not checked.

        Raises:
            InputError: for an index out of range, such as a token id beyond the vocabulary, for a tensor without memory, and
                for weights that were trained or loaded anew since they were compiled.
        """
        if self._shared.changed():
            with self.refusals():
                raise InputError(self._shared.sentence(self.program.name))
        if tracer() is not None or not all(map(has_memory, tensors)):
            with self.refusals():
                tensors = with_memory(self.program, tensors)
        try:
            outputs = self._executable(tensors)
        except (IndexError, RuntimeError) as error:
            sentence = outside_table(self.program, tensors)
            if sentence is None:
                raise
            raise InputError(sentence) from error
        if torch.is_inference_mode_enabled():
            return outputs
        return [ordinary(value) if isinstance(value, torch.Tensor) else value for value in outputs]

    def refusals(self) -> AbstractContextManager[None]:
        """A context for checking a call's arguments: if the block raises, the other ranks do not wait for this rank's call."""
        return self._executable.refusals() if isinstance(self._executable, RankProgram) else nullcontext()

    def state(self) -> dict[str, torch.Tensor]:
        """The state the model keeps between calls, by the names of its buffers; empty if it keeps none.

        The tensors share the state's memory until the next call: `zero_()` empties a cache, `copy_(tensor[rows])` reorders its
        rows. After a failed call the state is undefined.
        """
        return state_of(self._executable)

    @property
    def ranks(self) -> Ranks | None:
        """The ranks this one runs with; None for a model of one process."""
        return self._executable.ranks if isinstance(self._executable, RankProgram) else None

    def save(self, directory: str | Path, *, tokenizer: Saveable | None = None, processor: Saveable | None = None) -> None:
        """Write the model to a directory that `load` reads, on other machines too, and without the original model's code.

        The directory is written completely or not at all; an existing artifact is replaced. State is saved with its values at
        compile time, the backend with its options. All ranks of a group must call it.

        A transformers model is saved with its configuration, so that `pipeline(task, model=directory)` and
        `AutoModel....from_pretrained(directory)` load it where Lissom is imported.

        Args:
            tokenizer: saved in the same directory; by default that of the folder or Hub repository that the model was loaded
                from.
            processor: likewise; it may also be an image processor or a feature extractor.

        Raises:
            ArtifactError: if the directory holds something else, or cannot be written.
            InputError: for a tokenizer with a larger vocabulary than the model.
            UnsupportedError: if the backend cannot save its executable.
        """
        if tokenizer is not None:
            main_input = "input_ids" if self.facts is None else self.facts.main_input
            check_tokenizer(self.program, main_input, tokenizer)
        facts, source = self.facts, None if self.facts is None else self.facts.source
        tokenizer = saved_tokenizer(self.program, tokenizer, source)

        def write_more(folder: Path) -> None:
            if facts is not None:
                saved_config(facts.configuration, folder)
            write_processors(folder, source, tokenizer, processor)

        self.save_with(directory, write_more)

    def save_pretrained(self, directory: str | Path, **_: object) -> NoReturn:
        """Refuse to write an ordinary checkpoint, which a compiled model has none of.

        Raises:
            UnsupportedError: always, with the call that writes an ordinary checkpoint, and the one that saves this model.
        """
        raise UnsupportedError(
            f"{self.program.name} is compiled: its weights are laid out for backend '{self.backend}'. save({str(directory)!r}) "
            f"writes it for lissom.load and Auto classes; lissom.optimize(model, example_inputs, "
            f"passes=...).save_pretrained({str(directory)!r}) writes an ordinary checkpoint with the same passes"
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: Saveable | None = None,
        processor: Saveable | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a model compiled by Lissom",
    ) -> str:
        """Upload the directory that `save` writes to a repository of the Hugging Face Hub; returns its address.

        Args:
            tokenizer: as for `save`.
            processor: as for `save`.
            private: as in transformers.
            token: as in transformers.
            commit_message: as in transformers.

        Raises:
            ArtifactError: if the Hub cannot be reached, or refuses the upload.
            LissomError: as `save`.
        """
        save = partial(self.save, tokenizer=tokenizer, processor=processor)
        return upload(save, self.program.name, repo_id, private, token, commit_message)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickle: the files of its artifact, the function that loads them, and a backend of another package.

        Raises:
            UnsupportedError: for a model that runs with other ranks, or whose backend cannot be saved.
        """
        self.check_alone()
        return _from_files, (files_of(self.save), None if self.facts is None else self.facts.source, self.external_backend)

    def __deepcopy__(self, memo: object) -> CompiledModel:
        """A copy through its artifact; unlike a pickle's, its compiled code is known. Raises as `__reduce_ex__`."""
        self.check_alone()
        copied = loaded_from(files_of(self.save), partial(load, backend=self.external_backend, allow_native=True))
        copied.facts = self.facts
        return copied

    @property
    def external_backend(self) -> Backend | None:
        """The backend where another package has it, which loading needs; None for one of Lissom's."""
        return None if is_ours(self._backend) else self._backend

    def check_alone(self) -> None:
        """Refuse to pickle a model that runs with other ranks. Raises UnsupportedError."""
        if self.ranks is not None:
            raise UnsupportedError(f"{self.program.name} runs with other ranks and cannot be pickled; save() it on all of them")

    def save_with(self, directory: str | Path, write_more: WriteMore) -> None:
        """Like `save`, with additional files that the artifact's hashes cover.

        Args:
            write_more: called with the folder to write them into.
        """
        if self._shared.changed():
            raise InputError(self._shared.sentence(self.program.name))
        facts = {} if self.facts is None else self.facts.to_json()
        compiled = Compiled(self.program, self._executable, self.report.history, self._backend, facts, write_more)
        rank_files.save(check_path(directory), compiled)

    def export_onnx(
        self,
        directory: str | Path,
        *,
        layout: Layout = "huggingface",
        dtypes: Sequence[Dtype] | None = None,
        tokenizer: Saveable | None = None,
        processor: Saveable | None = None,
        original: nn.Module | None = None,
        data: Sequence[Mapping[str, object]] = (),
        contrib: bool = False,
    ) -> None:
        """Write ONNX files that run without Lissom, in the layout that transformers.js and other tools load.

        Each file is opened by ONNX Runtime with its default options, and compared with the program.

        Args:
            layout: `huggingface`: `onnx/model.onnx` and others, `config.json`, and a card, `README.md`, with measured quality
                and speed.
            dtypes: the files, by the names of transformers.js: `fp32`, `fp16` (needs data), `q8` (int8-dynamic), `q4` (int4
                weights); all that apply by default. A model that was compiled quantized is one file.
            tokenizer: written too; by default that of the directory that the model came from.
            processor: likewise.
            original: the model that the card compares with; the compiled program by default.
            data: batches of keyword arguments to calibrate and compare on; the example inputs by default.
            contrib: use operators of ONNX Runtime's own domain, `com.microsoft`, where they are faster. Other files hold
                standard operators alone, of the oldest opset that they allow.

        Raises:
            UnsupportedError: for a model of another backend than `onnxruntime`, or one that does not fit the layout.
            InputError: for data or an original that do not fit.
            VerifyError: for a file with other answers.
            ArtifactError: if the directory holds something, or cannot be written.
        """
        if self.backend != OnnxRuntime.name:
            raise UnsupportedError(
                f"export_onnx needs a model compiled with backend='{OnnxRuntime.name}', and this one is for '{self.backend}'"
            )
        if tokenizer is not None and self.facts is not None:
            check_tokenizer(self.program, self.facts.main_input, tokenizer)
        signature, timer = self.program.signature, self.report.timer
        if not isinstance(data, Sequence) or not all(isinstance(batch, Mapping) for batch in data):
            raise InputError("data= is not a list of batches; give mappings from the names of arguments to tensors")
        samples = [signature.flatten((), batch) for batch in data]
        example = timer.example if isinstance(timer, ProgramTimer) else None
        given = samples or ([example] if example is not None else [])
        if not given:
            raise UnsupportedError("a loaded model keeps no example inputs; pass a batch in data=")
        check_original(self.program, original)
        tokenizer = saved_tokenizer(self.program, tokenizer, None if self.facts is None else self.facts.source)
        lossy = [step.spelling for step in self.report.history.steps if not step.exact and step.reverted is None]
        export = Export(self.program, self.facts, lossy, given, bool(samples), tokenizer, processor, original, contrib)
        write_folder(check_path(directory), layout, dtypes, export)

    def _repr_html_(self) -> str:
        """The report, in a notebook."""
        return self.report._repr_html_()

    def __repr__(self) -> str:
        return f"CompiledModel({self.program.name}{self.program.signature.describe()}, backend='{self.backend}')"


class _Shared:
    """The parameters that a compiled program shares with its model, which may be trained on.

    Other weights are packed copies, so that the program would be a mixture of both. PyTorch counts the writes to a tensor, but
    not those through `.data`.
    """

    def __init__(self, program: Program) -> None:
        parameters = {name: weight for name, weight in program.weights().items() if isinstance(weight, nn.Parameter)}
        self._names = [name for name, parameter in parameters.items() if not parameter.is_inference()]
        self._tensors = [parameters[name] for name in self._names]
        self._versions = [tensor._version for tensor in self._tensors]

    def changed(self) -> bool:
        """True if one of the parameters was written to since the compile."""
        return [tensor._version for tensor in self._tensors] != self._versions

    def sentence(self, name: str) -> str:
        """The error for changed weights.

        Args:
            name: of the program.
        """
        pairs = zip(self._names, self._tensors, self._versions, strict=True)
        first = next(path for path, tensor, version in pairs if tensor._version != version)
        return (
            f"the weights of {name} were changed after it was compiled, first '{first}', and it holds packed copies of others; "
            f"compile it again, or compile copy.deepcopy(model) to keep the weights as they are"
        )


def _from_files(files: Mapping[str, bytes], source: str | None, backend: Backend | None = None) -> CompiledModel:
    model = loaded_from(files, partial(load, backend=backend))
    model.facts = None if model.facts is None else replace(model.facts, source=source)
    return model


def load(
    directory: str | Path,
    device: str | torch.device | None = None,
    *,
    backend: str | Backend | None = None,
    allow_native: bool = False,
    trusted_keys: TrustedKeys | None = None,
    map_weights: bool = True,
) -> CompiledModel:
    """The model that `CompiledModel.save` wrote, its weights mapped from the file. Nothing is unpickled.

    A model for several ranks is loaded by every rank of a group of that size; each rank reads only its own shard.

    Args:
        device: where it runs; by default the device it was compiled for. A warning names what differs from the machine that
            compiled it, such as missing kernels.
        backend: the backend it was saved for, by name, or as an object whose options replace the saved ones:
            `lissom.OnnxRuntime(threads=1)`. A backend of another package has to be an object.
        allow_native: load native code that the artifact holds or names: code compiled by `inductor`, libraries named in
            options.
        trusted_keys: PEM files of Ed25519 public keys, one or several, one of which must have signed it (`lissom sign`).
        map_weights: False reads the weights into memory: a mapped file that is cut short later ends the process.

    Raises:
        ArtifactError: if the directory is not an artifact, was changed or damaged, is not signed by a trusted key, holds native
            code that is not allowed, or does not run here.
        UnsupportedError: for a missing device or package, or a process group of another size.
        RankError: if a rank is gone.

    Examples:
        >>> import tempfile, torch, lissom
        >>> folder = tempfile.mkdtemp() + "/model"
        >>> lissom.compile(torch.nn.Linear(4, 2), torch.ones(3, 4)).save(folder)
        >>> lissom.load(folder)
        CompiledModel(Linear(input: f32[batch, 4]), backend='eager')
    """
    trust = Trust(allow_native, key_files(trusted_keys), map_weights)
    loaded = rank_files.load(check_path(directory), check_device(device), backend, trust)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return compiled_from(loaded, str(directory))


def compiled_from(loaded: Loaded, source: str | None = None) -> CompiledModel:
    """The model that an artifact holds.

    Args:
        source: its directory.
    """
    timer = ProgramTimer(loaded.program, loaded.executable, loaded.backend, loaded.history)
    report = Report(f"{loaded.program.name} on {loaded.backend.name}", loaded.history, timer=timer)
    facts = Facts.from_json(loaded.facts)
    facts = None if facts is None else replace(facts, source=source)
    return CompiledModel(loaded.program, loaded.executable, report, loaded.backend, facts)
