"""A chat server with OpenAI's protocol: texts of many clients are computed together by one compiled decoder.

    pip install 'lissom[examples,serve]'
    python examples/serve_chat.py gemma3-270m --passes balanced --port 8001 --sequences 8 --max-length 2048
    curl localhost:8001/v1/chat/completions -d '{"model": "gemma3-270m", "messages": [{"role": "user", "content": "Hello"}]}'

The event loop reads requests and sends answers, one thread tokenizes, one makes the calls of the decoder and turns tokens into
text. A request that does not fit the queue gets status 503 with `Retry-After`; one that was accepted is answered, also when the
server is told to stop. docs/serving.md has the routes and the bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import secrets
import threading
import time
import uuid
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import llguidance.hf
import numpy as np
import torch
import uvicorn
from llguidance import LLMatcher
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

import lissom
from lissom.errors import InputError
from lissom.frontends.models.huggingface import find_directory, tokenizer_of
from lissom.generation.batching import Text
from lissom.generation.directory import is_saved
from lissom.generation.pool import PooledDecoder
from lissom.generation.sampling import Sampling

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TEXT = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "logprobs"}
"""The fields of a request for a completion."""
_CHAT = _TEXT - {"prompt"} | {"messages", "max_completion_tokens", "top_logprobs", "response_format"}
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_ONLY = {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "echo": False, "tools": []}
"""Fields of OpenAI's API that are taken with this value only."""
_ROLES = ("system", "developer", "user", "assistant")
_BUSY = "the server is busy; send the request again later"
_UNFINISHED = "�"


@dataclass(frozen=True)
class Limits:
    """The bounds of a server; together they bound its memory.

    queue: texts that may wait for a place among the sequences of the decoder. requests: that may be open. body_bytes: of a
    request. body_seconds: for a client to send its body. send_seconds: for a client to read a part of the answer. stops,
    stop_characters: stop strings, and of each. stop_seconds: for answers, once the server is told to stop.
    """

    queue: int = 64
    requests: int = 512
    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    send_seconds: float = 30.0
    stops: int = 4
    stop_characters: int = 256
    stop_seconds: float = 120.0


class Histogram:
    """Counts of values up to each bound, as Prometheus has them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = (*bounds, math.inf), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, label: str = "") -> list[str]:
        """The lines of its samples. label: `path="/v1/completions"`, or empty."""
        lines, count = list[str](), 0
        for bound, in_bucket in zip(self.bounds, self.counts, strict=True):
            count += in_bucket
            limit = "+Inf" if bound == math.inf else f"{bound:g}"
            lines.append(f'{name}_bucket{{{label}{"," if label else ""}le="{limit}"}} {count}')
        labels = f"{{{label}}}" if label else ""
        return [*lines, f"{name}_sum{labels} {self.total:.9g}", f"{name}_count{labels} {count}"]


class Refused(HTTPException):
    """A refusal in the form of OpenAI's errors. param: the field it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0) -> None:
        super().__init__(status, message, {"Retry-After": str(retry)} if retry else None)
        self.param, self.code = param, code


def _error(refusal: HTTPException) -> dict[str, object]:
    kind = "invalid_request_error" if refusal.status_code < 500 else "server_error"
    about = {"param": refusal.param, "code": refusal.code} if isinstance(refusal, Refused) else {"param": None, "code": None}
    return {"error": {"message": refusal.detail, "type": kind, **about}}


async def _refuse(request: Request, refusal: HTTPException) -> Response:
    return JSONResponse(_error(refusal), refusal.status_code, refusal.headers)


