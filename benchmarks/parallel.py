"""One model on one, two and four ranks: time, memory of a rank, and bytes between ranks against theory.

    python benchmarks/parallel.py --update

A Llama-like decoder with random weights, and Gemma 3 270M, compiled with their KV cache, partitioned and saved by one process;
then each rank is a process that loads its own file. It prefills 128 tokens and decodes 50, chosen greedily, and the tokens of
every world size are compared with those of one rank. Ranks exchange values through shared memory, and, in separate rows, over
gloo. For comparison, on the Llama-like model, PyTorch's own tensor parallelism over gloo: `parallelize_module` with the plan
from transformers. Float32, one thread per rank; with fewer cores than ranks, the ranks share cores.

*Memory* is the peak of the rank with the most, above what it used before it loaded the model. *Bytes* are those the
loopback device counted for one prompt, packet headers included, which shared memory does not use; theory: ring collectives
(Thakur et al. 2005).
Prints a Markdown table; `--update` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from linear_attention import held_bytes
from quality import conditions
from readme import put_table

import lissom
from lissom.cli.bench.worker import peak_bytes
from lissom.frontends.models.huggingface import load
from lissom.inspect.sharding import program_traffic

PROMPT, ANSWER, LENGTH = 128, 50, 256
WORLD_SIZES = (1, 2, 4)
MODELS = ("llama", "gemma3-270m")
CONFIG: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """The result of one world size.

    prompt: milliseconds, median and quartiles; token: of one token. weights, peak: bytes, of the rank with the most.
    sent: bytes between ranks for a prompt, counted; theory: those of rings. tokens: the answer.
    """

    prompt: tuple[float, float, float]
    token: tuple[float, float, float]
    weights: int
    peak: int
    sent: int
    theory: float
    tokens: list[int]


def build(name: str) -> transformers.PreTrainedModel:
    """The model, equal in every process."""
    torch.manual_seed(0)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    model = load(name).model
    assert isinstance(model, transformers.PreTrainedModel)
    return model


def loopback_bytes() -> int:
    """The bytes the loopback device has received; 0 if the system does not report them."""
    counters = Path("/proc/net/dev")
    lines = counters.read_text(encoding="utf-8").splitlines() if counters.is_file() else []
    return next((int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")), 0)


def measure(read: Read, reset: Callable[[], None], rounds: int) -> dict[str, object]:
    """The times, tokens and bytes between ranks of this rank."""
    ids = torch.randint(3, 30000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prompts: list[float] = []
    steps: list[float] = []
    tokens: list[int] = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            reset()
            tokens = []
            started = time.perf_counter()
            last = read(ids)
            prompts.append(1e3 * (time.perf_counter() - started))
            for _ in range(ANSWER):
                tokens.append(int(last.argmax()))
                started = time.perf_counter()
                last = read(torch.tensor([[tokens[-1]]]))
                steps.append(1e3 * (time.perf_counter() - started))
        reset()
        sent = _sent(lambda: read(ids))
    return {"prompt": _quarters(prompts[1:]), "token": _quarters(steps[ANSWER:]), "tokens": tokens, "sent": sent}


def _sent(call: Callable[[], object]) -> int:
    """The bytes a call sends between ranks, minus those of the two barriers around it."""
    if not dist.is_initialized():
        return 0
    counts: list[int] = []
    for work in (lambda: None, call):
        dist.barrier()
        before = loopback_bytes()
        work()
        dist.barrier()
        counts.append(loopback_bytes() - before)
    return counts[1] - counts[0]


def _quarters(values: Sequence[float]) -> tuple[float, float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), low, high


def lissom_rank(directory: str, rounds: int) -> dict[str, object]:
    """This rank's figures for a saved decoder."""
    before = held_bytes()
    decoder = lissom.load_generation(directory)
    program = decoder.compiled.program
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    numbers = dict.fromkeys(program.signature.dimensions, PROMPT)
    theory = world_size * sum(collective.sent_bytes for collective in program_traffic(program, world_size, numbers))
    figures = measure(lambda ids: decoder.step(ids)[0], decoder.reset, rounds)
    return figures | {"weights": program.parameter_bytes, "peak": peak_bytes() - before, "theory": theory}


