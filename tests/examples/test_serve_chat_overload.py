"""The server of examples/serve_chat.py where clients leave, are too many, or do not read, and where it is stopped."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.chat_server import (
    PROMPTS,
    alone,
    completion,
    running,
    until_idle,
    until_no_request,
)
from tests.support.servers import HOST, ask, ask_many

for package in ("starlette", "uvicorn", "llguidance"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lissom[serve]'")


@pytest.fixture(scope="module")
def port(chat_example, decoder, words):
    """A server for the tests that do not stop it."""
    with running(decoder, words, chat_example.Limits(body_seconds=0.3)) as server:
        yield server.config.port


def test_a_body_that_does_not_come_is_given_up(port):
    with socket.create_connection((HOST, port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in connection.recv(4096).partition(b"\r\n")[0]


class Gate:
    """Holds the calls of a decoder while it is closed."""

    def __init__(self, decoder, monkeypatch):
        self.open, read = threading.Event(), decoder.compiled.run
        self.open.set()

        def gated(inputs):
            assert self.open.wait(60)
            return read(inputs)

        monkeypatch.setattr(decoder.compiled, "run", gated)


@pytest.fixture
def gate(decoder, monkeypatch):
    found = Gate(decoder, monkeypatch)
    yield found
    found.open.set()


def post(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slots(port, decoder, words, gate, stream):
    gate.open.clear()
    connections = [socket.create_connection((HOST, port), timeout=30) for _ in range(6)]
    for connection in connections:
        connection.sendall(post(completion("and", 100, stream=stream)))
    while decoder.running + decoder.waiting < 6:
        time.sleep(0.01)
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    until_no_request(port)
    assert (decoder.running, decoder.waiting) == (0, 0)  # though no call has ended
    gate.open.set()
    assert ask(port, "/v1/completions", completion("and"))[1]["choices"][0]["text"] == alone(decoder, words, "and", 16)
    assert 'status="499"' in ask(port, "/metrics")[1]


def test_a_reader_that_does_not_read_delays_no_other(chat_example, decoder, words):
    limits = chat_example.Limits(send_seconds=0.5)
    with running(decoder, words, limits) as server, socket.socket() as lazy:
        port = server.config.port
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.connect((HOST, port))
        lazy.sendall(post(completion("and", 100, stream=True, logprobs=5)))
        answers = ask_many(port, "/v1/completions", [completion(prompt) for prompt in PROMPTS])
        assert [body["choices"][0]["text"] for _, body, _ in answers] == [alone(decoder, words, p, 16) for p in PROMPTS]
        until_idle(decoder)
        until_no_request(port)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_never_reads_is_given_up(chat_example, decoder, words, stream):
    app = chat_example.configure(decoder, words, "tiny", chat_example.Limits(send_seconds=0.2), HOST, 0).app
    data, never = json.dumps(completion("and", 100, stream=stream)).encode(), 3600
    sent = []

    async def receive():
        if sent:
            await asyncio.sleep(never)
        sent.append(data)
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(never)

    async def ask_once():
        async with app.router.lifespan_context(app):
            await app({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)

    asyncio.run(asyncio.wait_for(ask_once(), 60))
    route = next(route for route in app.routes if route.path == "/v1/completions")
    assert route.endpoint.server.answered == {("/v1/completions", 499): 1}
    assert (route.endpoint.server.open, decoder.running, decoder.waiting) == (0, 0, 0)


def test_a_full_queue_refuses_and_loses_nothing(chat_example, decoder, words, gate):
    with running(decoder, words, chat_example.Limits(queue=3)) as server, ThreadPoolExecutor(20) as clients:
        port = server.config.port
        gate.open.clear()
        asked = [clients.submit(ask, port, "/v1/completions", completion(f"and {i}")) for i in range(20)]
        while sum(item.done() for item in asked) < 13:
            time.sleep(0.01)
        gate.open.set()
        answers = [item.result() for item in asked]
    statuses = [status for status, _, _ in answers]
    assert (statuses.count(200), statuses.count(503)) == (7, 13)
    for index, (status, body, headers) in enumerate(answers):
        if status == 200:
            assert body["choices"][0]["text"] == alone(decoder, words, f"and {index}", 16)
        else:
            assert body["error"]["message"] == "the server is busy; send the request again later"
            assert int(headers["Retry-After"]) >= 1


def test_open_requests_are_bounded(chat_example, decoder, words, gate):
    with running(decoder, words, chat_example.Limits(requests=2)) as server, ThreadPoolExecutor(4) as clients:
        gate.open.clear()
        asked = [clients.submit(ask, server.config.port, "/v1/completions", completion("and")) for _ in range(4)]
        while sum(item.done() for item in asked) < 2:
            time.sleep(0.01)
        gate.open.set()
        assert sorted(item.result()[0] for item in asked) == [200, 200, 503, 503]


def test_accepted_requests_are_answered_after_server_stop(chat_example, decoder, words, gate):
    with running(decoder, words, chat_example.Limits()) as server, ThreadPoolExecutor(8) as clients:
        port = server.config.port
        gate.open.clear()
        bodies = [completion(f"and {i}", stream=i % 2 == 0) for i in range(8)]
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(raw, port, body) for body in bodies]
            while decoder.running + decoder.waiting < 8:
                time.sleep(0.01)
            server.should_exit = True
            gate.open.set()
            answers = [item.result() for item in asked]
    for index, answer in enumerate(answers):
        text = alone(decoder, words, f"and {index}", 16)
        if index % 2:
            assert json.loads(answer)["choices"][0]["text"] == text
        else:
            events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
            assert events[-1] == "[DONE]"
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == text
    with pytest.raises(OSError):
        socket.create_connection((HOST, port))


def raw(port: int, body: object) -> str:
    with urllib.request.urlopen(f"http://{HOST}:{port}/v1/completions", json.dumps(body).encode(), timeout=60) as answer:
        return answer.read().decode()


def test_a_model_that_fails_is_said_and_survived(chat_example, decoder, words, monkeypatch, caplog):
    run = decoder.compiled.run

    def failing(inputs):
        if (inputs[0] == 7).any():
            raise RuntimeError("no room")
        return run(inputs)

    monkeypatch.setattr(decoder.compiled, "run", failing)
    with running(decoder, words, chat_example.Limits()) as server:
        port = server.config.port
        bad = {**completion("and"), "prompt": [2, 7]}
        status, found, _ = ask(port, "/v1/completions", bad)
        assert (status, found["error"]["message"]) == (500, "the model failed: RuntimeError")
        assert '"the model failed: RuntimeError"' in raw(port, {**bad, "stream": True})
        assert ask(port, "/v1/completions", completion("and", 1))[0] == 200
        assert ask(port, "/health")[0] == 200
