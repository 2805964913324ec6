"""Gemma 3 270M for several texts at once, and with drafts, in tokens per second: Lissom's pool and drafts, llama.cpp.

    python benchmarks/many_texts.py --update

Texts: prompts of 64 tokens of glosses, 64 tokens chosen greedily for each, 1 to 16 at once. `shared`: milliseconds to the first
token of a text whose first 512 tokens another text had, beside those of the first such text. Drafts: the answer to a text that
repeats itself and to one that does not, with `draft="prompt-lookup"`, relative to no draft; both answers must be the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from apart import run_apart
from llama import server_options
from quality import conditions, windows
from readme import put_table
from spread import Quartiles, quartiles, spread

import lissom
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.generation.sampling import Sampling

PROMPT, ANSWER, COUNTS, ROUNDS = 64, 64, (1, 4, 8, 16), 5
LENGTH = 640
RECIPES = {"Lissom, `balanced`": "balanced", "Lissom, `cast,quantize{embeddings=true}`": "cast,quantize{embeddings=true}"}
QUOTED = "The quick brown fox jumps over the lazy dog and runs along the river until it reaches the old stone bridge. "


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def pool_rates(checkpoint: Checkpoint, passes: str, prompts: Sequence[list[int]]) -> tuple[list[Quartiles], list[Quartiles]]:
    """Tokens of answers per second by number of texts; milliseconds to the first token of a text, and of one with its start."""
    pool = lissom.compile_pool(
        checkpoint.model, max_length=LENGTH, sequences=max(COUNTS), slots=max(COUNTS) * LENGTH, passes=passes, goal=None
    )
    greedy, rates = Sampling(), []
    for count in COUNTS:
        seconds = [timed(pool.generate, prompts[:count], ANSWER, greedy) for _ in range(ROUNDS + 1)][1:]
        rates.append(quartiles([count * ANSWER / value for value in seconds]))
    whole = torch.cat([window.flatten() for window in windows(checkpoint, "evaluation", 16 * 512)]).tolist()
    first: list[list[float]] = [[], []]
    for index in range(ROUNDS + 1):
        text = whole[index * 520 : index * 520 + 512]
        for kind in (0, 1):  # another text with these tokens, then one that shares them
            first[kind].append(timed(pool.generate, [[*text, 7 + kind]], 1, greedy) * 1000)
    return rates, [quartiles(values[1:]) for values in first]


def llama_rates(prompts: Sequence[list[int]], threads: int) -> list[Quartiles]:
    """The same with llama.cpp's server in this process, a slot for each text."""
    import xllamacpp

    rates = []
    for count in COUNTS:
        server: Any = xllamacpp.Server(server_options(LENGTH, count, threads))
        rates.append(quartiles([count * ANSWER / llama_seconds(server, prompts[:count]) for _ in range(ROUNDS + 1)][1:]))
        del server
    return rates


def llama_seconds(server: Any, prompts: Sequence[list[int]]) -> float:
    """The seconds in which all prompts are answered, each by a thread."""
    from concurrent.futures import ThreadPoolExecutor

    request = {"n_predict": ANSWER, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    requests = [{**request, "prompt": ids} for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        return timed(lambda: list(threads.map(server.handle_completions, requests)))


def draft_shares(checkpoint: Checkpoint, passes: str, plain: list[int]) -> list[tuple[str, Quartiles, float]]:
    """For each text its kind, the speed with a draft relative to none, and the tokens of a call."""
    assert checkpoint.tokenizer is not None
    make = {"max_length": LENGTH, "passes": passes, "goal": None}
    decoders = [lissom.compile_generation(checkpoint.model, draft=draft, **make) for draft in (None, "prompt-lookup")]
    options = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = []
    for kind, ids in (("repeats itself", checkpoint.tokenizer(QUOTED * 3)["input_ids"]), ("glosses", plain)):
        prompt = torch.tensor([ids])
        answers = [decoder.generate(prompt, **options) for decoder in decoders]
        if not torch.equal(*answers):
            raise SystemExit(f"the draft changed the answer to the text that {kind}")
        shares = []
        for _ in range(ROUNDS):
            alone, drafted = (timed(partial(decoder.generate, prompt, **options)) for decoder in decoders)
            shares.append(alone / drafted)
        assert decoders[1].drafts is not None
        rows.append((kind, quartiles(shares), decoders[1].drafts.tokens_per_call))
    return rows


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--without-llama", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--llama", action="store_true", help="print the rates of llama.cpp for prompts from standard input")
    options = parser.parse_args()
    if options.llama:
        print(json.dumps(llama_rates(json.load(sys.stdin), torch.get_num_threads())))
        return
    checkpoint = load("gemma3-270m")
    prompts = [window[0].tolist() for window in windows(checkpoint, "evaluation", PROMPT * max(COUNTS), PROMPT)]
    lines = [
        f"| tokens/s by texts at once | {' | '.join(map(str, COUNTS))} | first token after 512 others, ms | shared, ms |",
        f"|---|{'---:|' * (len(COUNTS) + 2)}",
    ]
    drafts = ["", "| drafts by prompt lookup | text | speed | tokens per call |", "|---|---|---:|---:|"]
    for name, passes in RECIPES.items():
        rates, first = pool_rates(checkpoint, passes, prompts)
        lines.append(f"| {name} | {' | '.join(map(spread, rates))} | {' | '.join(map(spread, first))} |")
        print(lines[-1], flush=True)
        for kind, share, tokens in draft_shares(checkpoint, passes, prompts[0]):
            drafts.append(f"| {name} | {kind} | {spread(share, 2)} | {tokens:.2f} |")
            print(drafts[-1], flush=True)
    if not options.without_llama:
        # In a process of its own, where no other threads are.
        rates = cast(list[Quartiles], run_apart(__file__, ["--llama"], prompts))
        lines.append(f"| llama.cpp | {' | '.join(map(spread, rates))} | | |")
    text = "\n".join([*lines, *drafts, "", f"{conditions()}.", ""])
    print(text)
    if options.update:
        put_table("many_texts", text, by_processor=True)


if __name__ == "__main__":
    main()
