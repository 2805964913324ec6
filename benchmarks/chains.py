"""One call with and without chains: operators that the library of kernels calls, and the same called from Python.

    python benchmarks/chains.py --update

all-MiniLM-L6-v2 with one row of tokens, and a token of Gemma 3 270M after 128 others. Both functions are of one program with
the same weights, and are timed in turn; their outputs must be the same to the last bit. Prints a Markdown table; `--update`
puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from quality import conditions
from quantization import own_head
from readme import put_table
from spread import spread

import lissom
from lissom.backends.eager.backend import build_function
from lissom.backends.eager.methods import METHODS
from lissom.compiler.ir.program import Program
from lissom.frontends.models.huggingface import load
from lissom.measure.timing import time_calls

BF16 = "cast,sink-casts,fold-casts"
ENCODERS = {"float32": "exact", "bfloat16": BF16, "int8": "int8"}
DECODERS = {
    "bfloat16": BF16,
    "int8": f"{BF16},quantize{{embeddings=true}}",
    "int4": own_head(BF16, "int4-dynamic"),
}
LENGTH, PLACE = 1024, 128
"""Of the KV cache, and of the token."""


def encoder_programs() -> Iterator[tuple[str, Program, list[torch.Tensor]]]:
    """The programs of MiniLM: a title, the program and its flat inputs."""
    model = load("minilm").model.eval()
    for length in (16, 32, 128):
        ids = torch.randint(1000, 20000, (1, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, passes in ENCODERS.items():
            compiled = lissom.compile(model, inputs, passes=passes, checks="structural", goal=None)
            yield f"MiniLM, 1x{length}, {name}", compiled.program, list(inputs.values())


def decoder_programs() -> Iterator[tuple[str, Program, list[torch.Tensor]]]:
    """The same for one token of Gemma."""
    model = load("gemma3-270m").model
    for name, passes in DECODERS.items():
        generator = lissom.compile_generation(model, max_length=LENGTH, passes=passes, checks="structural", goal=None)
        inputs = [_input(node.name, node.meta["val"]) for node in generator.program.placeholders]
        yield f"Gemma 3 270M, a token, {name}", generator.program, inputs


def _input(name: str, value: torch.Tensor) -> torch.Tensor:
    sizes = [size if isinstance(size, int) else 1 for size in value.shape]
    if "mask" in name:
        return torch.ones(1, sizes[1] if isinstance(value.shape[1], int) else LENGTH, dtype=value.dtype)
    return torch.full(sizes, 1 if "ids" in name and "position" not in name else PLACE, dtype=value.dtype)


def row(name: str, program: Program, inputs: Sequence[torch.Tensor], seconds: float) -> str:
    """A row of the table. Raises: SystemExit where the outputs differ."""
    functions = {
        "chains": build_function(program),
        "python": build_function(program, calls=lambda node: METHODS.get(node.target, node.target)),
    }
    outputs = [[value for value in function(inputs) if isinstance(value, torch.Tensor)] for function in functions.values()]
    if not all(map(torch.equal, *outputs)):
        raise SystemExit(f"{name}: the outputs with and without chains differ")
    times = time_calls({key: (lambda function=function: function(inputs)) for key, function in functions.items()}, seconds)
    cells = [spread((time.median_ms, time.low_ms, time.high_ms), 3) for time in (times["python"], times["chains"])]
    saved = 1 - times["chains"].median_ms / times["python"].median_ms
    return f"| {name} | {len(program.nodes())} | {' | '.join(cells)} | {saved:.0%} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each row")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    lines = ["| call | operators | from Python, ms | in chains, ms | saved |", "|---|---:|---:|---:|---:|"]
    for programs in (encoder_programs, decoder_programs):
        for name, program, inputs in programs():
            lines.append(row(name, program, inputs, options.seconds))
            print(lines[-1], flush=True)
    lines += ["", f"Medians (middle half). {conditions()}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.update:
        put_table("chains", text, by_processor=True)


if __name__ == "__main__":
    main()
