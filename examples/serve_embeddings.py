"""A server for embeddings: requests that wait are computed together, in batches of one compiled model.

    pip install 'lissom[examples,serve]'
    python examples/serve_embeddings.py minilm --passes quantize --port 8000
    curl localhost:8000/embed -d '{"texts": ["A lake.", "Two boats."]}'

The event loop reads and answers requests, one thread tokenizes, one runs the model. The compiled model computes no padding, so
texts of unlike lengths share a batch. A request that does not fit the queue gets status 503 with `Retry-After`; one that was
accepted is answered, also when the server is told to stop. docs/serving.md has the routes and the bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import math
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from torch.nn.utils.rnn import pad_sequence

import lissom
from lissom.frontends.models.huggingface import find_directory
from lissom.integrations.sentence_transformers.compiled_transformer import CompiledTransformer

Endpoint = Callable[[Request], Awaitable[Response]]
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_PADDED = 4
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Limits:
    """The bounds of a server; together they bound its memory.

    batch_tokens: tokens of a batch, without padding. queue_tokens: tokens that may wait. wait_seconds: of a text, at most, for
    as many others as the last batch had, while the model is idle. texts, body_bytes: of a request. requests: that may be
    open. body_seconds: for a client to send its body. stop_seconds: for answers, once the server is told to stop.
    """

    batch_tokens: int = 1024
    queue_tokens: int = 65_536
    wait_seconds: float = 0.002
    texts: int = 256
    body_bytes: int = 1 << 20
    requests: int = 512
    body_seconds: float = 10.0
    stop_seconds: float = 120.0


class Encoder:
    """A model of Sentence Transformers, compiled or not, on token ids.

    name: what clients call it. max_tokens: the longest text. dimension: of an embedding.
    """

    def __init__(self, model: SentenceTransformer, name: str) -> None:
        self.model, self.name, self.tokenizer = model, name, model.tokenizer
        self.max_tokens = int(model.max_seq_length or self.tokenizer.model_max_length)
        self.prompt = model.prompts.get(model.default_prompt_name or "", "")
        features = model.preprocess(["a"])
        self.fixed = {key: value for key, value in features.items() if not isinstance(value, torch.Tensor)}
        self.has_types = "token_type_ids" in features
        self.dimension = self.embed(self.tokenize(["a"], truncate=False)).shape[1]

    def tokenize(self, texts: Sequence[str], *, truncate: bool) -> list[list[int]]:
        """The token ids of each text, of any length unless truncated to `max_tokens`. For one thread at a time."""
        prompted, most = [self.prompt + text for text in texts], self.max_tokens if truncate else None
        return self.tokenizer(prompted, truncation=truncate, max_length=most, verbose=False)["input_ids"]

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The embeddings, [texts, dimension] in float32. texts: token ids."""
        side = self.tokenizer.padding_side
        rows = [torch.tensor(ids) for ids in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        features = {**self.fixed, "input_ids": ids, "attention_mask": mask}
        if self.has_types:
            features["token_type_ids"] = torch.zeros_like(ids)
        with torch.inference_mode():
            return self.model(features)["sentence_embedding"].float().cpu().numpy()


class Histogram:
    """Counts of values up to each bound, as Prometheus has them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = (*bounds, math.inf), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, label: str = "") -> list[str]:
        """The lines of its samples. label: `path="/embed"`, or empty."""
        lines, count = list[str](), 0
        for bound, in_bucket in zip(self.bounds, self.counts, strict=True):
            count += in_bucket
            limit = "+Inf" if bound == math.inf else f"{bound:g}"
            lines.append(f'{name}_bucket{{{label}{"," if label else ""}le="{limit}"}} {count}')
        labels = f"{{{label}}}" if label else ""
        return [*lines, f"{name}_sum{labels} {self.total:.9g}", f"{name}_count{labels} {count}"]


@dataclass
class Job:
    """A request in the queue. arrived: by the event loop's clock. rows: its embeddings as they are computed; left: missing."""

    arrived: float
    answer: asyncio.Future[list[np.ndarray]]
    rows: list[np.ndarray]
    left: int


@dataclass(frozen=True)
class Text:
    """A text in the queue. index: in its request."""

    ids: list[int]
    job: Job
    index: int


@dataclass
class Batcher:
    """A bounded queue of texts, and the thread that computes batches of them in order. last: texts of the last batch."""

    encoder: Encoder
    limits: Limits
    waiting: deque[Text] = field(default_factory=deque)
    tokens: int = 0
    last: int = 1
    token_seconds: float = 0.0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    batch_texts: Histogram = field(default_factory=lambda: Histogram(_SIZES))
    batch_tokens: Histogram = field(default_factory=lambda: Histogram([16 * size for size in _SIZES]))

    def submit(self, texts: Sequence[list[int]]) -> asyncio.Future[list[np.ndarray]]:
        """Accept all texts of a request; the future gives their embeddings.

        Raises: HTTPException with status 413 if they fit no queue, 503 if they do not fit it now.
        """
        count, most = sum(map(len, texts)), self.limits.queue_tokens
        if count > most:
            raise HTTPException(413, f"the request has {count} tokens, and the queue holds {most}; send fewer texts")
        if self.tokens + count > most:
            seconds = max(1, math.ceil(self.tokens * self.token_seconds))
            raise HTTPException(503, "the server is busy; send the request again later", {"Retry-After": str(seconds)})
        loop = asyncio.get_running_loop()
        job = Job(loop.time(), loop.create_future(), [np.empty(0)] * len(texts), len(texts))
        self.waiting.extend(Text(ids, job, index) for index, ids in enumerate(texts))
        self.tokens += count
        self.arrived.set()
        return job.answer

    async def run(self, stopped: asyncio.Event) -> None:
        """Compute batches until the server is stopped and nothing waits."""
        with ThreadPoolExecutor(1, "model") as worker:
            while not (stopped.is_set() and not self.waiting):
                await self.arrived.wait()
                self.arrived.clear()
                while self.waiting:
                    with suppress(TimeoutError):  # Clients that were answered together send together.
                        async with asyncio.timeout_at(self.waiting[0].job.arrived + self.limits.wait_seconds):
                            while len(self.waiting) < self.last and self.tokens < self.limits.batch_tokens:
                                self.arrived.clear()
                                await self.arrived.wait()
                    await self._compute(self._take(), worker)

    def _take(self) -> list[Text]:
        """The first texts, up to the tokens of a batch, or to four times as many padded ones; at least one."""
        batch, tokens, longest, most = list[Text](), 0, 0, self.limits.batch_tokens
        while self.waiting:
            longest = max(longest, length := len(self.waiting[0].ids))
            # Some attention runs on padded rows, so their number is bounded too.
            if batch and (tokens + length > most or longest * (len(batch) + 1) > _PADDED * most):
                break
            tokens += length
            batch.append(self.waiting.popleft())
        self.tokens, self.last = self.tokens - tokens, len(batch)
        self.batch_texts.add(len(batch))
        self.batch_tokens.add(tokens)
        return batch

    async def _compute(self, batch: Sequence[Text], worker: ThreadPoolExecutor) -> None:
        started = time.perf_counter()
        try:
            ids = [text.ids for text in batch]
            rows = await asyncio.get_running_loop().run_in_executor(worker, self.encoder.embed, ids)
        # The model may raise anything; the requests of this batch are told, and the server goes on.
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("a batch of %d texts failed", len(batch))
            for text in batch:
                if not text.job.answer.done():
                    text.job.answer.set_exception(error)
            return
        self.token_seconds = (time.perf_counter() - started) / max(1, sum(map(len, ids)))
        for text, row in zip(batch, rows, strict=True):
            text.job.rows[text.index] = row
            text.job.left -= 1
            if not text.job.left and not text.job.answer.done():
                text.job.answer.set_result(text.job.rows)


@dataclass
class Server:
    """The routes of the application, and what it counts."""

    encoder: Encoder
    limits: Limits
    open: int = 0
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: dict[str, Histogram] = field(default_factory=dict)

    def application(self) -> Starlette:
        """The ASGI application."""
        posts = (("/embed", self.embed), ("/v1/embeddings", self.embeddings))
        routes = [Route(path, self._guarded(path, endpoint), methods=["POST"]) for path, endpoint in posts]
        routes += [Route("/health", self.health), Route("/metrics", self.metrics)]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _refused})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher, stopped = Batcher(self.encoder, self.limits), asyncio.Event()
        self.running = asyncio.create_task(self.batcher.run(stopped))
        with ThreadPoolExecutor(1, "tokenizer") as self.tokenizing:
            yield
            stopped.set()
            self.batcher.arrived.set()
            await self.running

    def _guarded(self, path: str, endpoint: Endpoint) -> Endpoint:
        """The route, with a bound on open requests, and counted."""
        self.seconds[path] = Histogram(_SECONDS)

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            self.open += 1
            try:
                if self.open > self.limits.requests:
                    raise HTTPException(503, "the server is busy; send the request again later", {"Retry-After": "1"})
                response = await endpoint(request)
            except HTTPException as refusal:
                response = await _refused(request, refusal)
            except Exception as error:  # of the model, which the batcher has logged
                response = await _refused(request, HTTPException(500, f"the model failed: {type(error).__name__}"))
            finally:
                self.open -= 1
            self.answered[path, response.status_code] += 1
            if response.status_code == 200:
                self.seconds[path].add(time.perf_counter() - started)
            return response

        return answer

    async def embed(self, request: Request) -> Response:
        """`{"texts": […], "truncate": false}` to `{"embeddings": [[…], …]}`."""
        body = await self._body(request, {"texts", "truncate"})
        rows, _ = await self._rows(body, body.get("texts"), "texts")
        return JSONResponse({"embeddings": [row.tolist() for row in rows]})

    async def embeddings(self, request: Request) -> Response:
        """The request and the answer of OpenAI's API for embeddings."""
        body = await self._body(request, {"input", "model", "encoding_format", "dimensions", "user", "truncate"})
        if body.get("model") != self.encoder.name:
            raise HTTPException(404, f"this server has the model '{self.encoder.name}'; give it as model")
        if body.get("dimensions") not in (None, self.encoder.dimension):
            raise HTTPException(400, f"the model has {self.encoder.dimension} dimensions; leave out dimensions")
        form = body.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise HTTPException(400, "encoding_format is neither 'float' nor 'base64'")
        given = body.get("input")
        rows, tokens = await self._rows(body, [given] if isinstance(given, str) else given, "input")
        written = [row.tolist() if form == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(written)]
        answer = {"object": "list", "data": data, "model": self.encoder.name}
        return JSONResponse({**answer, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    async def health(self, request: Request) -> Response:
        """Status 200 while requests are computed."""
        alive = not self.running.done()
        return JSONResponse({"status": "ok" if alive else "the batches have stopped"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Counts, sizes and times in the text format of Prometheus."""
        batcher, lines = self.batcher, ["# TYPE embeddings_requests_total counter"]
        for (path, status), count in sorted(self.answered.items()):
            lines.append(f'embeddings_requests_total{{path="{path}",status="{status}"}} {count}')
        sizes = {"open_requests": self.open, "queue_texts": len(batcher.waiting), "queue_tokens": batcher.tokens}
        for name, value in sizes.items():
            lines += [f"# TYPE embeddings_{name} gauge", f"embeddings_{name} {value}"]
        for name, histogram in (("texts", batcher.batch_texts), ("tokens", batcher.batch_tokens)):
            lines += [f"# TYPE embeddings_batch_{name} histogram", *histogram.lines(f"embeddings_batch_{name}")]
        lines.append("# TYPE embeddings_request_seconds histogram")
        for path, histogram in self.seconds.items():
            lines += histogram.lines("embeddings_request_seconds", f'path="{path}"')
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def _body(self, request: Request, known: set[str]) -> dict[str, Any]:
        """The JSON object of a request. A body that is too large is read to its end, so that the client reads the answer."""
        held, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= self.limits.body_bytes:
                        held += chunk
        except (ClientDisconnect, TimeoutError):
            raise HTTPException(408, f"the body did not arrive within {self.limits.body_seconds:g} seconds") from None
        if size > self.limits.body_bytes:
            raise HTTPException(413, f"the body has {size} bytes, and may have {self.limits.body_bytes}; send fewer texts")
        try:
            fields = json.loads(held)
        except (ValueError, RecursionError):  # bytes that are no UTF-8 too, and lists nested too deep
            raise HTTPException(400, "the body is not JSON") from None
        if not isinstance(fields, dict):
            raise HTTPException(400, "the body is not a JSON object")
        if unknown := sorted(fields.keys() - known):
            raise HTTPException(400, f"the request has no field '{unknown[0]}'; it has {', '.join(sorted(known))}")
        return fields

    async def _rows(self, body: dict[str, Any], texts: object, name: str) -> tuple[list[np.ndarray], int]:
        """The embeddings of the texts, and the number of their tokens."""
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise HTTPException(400, f"{name} is not a list of texts")
        if len(texts) > self.limits.texts:
            raise HTTPException(413, f"the request has {len(texts)} texts, and may have {self.limits.texts}")
        truncate = body.get("truncate", False)
        if not isinstance(truncate, bool):
            raise HTTPException(400, "truncate is neither true nor false")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            raise HTTPException(400, f"{name} has a text that is not Unicode") from None
        loop, most = asyncio.get_running_loop(), self.encoder.max_tokens
        token_ids = await loop.run_in_executor(self.tokenizing, lambda: self.encoder.tokenize(texts, truncate=truncate))
        long = next((index for index, ids in enumerate(token_ids) if len(ids) > most), None)
        if long is not None:
            raise HTTPException(
                413, f"text {long} has {len(token_ids[long])} tokens, and may have {most}; shorten it, or send truncate: true"
            )
        return await self.batcher.submit(token_ids), sum(map(len, token_ids))


async def _refused(request: Request, refusal: HTTPException) -> Response:
    kind = "invalid_request_error" if refusal.status_code < 500 else "server_error"
    return JSONResponse({"error": {"message": refusal.detail, "type": kind}}, refusal.status_code, refusal.headers)


def configure(encoder: Encoder, limits: Limits, host: str, port: int) -> uvicorn.Config:
    """The server's settings for uvicorn; more connections than four times the requests get its own 503."""
    return uvicorn.Config(
        Server(encoder, limits).application(),
        host=host,
        port=port,
        access_log=False,
        limit_concurrency=4 * limits.requests,
        timeout_graceful_shutdown=math.ceil(limits.stop_seconds),
    )


def main() -> None:
    """Compile the model and serve it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="minilm", help="'minilm', or a folder, compiled or not")
    parser.add_argument("--passes", default="exact", help="a pipeline or a recipe, for a model that is not compiled")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-tokens", type=int, default=Limits.batch_tokens)
    parser.add_argument("--queue-tokens", type=int, default=Limits.queue_tokens)
    options = parser.parse_args()
    model = SentenceTransformer(str(find_directory(options.model)), device="cpu")
    if not isinstance(model[0], CompiledTransformer):
        model = lissom.compile(model, passes=options.passes)
    encoder, limits = Encoder(model, Path(options.model).name), Limits(options.batch_tokens, options.queue_tokens)
    uvicorn.Server(configure(encoder, limits, options.host, options.port)).run()


if __name__ == "__main__":
    main()
