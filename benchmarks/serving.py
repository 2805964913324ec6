"""Load test of examples/serve_embeddings.py: PyTorch, ONNX Runtime and Lissom behind the same server.

    python benchmarks/serving.py --update

Each engine runs in a server process of its own with all-MiniLM-L6-v2; this process sends requests of one text of mixed length
over loopback, on the same processor. First a fixed number of clients, each of which sends its next request when it has an
answer; then requests at random times (Poisson) at several rates, to find the highest rate at which the 99th percentile of the
latency stays within a bound; then three times the rate that the engine can serve, to see that no accepted request is lost.
Prints Markdown tables; `--update` puts them into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import platform
import random
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from encoding import BACKENDS, mixed_texts
from readme import processor_kind, put_table
from sentence_transformers import SentenceTransformer
from server_process import HOST, free_port, resident_mb, served

from lissom.frontends.models.huggingface import find_directory

ENGINES = ("torch", "onnxruntime", "lissom", "onnxruntime-int8", "lissom-int8")
CLIENTS = (1, 8, 32)
BATCH_TOKENS = {"torch": 512, "onnxruntime": 512, "onnxruntime-int8": 512}
"""Where padding is computed, small batches are faster; others have the server's default."""
SERVER = Path(__file__).parent.parent / "examples" / "serve_embeddings.py"
_TEXTS = 500
_COMPARED = 64
_STEPS = 6
_IDLE_SECONDS = 4.0
"""A connection that was idle for longer is not used again: the server closes it after 5 seconds."""


@dataclass
class Load:
    """What a load test counted. seconds: of each request that was answered with embeddings, from the time it was due."""

    wall_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    lost: int = 0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.seconds) / self.wall_seconds

    def milliseconds(self, percent: float) -> float:
        """The percentile of the latency."""
        return 1e3 * float(np.percentile(self.seconds, percent)) if self.seconds else math.inf


@dataclass
class Row:
    """An engine's figures. clients: by their number. bounded: the load at the highest rate within the bound."""

    engine: str
    cosine: float
    clients: dict[int, Load]
    bounded: Load
    overload: Load
    resident_mb: tuple[float, float]


