"""Load test of examples/serve_chat.py: every accepted answer is compared with the one computed alone, and memory is watched.

    python benchmarks/chat_load.py --update
    python benchmarks/chat_load.py --model gemma3-270m --requests 2000
    python benchmarks/chat_load.py --model gemma3-270m --passes balanced --requests 0 --streams --peer --update

The server runs in a process of its own, by default with a small Llama of random weights. Client processes send requests in
random order: whole and streamed answers, cancels, and bodies that are refused; more at once than the server admits, so that
some get status 503 and are sent again. While answers arrive, client processes are killed with SIGKILL and replaced. Exits
with 1 if an accepted answer is lost or differs from the greedy one, if memory grows, or if the server's counts do not add up.
`--streams` measures the time to the first token and between tokens, and `--peer` the same of llama.cpp's server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from chat_requests import LENGTH, QUEUE, SEQUENCES, Alone, Wanted, prompts_of, requests_of, save_small_model
from chat_streams import CLIENT_SCRIPT, CLIENTS, HEAD, prompts_for, stream_row
from quality import conditions
from readme import put_table
from server_process import HOST, free_port, resident_mb, served

ROOT = Path(__file__).parent
SERVER = ROOT.parent / "examples" / "serve_chat.py"
PEER_LENGTH = 640
"""Tokens of a text in llama.cpp's slots, as in many_texts.py."""
GROWTH_MB = 8.0
"""Growth that the allocator may cause. One answer kept per request has some KB: 30 MB or more in 10,000 requests."""
SETTLE_SECONDS = 60.0
GAUGES = ("chat_open_requests", "chat_running_texts", "chat_queue_texts", "chat_reserved_slots")
BUSY = "the server is busy; send the request again later"
CONNECTIONS = 6
"""Of each client process."""
_LINE = 1 << 24


@dataclass
class Load:
    """What the clients saw.

    done: the last line about a request. killed: requests without an answer when their client was killed. kills: of clients with
    such a request; planned: those and the ones under way; begun: answers that had begun to arrive then. memory: requests
    that were done, and MB of the server.
    """

    total: int
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)
    kills: int = 0
    planned: int = 0
    begun: int = 0
    memory: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ended(self) -> int:
        """Requests that are done or killed."""
        return len(self.done) + len(self.killed)

    def growth_mb(self, at_end: float) -> float:
        """The memory at the end minus the most of the first tenth."""
        return at_end - max(size for ended, size in self.memory if ended <= max(self.total / 10, self.memory[0][0]))


async def run_client(load: Load, port: int, share: list[dict[str, Any]], kills: int, source: random.Random) -> None:
    """Send a share of the requests by a client process, and by another one whenever it was killed."""
    loop = asyncio.get_running_loop()
    while share:
        command = [sys.executable, str(CLIENT_SCRIPT)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=_LINE)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"port": port, "connections": CONNECTIONS, "requests": share}).encode())
        process.stdin.write_eof()
        sent, begun, is_killed = set[int](), set[int](), False
        async for text in process.stdout:
            try:
                line = json.loads(text)
            except ValueError:  # the last line of a killed process
                continue
            number = line["id"]
            if line["event"] == "sent":
                sent.add(number)
            elif line["event"] == "began":
                begun.add(number)
                if not is_killed and load.planned < min(kills, kills * (load.ended + 1) / load.total):
                    is_killed = True
                    load.planned += 1
                    loop.call_later(source.random() * 0.02, _kill, process)
            else:
                sent.discard(number)
                begun.discard(number)
                if line["event"] == "refused":
                    load.refused.append(line)
                else:
                    load.done[number] = line
        status = await process.wait()
        if status != (-9 if is_killed else 0) and not (is_killed and status == 0):
            raise RuntimeError(f"a client process ended with status {status}")
        load.kills += is_killed and bool(sent)
        load.planned -= is_killed and not sent  # it had ended, or waited to send again
        load.begun += len(begun)
        load.killed |= sent
        share = [request for request in share if request["id"] not in load.done and request["id"] not in load.killed]


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()


