"""llama.cpp's server through xllamacpp, as the benchmarks start it: its options, and a process that listens on a port.

python benchmarks/llama.py --port 8002 --texts 8 --length 640
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

import torch

from lissom.frontends.models.huggingface import find_directory


def weights_file() -> Path:
    """The GGUF file of Gemma 3 270M."""
    return next(Path(find_directory("gemma3-270m")).glob("*.gguf"))


def server_options(length: int, texts: int, threads: int) -> Any:
    """Options of a server with a slot for each text of so many tokens, which keeps no prompts."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(weights_file())
    options.n_ctx, options.n_parallel, options.warmup, options.cache_prompt = length * texts, texts, True, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    return options


def main() -> None:
    """Listen until the process is terminated."""
    import xllamacpp

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--texts", type=int, default=1, help="answered at once")
    parser.add_argument("--length", type=int, default=640, help="tokens of a text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    options = server_options(given.length, given.texts, given.threads)
    options.port = given.port
    server = xllamacpp.Server(options)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
