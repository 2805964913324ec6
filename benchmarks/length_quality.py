"""What sparse and linear attention cost and gain with the length, on a whole model: Gemma 3 270M, 128 tokens to 16,384.

    python benchmarks/length_quality.py --update

Fifteen of its layers see 512 tokens, three see all; patterns and feature maps replace what the treated layers see. Nothing is
trained; `hedgehog` is fitted to softmax on other texts. The text is glosses of WordNet, one after the other, so what a token
takes from far away is little, and more in a text that speaks of one thing: read these figures as the least loss.

*Error*: the distance of a token's hidden state to the dense model's, as a share of its length; the largest and the mean.
*Perplexity*: of the last tokens of each text, a thousand or half the text if that is less; texts are read until there are
`--tokens` of them, and at least one. *ms*: the median of calls with one text, without the output head. float32.
Prints Markdown tables; `--update` puts them into benchmarks/README.md and draws benchmarks/length_quality.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from quality import conditions, perplexity_change, windows
from readme import put_table
from torch import nn
from torch.nn import functional

import lissom
from lissom.frontends.huggingface import Checkpoint, load
from lissom.inspect.timing import time_calls

FIGURE = Path(__file__).parent / "length_quality.svg"
LENGTHS = (128, 512, 2048, 4096, 8192, 16384)
GLOBAL = "layers.5,layers.11,layers.17"
PASSES = {
    "none": "exact",
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
"""Tokens at the end of a text whose perplexity is taken, at most."""
EXAMPLE = 256
Call = Callable[..., object]


@dataclass(frozen=True)
class Point:
    """One program at one length. error: largest, mean; losses: of the last tokens of all texts; milliseconds: of one text."""

    error: tuple[float, float]
    losses: torch.Tensor
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
        found = functional.cross_entropy(functional.linear(states[-count - 1 : -1], head), ids[0, -count:], reduction="none")
    return found.double()


def measure(checkpoint: Checkpoint, lengths: Sequence[int], tokens: int, seconds: float) -> dict[int, dict[str, Point]]:
    """The points by length and name."""
    backbone = checkpoint.model.model
    assert isinstance(backbone, nn.Module)
    head = checkpoint.model.get_input_embeddings().weight.detach()  # pyright: ignore
    data = [inputs(ids) for ids in windows(checkpoint, "calibration", 8192)]
    example = inputs(data[0]["input_ids"][:, :EXAMPLE])  # pyright: ignore
    calls = {
        name: lissom.compile(backbone, example, passes=passes, data=data, checks="structural", only_if_faster=False)
        for name, passes in PASSES.items()
    }
    found: dict[int, dict[str, Point]] = {}
    for length in lengths:
        texts = windows(checkpoint, "evaluation", max(tokens, length), length)
        wanted = [hidden(calls["none"], ids) for ids in texts]
        given = inputs(texts[0])
        with torch.inference_mode():
            timings = time_calls({name: partial(call, **given) for name, call in calls.items()}, seconds, least=1)
        found[length] = {}
        for name, call in calls.items():
            states = [hidden(call, ids) for ids in texts]
            distances = torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(states, wanted, strict=True)])
            losses = torch.cat([last_losses(item, head, ids) for item, ids in zip(states, texts, strict=True)])
            found[length][name] = Point((float(distances.max()), float(distances.mean())), losses, timings[name].median_ms)
        print(table({length: found[length]}), file=sys.stderr, flush=True)
    return found


def table(points: Mapping[int, Mapping[str, Point]]) -> str:
    """A block of rows for every length."""
    lines = ["| tokens | treated | error, largest | mean | perplexity | change (± standard error) | ms |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|")
    for length, row in points.items():
        base = row["none"].losses
        for name, point in row.items():
            worst, mean = point.error
            change = ["", ""] if name == "none" else [f"{worst:.2g}", f"{mean:.2g}"]
            quality = perplexity_change(base, point.losses)
            quality = [quality[0], ""] if name == "none" else quality
            lines.append(f"| {' | '.join([f'{length:,}', name, *change, *quality, f'{point.milliseconds:,.0f}'])} |")
    return "\n".join(lines) + "\n"


def draw(points: Mapping[int, Mapping[str, Point]], file: Path) -> None:
    """Mean error, change of perplexity and time a token against the length."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "lissom"
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    lengths = list(points)
    for name in PASSES:
        rows = [points[length] for length in lengths]
        changes = [100 * (float((row[name].losses - row["none"].losses).mean().exp()) - 1) for row in rows]
        times = [1e3 * row[name].milliseconds / length for row, length in zip(rows, lengths, strict=True)]
        for panel, values in zip(panels, ([row[name].error[1] for row in rows], changes, times), strict=True):
            panel.plot(lengths, values, marker=".", label=name, color="black" if name == "none" else None)
    for panel, title in zip(panels, ("mean error of hidden states", "perplexity, change in %", "µs a token"), strict=True):
        panel.set(title=title, xlabel="tokens")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[1].set_yscale("symlog", linthresh=1)
    panels[2].legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="%(default)s by default")
    parser.add_argument("--tokens", type=int, default=4096, help="read at each length at least; %(default)s by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each program is timed at each length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--update", action="store_true", help="put the tables into benchmarks/README.md, and draw the figure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    points = measure(load("gemma3-270m"), options.lengths, options.tokens, options.seconds)
    passes = "\n".join(f"- {name}: `{passes}`" for name, passes in PASSES.items() if name != "none")
    figure = f"![error, perplexity and time against the length]({FIGURE.name})"
    printed = "\n".join([table(points), figure, "", passes, "", f"{conditions()}.", ""])
    print(printed)
    if options.update:
        put_table("length quality", printed)
        draw(points, FIGURE)


if __name__ == "__main__":
    main()
