"""The server of examples/serve_embeddings.py over HTTP: answers, batches, bounds, refusals, overload and its end."""

from __future__ import annotations

import base64
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import lissom
from lissom.frontends.models.huggingface import find_directory
from tests.support.ranks import free_port
from tests.support.sentence_models import TEXTS, sentence_transformer
from tests.support.servers import HOST, ask, ask_many, in_process, in_thread, load_example, until

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'lissom[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'lissom[serve]'")

MANY = [f"{text} {index}" for index in range(12) for text in TEXTS]


@pytest.fixture(scope="module")
def example():
    return load_example("serve_embeddings")


@pytest.fixture(scope="module")
def model():
    return lissom.compile(sentence_transformer(), checks="structural", goal=None)


@pytest.fixture(scope="module")
def port(example, model):
    """A server with small bounds, for the tests that do not stop it."""
    limits = example.Limits(batch_tokens=100, queue_tokens=6000, texts=50, body_bytes=20_000, body_seconds=0.3)
    with running(example, example.Encoder(model, "tiny"), limits) as server:
        yield server.config.port


def running(example, encoder, limits) -> AbstractContextManager:
    return in_thread(example.configure(encoder, limits, HOST, free_port()))


def test_answers_are_those_of_encode(port, model):
    status, found, _ = ask(port, "/embed", {"texts": TEXTS})
    assert status == 200
    np.testing.assert_allclose(found["embeddings"], model.encode(TEXTS), atol=1e-5)  # other batches, other sums


