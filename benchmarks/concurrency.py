"""Calls one compiled model from several threads at once, and checks the outputs and the growth of memory.

    python benchmarks/concurrency.py

all-MiniLM-L6-v2; each thread has its own glosses, of its own length, and calls the model 1,000 times. The exit status is 1
if an output differs from that of a single thread. Memory is read from /proc, so this runs on Linux.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import torch
from memory import used_memory

import lissom
from lissom.cli.bench.workload import Inputs, Shape, answer, encode, load_model
from lissom.cli.calibration_files import read_texts
from lissom.runtime.compiled_model import CompiledModel

GLOSSES = Path(__file__).parent / "data" / "glosses.txt"
_ROWS = 2


def wrong_answers(compiled: CompiledModel, inputs: list[Inputs], calls: int) -> int:
    """The number of calls whose outputs differ from those of a single thread; one thread per input, `calls` calls each."""
    wanted = [torch.from_numpy(answer(compiled(**example)).copy()) for example in inputs]
    together = threading.Barrier(len(inputs))
    wrong = [0] * len(inputs)

    def call_often(index: int) -> None:
        together.wait()
        for _ in range(calls):
            try:
                wrong[index] += not torch.equal(torch.from_numpy(answer(compiled(**inputs[index]))), wanted[index])
            except Exception as error:
                print(f"thread {index}: {type(error).__name__}: {error}", file=sys.stderr)
                wrong[index] += 1

    threads = [threading.Thread(target=call_often, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(wrong)


def main() -> int:
    """Call the model, compare the outputs, and print the growth of memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=8, help="number of threads")
    parser.add_argument("--calls", type=int, default=1000, help="calls per thread")
    parser.add_argument("--passes", default="exact", help="pipeline text or a recipe's name")
    parser.add_argument("--backend", default="eager", help="the backend")
    options = parser.parse_args()
    model, texts = load_model("minilm"), read_texts(GLOSSES)
    compiled = lissom.compile(model.source.model, model.example, passes=options.passes, backend=options.backend)
    first = range(0, _ROWS * options.threads, _ROWS)
    inputs = [encode(model, Shape(_ROWS, None), [texts[(at + row) % len(texts)] for row in range(_ROWS)]) for at in first]
    wrong_answers(compiled, inputs, 5)
    before, started = used_memory("VmRSS"), time.perf_counter()
    wrong = wrong_answers(compiled, inputs, options.calls)
    seconds, grown = time.perf_counter() - started, used_memory("VmRSS") - before
    total = options.threads * options.calls
    print(f"{options.threads} threads, {total} calls in {seconds:.1f} s: {wrong} answers differ from those of a single thread")
    print(f"memory: {before / 1e6:.0f} MB after warming up, {grown / 1e6:+.1f} MB since")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
