"""Encoders on Lissom and on other engines, at several shapes: all-MiniLM-L6-v2, BERT-base, ModernBERT-base, ViT-B/16.

    python benchmarks/encoder.py --update
    python benchmarks/encoder.py --model bert-base --update

All but MiniLM have random weights; BERT and ModernBERT read the same texts, with MiniLM's tokenizer.

Each engine runs in its own process, with the settings its documentation advises for latency (`lissom/cli/bench/engines.py`).
Prints a Markdown table at the end; `--update` puts it into benchmarks/README.md, at the place of this kind of processor,
and draws the figure beside it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from figures import save, subplots
from readme import processor_kind, put_table

from lissom.cli.bench.comparison import compare, measurements
from lissom.cli.bench.engines import ENGINES, find_engines
from lissom.cli.bench.report import markdown_table, shapes_of
from lissom.cli.bench.worker import Record
from lissom.cli.bench.workload import parse_shapes
from lissom.cli.calibration_files import read_texts
from lissom.frontends.models.huggingface import find_directory
from lissom.inspect.progress import progress_bar

HERE = Path(__file__).parent
GLOSSES = HERE / "data" / "glosses.txt"
SHAPES = {
    "minilm": "1x32,1x128,8x128,32x128,32xragged",
    "bert-base": "1x32,1x128,8x128,32x128",
    "modernbert": "1x32,1x128,8x128,32xragged",
    "vit-b16": "1,8",
}


def model_name(model: str, folder: Path) -> str:
    """The name by which Lissom loads the model; one that is made is written to the folder."""
    if model not in ("bert-base", "modernbert"):
        return {"minilm": "minilm", "vit-b16": "timm:vit_base_patch16_224"}[model]
    from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    made = BertModel(BertConfig()) if model == "bert-base" else ModernBertModel(ModernBertConfig())
    made.eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(find_directory("minilm") / name, folder)
    return str(folder)


def measure(model: str, engines: str, shapes: str, seconds: float, threads: int) -> list[Record]:
    """The records of the engines at the shapes; after an interrupt, those finished so far."""
    records: list[Record] = []
    try:
        with progress_bar("encoder") as progress, tempfile.TemporaryDirectory() as folder:
            compared = compare(
                model_name(model, Path(folder)),
                find_engines(engines),
                shapes=parse_shapes(shapes),
                texts=read_texts(GLOSSES),
                threads=threads,
                seconds=seconds,
                progress=progress,
            )
            for record in compared:
                records.append(record)
    except KeyboardInterrupt:
        print("interrupted; finished so far:")
    return records


def draw(records: list[Record], file: Path) -> None:
    """Median milliseconds of every engine, one panel per shape, with the quartiles as whiskers."""
    shapes = shapes_of(records)
    ran = {engine.title: measured for engine in ENGINES.values() if (measured := measurements(records, engine.name))}
    figure, panels = subplots(1, len(shapes), sharey=True, squeeze=False, figsize=(2.4 + 2.2 * len(shapes), 1 + 0.3 * len(ran)))
    colours = ["tab:blue" if title.startswith("Lissom") else "tab:gray" for title in ran]
    for panel, shape in zip(panels[0], shapes, strict=True):
        timings = [measured[shape].timing if shape in measured else None for measured in ran.values()]
        medians = [timing.median_ms if timing else 0.0 for timing in timings]
        below = [timing.median_ms - timing.low_ms if timing else 0.0 for timing in timings]
        above = [timing.high_ms - timing.median_ms if timing else 0.0 for timing in timings]
        bars = panel.barh(list(ran), medians, xerr=[below, above], color=colours, error_kw={"elinewidth": 1})
        panel.bar_label(bars, [str(timing).partition(" ")[0] if timing else "—" for timing in timings], padding=3, fontsize=8)
        panel.set(title=shape, xlabel="ms")
        panel.margins(x=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    save(figure, file)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of %(default)s")
    parser.add_argument("--model", choices=SHAPES, default="minilm", help="%(default)s by default")
    parser.add_argument("--shapes", help="rows x tokens, or x ragged for whole glosses; for pictures the number of rows")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per engine and shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for each engine")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md, and draw its figure")
    options = parser.parse_args()
    shapes = options.shapes or SHAPES[options.model]
    records = measure(options.model, options.engines, shapes, options.seconds, options.threads)
    printed = markdown_table(records, options.threads)
    print(printed)
    if options.update:
        name = "encoder" if options.model == "minilm" else f"encoder {options.model}"
        figure = HERE / f"{name} {processor_kind()}.svg".replace(" ", "-")
        drawn = f"\n![milliseconds a call of every engine at every shape]({figure.name})\n"
        put_table(name, f"{printed}{drawn}", by_processor=True)
        draw(records, figure)


if __name__ == "__main__":
    main()
