"""The load test of benchmarks/chat_load.py, shorter, and its judgement; and what a server process does when it is stopped."""

from __future__ import annotations

import importlib
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tests.support.chat_server import LENGTH, PROMPTS, alone, completion, small_model
from tests.support.servers import ROOT, ask, in_process, until

for package in ("starlette", "uvicorn", "llguidance"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lissom[serve]'")


@pytest.fixture(scope="module")
def benchmark():
    """The modules of the load test, which import their neighbours in benchmarks/ by name."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        names = ("chat_load", "chat_requests", "chat_streams")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(folder)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_load(benchmark, tmp_path):
    model = tmp_path / "small"
    benchmark.chat_requests.save_small_model(model)
    options = benchmark.chat_load.parse(["--requests=900", "--kills=10", "--prompts=60"])
    with (tmp_path / "log").open("w") as log:
        result = benchmark.chat_load.load_test(options, str(model), log)
    assert result.faults == []
    outcomes = result.outcomes
    assert outcomes["whole answers, all right"] > 200
    assert outcomes["streamed answers, all right"] > 200
    assert outcomes["different texts among them"] > 100
    assert outcomes["left by the client"] > 90
    assert outcomes["malformed, refused in a sentence"] > 50
    assert outcomes["503, sent again"] > 0
    assert outcomes["clients killed while they waited for answers"] >= 10


@pytest.mark.slow
@pytest.mark.multiprocess
def test_times_of_streams(benchmark, tmp_path, monkeypatch):
    model = tmp_path / "small"
    benchmark.chat_requests.save_small_model(model)
    monkeypatch.setattr(benchmark.chat_load, "CLIENTS", (2,))
    options = benchmark.chat_load.parse(["--streams", "--threads=1"])
    with (tmp_path / "log").open("w") as log:
        row = benchmark.chat_load.stream_rows(options, str(model), log)[-1]
    name, clients, *milliseconds = [cell.strip() for cell in row.strip("|").split("|")]
    assert (name, clients) == ("Lissom, `exact`", "2")
    first, first_99, between, between_99 = map(float, milliseconds)
    assert 0 < first <= first_99
    assert 0 < between <= between_99


RIGHT = {"status": 200, "text": "a lake", "reason": "length", "whole": True}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (RIGHT, None),
        (RIGHT | {"text": "a lane"}, "wrong: 'a lane' (length), not 'a lake' (length)"),
        (RIGHT | {"reason": "stop"}, "wrong: 'a lake' (stop), not 'a lake' (length)"),
        (RIGHT | {"whole": False, "error": "the model failed"}, "lost: the model failed"),
        ({"status": 0, "left": False, "message": "reset"}, "lost: reset"),
        ({"status": 500, "message": "the model failed"}, "wrong: status 500, not 200: the model failed"),
        ({"status": 200, "left": True, "text": "a l"}, None),
        ({"status": 200, "left": True, "text": "a b"}, "wrong: it began 'a b', not 'a lake'"),
    ],
)
def test_each_outcome_is_judged(benchmark, line, fault):
    assert benchmark.chat_load.fault(line, benchmark.chat_requests.Wanted("stream", 200, "a lake", "length")) == fault


def judged(benchmark, mb: float = 95.0, **changes: float) -> list[str]:
    """The faults of a load of two right answers, a refusal, one left, and one killed, with changed metrics."""
    load = benchmark.chat_load.Load(5, killed={3}, refused=[{"status": 503, "message": benchmark.chat_load.BUSY, "retry": 1.0}])
    load.done = {0: RIGHT, 1: RIGHT, 2: {"status": 200, "left": True, "text": "a"}, 4: {"status": 400, "message": "not JSON"}}
    load.memory = [(0, 90.0), (5, 100.0)]
    wanted = [benchmark.chat_requests.Wanted("whole", 200, "a lake", "length")] * 4
    wanted.append(benchmark.chat_requests.Wanted("malformed", 400))
    requests = [{"id": number, "stream": False, "raw": "POST /v1/completions HTTP/1.1"} for number in range(5)]
    counts = {"200": 2, "400": 1, "503": 1, "499": 1}
    found = {f'chat_requests_total{{path="/v1/completions",status="{status}"}}': float(n) for status, n in counts.items()}
    found |= dict.fromkeys(benchmark.chat_load.GAUGES, 0.0)
    return benchmark.chat_load.judge(load, requests, wanted, found | changes, mb).faults


def total(status: int, count: int) -> dict[str, float]:
    return {f'chat_requests_total{{path="/v1/completions",status="{status}"}}': float(count)}


def test_counts_and_memory_are_judged(benchmark):
    assert judged(benchmark) == []
    assert judged(benchmark, chat_running_texts=1.0) == ["chat_running_texts is 1 at the end"]
    assert judged(benchmark, chat_reserved_slots=16.0) == ["chat_reserved_slots is 16 at the end"]
    assert judged(benchmark, mb=99.0) == ["memory grew by 9.0 MB, and may by 8"]
    assert judged(benchmark, **total(499, 2)) == []
    assert judged(benchmark, **total(499, 3)) == ["the server counted 7 requests, the clients 4 and 2 left"]
    assert judged(benchmark, **total(400, 0))[0] == "status 400: the server counted 0, the clients 1"
    assert judged(benchmark, **total(500, 1)) == ["the server counted statuses that no client saw: ['500']"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_server_process_answers_what_it_accepted(tmp_path, decoder, words):
    folder, prompt, count = tmp_path / "tiny", PROMPTS[0], 60
    small_model().save_pretrained(folder)
    words.save_pretrained(folder)
    with (
        in_process("serve_chat", str(folder), f"--max-length={LENGTH}", "--sequences=4") as (process, port),
        ThreadPoolExecutor(8) as clients,
    ):
        asked = [clients.submit(ask, port, "/v1/completions", completion(prompt, count)) for _ in range(8)]
        until(lambda: "chat_open_requests 8\n" in ask(port, "/metrics")[1] or any(item.done() for item in asked))
        process.send_signal(signal.SIGTERM)
        answers = [item.result() for item in asked]
        assert [body["choices"][0]["text"] for _, body, _ in answers] == [alone(decoder, words, prompt, count)] * 8
        assert process.wait(60) in (0, -signal.SIGTERM)