class Scores:
    """Masks the tokens that a grammar does not allow; keeps the logits for logprobs. A `Sampling.process` of one text."""

    def __init__(self, grammar: LLMatcher | None) -> None:
        self.grammar, self.logits, self.length = grammar, torch.empty(0), 0

    def __call__(self, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The scores of the next token, [1, vocabulary]. text: [1, tokens]; the first call has the prompt alone."""
        self.logits = logits
        if self.grammar is None:
            return logits
        if self.length:
            self.grammar.consume_tokens(text[0, self.length :].tolist())
        self.length = text.shape[1]
        mask = np.frombuffer(self.grammar.compute_bitmask(), np.uint8)
        if self.grammar.is_error():
            raise InputError(f"the grammar cannot be followed: {_first_line(self.grammar.get_error())}")
        allowed = torch.from_numpy(np.unpackbits(mask, count=logits.shape[1], bitorder="little")).bool()
        return logits.masked_fill(~allowed.to(logits.device), -math.inf)


@dataclass(frozen=True)
class Asked:
    """A checked request. stops: strings. top: logprobs of so many likely tokens per token; None for no logprobs."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    top: int | None
    grammar: LLMatcher | None
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class Logprob:
    """The log probability of a token by the model, before temperature and grammar. offset: of its text in the answer."""

    token: str
    logprob: float
    offset: int
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """A part of an answer. reason: why the answer ended, in its last piece."""

    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    reason: str | None = None
    error: Exception | None = None


class Writer:
    """The text of an answer from its tokens: whole characters, and nothing from a stop string on.

    is_stopped: a stop string was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops, self.is_stopped = tokenizer, stops, False
        self.ids, self.begin, self.end = list[int](), 0, 0  # the text of ids[begin:end] is known, and decodes what follows
        self.held, self.sent = "", 0  # text that may begin a stop string; the length of the text before it
        self.logprobs = deque[Logprob]()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def add(self, token: int) -> None:
        """Append a token."""
        self.ids.append(token)
        text, known = self.decode(self.ids[self.begin :]), self.decode(self.ids[self.begin : self.end])
        if len(text) > len(known) and not text.endswith(_UNFINISHED):
            self.begin, self.end = self.end, len(self.ids)
            self._append(text[len(known) :])

    def _append(self, text: str) -> None:
        self.held += text
        if found := [at for stop in self.stops if (at := self.held.find(stop)) >= 0]:
            self.held, self.is_stopped = self.held[: min(found)], True

    def take(self, *, is_last: bool) -> tuple[str, tuple[Logprob, ...]]:
        """The text that can be sent, and the logprobs of its tokens."""
        if is_last and not self.is_stopped:
            known = len(self.decode(self.ids[self.begin : self.end]))
            self._append(self.decode(self.ids[self.begin :])[known:])
        keep = 0 if is_last or self.is_stopped else max((self._overlap(stop) for stop in self.stops), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.sent += len(text)
        is_whole, taken = is_last and not self.is_stopped, list[Logprob]()
        while self.logprobs and (is_whole or self.logprobs[0].offset < self.sent):
            taken.append(self.logprobs.popleft())
        return text, tuple(taken)

    def _overlap(self, stop: str) -> int:
        """The length of the longest beginning of a stop string that the text ends with."""
        return next((size for size in range(len(stop) - 1, 0, -1) if self.held.endswith(stop[:size])), 0)


class Answer:
    """An accepted text: the driver puts pieces, the event loop takes them. At most `max_tokens` pieces are ever held."""

    def __init__(self, asked: Asked, text: Text, scores: Scores | None, writer: Writer) -> None:
        self.asked, self.text, self.scores, self.writer = asked, text, scores, writer
        self.started, self.last, self.tokens = time.perf_counter(), 0.0, 0
        self.loop, self.pieces, self.arrived = asyncio.get_running_loop(), deque[Piece](), asyncio.Event()

    def put(self, piece: Piece) -> None:
        """Add a piece, from the driver's thread."""
        self.pieces.append(piece)
        with suppress(RuntimeError):  # a loop that was closed
            self.loop.call_soon_threadsafe(self.arrived.set)

    async def parts(self) -> AsyncIterator[Piece]:
        """All pieces up to the last one; those that a slow reader left are joined."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            taken = [self.pieces.popleft() for _ in range(len(self.pieces))]
            if not taken:
                continue
            last, logprobs = taken[-1], tuple(logprob for piece in taken for logprob in piece.logprobs)
            yield Piece("".join(piece.text for piece in taken), logprobs, last.reason, last.error)
            if last.reason or last.error:
                return


@dataclass
class Driver:
    """The thread that makes the calls of a decoder and turns tokens into text."""

    decoder: PooledDecoder
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    live: list[Answer] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    is_stopped: bool = False
    answer_seconds: float = 1.0
    tokens: Counter[str] = field(default_factory=Counter)
    first: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    between: Histogram = field(default_factory=lambda: Histogram((0.001, 0.002, *_SECONDS)))

    def __post_init__(self) -> None:
        self.ends = _ends(self.decoder, self.tokenizer)

    def start(self) -> None:
        """Start the thread."""
        self.thread = threading.Thread(target=self._run, name="decoder")
        self.thread.start()

    def stop(self) -> None:
        """End the texts that are left, and the thread."""
        with self.changed:
            self.is_stopped = True
            for answer in self.live:
                self.decoder.cancel(answer.text)
            self.changed.notify()
        self.thread.join()

    def submit(self, asked: Asked) -> Answer:
        """Accept a text. Raises Refused with status 503 if the queue is full, 400 for token ids out of range."""
        grammar, most = asked.grammar, self.decoder.sequences + self.limits.queue
        scores = Scores(grammar) if grammar is not None or asked.top is not None else None
        sampling = Sampling(asked.temperature, 0, asked.top_p, self.ends, asked.seed, scores)
        with self.changed:
            if len(self.live) >= most:
                rounds = self.decoder.waiting / self.decoder.sequences
                raise Refused(503, _BUSY, retry=max(1, min(60, math.ceil(rounds * self.answer_seconds))))
            try:
                text = self.decoder.submit(asked.prompt, asked.max_tokens, sampling)
            except InputError as error:
                raise Refused(400, str(error), "prompt") from None
            answer = Answer(asked, text, scores, Writer(self.tokenizer, asked.stops))
            self.live.append(answer)
            self.changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """End a text, unless it is finished."""
        self.decoder.cancel(answer.text)

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.live or self.is_stopped)
                if not self.live:
                    return
                live = list(self.live)
            self.decoder.step()
            ended = {answer for answer in live if self._hand_on(answer)}
            if ended:
                with self.changed:
                    self.live = [answer for answer in self.live if answer not in ended]

    def _hand_on(self, answer: Answer) -> bool:
        """Put the text of new tokens; returns whether the answer has ended."""
        text, writer = answer.text, answer.writer
        is_finished = text.is_finished  # before the last tokens are taken
        try:
            if not text.new and not is_finished:
                return False
            while text.new and not writer.is_stopped:
                self._write(answer, text.new.popleft())
            if text.error is not None:
                raise text.error
            is_last = is_finished or writer.is_stopped
            content, logprobs = writer.take(is_last=is_last)
        # The tokenizer, a grammar or the model may raise anything; this text ends, and the others go on.
        except Exception as error:
            logging.getLogger("uvicorn.error").error("a text failed", exc_info=error)
            self.decoder.cancel(text)
            answer.put(Piece(error=error))
            return True
        if not is_last:
            if content:
                answer.put(Piece(content, logprobs))
            return False
        self.decoder.cancel(text)
        self.answer_seconds += 0.1 * (time.perf_counter() - answer.started - self.answer_seconds)
        is_full = answer.tokens == answer.asked.max_tokens and not writer.is_stopped
        answer.put(Piece(content, logprobs, "length" if is_full else "stop"))
        return True

    def _write(self, answer: Answer, token: int) -> None:
        """Append a token to the text of an answer, and count it."""
        now, writer = time.perf_counter(), answer.writer
        (self.between if answer.tokens else self.first).add(now - (answer.last or answer.started))
        answer.last, answer.tokens = now, answer.tokens + 1
        self.tokens["completion"] += 1
        if answer.tokens == 1:
            self.tokens["prompt"] += len(answer.asked.prompt)
        offset = writer.sent + len(writer.held)
        if answer.scores is not None and answer.asked.top is not None:
            writer.logprobs.append(self._logprob(answer.scores.logits, token, offset, answer.asked.top))
        writer.add(token)

    def _logprob(self, logits: torch.Tensor, token: int, offset: int, count: int) -> Logprob:
        """A logprob from logits, [1, vocabulary]. count: of the likeliest tokens."""
        logprobs = logits[0].float().log_softmax(-1)
        values, ids = logprobs.topk(count)
        decode = self.tokenizer.decode
        top = tuple((str(decode([index])), value) for index, value in zip(ids.tolist(), values.tolist(), strict=True))
        return Logprob(str(decode([token])), float(logprobs[token]), offset, top)


def _ends(decoder: PooledDecoder, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text."""
    own = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    return {*Sampling.of(decoder.generation_config).stop, *own}


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0][:200]


