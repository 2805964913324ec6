"""Stop processes while they save, at random moments, and look at what is there: `python -m tests.support.killing --help`.

A process saves two versions in turns to one directory, until it is stopped. Then the directory must hold one of the two, byte
for byte, and load. The next save must delete what the stopped one left beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import lissom

Save = Callable[[Path], None]


def versions(kind: str) -> tuple[tuple[Save, Save], Callable[[Path], object]]:
    """What saves each of two versions of a model or a decoder, and what loads either."""
    if kind == "model":
        from tests.support.models import normal
        from tests.support.saving import compiled_module

        models = [compiled_module(torch.nn.Linear(64, 64), normal(2, 64)) for _ in range(2)]
        return (models[0].save, models[1].save), lissom.load
    from tests.support.decoders import decoder

    fast = lissom.compile_generation(decoder("llama"), max_length=32, checks="off")

    def save(end: int) -> Save:
        def write(path: Path) -> None:
            fast.generation_config.eos_token_id = end
            fast.save(path)

        return write

    return (save(1), save(2)), lissom.load_generation


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_saves(
    saves: tuple[Save, Save], load: Callable[[Path], object], count: int, number: signal.Signals, folder: Path, seed: int = 0
) -> Counter[str]:
    """Start and stop so many processes that save; how often which version was there, and how often something lay beside it."""
    first, second = saves
    first(folder / "first")
    second(folder / "second")
    wanted = [contents(folder / "first"), contents(folder / "second")]
    assert wanted[0] != wanted[1]
    target = folder / "here" / "artifact"
    target.parent.mkdir()
    first(target)
    started = time.perf_counter()
    second(target)
    seconds = time.perf_counter() - started
    found = contents(target)
    draw, seen = random.Random(seed), Counter[str]()
    for _ in range(count):
        process = os.fork()
        if process == 0:
            # The version that is not there comes first.
            _save_until_stopped(*((first, second) if found == wanted[1] else (second, first)), target)
        time.sleep(draw.uniform(0, 4 * seconds))
        _stop(process, number)
        found = contents(target)
        assert found in wanted, f"neither version: {sorted(found)}"
        load(target)
        seen[("first", "second")[wanted.index(found)]] += 1
        seen["left beside"] += len([*target.parent.iterdir()]) > 1
    first(target)
    assert contents(target) == wanted[0]
    left = [path.name for path in target.parent.iterdir()]
    assert left == ["artifact"], left
    return seen


def _stop(process: int, number: signal.Signals) -> None:
    """Send the signal, and again where it was lost: an interrupt within a callback from C++ is another error there, or none."""
    while True:
        os.kill(process, number)
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            if os.waitpid(process, os.WNOHANG)[0] == process:
                return
            time.sleep(0.01)


def _save_until_stopped(one: Save, other: Save, target: Path) -> None:
    # A shell that starts something in the background has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            one(target)
            other(target)
    except KeyboardInterrupt:
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("model", "decoder"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--signal", action="append", choices=("SIGKILL", "SIGINT", "SIGTERM"), help="default SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # OpenMP's threads are not there in a process that is forked, and are waited for.
    torch.set_num_threads(1)
    saves, load = versions(given.kind)
    for name in given.signal or ["SIGKILL"]:
        with TemporaryDirectory() as folder:
            print(name, dict(stop_saves(saves, load, given.count, signal.Signals[name], Path(folder), given.seed)))


if __name__ == "__main__":
    main()
