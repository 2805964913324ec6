"""Quality and speed of sparse and linear attention against the length: Gemma 3 270M, 128 to 16,384 tokens.

    python benchmarks/length_quality.py --update

Fifteen of its layers have a window of 512 tokens, three see all; patterns and feature maps replace the attention of the treated
layers. Nothing is trained; `hedgehog` is fitted to softmax on other texts. The text is a series of WordNet glosses, which have
few long-range dependencies, so a coherent text would lose more.

*Error*: the distance of a token's hidden state to the dense model's, relative to its norm; the largest and the mean.
*Perplexity*: of the last tokens of each text, a thousand or half the text if that is less; texts are read until there are
`--tokens` of them, and at least one. *ms*: the median call of one text, over two calls or more, without the LM head.
Each row is added to length_quality.json as soon as it is measured, and a run continues where the last one stopped; `--again`
starts over. `--update` puts the table into benchmarks/README.md and draws benchmarks/length_quality.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from figures import save, subplots
from quality import conditions, windows
from readme import put_table
from torch import nn
from torch.nn import functional

import lissom
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.io.files import write_whole

RECORDS = Path(__file__).parent / "length_quality.json"
FIGURE = Path(__file__).parent / "length_quality.svg"
LENGTHS = (128, 512, 2048, 4096, 8192, 16384)
DENSE = "none"
GLOBAL = "layers.5,layers.11,layers.17"
PASSES = {
    DENSE: "exact",
    "window of 512, global layers": f'sparsify-attention{{window=512,only="{GLOBAL}"}}',
    "and 64 global tokens": f'sparsify-attention{{window=512,global_tokens=64,only="{GLOBAL}"}}',
    "global, window, random": f'sparsify-attention{{pattern=global-window-random,only="{GLOBAL}"}}',
    "strided": f'sparsify-attention{{pattern=strided,only="{GLOBAL}"}}',
    "dilated": f'sparsify-attention{{pattern=dilated,only="{GLOBAL}"}}',
    "window of 128, all layers": "sparsify-attention{window=128}",
    "elu, last layer": 'linear-attention{features=elu,only="layers.17"}',
    "hedgehog, last layer": 'linear-attention{features=hedgehog,only="layers.17"}',
    "hedgehog, global layers": f'linear-attention{{features=hedgehog,only="{GLOBAL}"}}',
}
LAST = 1000
"""The most tokens at the end of a text whose perplexity is measured."""
EXAMPLE = 256
Call = Callable[..., object]


@dataclass(frozen=True)
class Row:
    """One program at one length. error: largest and mean. perplexity, change, spread: of the last tokens; spread: one standard
    error of the change. milliseconds: of one text.
    """

    tokens: int
    treated: str
    error: Sequence[float]
    perplexity: float
    change: float
    spread: float
    milliseconds: float


def inputs(ids: torch.Tensor) -> dict[str, object]:
    """The arguments of the decoder without its head; ids: [1, tokens]."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def hidden(call: Call, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states, [tokens, features]."""
    with torch.inference_mode():
        return call(**inputs(ids)).last_hidden_state[0]  # pyright: ignore[reportAttributeAccessIssue]


