"""The quality of sparse attention: all-MiniLM-L6-v2 on texts of 256 tokens, by pattern.

    python benchmarks/attention_quality.py --update
    python benchmarks/attention_quality.py --passes "sparsify-attention{pattern=measured,mass=0.9}"

Texts are WordNet glosses and examples, joined until they have 256 tokens; calibration texts are of other synsets. The cosine
compares a text's mean-pooled embedding with the dense model's. *Blocks* is the fraction of (query block, key block) pairs that
the masks leave visible, over heads, layer by layer. Prints a Markdown table; `--update` puts it into README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from quality import conditions, embed, long_texts, optimized, read_pairs
from readme import put_table

from lissom.compiler.analysis.patterns.reader import read_pattern
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.program import Program
from lissom.frontends.models.huggingface import Checkpoint, load

TOKENS, BLOCK, BATCH = 256, 32, 8
PASSES = (
    *(f"sparsify-attention{{pattern=measured,mass={mass}}}" for mass in (0.99, 0.95, 0.9, 0.8)),
    "sparsify-attention{pattern=measured,block=16}",
    "sparsify-attention{window=64}",
    "sparsify-attention{window=64,global_tokens=1}",
    "sparsify-attention{pattern=global-window-random,window=32,block=32,global_tokens=1,random_blocks=1}",
)


def drawn(checkpoint: Checkpoint, split: str, count: int) -> list[str]:
    """This many texts of TOKENS tokens."""
    pairs = read_pairs(split)
    texts = long_texts(checkpoint, [text for pair in zip(pairs.glosses, pairs.examples, strict=True) for text in pair], TOKENS)
    return texts[:count]


def kept(program: Program) -> list[float]:
    """The fraction of blocks that each attention's mask leaves visible, in the order of the layers."""
    shares: list[float] = []
    for site in program.fact(structure).attention:
        reading = read_pattern(program, site.node)
        if reading.pattern is None:
            shares.append(1.0)
            continue
        some, _ = reading.pattern.blocks(TOKENS, TOKENS, BLOCK, reading.layout)
        shares.append(float(some.float().mean()))
    return shares


def table(checkpoint: Checkpoint, pipelines: Sequence[str], calibration: int, evaluated: int) -> str:
    """The cosines and the fractions of blocks, as Markdown."""
    texts = drawn(checkpoint, "evaluation", evaluated)
    others = drawn(checkpoint, "calibration", calibration)
    data: list[dict[str, object]] = [
        {**checkpoint.encode(others[at : at + BATCH], TOKENS)} for at in range(0, len(others), BATCH)
    ]
    wanted = embed(checkpoint.model, checkpoint, texts)
    lines = [
        "| passes | cosine, mean | least | blocks, mean | least and most of a layer | s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for passes in pipelines:
        program, seconds = optimized(checkpoint, passes, data)
        near, shares = (wanted * embed(program, checkpoint, texts)).sum(-1), kept(program)
        cells = [f"`{passes}`", f"{float(near.mean()):.4f}", f"{float(near.min()):.4f}"]
        cells += [f"{sum(shares) / len(shares):.0%}", f"{min(shares):.0%} to {max(shares):.0%}", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    about = f"{len(texts)} texts of {TOKENS} tokens, {calibration} for calibration; blocks of {BLOCK}. {conditions()}."
    return "\n".join([*lines, "", about, ""])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", nargs="*", default=PASSES, help="pipelines to measure, one argument each")
    parser.add_argument("--calibration", type=int, default=64, help="calibration texts; %(default)s by default")
    parser.add_argument("--texts", type=int, default=48, help="evaluated texts; %(default)s by default")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    printed = table(load("minilm"), options.passes, options.calibration, options.texts)
    print(printed)
    if options.update:
        put_table("attention_quality", printed)


if __name__ == "__main__":
    main()