async def run_load(
    requests: Sequence[dict[str, Any]], port: int, server: int, *, processes: int, kills: int, seed: int
) -> Load:
    """Send all requests, each process its share; server: the process whose memory is watched."""
    load, source, started = Load(len(requests)), random.Random(seed), time.perf_counter()

    async def watch() -> None:
        while True:
            load.memory.append((load.ended, resident_mb(server, "VmRSS")))
            print(f"\r{load.ended} of {load.total}", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    shares = [list(requests[first::processes]) for first in range(processes)]
    try:
        await asyncio.gather(*(run_client(load, port, share, kills, source) for share in shares))
    finally:
        watching.cancel()
    print(file=sys.stderr)
    load.seconds = time.perf_counter() - started
    return load


def fault(line: dict[str, Any], wanted: Wanted) -> str | None:
    """Why an outcome is wrong, None if it is right; `lost` for an accepted answer that did not come whole."""
    if line.get("left"):
        return None if wanted.text.startswith(line["text"]) else f"wrong: it began {line['text']!r}, not {wanted.text!r}"
    if line["status"] == 0 or (line["status"] == 200 and not line["whole"]):
        return f"lost: {line.get('message', line.get('error'))}"
    if line["status"] != wanted.status:
        return f"wrong: status {line['status']}, not {wanted.status}: {line.get('message')}"
    if line["status"] != 200:
        return None if line["message"].strip() else "wrong: a refusal without a sentence"
    if (line["text"], line["reason"]) != (wanted.text, wanted.reason):
        return f"wrong: {line['text']!r} ({line['reason']}), not {wanted.text!r} ({wanted.reason})"
    return None


def get(port: int, path: str) -> str:
    """The answer to a GET request. Raises OSError if its status is not 200."""
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=60) as answer:
        return answer.read().decode()


def metrics(port: int) -> dict[str, float]:
    """The values of /metrics by name, with labels."""
    return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", get(port, "/metrics"), re.M)}


def settled(port: int) -> dict[str, float]:
    """The metrics once nothing is running, waiting or reserved, or after `SETTLE_SECONDS`."""
    ends = time.monotonic() + SETTLE_SECONDS
    while any((found := metrics(port))[name] for name in GAUGES) and time.monotonic() < ends:
        time.sleep(0.05)
    return found


def count_faults(load: Load, requests: Sequence[dict[str, Any]], found: dict[str, float]) -> list[str]:
    """Where the server's counts differ from those of the clients.

    A request that was left or killed may have reached the server or not, and may be counted with any status.
    """
    at_route = {request["id"] for request in requests if request["raw"].startswith("POST /v1/completions ")}
    seen = Counter(str(line["status"]) for number, line in load.done.items() if number in at_route and not line.get("left"))
    seen.update(str(line["status"]) for line in load.refused)
    unknown = sum(bool(line.get("left")) for line in load.done.values()) + len(load.killed)
    counted = {
        match[1]: int(value)
        for name, value in found.items()
        if (match := re.fullmatch(r'chat_requests_total\{path="/v1/completions",status="(\d+)"\}', name))
    }
    faults = [f"{name} is {found[name]:g} at the end" for name in GAUGES if found[name]]
    faults += [
        f"status {status}: the server counted {counted.get(status, 0)}, the clients {count}"
        for status, count in seen.items()
        if not count <= counted.get(status, 0) <= count + unknown
    ]
    if not seen.total() <= sum(counted.values()) <= seen.total() + unknown:
        faults.append(f"the server counted {sum(counted.values())} requests, the clients {seen.total()} and {unknown} left")
    if strange := counted.keys() - seen.keys() - {"408", "499"}:
        faults.append(f"the server counted statuses that no client saw: {sorted(strange)}")
    return faults


@dataclass
class Result:
    """Outcomes by name, and what was wrong."""

    outcomes: dict[str, object]
    faults: list[str]


def judge(
    load: Load, requests: Sequence[dict[str, Any]], wanted: Sequence[Wanted], found: dict[str, float], mb: float
) -> Result:
    """Compare all outcomes. found: metrics at the end; mb: memory of the server then."""
    verdicts = {number: fault(line, wanted[number]) for number, line in load.done.items()}
    faults = [f"request {number} ({wanted[number].kind}): {why}" for number, why in verdicts.items() if why is not None]
    whole = [number for number, line in load.done.items() if line["status"] == 200 and line.get("whole")]
    right = [number for number in whole if verdicts[number] is None]
    left = [number for number, line in load.done.items() if line.get("left")]
    growth = load.growth_mb(mb)
    outcomes = {
        "requests": load.total,
        "whole answers, all right": sum(not requests[number]["stream"] for number in right),
        "streamed answers, all right": sum(requests[number]["stream"] for number in right),
        "different texts among them": len({load.done[number]["text"] for number in right}),
        "left by the client": len(left),
        "of these, with text that was right so far": sum(bool(load.done[number]["text"]) for number in left),
        "malformed, refused in a sentence": sum(
            wanted[n].kind == "malformed" and not load.done[n].get("left") for n in load.done
        ),
        "503, sent again": len(load.refused),
        "clients killed while they waited for answers": load.kills,
        "their requests": len(load.killed),
        "of these, with an answer that had begun": load.begun,
        "lost answers": sum(str(why).startswith("lost") for why in verdicts.values()),
        "wrong answers": sum(str(why).startswith("wrong") for why in verdicts.values()),
        "MB after a tenth, at the end": f"{mb - growth:.0f}, {mb:.0f}",
    }
    faults += [
        f"a refusal said {line['message']!r}" for line in load.refused if (line["message"], line["retry"] >= 1) != (BUSY, True)
    ]
    if missing := load.total - load.ended:
        faults.append(f"{missing} requests have no outcome")
    if growth > GROWTH_MB:
        faults.append(f"memory grew by {growth:.1f} MB, and may by {GROWTH_MB:g}")
    return Result(outcomes, faults + count_faults(load, requests, found))


