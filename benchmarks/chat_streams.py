"""Time to the first token and between tokens of streamed answers, for chat_load.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from chat_requests import post
from quality import read_texts
from transformers import PreTrainedTokenizerBase

CLIENTS = (1, 4, 8)
PROMPT, ANSWER, ROUNDS = 64, 64, 8
"""Tokens of a prompt and of an answer; answers that each client reads."""
CLIENT_SCRIPT = Path(__file__).parent / "chat_clients.py"


def prompts_for(words: PreTrainedTokenizerBase) -> dict[int, list[list[int]]]:
    """Prompts by the number of clients, each with one for a warm-up; no two begin alike."""
    count = sum(clients * ROUNDS + 1 for clients in CLIENTS)
    ids = words(" ".join(line for part in read_texts() for line in part[:2000]), add_special_tokens=False)["input_ids"]
    first = [] if words.bos_token_id is None else [int(words.bos_token_id)]
    size = PROMPT - len(first)
    if len(ids) < count * size:
        raise ValueError(f"the texts have {len(ids)} tokens, and {count} prompts need {count * size}")
    prompts = iter([[*first, *ids[index * size : (index + 1) * size]] for index in range(count)])
    return {clients: [next(prompts) for _ in range(clients * ROUNDS + 1)] for clients in CLIENTS}


def ask_streams(port: int, prompts: Sequence[list[int]], clients: int, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The streamed answers of a client process with so many connections. Raises RuntimeError if one is not whole."""
    body = {"max_tokens": ANSWER, "temperature": 0, "stream": True, **fields}
    request = {"pad": 0, "stream": True, "leave": None, "reset": False}
    requests = [
        {"id": index, **request, "raw": post(json.dumps(body | {"prompt": ids}).encode())} for index, ids in enumerate(prompts)
    ]
    given = json.dumps({"port": port, "connections": clients, "requests": requests})
    ran = subprocess.run([sys.executable, str(CLIENT_SCRIPT)], input=given, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    answers = [line for line in lines if line["event"] == "done"]
    if broken := [answer for answer in answers if not answer.get("whole")]:
        raise RuntimeError(f"{len(broken)} of {len(answers)} streams are not whole, the first: {broken[0]}")
    return answers


def stream_row(name: str, port: int, prompts: Sequence[list[int]], clients: int, fields: dict[str, Any]) -> str:
    """A row of the table. fields: more fields of the request."""
    ask_streams(port, prompts[:1], 1, fields)
    answers = ask_streams(port, prompts[1:], clients, fields)
    # A text that is sent has one token or more: a character of several tokens is sent when it is whole.
    times = ([answer["first"] for answer in answers if answer["first"]], [gap for answer in answers for gap in answer["gaps"]])
    cells = [f"{1000 * float(np.percentile(seconds, percent)):.1f}" for seconds in times for percent in (50, 99)]
    return f"| {name} | {clients} | {' | '.join(cells)} |"


HEAD = [
    "| server | clients | first token, p50 ms | p99 | between tokens, p50 ms | p99 |",
    "|---|---:|---:|---:|---:|---:|",
]
