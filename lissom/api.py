"""The public API: compile a model, or run only the passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lissom.artifacts.facts import Facts
from lissom.artifacts.model_files import Saveable, check_tokenizer
from lissom.artifacts.pruned_tokenizer import check_original_ids_unmapped, saved_tokenizer
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.driver.compile import compile_by_class, optimize_model, with_errors
from lissom.driver.keywords import TextModel, keywords_of
from lissom.driver.options import Inputs, OptimizeSettings, Settings, check_data, read_data
from lissom.errors import UnsupportedError
from lissom.export.causal_lm.names import is_decoder
from lissom.export.checkpoint import save_checkpoint
from lissom.export.compressed_tensors.kv_cache import KvCache
from lissom.export.compressed_tensors.writer import CompressedCheckpoint, write_compressed
from lissom.export.genai.writer import GenaiFolder, write_genai
from lissom.export.gguf.k_types import Types
from lissom.export.gguf.writer import Dtype, GgufFile, write_gguf
from lissom.export.openvino.decoder_folder import write_openvino_decoder
from lissom.export.openvino.folder import OpenVinoFolder, write_openvino
from lissom.export.pt2 import Pt2Package, write_pt2
from lissom.export.tp_plan.writer import TpPlan, write_tp_plan
from lissom.frontends.models.adapters import with_merged_adapters
from lissom.inspect.report import Report
from lissom.io.files import check_path
from lissom.runtime.compiled_model import CompiledModel

_DEFAULTS = Settings()


@keywords_of(Settings)
def compile(
    model: nn.Module | Program | str | Path, example_inputs: Inputs | None = None, settings: Settings = _DEFAULTS
) -> CompiledModel | TextModel:
    """Optimize a model for inference.

    The model itself is not modified. The result shares its weights until a pass changes one, and refuses calls after these were
    trained or loaded anew.

    Args:
        model: a module, or a program from `lissom.optimize`, whose sizes vary as they did there. A `SentenceTransformer`, a
            `CrossEncoder` or a `SparseEncoder` gives a model of its own class, all of whose modules run as one program. Or a
            checkpoint's folder, or another name that `lissom compile` takes: large ones are compiled from the disk, in the
            memory of the result.
        example_inputs: a tuple holds positional arguments, a mapping keyword arguments, a tensor is the only argument. Models
            of Sentence Transformers take texts, here and as data, and have a default, and so has a checkpoint.
        passes: pipeline text, pass objects, or a recipe's name, run in the order written. The recipe `exact` brings every model
            into canonical form and always comes first. By default `exact`; for the folder of a GGUF file or of a quantized
            checkpoint `use-stored-weights`, if it runs on a CPU.
        backend: the backend that runs the result: a name, or an object with options, `lissom.OnnxRuntime(threads=2)`;
            `lissom.backends.BACKENDS` lists them. `fastest` builds every backend, times each on the example inputs, and keeps
            the fastest.
        world_size: with the backend `distributed`, the number of ranks that share the model. `shard{world_size=N},partition` is
            appended to the passes unless they hold `partition`. In a process group of that size every rank calls `compile`;
            rank 0 runs the passes and sends each rank its shard.
        device: where the result runs; the model's own device by default.
        dynamic: True finds out by trying whether batch and sequence may vary, False fixes all sizes, a mapping names the
            dimensions that vary: `{"input_ids": {0: "batch"}}`.
        checks: `numeric` compares outputs, once for all exact passes in a row; `each` after every pass; `structural` checks the
            graph and its types, `off` nothing.
        data: calibration inputs, each like example_inputs, for passes that calibrate.
        metric: scores a callable that takes the model's arguments; higher is better.
        max_drop: the largest drop of the metric that lossy passes may cause.
        goal: what a lossy pass must gain. The program is lowered and timed with it and without it, on the example and at larger
            sizes, and the report has the figures. `latency` reverts a pass that makes the program slower, or neither faster nor
            smaller; `memory` keeps one that makes it smaller; None keeps every pass, untimed.
        simulate: compute quantized layers without a kernel on this backend in floating point, on quantized values. The outputs
            are the same, without a speedup. If False, such layers are refused.
        progress: called with the current step, the number of steps finished, and the total; by default a bar on a terminal.

    Raises:
        CaptureError: if the model cannot be captured.
        InputError: if the inputs, the data or the metric are wrong.
        PipelineTextError: if the text of the passes has no meaning.
        UnsupportedError: if an option, the backend or a pass does not support this model or machine.
        RequirementError: if the program lacks what a pass needs.
        PassError: if a pass fails.
        VerifyError: if a pass or a backend gives other outputs.
        BudgetError: if the metric drops by more than max_drop.
        RankError: if a rank ended, or differs from rank 0.

    Examples:
        >>> import torch, lissom
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> fast = lissom.compile(model, torch.randn(2, 5, 32))
        >>> fast(torch.randn(3, 7, 32)).shape
        torch.Size([3, 7, 32])
    """
    return compile_by_class(model, example_inputs, settings)


@dataclass(frozen=True)
class Optimized:
    """The result of `optimize`.

    Attributes:
        program: the optimized program, before a backend lowers it.
        report: what every pass did; prints as a table.

    Examples:
        >>> import torch, lissom
        >>> optimized = lissom.optimize(torch.nn.Linear(4, 2), torch.randn(3, 4), passes="cast{dtype=bf16}")
        >>> optimized.program.parameter_bytes
        20
    """

    program: Program
    report: Report
    _model: nn.Module | Program = field(repr=False, compare=False)
    _example: Sample = field(repr=False, compare=False)

    def save_pretrained(
        self, directory: str | Path, *, tokenizer: Saveable | None = None, processor: Saveable | None = None
    ) -> None:
        """Write an ordinary checkpoint that plain transformers loads: weights, and a configuration that says what was removed.

        The checkpoint is loaded by transformers and compared with the program before it is written. Layers of different widths
        are padded with zeros to the widest. The directory is written completely or not at all, and must be new or empty.

        Args:
            tokenizer: as for `CompiledModel.save`.
            processor: as for `CompiledModel.save`.

        Raises:
            UnsupportedError: if the model is not one of transformers, its configuration cannot say what was removed, or the
                program computes what no weights say, such as quantized layers.
            ArtifactError: if it cannot be written.
        """
        model = self._transformers_model("checkpoint", tokenizer)
        tokenizer = self._own_tokenizer("a checkpoint", tokenizer, model)
        save_checkpoint(self.program, model, self._example, check_path(directory), tokenizer, processor)

    def save_compressed(
        self,
        directory: str | Path,
        *,
        tokenizer: Saveable | None = None,
        processor: Saveable | None = None,
        kv_cache: KvCache | None = None,
        data: Iterable[Inputs] = (),
    ) -> CompressedCheckpoint:
        """Write a quantized model as a checkpoint of compressed-tensors, which transformers and vLLM load.

        The checkpoint has the program's integers in int4, int8 or fp8, and schemes by layer. transformers loads it in a fresh
        process before it is written: the weights have to be the program's bit for bit, and the outputs are compared. The
        directory is written completely or not at all, and must be new or empty.

        Args:
            tokenizer: as for `CompiledModel.save`.
            processor: as for `CompiledModel.save`.
            kv_cache: `fp8` writes one scale for the keys and one for the values of each layer, with which servers keep their KV
                cache in e4m3; the notes say what that changes. By default there are none.
            data: the calibration inputs that these scales are measured on, each like the example inputs, which are the default.

        Returns:
            The schemes of the layers, the relative error of the outputs, and notes on what was not compared.

        Raises:
            UnsupportedError: if the model is not one of transformers, the format cannot say the program, or compressed-tensors
                is not installed.
            ArtifactError: if it cannot be written.
        """
        model = self._transformers_model("checkpoint", tokenizer)
        tokenizer = self._own_tokenizer("a checkpoint", tokenizer, model)
        check_data(data)
        samples, _ = read_data(data, self.program.signature)
        return write_compressed(
            self.program, model, self._example, check_path(directory), tokenizer, processor, kv_cache, samples
        )

    def save_genai(
        self, directory: str | Path, *, tokenizer: Saveable | None = None, processor: Saveable | None = None
    ) -> GenaiFolder:
        """Write a decoder as a folder for ONNX Runtime GenAI: ONNX model with a KV cache, configuration, tokenizer.

        Attention becomes `GroupQueryAttention`, sliding windows included, and int4 and int8 weights become `MatMulNBits`. ONNX
        Runtime reads a text in parts, and ONNX Runtime GenAI generates in a fresh process; both are compared with the
        program before the folder is there. The directory is written completely or not at all, and must be new or empty.

        Args:
            tokenizer: as for `CompiledModel.save`.
            processor: as for `CompiledModel.save`.

        Returns:
            The type of the model, the kinds of its layers, the relative error of the logits, and notes on the comparison.

        Raises:
            UnsupportedError: if the model is not a causal language model of transformers, ONNX Runtime GenAI has no type for it
                or cannot run the program, or the extra `onnx` is not installed.
            ArtifactError: if it cannot be written.
        """
        model = self._transformers_model("folder for ONNX Runtime GenAI", tokenizer)
        tokenizer = self._own_tokenizer("a folder for ONNX Runtime GenAI", tokenizer, model)
        return write_genai(self.program, model, self._example, check_path(directory), tokenizer, processor)

    def export_gguf(
        self, path: str | Path, *, tokenizer: Saveable | None = None, dtype: Dtype | None = None, types: Types | None = None
    ) -> GgufFile:
        """Write a decoder as a GGUF file, which llama.cpp runs: weights, sizes of every layer, and the vocabulary.

        Weights in int8 and int4 are written with the program's integers, in Q8_0, Q4_0 and Q4_1; weights that have the values
        of the GGUF file they were read from, with its blocks. Removed layers are left out. Where llama.cpp reads one width for
        all layers, those of different widths are padded with zeros to the widest. The file is written completely or not at all.

        Args:
            tokenizer: a fast one of transformers; by default that of the folder that the model came from.
            dtype: of matrices in floating point, `f32`, `f16` or `bf16`; by default the program's own.
            types: quantizes matrices that are in floating point: `q4_k`, `q5_k` or `q6_k`, or the mixtures `q4_k_m` and
                `q5_k_m`, which have embedding tables, LM heads and some layers in Q6_K. Rows that are no multiple of 256 are
                written in Q5_0, Q5_1 or Q8_0, and those that are none of 32 in `dtype`.

        Returns:
            The graph of llama.cpp, the types of the tensors, the size of the file, and how far llama.cpp's result was from
            that of the model with the file's weights; compared where the package of the extra `llama-cpp` is installed.

        Raises:
            UnsupportedError: if the model is not one of transformers, llama.cpp has no graph for the program or no tokenizer
                like this one, or computes something else, or gguf is not installed.
            ArtifactError: if the file cannot be written.
        """
        model = self._transformers_model("GGUF file", tokenizer)
        tokenizer = self._own_tokenizer("a GGUF file", tokenizer, model)
        return write_gguf(self.program, model, self._example, check_path(path), tokenizer, dtype, types)

    def export_pt2(self, path: str | Path) -> Pt2Package:
        """Compile the program into a package of AOTInductor, a `.pt2` file, which PyTorch loads without Lissom.

        In Python `torch._inductor.aoti_load_package(path)` gives a function of the inputs, contiguous tensors in order, to a
        list of tensors; in C++ there is `torch::inductor::AOTIModelPackageLoader`. Free dimensions stay free. The package runs
        on processors with the instructions of this one, with the same version of PyTorch. A fresh process has called it before
        the file is written, completely or not at all.

        Returns:
            Names, dtypes and shapes of inputs and outputs, the size, and the relative error in the fresh process.
            `get_metadata()` of the loaded package has the names too.

        Raises:
            UnsupportedError: if there is no C++ compiler, or TorchInductor cannot compile the program, such as one with
                quantized layers on a CPU.
            VerifyError: if the package gives other outputs than the program.
            ArtifactError: if the file cannot be written.
        """
        return write_pt2(self.program, self._example, check_path(path))

    def export_tp_plan(self, path: str | Path) -> TpPlan:
        """Write the placements of `shard` as a JSON file for transformers' own tensor parallelism, without its weights.

        The model itself is loaded with it: `from_pretrained(folder, distributed_config=json.loads(text))`, on as many ranks as
        `shard` planned for. Where the model's forward does not work on a part of its heads, the layers are sharded and their
        values gathered. Ranks of transformers on this CPU have given the outputs of one rank before the file is written,
        completely or not at all; for them the weights are copied to a temporary directory.

        Returns:
            The plan, the size of a rank's parameters, the relative error of the outputs, and notes on gathered values.

        Raises:
            UnsupportedError: if the model is not one of transformers, nothing is sharded, other passes changed its weights, or
                transformers cannot carry out the plan.
            ArtifactError: if the file cannot be written.
        """
        model = self._transformers_model("plan of tensor parallelism", None)
        return write_tp_plan(self.program, model, self._example, check_path(path))

    def export_openvino(
        self, directory: str | Path, *, tokenizer: Saveable | None = None, processor: Saveable | None = None
    ) -> OpenVinoFolder:
        """Write a model as OpenVINO's IR, `openvino_model.xml` and `openvino_model.bin`, which OpenVINO runs without Lissom.

        Quantized layers have `FakeQuantize` and integer weights, which OpenVINO fuses into integer products where it has them;
        the result says how many layers those are. The files are opened by OpenVINO and compared with the program before they
        are written to the directory, completely or not at all, which must be new or empty. The configuration and the tokenizer
        of a transformers model are written too.

        A causal language model of transformers is written with a KV cache as its state, for openvino-genai: with
        `generation_config.json` and OpenVINO's tokenizer. What openvino-genai generates in a fresh process is compared too.

        Args:
            tokenizer: as for `CompiledModel.save`.
            processor: as for `CompiledModel.save`.

        Returns:
            The size, the relative error of the outputs, and notes on quantized layers and on options to open it with.

        Raises:
            UnsupportedError: if the program keeps state, a decoder cannot have a KV cache, ONNX or OpenVINO cannot say it, or
                OpenVINO is not installed.
            VerifyError: if OpenVINO gives other outputs.
            ArtifactError: if the directory holds something, or cannot be written.
        """
        model = with_merged_adapters(self._model) if isinstance(self._model, nn.Module) else None
        facts = None if model is None else Facts.of(model)
        source = None if facts is None else facts.source
        if tokenizer is not None and facts is not None:
            check_tokenizer(self.program, facts.main_input, tokenizer)
        tokenizer = saved_tokenizer(self.program, tokenizer, source)
        if is_decoder(model):
            check_original_ids_unmapped(self.program, "an IR for openvino-genai")
            return write_openvino_decoder(self.program, model, self._example, check_path(directory), tokenizer, processor)
        return write_openvino(self.program, self._example, check_path(directory), facts, tokenizer, processor)

    def _own_tokenizer(self, what: str, tokenizer: Saveable | None, model: Any) -> Saveable | None:
        """The tokenizer that is written: the given one, or that of a pruned vocabulary. Raises UnsupportedError."""
        check_original_ids_unmapped(self.program, what)
        return saved_tokenizer(self.program, tokenizer, str(model.config._name_or_path) or None)

    def _transformers_model(self, what: str, tokenizer: Saveable | None) -> Any:
        """The model that the program was captured from, with merged adapters; its tokenizer is checked.

        Raises:
            UnsupportedError: for another one.
            InputError: for a tokenizer with a larger vocabulary.
        """
        model = with_merged_adapters(self._model) if isinstance(self._model, nn.Module) else None
        # Other modules keep a configuration of transformers too.
        if model is None or Facts.of(model) is None or not hasattr(type(model), "from_pretrained"):
            raise UnsupportedError(
                f"{self.program.name} was not captured from a transformers model here, and has no {what}; call "
                f"lissom.optimize on the model itself"
            )
        if tokenizer is not None:
            check_tokenizer(self.program, str(getattr(model, "main_input_name", "input_ids")), tokenizer)
        return model


@keywords_of(OptimizeSettings)
def optimize(model: nn.Module | Program, example_inputs: Inputs, settings: OptimizeSettings) -> Optimized:
    """Run only the passes, without lowering the program for a backend.

    Raises:
        LissomError: as `compile`, whose options these are.

    Examples:
        >>> import torch, lissom
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
        >>> print(lissom.optimize(model, torch.randn(2, 4)).program)
        program Sequential(input: f32[batch, 4]) {
          weight @0.bias: f32[4]
          weight @0.weight: f32[4, 4]
          %linear: f32[batch, 4] = aten.linear(%input_1, @0.weight, @0.bias)  # 0
          return [%linear]
        }
        <BLANKLINE>
    """
    program, history, example = optimize_model(model, example_inputs, settings)
    report = with_errors(Report(program.name, history), program, model, example_inputs, settings)
    return Optimized(program, report, model, example)
