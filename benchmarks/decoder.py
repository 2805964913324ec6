"""Gemma 3 270M, prefill and decode in tokens per second: Lissom, PyTorch, torchao, ONNX Runtime and llama.cpp.

    python benchmarks/decoder.py --update
    python benchmarks/decoder.py --engines eager-bf16 lissom-bf16

A prompt of 128 tokens of glosses, then 64 tokens chosen greedily, one sequence, each engine in a process of its own. All
engines start from the weights of the model's GGUF file, mixed of four to eight bits; llama.cpp reads the file itself.
Perplexity: `--tokens` tokens of other glosses, one at a time. The share of the memory bandwidth is of weights read per token.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from apart import run_apart
from llama import server_options, weights_file
from quality import conditions, windows
from quantization import INT4, MIXED, OF_HEAD, own_head
from readme import put_table
from spread import Quartiles, quartiles, spread

from lissom.cli.bench.worker import peak_bytes
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.measure.machine import measure_machine
from lissom.ops import packed_embedding

PROMPT, ANSWER, LENGTH = 128, 64, 1024
"""The lengths in tokens of the prompt, the answer, and the cache."""
ROUNDS = 5
CALIBRATION = 8192
"""Calibration tokens of GPTQ here. quantization.py shows the effect of more; the speed is the same."""


class Engine(Protocol):
    """A decoder with a cache. bytes_read: bytes of weights read per token."""

    bytes_read: int

    def reset(self) -> None:
        """Empty the cache."""
        ...

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after the last of these tokens, [vocabulary]; ids: [1, tokens]."""
        ...


@dataclass(frozen=True)
class Result:
    """The result of one engine.

    prefill, decode: tokens per second, median over rounds, with the quartiles. peak: peak memory of the process in bytes.
    perplexity: None if it was not measured. bytes_read: bytes of weights read per token.
    """

    prefill: Quartiles
    decode: Quartiles
    peak: int
    perplexity: float | None
    bytes_read: int


class Static:
    """The model of transformers with a `StaticCache` and a given forward."""

    def __init__(self, checkpoint: Checkpoint, forward: Callable[..., object] | None = None) -> None:
        from transformers import StaticCache

        self.model = checkpoint.model
        self.forward = self.model if forward is None else forward
        self.cache = StaticCache(self.model.config, max_cache_len=LENGTH)
        self.bytes_read = weight_bytes(self.model)
        self.start = 0
        self.read(torch.tensor([[2]]))
        self.reset()

    def reset(self) -> None:
        self.cache.reset()
        self.start = 0

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        start, self.start = self.start, self.start + ids.shape[1]
        positions = torch.arange(start, self.start)[None]
        outputs = self.forward(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return outputs.logits[0, -1]  # pyright: ignore[reportAttributeAccessIssue]


def weight_bytes(model: torch.nn.Module) -> int:
    """The bytes read per token: all weights, tied ones once, without an embedding table that is not the LM head."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def in_bfloat16(checkpoint: Checkpoint) -> Checkpoint:
    """Cast the model's weights in place."""
    checkpoint.model.to(torch.bfloat16)
    return checkpoint


def eager(checkpoint: Checkpoint) -> Engine:
    """PyTorch eager."""
    return Static(in_bfloat16(checkpoint))


def torch_compile(checkpoint: Checkpoint) -> Engine:
    """TorchInductor on the model's forward, which recompiles once when the number of tokens changes."""
    in_bfloat16(checkpoint)
    return Static(checkpoint, torch.compile(checkpoint.model))


def torchao(bits: int, checkpoint: Checkpoint) -> Engine:
    """Weights in 8 or 4 bits under `torch.compile`, the LM head included, as torchao recommends for CPUs."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = in_bfloat16(checkpoint).model
    # The LM head is tied to the embedding table, which stays as it is; torchao quantizes linear layers.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # pyright: ignore
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    elements = sum(linear.weight.numel() for linear in linears)
    if bits == 8:
        quantize_(model, Int8WeightOnlyConfig())
    else:
        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    engine = Static(checkpoint, torch.compile(model))
    scales = sum(linear.weight.shape[0] for linear in linears) if bits == 8 else elements // 32 * 2
    engine.bytes_read = elements * bits // 8 + 2 * scales
    return engine


def plain(config: transformers.PretrainedConfig) -> dict[str, object]:
    """A configuration without the fields that describe the file's format."""
    return {key: value for key, value in config.to_dict().items() if key not in ("quantization_config", "dtype")}


def add_older_names(configuration: Path) -> None:
    """Add the rotary fields that the model builder reads, under their names in transformers 4."""
    fields = json.loads(configuration.read_text())
    angles = fields["rope_parameters"]
    transformers.Gemma3TextConfig.rope_local_base_freq = angles["sliding_attention"]["rope_theta"]  # pyright: ignore
    angles |= {"rope_type": "default", "rope_theta": angles["full_attention"]["rope_theta"]}
    configuration.write_text(json.dumps(fields | {"rope_theta": angles["rope_theta"]}))


def built(precision: str, checkpoint: Checkpoint) -> Genai:
    """The model from onnxruntime-genai's own model builder."""
    # A module of the builder has the name of a script in this folder; Python would import that one first.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).parent]
    sys.modules.pop("quantization", None)
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    source = tempfile.mkdtemp()
    # The weights are already dequantized, whatever the file's format was.
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**plain(checkpoint.model.config)))
    model.load_state_dict(checkpoint.model.state_dict())
    model.save_pretrained(source)
    add_older_names(Path(source) / "config.json")
    assert checkpoint.tokenizer is not None
    checkpoint.tokenizer.save_pretrained(source)
    call = ("", source, folder := tempfile.mkdtemp(), precision, "cpu", tempfile.mkdtemp())
    create_model(*call, **parse_extra_options(*call, extra_options=None))
    return Genai(folder)