def last_losses(states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of the last tokens in float64; states: [tokens, features], ids: [1, tokens]."""
    count = min(LAST, ids.shape[1] // 2)
    with torch.inference_mode():
        losses = functional.cross_entropy(functional.linear(states[-count - 1 : -1], head), ids[0, -count:], reduction="none")
    return losses.double()


def measure(checkpoint: Checkpoint, wanted: Mapping[int, Sequence[str]], tokens: int) -> Iterator[Row]:
    """The selected rows, by length."""
    backbone = checkpoint.model.model
    assert isinstance(backbone, nn.Module)
    head = checkpoint.model.get_input_embeddings().weight.detach()  # pyright: ignore
    data = [inputs(ids) for ids in windows(checkpoint, "calibration", 8192)]
    example = inputs(data[0]["input_ids"][:, :EXAMPLE])  # pyright: ignore
    calls = {
        name: lissom.compile(backbone, example, passes=PASSES[name], data=data, checks="structural", goal=None)
        for name in PASSES
        if name == DENSE or any(name in names for names in wanted.values())
    }
    for length, names in wanted.items():
        texts = windows(checkpoint, "evaluation", max(tokens, length), length)
        dense = [hidden(calls[DENSE], ids) for ids in texts]
        base = torch.cat([last_losses(states, head, ids) for states, ids in zip(dense, texts, strict=True)])
        for name in names:
            states, seconds = timed(calls[name], texts)
            distances = torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(states, dense, strict=True)])
            losses = torch.cat([last_losses(hidden, head, ids) for hidden, ids in zip(states, texts, strict=True)])
            moved = losses - base
            yield Row(
                length,
                name,
                (float(distances.max()), float(distances.mean())),
                float(losses.mean().exp()),
                float(moved.mean().exp()) - 1,
                float(moved.std() / len(moved) ** 0.5),
                1e3 * statistics.median(seconds),
            )


def timed(call: Call, texts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
    """The hidden states of each text, and the seconds every call took."""
    states: list[torch.Tensor] = []
    seconds: list[float] = []
    for ids in [*texts, *texts[:1]]:
        started = time.perf_counter()
        states.append(hidden(call, ids))
        seconds.append(time.perf_counter() - started)
    return states[: len(texts)], seconds


def table(rows: Sequence[Row]) -> str:
    """One line per row, sorted by length."""
    lines = ["| tokens | treated | error, largest | mean | perplexity | change (± standard error) | ms |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|")
    for row in sorted(rows, key=lambda row: (row.tokens, [*PASSES].index(row.treated))):
        worst, mean = row.error
        cells = [f"{row.tokens:,}", row.treated, f"{worst:.2g}", f"{mean:.2g}", f"{row.perplexity:.2f}"]
        cells += [f"{row.change:+.2%} (± {row.spread:.2%})", f"{row.milliseconds:,.0f}"]
        if row.treated == DENSE:
            cells[2] = cells[3] = cells[5] = ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Mean error, change of perplexity and time per token against the length."""
    figure, panels = subplots(1, 3, figsize=(13, 4.2))
    for name in PASSES:
        mine = sorted((row for row in rows if row.treated == name), key=lambda row: row.tokens)
        lengths = [row.tokens for row in mine]
        curves = (
            [row.error[1] for row in mine],
            [100 * row.change for row in mine],
            [1e3 * row.milliseconds / row.tokens for row in mine],
        )
        for panel, values in zip(panels, curves, strict=True):
            panel.plot(lengths, values, marker=".", label=name, color="black" if name == DENSE else None)
    for panel, title in zip(panels, ("mean error of hidden states", "perplexity, change in %", "µs a token"), strict=True):
        panel.set(title=title, xlabel="tokens")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[1].set_yscale("symlog", linthresh=1)
    panels[2].legend(fontsize=7)
    save(figure, file)


def read_rows() -> list[Row]:
    """The rows measured so far."""
    if not RECORDS.exists():
        return []
    return [Row(**fields) for fields in json.loads(RECORDS.read_text(encoding="utf-8"))]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="%(default)s by default")
    parser.add_argument("--tokens", type=int, default=4096, help="least tokens per length; %(default)s by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--again", action="store_true", help="measure all rows again")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md, and draw the figure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [] if options.again else read_rows()
    known = {(row.tokens, row.treated) for row in rows}
    wanted = {length: [name for name in PASSES if (length, name) not in known] for length in options.lengths}
    wanted = {length: names for length, names in wanted.items() if names}
    for row in measure(load("gemma3-270m"), wanted, options.tokens) if wanted else ():
        rows.append(row)
        write_whole(RECORDS, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(row, file=sys.stderr, flush=True)
    passes = "\n".join(f"- {name}: `{passes}`" for name, passes in PASSES.items() if name != DENSE)
    figure = f"![error, perplexity and time against the length]({FIGURE.name})"
    printed = "\n".join([table(rows), figure, "", passes, "", f"{conditions()}.", ""])
    print(printed)
    if options.update:
        put_table("length quality", printed)
        draw(rows, FIGURE)


if __name__ == "__main__":
    main()
