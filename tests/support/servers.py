"""The servers of examples/, in a thread or a process of their own, and requests to them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.message import Message
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.support.ranks import free_port

ROOT = Path(__file__).parent.parent.parent
HOST = "127.0.0.1"


def script(name: str) -> Path:
    """A script in examples/."""
    return ROOT / "examples" / f"{name}.py"


@cache
def load_example(name: str) -> ModuleType:
    """A script in examples/ as a module."""
    specification = importlib.util.spec_from_file_location(name, script(name))
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@contextmanager
def in_thread(config) -> Iterator:
    """A server with uvicorn's settings in a thread; gives it once it has started."""
    import uvicorn

    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def in_process(name: str, *arguments: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A script in examples/ in a process of its own; gives the process and its port once it is healthy."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(script(name)), *arguments, f"--port={port}"])
    try:
        for _ in range(3000):
            assert process.poll() is None
            with suppress(OSError):
                assert ask(port, "/health")[0] == 200
                break
            time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def ask(port: int, path: str, body: object = None) -> tuple[int, dict | str, Message]:
    """Status, body and headers. body: sent as JSON unless bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", data)
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read().decode()
        return answer.status, text if path == "/metrics" else json.loads(text), answer.headers


def ask_many(port: int, path: str, bodies: list) -> list:
    """All requests at once."""
    with ThreadPoolExecutor(len(bodies)) as clients:
        return list(clients.map(lambda body: ask(port, path, body), bodies))
