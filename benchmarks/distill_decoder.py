"""What distillation wins back on Gemma 3 270M: perplexity without and with `distill` in a pipeline.

    pip install -e '.[gemma]'
    python benchmarks/distill_decoder.py --minutes 20 --update

Trains on windows of 512 tokens of glosses of WordNet, without labels. Perplexity is of the glosses of other synsets, as in
quality.py; all are of synsets with an example. A row is printed as soon as it is measured.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from distill import RECOVER
from quality import WINDOW, conditions, decoder_inputs, losses, perplexity_change, training_texts, windows
from readme import put_table

import lissom
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.passes.canonical.fold_constants import FoldConstants

INT4 = "quantize{scheme=int4-weight,symmetric=false,embeddings=true},gptq"
PIPELINES = (f"prune-neurons{{keep=0.75}},{RECOVER}", f"{INT4},{RECOVER}")


def training_windows(checkpoint: Checkpoint, rows: int) -> list[dict[str, object]]:
    """Batches of this many windows: the BOS token, then texts in random order, one a line."""
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    texts = training_texts()[0]
    random.Random(0).shuffle(texts)
    ids = tokenizer("\n".join(texts), return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [piece for piece in ids.split(WINDOW - 1, 1) if piece.shape[1] == WINDOW - 1]
    whole = [torch.cat([torch.tensor([[tokenizer.bos_token_id]]), piece], 1) for piece in pieces]
    batches = [torch.cat(whole[at : at + rows]) for at in range(0, len(whole) - rows + 1, rows)]
    return [decoder_inputs(checkpoint, batch) for batch in batches]


def quick(program: Program) -> Program:
    """The same numbers, with weights quantized once and not at every call."""
    return Pipeline([FoldConstants()], checks="structural").run(program)[0]


def table(checkpoint: Checkpoint, pipelines: Sequence[str], recovery: str, rows: int, tokens: int) -> str:
    """Perplexity without and with recovery, as Markdown."""
    texts, batches = windows(checkpoint, "evaluation", tokens), training_windows(checkpoint, rows)
    lines = ["| passes | without recovery | with `distill` | steps | seconds in all |", "|---|---:|---:|---:|---:|"]
    for passes in pipelines:
        measured = list[torch.Tensor]()

        def likelihood(program: Program, measured: list[torch.Tensor] = measured) -> float:
            """Higher is better; measured at the start and after every lossy pass."""
            measured.append(losses(quick(program), checkpoint, texts))
            print(f"perplexity {float(measured[-1].mean().exp()):.2f}", flush=True)
            return -float(measured[-1].mean())

        recovered = lissom.optimize(
            checkpoint.model,
            checkpoint.example_inputs,
            passes=passes.replace(RECOVER, recovery),
            data=batches,
            checks="structural",
            metric=likelihood,
        )
        (step,) = (step for step in recovered.report.history.steps if step.curve)
        print(*step.notes, sep="\n")
        seconds = sum(pass_step.seconds for pass_step in recovered.report.history.steps)
        base, *_, before, after = measured
        if len(lines) == 2:
            lines.append(f"| none | {float(base.mean().exp()):.2f} | | | |")
        changes = [", ".join(perplexity_change(base, reached)) for reached in (before, after)]
        lines.append(
            f"| `{passes.replace(RECOVER, 'distill')}` | {' | '.join(changes)} | {step.curve[-1].step} | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    about = f"`{recovery}`, steps of {rows} × {WINDOW} tokens, {sum(map(torch.numel, texts)) - len(texts):,} tokens evaluated."
    return "\n".join([*lines, "", f"{about} {conditions()}."]) + "\n"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of each distillation; %(default)s by default")
    parser.add_argument("--steps", type=int, help="their length in steps instead")
    parser.add_argument("--options", default="", help="further options of distill, e.g. learning_rate=0.0001")
    parser.add_argument("--rows", type=int, default=1, help="windows of a step; %(default)s by default")
    parser.add_argument("--tokens", type=int, default=20480, help="tokens evaluated; %(default)s by default")
    parser.add_argument("--passes", nargs="*", default=list(PIPELINES), help=f"pipelines to measure, {RECOVER} where to train")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    length = f"minutes={options.minutes:g}" if options.steps is None else f"steps={options.steps}"
    recovery = f"distill{{{length}{options.options and ','}{options.options}}}"
    text = table(load("gemma3-270m"), options.passes, recovery, options.rows, options.tokens)
    print(text)
    if options.update:
        put_table("distillation gemma3-270m", text, by_processor=True)


if __name__ == "__main__":
    main()
