"""Every technique of the survey alone, and the best hybrids, on three models: docs/tradeoffs.md.

    python benchmarks/tradeoffs.py --update
    python benchmarks/tradeoffs.py minilm --only int8 --quick

A row has the memory that a technique saves, its speed-up, the quality it keeps and the seconds it takes. Each row is printed
and added to tradeoffs.json as soon as it is measured, and a run goes on where the last one stopped; rows of another machine are
measured again. Speed is relative to our own exact program in float32, the two called in turn. Quality of MiniLM and Gemma is
that of quality.py; the vision transformer has random weights, and its quality is how well the differences between its outputs
for different pictures are kept. `--quick` tries rows with little data, and keeps none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from apart import run_apart
from quality import (
    calibration_batches,
    conditions,
    cosine,
    difference,
    perplexity_change,
    read_pairs,
    retrieve,
    timed_inputs,
    windows,
)
from readme import processor_kind
from tradeoff_page import page
from tradeoff_rows import MODELS, RANKS, TECHNIQUES, Row

import lissom
from lissom.artifacts.weights import stored_bytes
from lissom.errors import LissomError
from lissom.frontends.models.huggingface import load
from lissom.frontends.models.vision import load_timm
from lissom.io.files import write_whole
from lissom.measure.timing import time_calls

HERE = Path(__file__).parent
RECORDS = HERE / "tradeoffs.json"
PAGE = HERE.parent / "docs" / "tradeoffs.md"
EXACT = "exact"
"""The row of our own exact program, whose speed is relative to PyTorch's."""
PROMPT, WINDOW, LENGTH = 128, 256, 512
"""Gemma: tokens in the cache while a step is timed, of a text that is evaluated, and that the cache holds."""
ENCODER_SHAPE = (8, 128)
PICTURES = 4
"""Pictures of a timed call."""
RUNS = 30
"""Calls of a rank that are timed: as many in every rank, because each call needs all of them."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    texts, pairs: calibration texts and evaluated synsets of MiniLM. tokens, evaluated: Gemma's, to calibrate and to evaluate.
    pictures: for calibration, and as many for evaluation. seconds: of timing a program. minutes: a factor on those of training.
    """

    texts: int = 512
    pairs: int = 1000
    tokens: int = 2048
    evaluated: int = 1024
    pictures: int = 32
    seconds: float = 1.5
    minutes: float = 1.0


QUICK = Sizes(texts=16, pairs=20, tokens=256, evaluated=64, pictures=8, seconds=0.1, minutes=0.05)


@dataclass(frozen=True)
class Subject:
    """A model with its ways of being compiled, called and judged.

    compile: by passes, with further options of `lissom.compile`. call: a call to time, of a compiled model. eager: the same of
    PyTorch. score: the fraction of the quality kept, and the same in words; of the exact program first.
    """

    compile: Callable[..., Any]
    call: Callable[[Any], Callable[[], object]]
    eager: Callable[[], Callable[[], object]]
    score: Callable[[Any], tuple[float, str]]


def encoder(sizes: Sizes) -> Subject:
    """all-MiniLM-L6-v2: recall of glosses, 8 rows of 128 tokens."""
    checkpoint = load("minilm")
    data = calibration_batches(checkpoint, sizes.texts)
    texts = read_pairs("evaluation", sizes.pairs)
    original = retrieve(checkpoint.model, checkpoint, texts)
    inputs = timed_inputs("minilm", checkpoint, *ENCODER_SHAPE)

    def score(compiled: Any) -> tuple[float, str]:
        reached = retrieve(compiled, checkpoint, texts)
        change, low, high = difference(original, reached, 10)
        near = float(cosine(original, reached).mean())
        return 1 + change, f"recall@10 {change:+.1%} ({low:+.1%} to {high:+.1%}), cosine {near:.4f}"

    return Subject(
        partial(lissom.compile, checkpoint.model, checkpoint.example_inputs, data=data),
        lambda compiled: lambda: compiled(**inputs),
        lambda: lambda: checkpoint.model(**inputs),
        score,
    )


def decoder(sizes: Sizes) -> Subject:
    """Gemma 3 270M: perplexity, one token after 128."""
    from decoder import Static

    checkpoint = load("gemma3-270m")
    make = partial(lissom.compile_generation, checkpoint.model, max_length=LENGTH, all_logits=True)
    pieces = windows(checkpoint, "evaluation", sizes.evaluated, min(WINDOW, sizes.evaluated))

    exact: list[torch.Tensor] = []

    def score(decoder: Any) -> tuple[float, str]:
        reached = decoder_losses(decoder, pieces)
        exact.append(reached)
        after, change = perplexity_change(exact[0], reached)
        return math.exp(-float((reached - exact[0]).mean())), f"perplexity {after}, {change}"

    return Subject(
        partial(make, data=windows(checkpoint, "calibration", sizes.tokens, WINDOW)),
        decode,
        lambda: _eager_step(Static(checkpoint)),
        score,
    )