class Reader:
    """Reads requests: checks fields, makes prompts and grammars. For one thread at a time.

    name: what clients call the model.
    """

    def __init__(self, decoder: PooledDecoder, tokenizer: PreTrainedTokenizerBase, name: str, limits: Limits) -> None:
        self.decoder, self.tokenizer, self.name, self.limits = decoder, tokenizer, name, limits
        ends = sorted(_ends(decoder, tokenizer))
        size = max(decoder.vocabulary, len(tokenizer))
        self.grammars = llguidance.hf.from_tokenizer(tokenizer, size, ends) if tokenizer.is_fast and ends else None

    def read(self, data: bytes, *, is_chat: bool) -> Asked:
        """The request in a body. Raises Refused."""
        body = self._fields(data, _CHAT if is_chat else _TEXT)
        if body.get("model") != self.name:
            raise Refused(404, f"this server has the model '{self.name}'; give it as model", "model", "model_not_found")
        prompt, stops = self._chat(body) if is_chat else (self._prompt(body.get("prompt")), ())
        stream, options = _flag(body, "stream"), body.get("stream_options", {})
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise Refused(400, "stream_options is an object with include_usage", "stream_options")
        return Asked(
            prompt,
            self._max_tokens(body, len(prompt), is_chat),
            float(_number(body, "temperature", 1.0, 0, 2)),
            float(_number(body, "top_p", 1.0, 1e-6, 1)),
            int(_number(body, "seed", secrets.randbits(63), -(1 << 63), (1 << 63) - 1, is_whole=True)),
            (*self._stops(body), *stops),
            _top(body, is_chat),
            self._grammar(body.get("response_format")),
            stream,
            stream and _flag(options, "include_usage"),
        )

    def _fields(self, data: bytes, known: set[str]) -> dict[str, Any]:
        """The fields of a JSON object that have a value."""
        try:
            fields = json.loads(data)
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            raise Refused(400, "the body has a text that is not Unicode") from None
        except (ValueError, RecursionError):  # bytes that are no UTF-8 too, and lists nested too deep
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(fields, dict):
            raise Refused(400, "the body is not a JSON object")
        body = {name: value for name, value in fields.items() if value is not None and name not in _IGNORED}
        for name in body.keys() & _ONLY.keys():
            if body.pop(name) != _ONLY[name]:
                raise Refused(400, f"{name} is not supported; leave it out, or give {json.dumps(_ONLY[name])}", name)
        if unknown := sorted(body.keys() - known):
            raise Refused(400, f"the request has no field '{unknown[0]}'; it has {', '.join(sorted(known))}", unknown[0])
        return body

    def _chat(self, body: Mapping[str, Any]) -> tuple[list[int], tuple[str, ...]]:
        """The prompt of messages by the chat template, and stop strings; without a template, lines of `role: content`."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages is not a list of messages", "messages")
        said = [{"role": _role(message), "content": _content(message)} for message in messages]
        if not self.tokenizer.chat_template:
            lines = [f"{message['role']}: {message['content']}" for message in said]
            return self._tokenize("\n".join([*lines, "assistant:"])), ("\nuser:", "\nassistant:")
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise Refused(400, f"the chat template refuses the messages: {_first_line(error)}", "messages") from None
        return self._tokenize(str(text), add_special_tokens=False), ()

    def _tokenize(self, text: str, **options: bool) -> list[int]:
        return self.tokenizer(text, verbose=False, **options)["input_ids"]

    def _prompt(self, prompt: object) -> list[int]:
        """The token ids of a text, or given ones."""
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            (prompt,) = prompt
        ids = self._tokenize(prompt) if isinstance(prompt, str) else prompt
        # A bool is an int, and a JSON number may have any size.
        if not isinstance(ids, list) or not ids or not all(type(token) is int and abs(token) < 1 << 31 for token in ids):
            raise Refused(400, "prompt is neither a text nor a list of token ids, with one token or more", "prompt")
        return ids

    def _max_tokens(self, body: Mapping[str, Any], prompt: int, is_chat: bool) -> int:
        """The most tokens of the answer: by default, 16 of a completion and all that fit of a chat, as OpenAI has them."""
        room = self.decoder.max_length - prompt
        name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        count = int(_number(body, name, max(1, room if is_chat else min(room, 16)), 1, 1 << 31, is_whole=True))
        if count > room:
            raise Refused(
                400,
                f"prompt and answer are to be {prompt} + {count} tokens, and may be {self.decoder.max_length}; shorten the "
                f"prompt, or lower {name}",
                "messages" if is_chat else "prompt",
                "context_length_exceeded",
            )
        return count

    def _stops(self, body: Mapping[str, Any]) -> list[str]:
        given = body.get("stop", [])
        stops, most, longest = [given] if isinstance(given, str) else given, self.limits.stops, self.limits.stop_characters
        if (
            not isinstance(stops, list)
            or len(stops) > most
            or not all(isinstance(x, str) and 0 < len(x) <= longest for x in stops)
        ):
            raise Refused(400, f"stop is a text or up to {most}, of 1 to {longest} characters each", "stop")
        return stops

    def _grammar(self, form: Any) -> LLMatcher | None:
        """A matcher for a response format; None for any text."""
        kind = form.get("type") if isinstance(form, dict) else form
        if kind in (None, "text"):
            return None
        holder = form.get("json_schema") if kind == "json_schema" else {"schema": {"type": "object"}}
        schema = holder.get("schema") if isinstance(holder, dict) else None
        if kind not in ("json_object", "json_schema") or not isinstance(schema, dict):
            raise Refused(400, "response_format has a type, text, json_object or json_schema, and a schema", "response_format")
        if self.grammars is None:
            raise Refused(400, "the model's tokenizer cannot follow a grammar; leave out response_format", "response_format")
        try:
            # Written as json.dumps does: models that may add blanks add them forever. Text and not a dict, whose nesting
            # llguidance does not bound.
            form = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            matcher = LLMatcher(
                self.grammars, LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=form), log_level=0
            )
            reason = matcher.get_error()
        except (ValueError, RecursionError) as error:
            matcher, reason = None, str(error)
        if reason:
            raise Refused(400, f"the JSON schema cannot be compiled: {_first_line(reason)}", "response_format")
        return matcher


def _flag(body: Mapping[str, Any], name: str) -> bool:
    if not isinstance(value := body.get(name, False), bool):
        raise Refused(400, f"{name} is neither true nor false", name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float, *, is_whole: bool = False) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float) or not least <= value <= most:
        raise Refused(400, f"{name} is not a {'whole ' if is_whole else ''}number from {least} to {most}", name)
    return value


def _top(body: Mapping[str, Any], is_chat: bool) -> int | None:
    """Logprobs of so many likely tokens; None for no logprobs."""
    if not is_chat:
        return int(_number(body, "logprobs", 0, 0, 5, is_whole=True)) if "logprobs" in body else None
    count = int(_number(body, "top_logprobs", 0, 0, 20, is_whole=True))
    if not _flag(body, "logprobs"):
        if count:
            raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return None
    return count


def _role(message: object) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(400, f"a message has no role among {', '.join(_ROLES)}", "messages")
    return role


def _content(message: Mapping[str, object]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(400, "the content of a message is not text", "messages")
    return "".join(map(str, texts))


class Form:
    """The JSON of an answer. is_chat: of /v1/chat/completions, otherwise of /v1/completions."""

    def __init__(self, asked: Asked, model: str, *, is_chat: bool) -> None:
        self.asked, self.is_chat = asked, is_chat
        kind = ("chat.completion" if is_chat else "text_completion") + (".chunk" if is_chat and asked.stream else "")
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def event(self, piece: Piece, *, is_first: bool) -> dict[str, object]:
        """A chunk of a stream."""
        usage = {"usage": None} if self.asked.include_usage else {}
        role = {"role": "assistant"} if is_first else {}
        content = {"delta": {**role, "content": piece.text}} if self.is_chat else {"text": piece.text}
        return {**self.head, "choices": [self._choice(content, piece)], **usage}

    def last(self, usage: Mapping[str, int]) -> dict[str, object]:
        """The chunk of a stream with its usage."""
        return {**self.head, "choices": [], "usage": usage}

    def whole(self, piece: Piece, usage: Mapping[str, int]) -> dict[str, object]:
        """A whole answer."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        content = {"message": message} if self.is_chat else {"text": piece.text}
        return {**self.head, "choices": [self._choice(content, piece)], "usage": usage}

    def _choice(self, content: Mapping[str, object], piece: Piece) -> dict[str, object]:
        logprobs = None if self.asked.top is None else (_chat_logprobs if self.is_chat else _text_logprobs)(piece.logprobs)
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": piece.reason}


