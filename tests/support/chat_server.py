"""The server of examples/serve_chat.py in a thread, with a small Llama and a byte-level tokenizer, and requests to it."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lissom
from lissom.generation.pool import PooledDecoder
from lissom.generation.sampling import Sampling
from tests.support.models import seeded
from tests.support.ranks import free_port
from tests.support.tokenizers import tokenizer

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "serve_chat.py"
HOST, NAME, LENGTH = "127.0.0.1", "tiny", 128
PROMPTS = ["The quick brown fox", "A vocabulary has rows", "日本語の文章", "and", "jumps over the lazy dog, and the dog sleeps"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}<s>assistant\n"
)


@cache
def load_example():
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("serve_chat", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["serve_chat"] = module
    specification.loader.exec_module(module)
    return module


def small_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts a token in front of texts."""
    made = Tokenizer.from_str(tokenizer("byte-level").to_str())
    made.no_padding()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.chat_template = template
    return found


def small_model() -> LlamaForCausalLM:
    """A Llama with random weights for the tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(small_tokenizer()) + 3, eos_token_id=3, bos_token_id=2, **sizes)
    return seeded(lambda: LlamaForCausalLM(config)).eval()


def small_pool() -> PooledDecoder:
    """The model compiled for four texts."""
    return lissom.compile_pool(small_model(), max_length=LENGTH, sequences=4, checks="structural", goal=None)


@contextmanager
def running(decoder, words, limits) -> Iterator:
    """A server in a thread."""
    import uvicorn

    server = uvicorn.Server(load_example().configure(decoder, words, NAME, limits, HOST, free_port()))
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


def completion(prompt: str, count: int = 16, **fields: object) -> dict[str, object]:
    """The body of a request for the likeliest tokens."""
    return {"model": NAME, "prompt": prompt, "max_tokens": count, "temperature": 0, **fields}


def alone(decoder: PooledDecoder, words: PreTrainedTokenizerFast, prompt: str | Sequence[int], count: int) -> str:
    """The likeliest text after a prompt, computed by itself."""
    ids = words(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    (answer,) = decoder.generate([ids], count, Sampling(stop=(3,)))
    return words.decode(answer, skip_special_tokens=True)


def until_idle(decoder) -> None:
    """Wait until no text is left."""
    ends = time.monotonic() + 30
    while decoder.running or decoder.waiting:
        assert time.monotonic() < ends
        time.sleep(0.01)
