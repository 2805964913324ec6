"""A client process of chat_load.py: sends requests to a server with OpenAI's protocol, and writes outcomes as lines of JSON.

It reads `{"port": …, "connections": …, "requests": […]}` from standard input. A request has `id`, `raw` (the bytes of the
HTTP request, as Latin-1), `pad` (more bytes at its end), `stream`, and `leave`: the client closes the connection after so many
parts of the answer, with a reset if `reset` is true; None reads to the end. A request with status 503 or 429 is sent again.

Lines: `{"event": "sent" | "refused" | "began" | "done", "id": …}`. `sent` is written before the first byte is sent, `began`
with the first text of a stream, so that a process that is killed leaves behind what it had asked for. This file imports the
standard library alone: many such processes are started.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import sys
import time
from typing import Any

HOST = "127.0.0.1"
_SECONDS = 300.0
"""For one answer; one that takes longer is lost."""
_MOST_RETRY = 2.0
BUSY = (429, 503)


def say(event: str, request: dict[str, Any], **fields: object) -> None:
    """Write a line, at once."""
    os.write(1, (json.dumps({"event": event, "id": request["id"], **fields}) + "\n").encode())


def leave(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Close a connection, with a reset or as usual."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", int(reset), 0))
    writer.transport.abort() if reset else writer.close()


async def read_stream(reader: asyncio.StreamReader, request: dict[str, Any], started: float) -> dict[str, Any]:
    """The text of server-sent events, why it ended, and the seconds to the first text and between texts."""
    found: dict[str, Any] = {
        "text": "",
        "reason": None,
        "whole": False,
        "left": False,
        "first": None,
        "gaps": [],
        "error": None,
    }
    last, parts = started, 0
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            found["whole"] = True
            continue
        event = json.loads(data)
        if "error" in event:
            found["error"] = event["error"]
            continue
        if not event["choices"]:  # the usage
            continue
        (choice,) = event["choices"]
        found["reason"] = choice["finish_reason"] or found["reason"]
        if choice["text"]:
            found["text"] += choice["text"]
            now = time.perf_counter()
            if found["first"] is None:
                found["first"] = now - started
                say("began", request)
            else:
                found["gaps"].append(now - last)
            last, parts = now, parts + 1
        if request["leave"] is not None and parts >= request["leave"]:
            found["left"] = True
            break
    return found


async def read_answer(reader: asyncio.StreamReader, request: dict[str, Any], started: float) -> dict[str, Any]:
    """The status and the content of an answer. Raises OSError or EOFError if it breaks off."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status == 200 and request["stream"]:
        return {"status": status, **await read_stream(reader, request, started)}
    body = (await reader.read()).decode()
    if not head.lower().count(b"application/json"):
        return {"status": status, "message": body}
    answer = json.loads(body)
    if status != 200:
        after = head.lower().partition(b"retry-after: ")[2].partition(b"\r\n")[0]
        return {"status": status, "message": answer["error"]["message"], "retry": float(after or 0)}
    (choice,) = answer["choices"]
    found = {"text": choice["text"], "reason": choice["finish_reason"], "whole": True}
    return {"status": status, **found, "tokens": answer["usage"]["completion_tokens"]}


async def send(port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request once; what came of it. Status 0: nothing whole came."""
    say("sent", request)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(request["raw"].encode("latin-1") + b" " * request["pad"])
        if request["leave"] == 0:
            await asyncio.sleep(random.random() * 0.1)
            return {"status": 0, "left": True, "text": ""}
        async with asyncio.timeout(_SECONDS):
            return await read_answer(reader, request, started)
    except (OSError, EOFError, ValueError, KeyError) as error:
        return {"status": 0, "left": False, "message": f"{type(error).__name__}: {error}"}
    finally:
        leave(writer, reset=bool(request["reset"]))


async def ask(port: int, requests: list[dict[str, Any]]) -> None:
    """One connection after the other, until no request is left."""
    while requests:
        request = requests.pop()
        while (found := await send(port, request))["status"] in BUSY:
            say("refused", request, **found)
            await asyncio.sleep(random.random() * min(found.get("retry", 0), _MOST_RETRY))
        say("done", request, **found)


async def main() -> None:
    """Send all requests."""
    given = json.load(sys.stdin)
    random.seed(given["requests"][0]["id"])
    requests = given["requests"][::-1]
    await asyncio.gather(*(ask(given["port"], requests) for _ in range(given["connections"])))


if __name__ == "__main__":
    asyncio.run(main())