def _chat_logprobs(logprobs: Sequence[Logprob]) -> dict[str, object]:
    def entry(token: str, logprob: float) -> dict[str, object]:
        # A token with a part of a character has no text of its own.
        return {"token": token, "logprob": logprob, "bytes": None if _UNFINISHED in token else list(token.encode())}

    content = [{**entry(item.token, item.logprob), "top_logprobs": [entry(*top) for top in item.top]} for item in logprobs]
    return {"content": content, "refusal": None}


def _text_logprobs(logprobs: Sequence[Logprob]) -> dict[str, object]:
    return {
        "tokens": [item.token for item in logprobs],
        "token_logprobs": [item.logprob for item in logprobs],
        # Of tokens with the same text, the likeliest.
        "top_logprobs": [dict(reversed(item.top)) for item in logprobs],
        "text_offset": [item.offset for item in logprobs],
    }


@dataclass
class Server:
    """The routes of the application, and what it counts."""

    driver: Driver
    reader: Reader
    limits: Limits
    open: int = 0
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: dict[str, Histogram] = field(default_factory=dict)

    def application(self) -> Starlette:
        """The ASGI application."""
        paths = {"/v1/chat/completions": True, "/v1/completions": False}
        self.seconds = {path: Histogram(_SECONDS) for path in paths}
        routes = [Route(path, Completions(self, path, is_chat), methods=["POST"]) for path, is_chat in paths.items()]
        routes += [Route("/v1/models", self.models), Route("/v1/models/{name:path}", self.model)]
        routes += [Route("/health", self.health), Route("/metrics", self.metrics)]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _refuse})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.driver.start()
        with ThreadPoolExecutor(1, "tokenizer") as self.tokenizing:
            yield
        await asyncio.get_running_loop().run_in_executor(None, self.driver.stop)

    def _model(self) -> dict[str, object]:
        return {"id": self.reader.name, "object": "model", "created": 0, "owned_by": "lissom"}

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model of that name."""
        if request.path_params["name"] != self.reader.name:
            raise Refused(404, f"this server has the model '{self.reader.name}'", "model", "model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Status 200 while texts are computed."""
        alive = self.driver.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the calls have stopped"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Counts and times in the text format of Prometheus."""
        driver, decoder, lines = self.driver, self.driver.decoder, ["# TYPE chat_requests_total counter"]
        for (path, status), count in sorted(self.answered.items()):
            lines.append(f'chat_requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append("# TYPE chat_tokens_total counter")
        lines += [f'chat_tokens_total{{kind="{kind}"}} {driver.tokens[kind]}' for kind in ("prompt", "completion")]
        sizes = {"open_requests": self.open, "running_texts": decoder.running, "queue_texts": decoder.waiting}
        sizes["reserved_slots"] = decoder.reserved
        for name, value in sizes.items():
            lines += [f"# TYPE chat_{name} gauge", f"chat_{name} {value}"]
        for name, histogram in {"first_token": driver.first, "between_tokens": driver.between}.items():
            lines += [f"# TYPE chat_{name}_seconds histogram", *histogram.lines(f"chat_{name}_seconds")]
        lines.append("# TYPE chat_request_seconds histogram")
        for path, histogram in self.seconds.items():
            lines += histogram.lines("chat_request_seconds", f'path="{path}"')
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


@dataclass
class Completions:
    """The ASGI application of a route that answers texts, with a bound on open requests, and counted."""

    server: Server
    path: str
    is_chat: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Status 499 is counted where the client went away or did not read."""
        server, started, status = self.server, time.perf_counter(), 499
        server.open += 1
        try:
            status = await self._answer(Request(scope, receive), send)
        except TimeoutError:  # a client that does not read
            pass
        finally:
            server.open -= 1
            server.answered[self.path, status] += 1
            if status == 200:
                server.seconds[self.path].add(time.perf_counter() - started)

    async def _answer(self, request: Request, send: Send) -> int:
        server, loop = self.server, asyncio.get_running_loop()
        try:
            if server.open > server.limits.requests:
                raise Refused(503, _BUSY, retry=1)
            data = await self._body(request)
            asked = await loop.run_in_executor(server.tokenizing, lambda: server.reader.read(data, is_chat=self.is_chat))
            answer = server.driver.submit(asked)
        except HTTPException as refusal:
            return await self._send(await _refuse(request, refusal), request, send)
        form = Form(asked, server.reader.name, is_chat=self.is_chat)
        write = self._stream if asked.stream else self._whole
        writing, gone = asyncio.create_task(write(answer, form, request, send)), asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            return writing.result() if writing.done() else 499
        finally:
            server.driver.cancel(answer)
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)

    async def _body(self, request: Request) -> bytes:
        """The body of a request. One that is too large is read to its end, so that the client reads the answer."""
        held, size, limits = bytearray(), 0, self.server.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limits.body_bytes:
                        held += chunk
        except (ClientDisconnect, TimeoutError):
            raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
        if size > limits.body_bytes:
            raise Refused(413, f"the body has {size} bytes, and may have {limits.body_bytes}; send a shorter prompt")
        return bytes(held)

    async def _send(self, response: Response, request: Request, send: Send) -> int:
        """Send a response; returns its status. Raises TimeoutError if the client does not read."""
        async with asyncio.timeout(self.server.limits.send_seconds):
            await response(request.scope, request.receive, send)
        return response.status_code

    async def _whole(self, answer: Answer, form: Form, request: Request, send: Send) -> int:
        """Send an answer as one JSON object."""
        pieces = [piece async for piece in answer.parts()]
        if (error := pieces[-1].error) is not None:
            return await self._send(await _refuse(request, _failed(error)), request, send)
        logprobs = tuple(logprob for piece in pieces for logprob in piece.logprobs)
        piece = Piece("".join(piece.text for piece in pieces), logprobs, pieces[-1].reason)
        return await self._send(JSONResponse(form.whole(piece, _usage(answer))), request, send)

    async def _stream(self, answer: Answer, form: Form, request: Request, send: Send) -> int:
        """Send an answer as server-sent events. Raises TimeoutError if the client does not read."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

        async def write(message: Message) -> None:
            async with asyncio.timeout(self.server.limits.send_seconds):
                await send(message)

        async def event(data: object) -> None:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            await write({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        await write({"type": "http.response.start", "status": 200, "headers": headers})
        is_first, status = True, 200
        async for piece in answer.parts():
            if piece.error is not None:
                status = (failed := _failed(piece.error)).status_code
                await event(_error(failed))
                break
            await event(form.event(piece, is_first=is_first))
            is_first = False
        else:
            if answer.asked.include_usage:
                await event(form.last(_usage(answer)))
            await event("[DONE]")
        await write({"type": "http.response.body", "body": b"", "more_body": False})
        return status


def _failed(error: Exception) -> Refused:
    if isinstance(error, InputError):  # of a grammar
        return Refused(400, _first_line(error), "response_format")
    return Refused(500, f"the model failed: {type(error).__name__}")


def _usage(answer: Answer) -> dict[str, int]:
    prompt, count = len(answer.asked.prompt), answer.tokens
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


async def _disconnect(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def configure(
    decoder: PooledDecoder, tokenizer: PreTrainedTokenizerBase, name: str, limits: Limits, host: str, port: int
) -> uvicorn.Config:
    """The server's settings for uvicorn; more connections than four times the requests get its own 503."""
    server = Server(Driver(decoder, tokenizer, limits), Reader(decoder, tokenizer, name, limits), limits)
    return uvicorn.Config(
        server.application(),
        host=host,
        port=port,
        access_log=False,
        limit_concurrency=4 * limits.requests,
        timeout_graceful_shutdown=math.ceil(limits.stop_seconds),
    )


def main() -> None:
    """Compile the model and serve it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "model", nargs="?", default="gemma3-270m", help="'gemma3-270m', the folder of a checkpoint, or of a saved decoder"
    )
    parser.add_argument("--passes", help="a pipeline or a recipe")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--sequences", type=int, default=8, help="texts that are computed together")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a prompt and its answer")
    parser.add_argument("--slots", type=int, help="tokens in the KV cache; by default, sequences of max-length")
    parser.add_argument("--queue", type=int, default=Limits.queue, help="texts that may wait")
    options = parser.parse_args()
    tokenizer = tokenizer_of(find_directory(options.model))
    if is_saved(options.model):
        decoder = lissom.load_pool(options.model)
    else:
        decoder = lissom.compile_pool(
            options.model,
            max_length=options.max_length,
            sequences=options.sequences,
            slots=options.slots,
            passes=options.passes,
        )
    limits = Limits(queue=options.queue)
    name = Path(options.model).name
    uvicorn.Server(configure(decoder, tokenizer, name, limits, options.host, options.port)).run()


if __name__ == "__main__":
    main()