class Connections:
    """HTTP connections that are kept; a request takes a free one, or opens one."""

    def __init__(self, port: int, texts: Sequence[str]) -> None:
        self.port, self.free = port, list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]]()
        bodies = [json.dumps({"model": "minilm", "input": text, "encoding_format": "base64"}).encode() for text in texts]
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
        self.requests = [head.format(len(body)).encode() + body for body in bodies]

    async def post(self, index: int) -> tuple[int, bytes]:
        """Status and body of the answer for a text."""
        while self.free and time.perf_counter() - self.free[-1][0] > _IDLE_SECONDS:
            self.free.pop()[2].close()
        reader, writer = self.free.pop()[1:] if self.free else await asyncio.open_connection(HOST, self.port)
        writer.write(self.requests[index % len(self.requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", head)
        assert size is not None, head
        body = await reader.readexactly(int(size[1]))
        if b"connection: close" in head:
            writer.close()
        else:
            self.free.append((time.perf_counter(), reader, writer))
        return int(head.split(b" ", 2)[1]), body

    async def count(self, load: Load, index: int, due: float) -> None:
        """Send one request and count how it went."""
        try:
            status, _ = await self.post(index)
        except (OSError, asyncio.IncompleteReadError):
            status = 0
        if status == 200:
            load.seconds.append(time.perf_counter() - due)
        elif status == 503:
            load.refused += 1
        else:
            load.lost += 1

    async def close(self) -> None:
        """Close the free connections."""
        for _, _, writer in self.free:
            writer.close()
        self.free.clear()


async def closed_loop(to: Connections, clients: int, seconds: float) -> Load:
    """Clients that each wait for an answer before they send again."""
    load, started = Load(), time.perf_counter()

    async def send(first: int) -> None:
        index = first
        while (due := time.perf_counter()) < started + seconds:
            await to.count(load, index, due)
            index += clients

    await asyncio.gather(*(send(first) for first in range(clients)))
    load.wall_seconds = time.perf_counter() - started
    await to.close()
    return load


async def open_loop(to: Connections, rate: float, seconds: float) -> Load:
    """Requests at random times, whatever the server does. rate: per second."""
    draw, load, tasks = random.Random(0), Load(), set[asyncio.Task[None]]()
    started = due = time.perf_counter()
    for index in range(int(rate * seconds)):
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(to.count(load, index, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    load.wall_seconds = time.perf_counter() - started
    await to.close()
    return load


async def highest_rate(to: Connections, most: float, seconds: float, bound: float) -> Load:
    """The load at the highest rate whose 99th percentile is within the bound, by bisection. bound: in milliseconds."""
    low, high, best = 0.0, most, Load(wall_seconds=math.inf)
    for _ in range(_STEPS):
        rate = (low + high) / 2
        load = await open_loop(to, rate, seconds)
        if load.milliseconds(99) <= bound and not load.refused + load.lost:
            low, best = rate, load
        else:
            high = rate
    return best


async def least_cosine(to: Connections, wanted: np.ndarray) -> float:
    """The smallest cosine between the server's embeddings, all asked for at once, and the wanted ones."""
    answers = await asyncio.gather(*(to.post(index) for index in range(len(wanted))))
    embeddings = [json.loads(body)["data"][0]["embedding"] for _, body in answers]
    rows = np.stack([np.frombuffer(base64.b64decode(text), np.float32) for text in embeddings])
    await to.close()
    return float(((rows * wanted).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(wanted, axis=1)).min())


async def measure(engine: str, port: int, process: int, wanted: np.ndarray, options: argparse.Namespace) -> Row:
    """All load tests of one running server."""
    to = Connections(port, mixed_texts(_TEXTS))
    cosine = await least_cosine(to, wanted)
    clients = {count: await closed_loop(to, count, options.seconds) for count in CLIENTS}
    most = max(load.rate for load in clients.values())
    bounded = await highest_rate(to, most, options.seconds, options.p99)
    before = resident_mb(process, "VmRSS")
    overload = await open_loop(to, 3 * most, options.seconds)
    return Row(engine, cosine, clients, bounded, overload, (before, resident_mb(process, "VmHWM")))


def serve(engine: str, port: int) -> None:
    """Run one engine behind the server of the example, in this process."""
    import uvicorn

    example = runpy.run_path(str(SERVER))
    model = SentenceTransformer(str(find_directory("minilm")), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        encoder = example["Encoder"](BACKENDS[engine][1](model, Path(folder)), "minilm")
        default = example["Limits"]()
        limits = example["Limits"](batch_tokens=BATCH_TOKENS.get(engine, default.batch_tokens))
        config = example["configure"](encoder, limits, HOST, port)
        config.log_level = "warning"
        config.configure_logging()
        uvicorn.Server(config).run()


def tables(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The figures as Markdown."""
    clients = " | ".join(f"{count} client{'s' * (count > 1)}" for count in CLIENTS)
    lines = [
        f"| server | {clients} | requests/s at p99 ≤ {options.p99:g} ms | p50, p99 there | × | least cosine |",
        f"|---|{'---|' * len(CLIENTS)}---:|---|---:|---:|",
    ]
    for row in rows:
        cells = [
            f"{load.rate:.0f}/s, {load.milliseconds(50):.0f}, {load.milliseconds(99):.0f} ms" for load in row.clients.values()
        ]
        best, basis = row.bounded, rows[0].bounded.rate
        there = f"{best.milliseconds(50):.0f}, {best.milliseconds(99):.0f} ms" if best.seconds else ""
        times = f"{best.rate / basis:.2f}" if basis else ""
        name = BACKENDS[row.engine][0]
        lines.append(f"| {name} | {' | '.join(cells)} | {best.rate:.0f} | {there} | {times} | {row.cosine:.5f} |")
    lines += [
        "",
        "Three times the rate that the clients reach:",
        "",
        "| server | sent | answered | refused with 503 | lost | p99 of answers, ms | MB before | peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        load, (before, peak) = row.overload, row.resident_mb
        sent = len(load.seconds) + load.refused + load.lost
        lines.append(
            f"| {BACKENDS[row.engine][0]} | {sent} | {len(load.seconds)} | {load.refused} | {load.lost} "
            f"| {load.milliseconds(99):.0f} | {before:.0f} | {peak:.0f} |"
        )
    names = ("torch", "sentence-transformers", "onnxruntime", "starlette", "uvicorn", "lissom")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    where = f"{options.seconds:g} s a cell. {processor_kind()}, {options.threads} threads"
    return "\n".join([*lines, "", f"{where}; Python {platform.python_version()}, {versions}.", ""])


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of %(default)s; the first is the basis")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load test; an engine has ten")
    parser.add_argument("--p99", type=float, default=200.0, help="the bound on the 99th percentile, in milliseconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the model")
    parser.add_argument("--update", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        serve(options.worker, options.port)
        return
    wanted = SentenceTransformer(str(find_directory("minilm")), device="cpu").encode(mixed_texts(_TEXTS)[:_COMPARED])
    rows = []
    for engine in options.engines.split(","):
        port = free_port()
        command = [sys.executable, __file__, f"--worker={engine}", f"--port={port}", f"--threads={options.threads}"]
        with served(command, port) as process:
            rows.append(asyncio.run(measure(engine, port, process, wanted, options)))
        print(f"{engine}: {rows[-1].bounded.rate:.0f} requests/s", flush=True)
    printed = tables(rows, options)
    print(printed)
    if options.update:
        put_table("serving", printed, by_processor=True)


if __name__ == "__main__":
    main()