def test_the_api_of_openai(port, model):
    status, found, _ = ask(port, "/v1/embeddings", {"input": TEXTS[0], "model": "tiny"})
    assert status == 200
    assert found["model"] == "tiny"
    assert found["usage"]["prompt_tokens"] == len(model.tokenizer(TEXTS[0])["input_ids"])
    asked = {"input": TEXTS, "model": "tiny", "encoding_format": "base64"}
    data = ask(port, "/v1/embeddings", asked)[1]["data"]
    assert [item["index"] for item in data] == [0, 1, 2, 3]
    rows = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])
    np.testing.assert_allclose(rows, model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(found["data"][0]["embedding"], rows[0], atol=1e-5)


def test_many_at_once_share_batches(port, model):
    answers = ask_many(port, "/embed", [{"texts": [text]} for text in MANY])
    assert [status for status, _, _ in answers] == [200] * len(MANY)
    np.testing.assert_allclose([body["embeddings"][0] for _, body, _ in answers], model.encode(MANY), atol=1e-5)
    metrics = ask(port, "/metrics")[1]
    sizes = {name: float(value) for name, value in re.findall(r"^embeddings_batch_texts_(sum|count) (\S+)$", metrics, re.M)}
    assert sizes["sum"] >= len(MANY) > sizes["count"]
    assert 'embeddings_request_seconds_bucket{path="/embed",le="+Inf"}' in metrics
    assert "\nembeddings_queue_tokens 0\n" in metrics


def test_one_client_does_not_wait_for_others(example, model):
    """Requests of several texts too: as many as the last batch had are there at once."""
    with running(example, example.Encoder(model, "tiny"), example.Limits(wait_seconds=1000.0)) as server:
        answers = [ask(server.config.port, "/embed", {"texts": texts}) for texts in (TEXTS[:1], TEXTS[:2], TEXTS[:2])]
        assert [status for status, _, _ in answers] == [200] * 3


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/embed", b"{", 400, "the body is not JSON"),
        ("/embed", b"\xff", 400, "the body is not JSON"),
        ("/embed", b"[" * 10_000, 400, "the body is not JSON"),
        ("/embed", [], 400, "the body is not a JSON object"),
        ("/embed", {}, 400, "texts is not a list of texts"),
        ("/embed", {"texts": []}, 400, "texts is not a list of texts"),
        ("/embed", {"texts": ["a", 1]}, 400, "texts is not a list of texts"),
        ("/embed", {"texts": ["\ud800"]}, 400, "texts has a text that is not Unicode"),
        ("/embed", {"texts": ["a"], "truncate": 1}, 400, "truncate is neither true nor false"),
        ("/embed", {"text": "a"}, 400, "the request has no field 'text'; it has texts, truncate"),
        ("/embed", {"texts": ["a"] * 51}, 413, "the request has 51 texts, and may have 50"),
        ("/embed", {"texts": ["a " * 63]}, 413, "text 0 has 65 tokens, and may have 64; shorten it, or send truncate: true"),
        ("/embed", b" " * 30_000, 413, "the body has 30000 bytes, and may have 20000; send fewer texts"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "this server has the model 'tiny'; give it as model"),
        ("/v1/embeddings", {"input": [[1, 2]], "model": "tiny"}, 400, "input is not a list of texts"),
        (
            "/v1/embeddings",
            {"input": "a", "model": "tiny", "dimensions": 4},
            400,
            "the model has 8 dimensions; leave out dimensions",
        ),
        (
            "/v1/embeddings",
            {"input": "a", "model": "tiny", "encoding_format": "int8"},
            400,
            "encoding_format is neither 'float' nor 'base64'",
        ),
        ("/v2", {}, 404, "Not Found"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(port, path, body, status, sentence):
    found, answer, _ = ask(port, path, body)
    assert (found, answer["error"]["message"]) == (status, sentence)
    assert ask(port, "/health")[:2] == (200, {"status": "ok"})


def test_truncate_cuts_a_long_text(port, model):
    status, found, _ = ask(port, "/embed", {"texts": ["a " * 99], "truncate": True})
    assert status == 200
    np.testing.assert_allclose(found["embeddings"], model.encode(["a " * 99]), atol=1e-5)


def test_a_body_that_does_not_come_is_given_up(port):
    with socket.create_connection((HOST, port), timeout=30) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        answer = connection.recv(4096)
    assert b" 408 " in answer.partition(b"\r\n")[0]


def slow(example, model, seconds: float):
    class Slow(example.Encoder):
        def embed(self, texts):
            time.sleep(seconds)
            return super().embed(texts)

    return Slow(model, "tiny")


def test_a_full_queue_refuses_and_loses_nothing(example, model):
    limits = example.Limits(batch_tokens=16, queue_tokens=100)
    with running(example, slow(example, model, 0.02), limits) as server:
        port = server.config.port
        answers = ask_many(port, "/embed", [{"texts": [text]} for text in MANY])
        assert ask(port, "/embed", {"texts": MANY})[1]["error"]["message"].endswith("queue holds 100; send fewer texts")
        metrics = ask(port, "/metrics")[1]
    wanted = model.encode(MANY)
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503}
    for row, (status, body, headers) in zip(wanted, answers, strict=True):
        if status == 200:
            np.testing.assert_allclose(body["embeddings"][0], row, atol=1e-5)
        else:
            assert body["error"]["message"] == "the server is busy; send the request again later"
            assert int(headers["Retry-After"]) >= 1
    assert f'status="200"}} {statuses.count(200)}\n' in metrics
    assert f'status="503"}} {statuses.count(503)}\n' in metrics


def test_open_requests_are_bounded(example, model):
    with running(example, slow(example, model, 0.1), example.Limits(requests=2)) as server:
        statuses = [status for status, _, _ in ask_many(server.config.port, "/embed", [{"texts": ["a"]}] * 4)]
    assert set(statuses) == {200, 503}


def test_accepted_requests_are_answered_after_server_stop(example, model):
    with running(example, slow(example, model, 0.05), example.Limits(batch_tokens=16)) as server:
        port = server.config.port
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(ask, port, "/embed", {"texts": TEXTS}) for _ in range(8)]
            while len(server.server_state.tasks) < 8:
                time.sleep(0.001)
            server.should_exit = True
            answers = [item.result() for item in asked]
    for status, body, _ in answers:
        assert status == 200
        np.testing.assert_allclose(body["embeddings"], model.encode(TEXTS), atol=1e-5)
    with pytest.raises(OSError):
        socket.create_connection((HOST, port))


def test_a_model_that_fails_is_said_and_survived(example, model, caplog):
    class Failing(example.Encoder):
        def embed(self, texts):
            if any(len(ids) > 30 for ids in texts):
                raise RuntimeError("no room")
            return super().embed(texts)

    with running(example, Failing(model, "tiny"), replace(example.Limits(), batch_tokens=8)) as server:
        found = ask_many(server.config.port, "/embed", [{"texts": [text]} for text in TEXTS])
    assert [status for status, _, _ in found] == [200, 200, 200, 500]
    assert found[3][1]["error"]["message"] == "the model failed: RuntimeError"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_server_process_with_minilm():
    texts = [f"{text} {index}" for index in range(20) for text in TEXTS]
    wanted = SentenceTransformer(str(find_directory("minilm")), device="cpu").encode(texts)
    with in_process("serve_embeddings", "minilm") as (process, port):
        answers = ask_many(port, "/embed", [{"texts": [text]} for text in texts])
        np.testing.assert_allclose([body["embeddings"][0] for _, body, _ in answers], wanted, atol=1e-4)
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(ask, port, "/embed", {"texts": texts[:16]}) for _ in range(8)]
            until(lambda: "embeddings_open_requests 8" in ask(port, "/metrics")[1])
            process.send_signal(signal.SIGTERM)
            for item in asked:
                np.testing.assert_allclose(item.result()[1]["embeddings"], wanted[:16], atol=1e-4)
        assert process.wait(60) in (0, -signal.SIGTERM)