class Genai:
    """ONNX Runtime's own generator, onnxruntime-genai, on a folder of its format."""

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime_genai as genai

        self.genai, self.model = genai, genai.Model(str(folder))
        self.bytes_read = sum(path.stat().st_size for path in Path(folder).glob("*.onnx*"))
        self.reset()

    def reset(self) -> None:
        options = self.genai.GeneratorParams(self.model)
        options.set_search_options(max_length=LENGTH, do_sample=False)
        self.generator = self.genai.Generator(self.model, options)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        self.generator.append_tokens(ids.numpy())
        return torch.from_numpy(self.generator.get_logits().copy()).flatten()


class Lissom:
    """`lissom.compile_generation`."""

    def __init__(self, passes: str, backend: str, checkpoint: Checkpoint) -> None:
        import lissom

        data = [ids.reshape(1, -1) for ids in windows(checkpoint, "calibration", CALIBRATION)] if "gptq" in passes else ()
        self.decoder = lissom.compile_generation(
            checkpoint.model, max_length=LENGTH, passes=passes, backend=backend, data=data, goal=None
        )
        program = self.decoder.program
        names = {node: str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        rows = {name for node, name in names.items() if all(user.target in EMBEDDINGS for user in node.users)}
        self.bytes_read = program.parameter_bytes - sum(program.weight(name).nbytes for name in {*program.state, *rows})

    def reset(self) -> None:
        self.decoder.reset()

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.step(ids)[0]


def lissom_engine(passes: str, backend: str = "eager") -> Callable[[Checkpoint], Engine]:
    """A Lissom engine with a pipeline on a backend."""
    return lambda checkpoint: Lissom(passes, backend, checkpoint)


EMBEDDINGS = (torch.ops.aten.embedding.default, packed_embedding)
"""They read single rows of a table."""
CAST = "cast{dtype=bf16}"

ENGINES: dict[str, tuple[str, Callable[[Checkpoint], Engine]]] = {
    "eager-bf16": ("PyTorch eager bf16, static cache", eager),
    "torch-compile-bf16": ("torch.compile bf16, static cache", torch_compile),
    "torchao-int8": ("torchao int8 weights + torch.compile", lambda checkpoint: torchao(8, checkpoint)),
    "torchao-int4": ("torchao int4 weights + torch.compile", lambda checkpoint: torchao(4, checkpoint)),
    "onnxruntime-fp32": ("ONNX Runtime (genai) fp32", lambda checkpoint: built("fp32", checkpoint)),
    "onnxruntime-int4": ("ONNX Runtime (genai) int4", lambda checkpoint: built("int4", checkpoint)),
    "lissom-fp32": ("Lissom fp32", lissom_engine("exact")),
    "lissom-bf16": ("Lissom bf16", lissom_engine(CAST)),
    "lissom-int8-int4": ("Lissom int8 table and head, int4 layers", lissom_engine(MIXED)),
    "lissom-stored": ("Lissom, the file's own weights", lissom_engine("use-stored-weights")),
    "lissom-int8": ("Lissom int8, activations too", lissom_engine("cast,quantize{embeddings=true}")),
    "lissom-int4": ("Lissom int4", lissom_engine(INT4)),
    "lissom-int4-int8": (
        "Lissom int8 table and head, int4 layers, int8 activations",
        lissom_engine("quantize{scheme=int4-dynamic},gptq{tables=false}"),
    ),
    "lissom-int8-group": (
        "Lissom int8 in groups, LM head of its own in int4",
        lissom_engine(f"{own_head(CAST, 'int8-group')},gptq{{{OF_HEAD}}}"),
    ),
    "lissom-int4-dynamic": (
        "Lissom int4, int8 activations, LM head of its own",
        lissom_engine(f"{own_head(CAST, 'int4-dynamic')},gptq"),
    ),
    "lissom-onnxruntime": ("Lissom fp32 on ONNX Runtime", lissom_engine("exact", "onnxruntime")),
    "lissom-onnxruntime-int4": ("Lissom int4 on ONNX Runtime", lissom_engine(INT4, "onnxruntime")),
}
LLAMA = "llama-cpp"
TITLES = {name: title for name, (title, _) in ENGINES.items()} | {LLAMA: "llama.cpp, the file itself"}


def texts(checkpoint: Checkpoint, tokens: int) -> torch.Tensor:
    """The prompt and the text after it, [1, PROMPT + tokens]."""
    ids = torch.cat([window.flatten() for window in windows(checkpoint, "evaluation", max(PROMPT + tokens, 1024))])
    return ids[None, : PROMPT + tokens]


def measure(name: str, threads: int, ids: torch.Tensor) -> Result:
    """Measure one engine; this process does nothing else."""
    torch.set_num_threads(threads)
    if name == LLAMA:
        return measure_llama(threads, ids[0].tolist())
    checkpoint, tokens = load("gemma3-270m"), ids.shape[1] - PROMPT
    prompt = ids[:, :PROMPT]
    with torch.inference_mode():
        engine = ENGINES[name][1](checkpoint)
        answer(engine, prompt)  # compiles and warms up
        rounds = [answer(engine, prompt) for _ in range(ROUNDS)]
        peak = peak_bytes()
        loss = perplexity(engine, ids) if tokens else None
    return Result(
        quartiles([PROMPT / seconds[0] for seconds in rounds]),
        quartiles([ANSWER / seconds[1] for seconds in rounds]),
        peak,
        loss,
        engine.bytes_read,
    )


def answer(engine: Engine, prompt: torch.Tensor) -> tuple[float, float]:
    """The seconds of prefill, and of the answer."""
    engine.reset()
    started = time.perf_counter()
    token = int(engine.read(prompt).argmax())
    read = time.perf_counter()
    for _ in range(ANSWER):
        token = int(engine.read(torch.tensor([[token]])).argmax())
    return read - started, time.perf_counter() - read


def perplexity(engine: Engine, ids: torch.Tensor) -> float:
    """The perplexity of the tokens after the prompt, fed one at a time."""
    engine.reset()
    logits, losses = engine.read(ids[:, :PROMPT]), []
    for index in range(PROMPT, ids.shape[1]):
        losses.append(float(torch.nn.functional.cross_entropy(logits.float(), ids[0, index])))
        if index + 1 < ids.shape[1]:
            logits = engine.read(ids[:, index : index + 1])
    return math.exp(statistics.fmean(losses))


def measure_llama(threads: int, ids: list[int]) -> Result:
    """llama.cpp through xllamacpp, with its own timings of prefill and decode. ids: the prompt and the text after it."""
    import xllamacpp

    server = xllamacpp.Server(server_options(LENGTH, 1, threads))
    request = {"prompt": ids[:PROMPT], "n_predict": ANSWER, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    timings = [server.handle_completions(request)["timings"] for _ in range(ROUNDS + 1)][1:]
    peak = peak_bytes()
    return Result(
        quartiles([timing["prompt_per_second"] for timing in timings]),
        quartiles([timing["predicted_per_second"] for timing in timings]),
        peak,
        llama_perplexity(server, ids) if len(ids) > PROMPT else None,
        weights_file().stat().st_size,
    )


def llama_perplexity(server: Any, ids: list[int]) -> float:
    """The perplexity of the tokens after the prompt. A logit bias forces each token; the server reports its own probability."""
    losses = []
    for index in range(PROMPT, len(ids)):
        request = {"prompt": ids[:index], "n_predict": 1, "n_probs": 1, "temperature": 0, "cache_prompt": True}
        completion = server.handle_completions({**request, "logit_bias": [[ids[index], 1e4]]})
        (chosen,) = completion["choices"][0]["logprobs"]["content"]
        if chosen["id"] != ids[index]:
            raise RuntimeError(f"llama.cpp chose the token {chosen['id']} though {ids[index]} had a bias of 1e4")
        losses.append(-chosen["logprob"])
    return math.exp(statistics.fmean(losses))


def measure_apart(name: str, threads: int, ids: torch.Tensor) -> Result | str:
    """Run `measure` in a process of its own with the tokens; the last line of its error output if it fails."""
    arguments = ["--one", name, "--threads", str(threads)]
    try:
        return Result(**run_apart(__file__, arguments, ids.tolist(), {"OMP_NUM_THREADS": str(threads)}))  # pyright: ignore
    except RuntimeError as error:
        return str(error)


def row(name: str, result: Result | str, bandwidth: float) -> str:
    """A row of the table. bandwidth: bytes per second."""
    if isinstance(result, str):
        return f"| {TITLES[name]} | failed: {result.replace('|', '/')[:160]} | | | | | |"
    loss = "" if result.perplexity is None else f"{result.perplexity:.2f}"
    share = result.bytes_read * result.decode[0] / bandwidth
    return (
        f"| {TITLES[name]} | {spread(result.prefill, 0)} | {spread(result.decode)} | "
        f"{result.bytes_read / 1e6:.0f} | {share:.0%} | {result.peak / 1e6:.0f} | {loss} |"
    )


def table(engines: Sequence[str], threads: int, tokens: int) -> str:
    """The results as Markdown, with the machine."""
    torch.set_num_threads(threads)
    ids = texts(load("gemma3-270m"), tokens)
    results: dict[str, Result | str] = {}
    bandwidths: list[float] = []
    for name in engines:
        # Other work on the machine can only lower a reading, so the maximum is its bandwidth.
        bandwidths.append(1e9 * measure_machine(0.3).cpu.memory_gb_per_second.median)
        results[name] = measure_apart(name, threads, ids)
        print(row(name, results[name], max(bandwidths)), file=sys.stderr)
    heads = "engine | prompt, tokens/s | decode, tokens/s | MB a token reads | of the bandwidth | peak MB | perplexity"
    lines = [f"| {heads} |", "|---|---:|---:|---:|---:|---:|---:|"]
    lines += [row(name, result, max(bandwidths)) for name, result in results.items()]
    speed = f"Memory reads {max(bandwidths) / 1e9:.1f} GB/s, the most of {len(bandwidths)} readings."
    notes = f"Medians of {ROUNDS} rounds (middle half). {speed} GPTQ saw {CALIBRATION:,} tokens. {conditions()}"
    return "\n".join([*lines, "", notes, ""])


def main() -> None:
    """Measure the engines asked for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES, LLAMA], default=[*ENGINES, LLAMA])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512, help="tokens for the perplexity; 0 for none")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measure(options.one, options.threads, torch.tensor(json.load(sys.stdin))))))
        return
    printed = table(options.engines, options.threads, options.tokens)
    print(printed)
    if options.update:
        put_table("decoder", printed, by_processor=True)


if __name__ == "__main__":
    main()
