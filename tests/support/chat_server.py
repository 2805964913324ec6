"""The server of examples/serve_chat.py in a thread, with a small Llama and a byte-level tokenizer, and requests to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from tokenizers import Tokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lissom
from lissom.generation.pool import PooledDecoder
from lissom.generation.sampling import Sampling
from tests.support.models import seeded
from tests.support.ranks import free_port
from tests.support.servers import HOST, ask, in_thread, load_example, until
from tests.support.tokenizers import tokenizer

NAME, LENGTH = "tiny", 128
PROMPTS = ["The quick brown fox", "A vocabulary has rows", "日本語の文章", "and", "jumps over the lazy dog, and the dog sleeps"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}<s>assistant\n"
)


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


def running(decoder, words, limits) -> AbstractContextManager:
    """A server in a thread."""
    return in_thread(load_example("serve_chat").configure(decoder, words, NAME, limits, HOST, free_port()))


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
    until(lambda: not decoder.running and not decoder.waiting)


def until_no_request(port: int) -> None:
    """Wait until the server has no open request."""
    until(lambda: "chat_open_requests 0\n" in ask(port, "/metrics")[1])
