"""Requests for chat_load.py, with the answer that each must have: the greedy one, computed alone by the same pool."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality import read_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import lissom
from lissom.frontends.models.huggingface import find_directory, tokenizer_of
from lissom.generation.pool import PooledDecoder
from lissom.generation.sampling import Sampling

LENGTH, SEQUENCES, QUEUE = 320, 4, 12
"""Bounds of the server: tokens of a text, texts at once, texts that wait."""
COUNTS = (1, 8, 24, 64)
"""Tokens of an answer."""
SHARED = "Of the words that follow one after the other, name those that are nouns, and say what each of them means: "
LARGE = (1 << 20) + 1
"""Bytes of a body above the server's bound."""
SHARES = {"whole": 0.35, "stream": 0.35, "cancel": 0.2, "malformed": 0.1}
_PATH = "/v1/completions"


@dataclass(frozen=True)
class Wanted:
    """What a request must get. status: 0 where the client leaves first. text, reason: of an answer with status 200."""

    kind: str
    status: int
    text: str = ""
    reason: str = ""


def save_small_model(folder: Path) -> None:
    """Save a Llama with random weights and a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(read_texts()[0][:2000], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    words.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    # Large weights: the likeliest token depends on the text, and few answers are alike.
    config = LlamaConfig(vocab_size=800, bos_token_id=1, eos_token_id=2, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def prompts_of(count: int, seed: int) -> list[str]:
    """Texts of 1 to 400 characters; half of them begin with the same words."""
    source = random.Random(seed)
    lines = [line for part in read_texts() for line in part]
    texts = ["; ".join(source.sample(lines, source.randint(1, 5)))[: source.choice((1, 40, 150, 280))] for _ in range(count)]
    return [SHARED + text if index % 2 else text for index, text in enumerate(texts)]


class Alone:
    """The answers to prompts, each computed by itself.

    tokens: the most likely ones after each prompt, up to the end of its text.
    """

    def __init__(self, model: str, passes: str, prompts: Sequence[str]) -> None:
        self.name, self.prompts = Path(model).name, prompts
        self.words: PreTrainedTokenizerBase = tokenizer_of(find_directory(model))
        pool: PooledDecoder = lissom.compile_pool(model, max_length=LENGTH, sequences=SEQUENCES, passes=passes)
        ends = {*Sampling.of(pool.generation_config).stop, int(self.words.eos_token_id)}
        self.ids = [self.words(prompt)["input_ids"] for prompt in prompts]
        self.vocabulary = pool.vocabulary
        self.tokens = [pool.generate([ids], max(COUNTS), Sampling(stop=ends))[0].tolist() for ids in self.ids]

    def wanted(self, kind: str, index: int, count: int) -> Wanted:
        """The answer of so many tokens."""
        text = self.words.decode(self.tokens[index][:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Wanted(kind, 200, str(text), "length" if len(self.tokens[index]) >= count else "stop")


def post(body: bytes, path: str = _PATH, more: int = 0) -> str:
    """An HTTP request. more: bytes that its head announces and the body does not have."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body) + more}\r\n\r\n"
    return (head.encode() + body).decode("latin-1")


def malformed(good: dict[str, Any], vocabulary: int) -> list[tuple[str, int, int]]:
    """HTTP requests that are refused, with their status and the bytes to add; status 0: the client leaves before the end."""
    body = json.dumps(good).encode()
    wrong = [
        {"prompt": None},
        {"prompt": [vocabulary]},
        {"max_tokens": 1 << 20},
        {"max_tokens": 0},
        {"temperature": float("nan")},
        {"stop": [""]},
        {"n": 2},
        {"unknown": 1},
    ]
    broken = [b"", b"{", body[:-1], b"\xff" + body, b"[]", b"[" * 10_000, *(json.dumps(good | item).encode() for item in wrong)]
    return [
        *((post(data), 400, 0) for data in broken),
        (post(json.dumps(good | {"model": "other"}).encode()), 404, 0),
        (post(body, "/v1/nothing"), 404, 0),
        (post(body, more=LARGE), 413, LARGE),
        ("no HTTP at all\r\n\r\n", 400, 0),
        (post(body, more=10), 0, 0),
    ]


def requests_of(alone: Alone, count: int, seed: int) -> tuple[list[dict[str, Any]], list[Wanted]]:
    """So many requests for chat_clients.py in random order, and what each must get."""
    source = random.Random(seed)
    requests, wanted = [], []
    for number in range(count):
        (kind,) = source.choices([*SHARES], [*SHARES.values()])
        index, tokens = source.randrange(len(alone.prompts)), source.choice(COUNTS)
        prompt = alone.prompts[index] if source.random() < 0.5 else alone.ids[index]
        body = {"model": alone.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        request = {"id": number, "pad": 0, "stream": kind == "stream", "leave": None, "reset": False}
        if kind == "malformed":
            raw, status, pad = source.choice(malformed(body, alone.vocabulary))
            request |= {"raw": raw, "pad": pad} | ({} if status else {"leave": 0})
            wanted.append(Wanted(kind, status))
        else:
            if kind == "cancel":
                request |= {"stream": source.random() < 0.8, "reset": source.random() < 0.5}
                # A request for a whole answer is left while it is computed.
                request["leave"] = source.choice((0, 1, 2, 5, 20)) if request["stream"] else 0
            request["raw"] = post(json.dumps(body | {"stream": request["stream"]}).encode())
            wanted.append(alone.wanted(kind, index, tokens))
        requests.append(request)
    return requests, wanted