def server_command(model: str, port: int, **options: object) -> list[str]:
    """The command line of the server. options: as of the script."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, str(SERVER), model, f"--port={port}", *given]


def load_test(options: argparse.Namespace, model: str, log: IO[str]) -> Result:
    """Start the server and send all requests."""
    alone = Alone(model, options.passes, prompts_of(options.prompts, options.seed))
    requests, wanted = requests_of(alone, options.requests, options.seed)
    port = free_port()
    bounds = {"max_length": LENGTH, "sequences": SEQUENCES, "queue": QUEUE, "passes": options.passes}
    with served(server_command(model, port, **bounds), port, log, {**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        running = run_load(requests, port, process, processes=options.processes, kills=options.kills, seed=options.seed)
        load = asyncio.run(running)
        found = settled(port)
        result = judge(load, requests, wanted, found, resident_mb(process, "VmRSS"))
        get(port, "/health")
    written = Path(log.name).read_text(encoding="utf-8")
    if "Traceback" in written or "ERROR" in written:
        result.faults.append(f"the server wrote errors, the last lines: {written[-2000:]}")
    if load.kills < options.kills:
        result.faults.append(f"{load.kills} clients were killed, not {options.kills}; send more requests")
    result.outcomes["seconds"] = f"{load.seconds:.0f}"
    return result


@contextmanager
def peer(clients: int, threads: int) -> Iterator[int]:
    """llama.cpp's server with a slot for each client; gives its port."""
    port = free_port()
    sizes = [f"--port={port}", f"--texts={clients}", f"--length={PEER_LENGTH}", f"--threads={threads}"]
    with served([sys.executable, str(ROOT / "llama.py"), *sizes], port):
        yield port


def stream_rows(options: argparse.Namespace, model: str, log: IO[str]) -> list[str]:
    """The table of times of streamed answers."""
    from lissom.frontends.models.huggingface import find_directory, tokenizer_of

    prompts, port, rows = prompts_for(tokenizer_of(find_directory(model))), free_port(), [*HEAD]
    command = server_command(model, port, max_length=PEER_LENGTH, sequences=max(CLIENTS), passes=options.passes)
    with served(command, port, log, {**os.environ, "OMP_NUM_THREADS": str(options.threads)}):
        for clients in CLIENTS:
            fields = {"model": Path(model).name}
            rows.append(stream_row(f"Lissom, `{options.passes}`", port, prompts[clients], clients, fields))
    for clients in CLIENTS if options.peer else ():
        with peer(clients, options.threads) as port:
            rows.append(stream_row("llama.cpp", port, prompts[clients], clients, {"ignore_eos": True, "cache_prompt": False}))
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="as of the server; by default a small Llama with random weights")
    parser.add_argument("--passes", default="exact", help="a pipeline or a recipe")
    parser.add_argument("--requests", type=int, default=10_000, help="of the load test; 0 for none")
    parser.add_argument("--prompts", type=int, default=200, help="different ones")
    parser.add_argument("--processes", type=int, default=6, help="of clients")
    parser.add_argument("--kills", type=int, default=100, help="of client processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the server, for --streams")
    parser.add_argument("--streams", action="store_true", help="measure the times of streamed answers")
    parser.add_argument("--peer", action="store_true", help="and those of llama.cpp, with --streams and gemma3-270m")
    parser.add_argument("--update", action="store_true", help="put the tables into benchmarks/README.md")
    options = parser.parse_args(arguments)
    if options.peer and not (options.streams and options.model == "gemma3-270m"):
        parser.error("--peer needs --streams and --model gemma3-270m")
    return options


def main() -> None:
    """Run the test and print the tables."""
    options = parse()
    tables, faults = dict[str, list[str]](), list[str]()
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        model = options.model or str(Path(folder) / "small")
        if options.model is None:
            save_small_model(Path(model))
        if options.requests:
            result = load_test(options, model, log)
            rows = [f"| {name} | {value} |" for name, value in result.outcomes.items()]
            tables["chat_load"] = ["| load test | |", "|---|---:|", *rows]
            faults += result.faults
        if options.streams:
            tables["chat_streams"] = stream_rows(options, model, log)
    last = f"{options.model or 'a small Llama'}. {conditions()}."
    texts = {name: "\n".join([*rows, "", last, ""]) for name, rows in tables.items()}
    print(*texts.values(), sep="\n")
    if faults:
        print(f"{len(faults)} faults, the first:", *faults[:20], sep="\n", file=sys.stderr)
        raise SystemExit(1)
    for name, text in texts.items() if options.update else ():
        put_table(name, text, by_processor=True)


if __name__ == "__main__":
    main()