def pytorch_rank(name: str, rounds: int) -> dict[str, object]:
    """This rank's figures for the model of transformers under `parallelize_module`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    before = held_bytes()
    model = build(name)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        styles = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
        plan = {f"model.{path}": styles[how] for path, how in model.config.base_model_tp_plan.items() if how in styles}  # pyright: ignore
        parallelize_module(model, mesh, {**plan, "lm_head": ColwiseParallel(output_layouts=Replicate())})
    cache = transformers.StaticCache(model.config, max_cache_len=LENGTH)
    start = 0

    def reset() -> None:
        nonlocal start
        start = 0
        if cache.get_seq_length():
            cache.reset()

    def read(ids: torch.Tensor) -> torch.Tensor:
        nonlocal start
        places, start = torch.arange(start, start + ids.shape[1])[None], start + ids.shape[1]
        return model(input_ids=ids, position_ids=places, past_key_values=cache, logits_to_keep=1).logits[0, -1]

    figures = measure(read, reset, rounds)
    held = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in model.parameters()]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in held)
    return figures | {"weights": weights, "peak": peak_bytes() - before, "theory": 0.0}


def work(engine: str, source: str, rounds: int) -> None:
    """Run one rank of those torchrun started, or the only one; rank 0 prints the results of all."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    figures = pytorch_rank(source, rounds) if engine == "PyTorch" else lissom_rank(source, rounds)
    every: list[dict[str, object]] = [figures]
    if dist.is_initialized():
        every = [{}] * dist.get_world_size()
        dist.all_gather_object(every, figures)
    if not dist.is_initialized() or dist.get_rank() == 0:
        most = {name: max(of_rank[name] for of_rank in every) for name in ("weights", "peak")}  # pyright: ignore
        print(json.dumps(figures | most), flush=True)
    if dist.is_initialized():
        # Gloo aborts a process that is still running when its peers have exited.
        dist.barrier()
        dist.destroy_process_group()


def run(engine: str, source: str, world_size: int, rounds: int) -> Result:
    """The result of one world size, with a process per rank. Raises: RuntimeError if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable]
    if world_size > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--master-port", str(port)]
    request = [*start, __file__, "--worker", engine, source, "--rounds", str(rounds)]
    ran = subprocess.run(request, capture_output=True, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{engine} on {world_size} ranks: {ran.stderr.strip()[-2000:]}")
    return Result(**json.loads(lines[-1]))


def rows(name: str, world_size: Sequence[int], rounds: int) -> list[str]:
    """The rows of one model, as Markdown."""
    results: dict[tuple[str, int], Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in world_size:
            backends: dict[str, Any] = {"Lissom": "eager"}
            if count > 1:
                backends = {
                    "Lissom": lissom.Distributed(world_size=count),
                    "Lissom, gloo": lissom.Distributed(world_size=count, shared_memory=False),
                }
            for engine, backend in backends.items():
                directory = f"{folder}/{engine}-{count}"
                lissom.compile_generation(build(name), max_length=LENGTH, backend=backend, checks="structural").save(directory)
                results[engine, count] = run(engine, directory, count, rounds)
            if name == "llama":
                results["PyTorch", count] = run("PyTorch", name, count, rounds)
    lines: list[str] = []
    for (engine, count), result in sorted(results.items()):
        whole = results[engine.partition(",")[0], world_size[0]]
        cells = [name, engine, str(count), *map(_spread, (result.prompt, result.token))]
        cells += [f"{result.weights / 1e6:.1f}", f"{result.weights / whole.weights:.1%}", f"{result.peak / 1e6:.0f}"]
        cells += [
            f"{result.sent / 1e6:.2f}" if count > 1 and engine != "Lissom" else "",
            f"{result.theory / 1e6:.2f}" if result.theory else "",
        ]
        cells.append("yes" if result.tokens == results["Lissom", world_size[0]].tokens else "no")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], json.dumps(asdict(result)), file=sys.stderr, flush=True)
    return lines


def _spread(figures: tuple[float, float, float]) -> str:
    median, low, high = figures
    return f"{median:.4g} ({low:.3g} to {high:.3g})"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS, help="%(default)s by default")
    parser.add_argument(
        "--world-size", nargs="*", type=int, default=list(WORLD_SIZES), help="world sizes; %(default)s by default"
    )
    parser.add_argument("--rounds", type=int, default=5, help="prompts and answers timed; %(default)s by default")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        engine, source = options.worker
        work(engine, source, options.rounds)
        return
    torch.set_num_threads(1)
    heads = ["model", "engine", "ranks", "prompt, ms", "token, ms", "weights of a rank, MB", "of the whole", "memory, MB"]
    heads += ["sent for a prompt, MB", "theory, MB", "same tokens"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 3) + "---|"]
    for name in options.models:
        lines += rows(name, options.world_size, options.rounds)
    printed = "\n".join(
        [*lines, "", f"Prompt of {PROMPT} tokens, {options.rounds} rounds, one thread a rank. {conditions()}.", ""]
    )
    print(printed)
    if options.update:
        put_table("parallel", printed)


if __name__ == "__main__":
    main()
