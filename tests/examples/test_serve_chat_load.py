"""The server of examples/serve_chat.py under load: hundreds of requests, of which some are cancelled, and its process."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.chat_server import (
    EXAMPLE,
    HOST,
    alone,
    ask,
    completion,
    load_example,
    running,
    small_model,
    small_pool,
    small_tokenizer,
)
from tests.support.ranks import free_port

for package in ("starlette", "uvicorn", "llguidance"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lissom[serve]'")

PROMPTS = ["The quick brown fox", "A vocabulary has rows", "日本語の文章", "jumps over the lazy dog, and the dog sleeps " * 3]
SHORT, LONG = 8, 60


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def text_of(answer: bytes, stream: bool) -> str:
    """The text of an HTTP answer, whose chunks end with a line each."""
    body = answer.decode().partition("\r\n\r\n")[2]
    if not stream:
        return json.loads(body)["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def request(port: int, seed: int, wanted: dict[tuple[str, int], str]) -> str:
    """Send a random request; it is cancelled at a random time, or its text is compared. Returns which."""
    source = random.Random(seed)
    prompt, count, stream = source.choice(PROMPTS), source.choice([SHORT, LONG]), source.random() < 0.5
    data = json.dumps(completion(prompt, count, stream=stream)).encode()
    with socket.create_connection((HOST, port), timeout=120) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        if source.random() < 0.3:
            time.sleep(source.random() * 0.1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", source.randint(0, 1), 0))
            return "cancelled"
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    status = int(answer.split(b" ", 2)[1])
    if status == 503:
        time.sleep(0.1)
        return "refused"
    assert (status, text_of(answer, stream)) == (200, wanted[prompt, count])
    return "right"


@pytest.mark.slow
def test_hundreds_of_requests_with_cancels():
    decoder, words, example = small_pool(), small_tokenizer(), load_example()
    wanted = {(prompt, count): alone(decoder, words, prompt, count) for prompt in PROMPTS for count in (SHORT, LONG)}
    sizes, ended = list[int](), list[str]()
    with running(decoder, words, example.Limits(queue=12)) as server, ThreadPoolExecutor(18) as clients:
        port = server.config.port
        for start in range(0, 900, 300):
            ended += clients.map(lambda seed: request(port, seed, wanted), range(start, start + 300))
            while "chat_open_requests 0\n" not in ask(port, "/metrics")[1] or decoder.running or decoder.waiting:
                time.sleep(0.01)
            sizes.append(resident_bytes())
    assert ended.count("right") > 300
    assert ended.count("cancelled") > 150
    assert "refused" in ended
    # Threads and the allocator settle in the first 300 requests. One text that is kept for each would be 300 x 60 pieces, and
    # one row of logits for each token more.
    assert max(sizes[1:]) - sizes[0] < 8_000_000, sizes


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_server_process_answers_what_it_accepted(tmp_path):
    small_model().save_pretrained(tmp_path / "tiny")
    words = small_tokenizer()
    words.save_pretrained(tmp_path / "tiny")
    port, wanted = free_port(), alone(small_pool(), words, PROMPTS[0], LONG)
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "tiny"), f"--port={port}", "--max-length=128", "--sequences=4"]
    process = subprocess.Popen(command, env={**os.environ})
    try:
        for _ in range(3000):
            assert process.poll() is None
            with suppress(OSError):
                assert ask(port, "/health")[0] == 200
                break
            time.sleep(0.1)
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(ask, port, "/v1/completions", completion(PROMPTS[0], LONG)) for _ in range(8)]
            while "chat_open_requests 8\n" not in ask(port, "/metrics")[1] and not any(item.done() for item in asked):
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            answers = [item.result() for item in asked]
        assert [body["choices"][0]["text"] for _, body, _ in answers] == [wanted] * 8
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