def decoder_losses(decoder: Any, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The losses of all tokens but the first of each piece of text, [1, tokens]."""
    parts = []
    for ids in pieces:
        decoder.reset()
        with torch.inference_mode():
            logits = decoder.step(ids)[0, :-1].float()
        parts.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(parts).double()


def decode(decoder: Any) -> Callable[[], object]:
    """A step of a decoder after a prompt; the cache is cropped afterwards, so that every step reads as many tokens."""
    prompt = torch.arange(100, 100 + PROMPT)[None]
    decoder.reset()
    decoder.step(prompt)

    def call() -> object:
        logits = decoder.step(prompt[:, :1])
        decoder.crop(PROMPT)
        return logits

    return call


def _eager_step(engine: Any) -> Callable[[], object]:
    """The same of the model of transformers with a static cache, in float32."""
    ids = torch.arange(100, 100 + PROMPT)[None]
    engine.reset()
    engine.read(ids)

    def call() -> object:
        engine.start = PROMPT
        return engine.read(ids[:, :1])

    return call


def vision(sizes: Sizes) -> Subject:
    """ViT-S/16 with random weights: outputs around their mean, four pictures."""
    model, example = load_timm("vit_small_patch16_224")
    pictures = _pictures(2 * sizes.pictures)
    data, held_out = pictures[: sizes.pictures].split(4), pictures[sizes.pictures :].split(4)
    inputs = pictures[:PICTURES]

    def outputs(call: Callable[..., Any]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([call(batch) for batch in held_out]).float()

    wanted = outputs(model)
    centre = wanted.mean(0)

    def score(compiled: Any) -> tuple[float, str]:
        near = torch.nn.functional.cosine_similarity(outputs(compiled) - centre, wanted - centre).mean()
        return float(near), f"cosine {float(near):.4f}"

    return Subject(
        partial(lissom.compile, model, example, data=list(data)),
        lambda compiled: lambda: compiled(inputs),
        lambda: lambda: model(inputs),
        score,
    )


def _pictures(count: int) -> torch.Tensor:
    """Smooth random pictures, [count, 3, 224, 224], which differ as much as photographs do."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(rough, size=(224, 224), mode="bicubic")


SUBJECTS = {"minilm": encoder, "gemma3-270m": decoder, "vit": vision}


def read_rows() -> list[Row]:
    """The rows measured so far."""
    return [Row(**fields) for fields in json.loads(RECORDS.read_text(encoding="utf-8"))] if RECORDS.exists() else []


def keep(row: Row) -> None:
    """Add a row to the records, in place of one of the same technique and model."""
    others = [known for known in read_rows() if (known.model, known.technique) != (row.model, row.technique)]
    write_whole(RECORDS, json.dumps([asdict(measured) for measured in (*others, row)], indent=1) + "\n")


def machine() -> str:
    """The machine and the versions, and the kind of the processor, which its name may not tell."""
    return f"{conditions()}; {processor_kind()}"


def missing(model: str, only: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """The techniques of a model with their passes that were not measured with these passes on this machine."""
    known = {(row.technique, row.passes) for row in rows if row.model == model and row.machine == machine()}
    for name, passes in ((EXACT, EXACT), *((technique.name, technique.passes(model)) for technique in TECHNIQUES)):
        if passes and (name, passes) not in known and any(part in name or part in passes for part in only):
            yield name, passes


def measure(model: str, only: Sequence[str], sizes: Sizes, kept: bool) -> None:
    """Measure the missing rows of a model. kept: whether to keep them."""
    wanted = list(missing(model, only, read_rows() if kept else []))
    if not wanted:
        return
    subject = SUBJECTS[model](sizes)
    whole = subject.compile(passes=EXACT, checks="structural", goal=None)
    subject.score(whole)
    for name, passes in wanted:
        try:
            row = one(subject, model, name, passes, whole, sizes)
        except LissomError as error:
            row = Row(model, name, passes, machine(), failed=str(error).splitlines()[0])
        print(_printed(row), flush=True)
        if kept:
            keep(row)


def one(subject: Subject, model: str, name: str, passes: str, whole: Any, sizes: Sizes) -> Row:
    """Compile one row, time it and judge it."""
    if passes == RANKS:
        return on_ranks(subject, model, name)
    started = time.perf_counter()
    ran = _shortened(passes, sizes.minutes)
    fast = whole if name == EXACT else subject.compile(passes=ran, checks="structural", goal=None)
    seconds = time.perf_counter() - started
    slower = subject.eager() if name == EXACT else subject.call(whole)
    with torch.inference_mode():
        timings = time_calls({"fast": subject.call(fast), "slower": slower}, sizes.seconds)
    fraction, quality = subject.score(fast)
    return Row(
        model,
        name,
        passes,
        machine(),
        1 - stored_bytes(fast.program) / stored_bytes(whole.program),
        timings["slower"].median_ms / timings["fast"].median_ms,
        fraction,
        quality,
        seconds,
        "",
        timings["fast"].median_ms,
        _embedding_share(fast.program),
    )


def _shortened(passes: str, factor: float) -> str:
    """The passes with every `minutes=` multiplied."""
    parts = passes.split("minutes=")
    return parts[0] + "".join(
        f"minutes={float(part.partition('}')[0]) * factor:g}}}{part.partition('}')[2]}" for part in parts[1:]
    )


def _embedding_share(program: Any) -> float:
    """The fraction of the bytes of weights that are tables, read by row."""
    tables = {
        str(node.args[0].target): program.weight(str(node.args[0].target)).nbytes
        for node in program.nodes(torch.ops.aten.embedding.default)
        if node.args[0].op == "get_attr"
    }
    return sum(tables.values()) / program.parameter_bytes


def on_ranks(subject: Subject, model: str, name: str) -> Row:
    """The program on two ranks of one thread each, against one process of one thread."""
    of_count: dict[int, dict[str, Any]] = {}
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            started = time.perf_counter()
            backend = lissom.Distributed(world_size=count) if count > 1 else "eager"
            subject.compile(passes=EXACT, backend=backend, checks="structural", goal=None).save(f"{folder}/{count}")
            seconds = time.perf_counter() - started
            request = [__file__, "--worker", model, f"{folder}/{count}"]
            if count > 1:
                request = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *request]
            of_count[count] = run_apart(request[0], request[1:], environment={"OMP_NUM_THREADS": "1"})  # pyright: ignore
    one_process, two = of_count[1], of_count[2]
    near = torch.nn.functional.cosine_similarity(torch.tensor(one_process["output"]), torch.tensor(two["output"]), 0)
    return Row(
        model,
        name,
        RANKS,
        machine(),
        1 - two["weights"] / one_process["weights"],
        one_process["milliseconds"] / two["milliseconds"],
        float(near),
        "equal outputs" if near > 0.99999 else f"cosine {float(near):.4f}",
        seconds,
        "",
        two["milliseconds"],
    )


def work(model: str, directory: str) -> None:
    """Load an artifact in this process, a rank or the only one, and time it; the first rank prints the result as JSON."""
    torch.set_num_threads(1)
    ranked = "RANK" in os.environ
    if ranked:
        torch.distributed.init_process_group("gloo")
    if model == "gemma3-270m":
        loaded: Any = lissom.load_generation(directory)
        output = loaded.step(torch.arange(100, 110)[None])[0, -1, :1000]
        call = decode(loaded)
    else:
        loaded = lissom.load(directory)
        call = partial(loaded, _pictures(PICTURES))
        if model == "minilm":
            call = partial(loaded, **timed_inputs("minilm", load("minilm"), *ENCODER_SHAPE))
        answer = call()
        output = (answer if isinstance(answer, torch.Tensor) else answer[0])[0].flatten()[:1000]  # pyright: ignore
    with torch.inference_mode():
        timing = time_calls({"one": call}, 0.0, RUNS, RUNS)["one"]
    if not ranked or torch.distributed.get_rank() == 0:
        program = loaded.program
        print(json.dumps({"milliseconds": timing.median_ms, "weights": program.parameter_bytes, "output": output.tolist()}))
    if ranked:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _printed(row: Row) -> str:
    """A row as it is measured."""
    if row.failed:
        return f"{row.model}: {row.technique}: {row.failed}"
    return (
        f"{row.model}: {row.technique}: {row.saved:.0%} saved, {row.faster:.2f} x as fast, {row.kept:.1%} kept, "
        f"{row.quality}, {row.seconds:.0f} s"
    )


def main() -> None:
    """Measure the missing rows, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help=f"{', '.join(MODELS)}; all by default")
    parser.add_argument("--only", nargs="*", default=[""], help="only techniques with one of these texts in name or passes")
    parser.add_argument("--quick", action="store_true", help="little data and short timings, and no rows kept: to try rows")
    parser.add_argument("--again", action="store_true", help="measure all rows again")
    parser.add_argument("--update", action="store_true", help="write docs/tradeoffs.md from the rows")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    if unknown := set(options.models) - set(MODELS):
        raise SystemExit(f"there is no model {', '.join(sorted(unknown))}; choose from {', '.join(MODELS)}")
    if options.again:
        RECORDS.unlink(missing_ok=True)
    try:
        for model in options.models or MODELS:
            measure(model, options.only, QUICK if options.quick else Sizes(), kept=not options.quick)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
    if options.update:
        write_whole(PAGE, page(read_rows()))


if __name__ == "__main__":
    main()
