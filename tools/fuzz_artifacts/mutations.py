"""Mutations of an artifact's files. Each is determined by its name and seed, so any subset can be applied again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lissom.artifacts.allowed import ALLOWED

MANIFEST = "manifest.json"
CANARY = "fuzz_canary"
"""A marker in every text that would be code if it were run or compiled."""
_CODE = f"__import__('builtins').{CANARY}()"
_NUMBERS = (0, 1, -1, 2, 7, 63, 64, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, -(2**63), 10**30)
_TEXTS = (
    *("", "x", "None", "self", "lambda", _CODE, f"a={_CODE}, b", f'"]) or {_CODE} or (["', f"a\n{_CODE}", "\x00", "\x1b[2J"),
    *(
        "..",
        "../x",
        "/",
        "a" * 5000,
        "\ud800",
        "é",
        "__class__",
        "__class__.forward",
        "forward",
        "training",
        "float32",
        "qint8",
    ),
    *("cpu", "meta", "cuda:0", "xla:9", "aten.linear.default", "os.system", "int64", "sparse_coo", "torch", "load"),
)
_OPERATORS = (
    *sorted(ALLOWED),
    *(
        "aten.manual_seed.default",
        "aten._reshape_alias.default",
        "aten.rand.default",
        "aten.empty.memory_format",
        "aten.set_.default",
    ),
    *("aten.from_file.default", "aten._print.default", "lissom.begin_call.default", "operator.pow", "operator.getitem"),
    *("operator.lshift", "math.sqrt", "size.Pow", "torch.sym_ite", "_c10d_functional.wait_tensor.default"),
)
_TOKENS = (
    b"NaN",
    b"Infinity",
    b"-",
    b"1e999",
    b"9" * 5000,
    b"[" * 5000,
    b'{"a":1,"a":2}',
    b"\xff\xfe",
    b"\x00",
    b'"\\ud800"',
    b",",
    b"}",
)


@dataclass(frozen=True)
class Mutation:
    """One mutation of one file, written `FILE:KIND:SEED`."""

    file: str
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.file}:{self.kind}:{self.seed}"

    @classmethod
    def of(cls, text: str) -> Mutation:
        file, kind, seed = text.rsplit(":", 2)
        return cls(file, kind, int(seed))


def choose(rng: Random, files: Sequence[str]) -> tuple[Mutation, ...]:
    """Draw one to four mutations of some of the files."""
    count = rng.choice((1, 1, 1, 1, 2, 3, 4))
    return tuple(_choose_one(rng, files) for _ in range(count))


def _choose_one(rng: Random, files: Sequence[str]) -> Mutation:
    weights = {"program.json": 12, MANIFEST: 2, "steps.json": 0.3}
    file = rng.choices(files, [weights.get(name, 2) for name in files])[0]
    anywhere = [name for name in JSON if name not in _OF_PROGRAMS]
    if file == "program.json":
        kind = rng.choice([*JSON, "bytes"])
    elif file.endswith(".json"):
        kind = rng.choice([*anywhere, "bytes"])
    elif file.endswith(".safetensors"):
        kind = rng.choice([*(f"header-{name}" for name in anywhere), "bytes"])
    else:
        kind = "bytes"
    return Mutation(file, kind, rng.getrandbits(32))


def apply(folder: Path, mutations: Sequence[Mutation]) -> None:
    """Mutate the files of an artifact, and recompute its hashes."""
    for mutation in mutations:
        path, rng = folder / mutation.file, Random(mutation.seed)
        if mutation.kind == "bytes":
            path.write_bytes(_change_bytes(rng, path.read_bytes(), mutation.file))
        elif mutation.kind.startswith("header-"):
            path.write_bytes(_change_header(rng, path.read_bytes(), JSON[mutation.kind.removeprefix("header-")]))
        else:
            _change_json(rng, path, JSON[mutation.kind])
    seal(folder)


def seal(folder: Path) -> None:
    """Write the current sizes and hashes into the manifest, and its own hash; a manifest that is not JSON stays as it is."""
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
        files = fields["files"]
        fields.pop("sha256", None)
        for name in list(files):
            if (folder / name).is_file():
                raw = (folder / name).read_bytes()
                files[name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        body = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return
    path.write_bytes(body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode())


def _change_json(rng: Random, path: Path, change: Callable[[Random, Any], None]) -> None:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    change(rng, data)
    path.write_text(json.dumps(data, indent=1 if path.name == MANIFEST else None), encoding="utf-8")


def _change_header(rng: Random, raw: bytes, change: Callable[[Random, Any], None]) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError):
        return raw
    change(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def _change_bytes(rng: Random, raw: bytes, name: str) -> bytes:
    """Flip, cut, add, copy or zero bytes: anywhere, or in the part of a file that describes its layout."""
    region = len(raw) if name.endswith(".json") or rng.random() < 0.4 else min(len(raw), 400)
    place = rng.randrange(region) if region else 0
    size = rng.choice((1, 1, 2, 4, 8, 64))
    match rng.choice(("flip", "flip", "cut", "token", "copy", "zero", "remove")):
        case "flip" if raw:
            return raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
        case "cut":
            return raw[:place]
        case "token":
            return raw[:place] + rng.choice(_TOKENS) + raw[place:]
        case "copy" if raw:
            start = rng.randrange(len(raw))
            return raw[:place] + raw[start : start + size] + raw[place + size :]
        case "zero":
            return raw[:place] + bytes(size) + raw[place + size :]
        case _:
            return raw[:place] + raw[place + size :]


_OF_PROGRAMS = ("operator", "argument", "keyword")
Place = tuple[Any, Any]
"""A list or an object, and an index or a key in it."""


def _places(data: Any) -> list[Place]:
    places: list[Place] = []
    left = [data]
    while left:
        container = left.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        places += [(container, key) for key in keys]
        left += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    return places


def _pick(rng: Random, data: Any, wanted: Callable[[Any], bool] = lambda _: True) -> Place | None:
    places = [(owner, key) for owner, key in _places(data) if wanted(owner[key])] if isinstance(data, (dict, list)) else []
    return rng.choice(places) if places else None


def _value(rng: Random) -> Any:
    return rng.choice(
        (
            *(None, True, False, 1.5, -0.0, [], {}, [[]], {"a": {}}, rng.choice(_NUMBERS), rng.choice(_TEXTS)),
            *({"float": rng.choice(("inf", "nan", "x"))}, {"tuple": [1, 2]}, {"slice": [None, None, rng.choice(_NUMBERS)]}),
            *({"dtype": rng.choice(_TEXTS)}, {"node": rng.choice(_TEXTS)}, {"device": rng.choice(_TEXTS)}, {"ellipsis": True}),
            *(["Pow", 7, 400_000_000], ["Mul", 2**62, 2**62], ["Max", *range(700)], ["Float", "1e308"], ["Rational", 1, 0]),
        )
    )


def _delete(rng: Random, data: Any) -> None:
    if (place := _pick(rng, data)) is not None:
        del place[0][place[1]]


def _duplicate(rng: Random, data: Any) -> None:
    place = _pick(rng, data, lambda value: isinstance(value, list) and bool(value))
    if place is not None:
        items = place[0][place[1]]
        items.insert(rng.randrange(len(items) + 1), json.loads(json.dumps(rng.choice(items))))


def _swap_type(rng: Random, data: Any) -> None:
    if (place := _pick(rng, data)) is not None:
        place[0][place[1]] = _value(rng)


def _number(rng: Random, data: Any) -> None:
    place = _pick(rng, data, lambda value: isinstance(value, (int, float)))
    if place is not None:
        place[0][place[1]] = rng.choice((*_NUMBERS, place[0][place[1]] + rng.choice((-1, 1))))


def _text(rng: Random, data: Any) -> None:
    place = _pick(rng, data, lambda value: isinstance(value, str))
    if place is not None:
        place[0][place[1]] = rng.choice(_TEXTS)


def _rename(rng: Random, data: Any) -> None:
    """Rename a key, to a new name or to one of another object."""
    place = _pick(rng, data, lambda value: isinstance(value, dict) and bool(value))
    if place is not None:
        fields = place[0][place[1]]
        fields[rng.choice(_TEXTS)] = fields.pop(rng.choice(list(fields)))


def _graft(rng: Random, data: Any) -> None:
    """Copy a value over another."""
    place, other = _pick(rng, data), _pick(rng, data)
    if place is not None and other is not None:
        place[0][place[1]] = json.loads(json.dumps(other[0][other[1]]))


def _exchange(rng: Random, data: Any) -> None:
    """Swap two items of a list."""
    place = _pick(rng, data, lambda value: isinstance(value, list) and len(value) > 1)
    if place is not None:
        items = place[0][place[1]]
        one, other = rng.sample(range(len(items)), 2)
        items[one], items[other] = items[other], items[one]


def _calls(data: Any) -> list[Any]:
    nodes = data.get("nodes") if isinstance(data, dict) else None
    entries = nodes if isinstance(nodes, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("args"), list) and "target" in entry]


def _operator(rng: Random, data: Any) -> None:
    if calls := _calls(data):
        rng.choice(calls)["target"] = rng.choice(_OPERATORS)


def _argument(rng: Random, data: Any) -> None:
    if calls := _calls(data):
        args = rng.choice(calls)["args"]
        names = [
            {"node": node["name"]} for node in data["nodes"] if isinstance(node, dict) and isinstance(node.get("name"), str)
        ]
        argument = rng.choice((_value(rng), rng.choice(names or [None]), rng.choice(names or [None])))
        place = rng.randrange(len(args) + 1)
        args[place : place + rng.choice((0, 1, 1, 1))] = [argument]


def _keyword(rng: Random, data: Any) -> None:
    if calls := _calls(data):
        call = rng.choice(calls)
        if isinstance(call.get("kwargs"), dict):
            call["kwargs"][rng.choice((*_TEXTS, "dtype", "dim", "bias", "train", "layout", "input", "out"))] = _value(rng)


JSON: Mapping[str, Callable[[Random, Any], None]] = {
    "delete": _delete,
    "duplicate": _duplicate,
    "swap-type": _swap_type,
    "number": _number,
    "text": _text,
    "rename": _rename,
    "graft": _graft,
    "exchange": _exchange,
    "operator": _operator,
    "argument": _argument,
    "keyword": _keyword,
}
"""Mutations of a JSON document, by name."""
