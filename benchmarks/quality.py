"""The quality cost of passes: retrieval and cosine of all-MiniLM-L6-v2, and perplexity of Gemma 3 270M, on WordNet texts.

    python benchmarks/quality.py minilm --passes "prune-neurons{keep=0.75}" "prune-heads{keep=0.75},prune-neurons{keep=0.75}"
    python benchmarks/quality.py gemma3-270m --passes "prune-neurons{keep=0.75}"

MiniLM: each usage example is looked up among the glosses of all evaluated synsets, by the cosine of mean-pooled embeddings.
recall@k is the fraction of examples whose own gloss is among the k nearest. Its change from the original is over the same
examples, with a 95 % interval from 2,000 bootstrap samples. The cosine compares a gloss's embedding with the original's.
Gemma: perplexity of the evaluated glosses, one per line, read in windows of 512 tokens that begin with the BOS token.
Calibration texts are those of other synsets.
"""

from __future__ import annotations

import argparse
import gzip
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import lissom
from lissom.compiler.ir.program import Program
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.measure.machine import core_count, device_name
from lissom.measure.timing import time_calls

DATA = Path(__file__).parent / "data"
PAIRS, TEXTS = DATA / "wordnet_pairs.tsv", DATA / "wordnet_texts.txt.gz"
DRAWS = 2000
BATCH = 16
WINDOW = 512


@dataclass(frozen=True)
class Texts:
    """Usage examples and the glosses they belong to, in the same order."""

    glosses: list[str]
    examples: list[str]


@dataclass(frozen=True)
class Retrieval:
    """The retrieval results of a model.

    ranks: for each example, how many glosses are nearer to it than its own. embeddings: of the glosses, [glosses, features].
    """

    ranks: torch.Tensor
    embeddings: torch.Tensor

    def recall(self, k: int) -> float:
        """The fraction of examples whose own gloss is among the k nearest."""
        return float((self.ranks < k).double().mean())


def read_pairs(split: str, limit: int | None = None) -> Texts:
    """The pairs of a split: `evaluation` or `calibration`."""
    rows = [line.split("\t") for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row[0] == split][:limit]
    return Texts([row[2] for row in chosen], [row[3] for row in chosen])


def calibration_batches(checkpoint: Checkpoint, texts: int = 3400, batch: int = BATCH) -> list[dict[str, torch.Tensor]]:
    """Batches of calibration texts, glosses and examples alike, of similar length to keep padding low."""
    pairs = read_pairs("calibration", (texts + 1) // 2)
    pool = (pairs.glosses + pairs.examples)[:texts]
    assert checkpoint.tokenizer is not None
    lengths = [len(ids) for ids in checkpoint.tokenizer(pool)["input_ids"]]
    order = sorted(range(len(pool)), key=lengths.__getitem__)
    return [checkpoint.encode([pool[index] for index in order[at : at + batch]]) for at in range(0, len(pool), batch)]


def read_texts() -> list[list[str]]:
    """Texts of synsets that have no pair: glosses of those with an example, examples, other glosses."""
    return [part.splitlines() for part in gzip.decompress(TEXTS.read_bytes()).decode().split("\n\n")]


def training_texts() -> list[list[str]]:
    """All texts that are not evaluated: glosses of synsets with an example, as those evaluated are, examples, other glosses."""
    pool = read_pairs("calibration")
    return [[*given, *part] for given, part in zip((pool.glosses, pool.examples, []), read_texts(), strict=True)]


def training_batches(checkpoint: Checkpoint, batch: int) -> list[dict[str, torch.Tensor]]:
    """Batches of all texts that are not evaluated, in random order, each padded to its longest text."""
    texts = [text for part in training_texts() for text in part]
    random.Random(0).shuffle(texts)
    return [checkpoint.encode(texts[start : start + batch]) for start in range(0, len(texts), batch)]


def long_texts(checkpoint: Checkpoint, texts: Sequence[str], tokens: int) -> list[str]:
    """The texts joined and split into texts of this many tokens, with the encoder's two special tokens; the rest is dropped."""
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    whole = range(0, len(ids) - tokens + 2, tokens - 2)
    return [str(checkpoint.tokenizer.decode(ids[start : start + tokens - 2])) for start in whole]


def embed(call: Callable[..., object], checkpoint: Checkpoint, texts: Sequence[str]) -> torch.Tensor:
    """Mean-pooled embeddings of unit length, [texts, features]. call: returns hidden states first, or the embeddings."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    embeddings = torch.empty(0)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        inputs = checkpoint.encode([texts[index] for index in chosen])
        with torch.inference_mode():
            answer = call(**inputs)
        pooled = answer if isinstance(answer, torch.Tensor) else mean_pooled(answer[0], inputs["attention_mask"])  # pyright: ignore[reportIndexIssue]
        embeddings = embeddings if len(embeddings) else torch.empty(len(texts), pooled.shape[-1])
        embeddings[chosen] = pooled.float()
    return embeddings


def mean_pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over real tokens, of unit length, [rows, features]. hidden: [rows, tokens, features]. mask: [rows, tokens]."""
    kept = mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


class Embedder(torch.nn.Module):
    """An encoder with mean pooling, as sentence-transformers runs it: returns embeddings of unit length."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
        """Shapes are [rows, tokens]; returns [rows, features]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        return mean_pooled(hidden, attention_mask)


def retrieve(call: Callable[..., object], checkpoint: Checkpoint, texts: Texts) -> Retrieval:
    """Look every example up among the glosses."""
    glosses, examples = embed(call, checkpoint, texts.glosses), embed(call, checkpoint, texts.examples)
    scores = examples @ glosses.T
    return Retrieval((scores > scores.diagonal()[:, None]).sum(1), glosses)


def difference(original: Retrieval, retrieval: Retrieval, k: int) -> tuple[float, float, float]:
    """The relative change of recall@k, and its 95 % interval from paired bootstrap samples."""
    before, after = (original.ranks < k).double(), (retrieval.ranks < k).double()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(before), (DRAWS, len(before)), generator=generator)
    changes = after[draws].mean(1) / before[draws].mean(1) - 1
    low, high = changes.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(after.mean() / before.mean() - 1), low, high


def cosine(original: Retrieval, retrieval: Retrieval) -> torch.Tensor:
    """The cosine of each gloss's embedding to the original's."""
    return (original.embeddings * retrieval.embeddings).sum(-1)


def windows(checkpoint: Checkpoint, split: str, tokens: int, size: int = WINDOW) -> list[torch.Tensor]:
    """Windows of token ids, [1, size]: the BOS token, then text; tokens: the total length of the text."""
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    pairs = read_pairs(split)
    lines = pairs.glosses if split == "evaluation" else [*pairs.glosses, *pairs.examples]
    ids = tokenizer("\n".join(lines), return_tensors="pt", add_special_tokens=False)["input_ids"][:, :tokens]
    return [torch.cat([torch.tensor([[tokenizer.bos_token_id]]), piece], 1) for piece in ids.split(size - 1, 1)]


def losses(call: Callable[..., object], checkpoint: Checkpoint, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The negative log-likelihood of every token but the first of each window, in float64."""
    parts = []
    for ids in texts:
        with torch.inference_mode():
            logits = call(**decoder_inputs(checkpoint, ids))[0]  # pyright: ignore[reportIndexIssue]
        parts.append(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none"))
    return torch.cat(parts).double()


def perplexity(call: Callable[..., object], checkpoint: Checkpoint, tokens: int = 4096) -> float:
    """exp of the mean negative log-likelihood of this many tokens of the evaluated glosses."""
    return float(losses(call, checkpoint, windows(checkpoint, "evaluation", tokens)).mean().exp())


def perplexity_change(base: torch.Tensor, reached: torch.Tensor) -> list[str]:
    """Perplexity, and its change with the standard error, as table cells; from `losses` of the same texts."""
    change = reached - base
    error = float(change.std() / len(change) ** 0.5)
    return [f"{float(reached.mean().exp()):.2f}", f"{float(change.mean().exp()) - 1:+.2%} (± {error:.2%})"]


def timed_inputs(model: str, checkpoint: Checkpoint, rows: int, tokens: int) -> dict[str, object]:
    """Inputs of that size for timing: text for MiniLM, one row of token ids for Gemma."""
    if model == "minilm":
        return dict(checkpoint.encode(["a sentence " * tokens] * rows, tokens))
    return decoder_inputs(checkpoint, torch.arange(100, 100 + tokens)[None])


def latency_share(
    fast: Callable[..., object], whole: Callable[..., object], given: Mapping[str, object], seconds: float
) -> float:
    """The median time of a call of `fast` relative to `whole`, the two called in turn."""
    timings = time_calls({"fast": lambda: fast(**given), "whole": lambda: whole(**given)}, seconds)
    return timings["fast"].median_ms / timings["whole"].median_ms


def decoder_inputs(checkpoint: Checkpoint, ids: torch.Tensor) -> dict[str, object]:
    """The decoder's arguments for these tokens without padding: [1, tokens]."""
    given = dict(checkpoint.example_inputs)
    return {**given, "input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if "attention_mask" in given else {})


def decoder_batches(checkpoint: Checkpoint, tokens: int = 8192) -> list[dict[str, object]]:
    """Calibration texts, one window per batch."""
    return [decoder_inputs(checkpoint, ids) for ids in windows(checkpoint, "calibration", tokens)]


def optimized(checkpoint: Checkpoint, passes: str, data: Sequence[dict[str, object]]) -> tuple[Program, float]:
    """The program after these passes, and the seconds they took."""
    started = time.perf_counter()
    compressed = lissom.optimize(checkpoint.model, checkpoint.example_inputs, passes=passes, data=data, checks="structural")
    return compressed.program, time.perf_counter() - started


def minilm_table(checkpoint: Checkpoint, pipelines: Sequence[str], texts: Texts, calibration: int) -> str:
    """Recall and cosine of the original and after each pipeline, as Markdown."""
    original = retrieve(checkpoint.model, checkpoint, texts)
    heads = ("passes", "recall@1", "change (95 %)", "recall@10", "change (95 %)", "cosine, mean", "5th percentile", "s")
    lines = [
        f"| {' | '.join(heads)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| none | {original.recall(1):.3f} | | {original.recall(10):.3f} | | 1 | 1 | |",
    ]
    for passes in pipelines:
        program, seconds = optimized(checkpoint, passes, calibration_batches(checkpoint, calibration))
        retrieval = retrieve(program, checkpoint, texts)
        near = cosine(original, retrieval)
        cells = [f"`{passes}`"]
        for k in (1, 10):
            change, low, high = difference(original, retrieval, k)
            cells += [f"{retrieval.recall(k):.3f}", f"{change:+.1%} ({low:+.1%} to {high:+.1%})"]
        cells += [f"{float(near.mean()):.4f}", f"{float(near.quantile(0.05)):.4f}", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def gemma_table(checkpoint: Checkpoint, pipelines: Sequence[str], tokens: int) -> str:
    """Perplexity of the original and after each pipeline, as Markdown."""
    lines = ["| passes | perplexity | s |", "|---|---:|---:|"]
    lines.append(f"| none | {perplexity(checkpoint.model, checkpoint, tokens):.2f} | |")
    for passes in pipelines:
        program, seconds = optimized(checkpoint, passes, decoder_batches(checkpoint))
        lines.append(f"| `{passes}` | {perplexity(program, checkpoint, tokens):.2f} | {seconds:.0f} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def conditions() -> str:
    """The machine and the versions of the measurements."""
    versions = {"torch": torch, "transformers": transformers, "lissom": lissom}
    listed = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    threads = torch.get_num_threads()
    return f"{device_name(torch.device('cpu'))}, {core_count()} cores, {threads} thread{'s' * (threads > 1)}; {listed}"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=["minilm", "gemma3-270m"])
    parser.add_argument("--passes", nargs="*", default=[], help="pipelines to measure, one argument each")
    parser.add_argument("--pairs", type=int, help="evaluated synsets; all of them by default")
    parser.add_argument("--texts", type=int, default=3400, help="calibration texts of MiniLM; %(default)s by default")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens Gemma reads; %(default)s by default")
    options = parser.parse_args()
    checkpoint = load(options.model)
    if options.model == "minilm":
        print(minilm_table(checkpoint, options.passes, read_pairs("evaluation", options.pairs), options.texts))
    else:
        print(gemma_table(checkpoint, options.passes, options.tokens))
    print(conditions())


if __name__ == "__main__":
    main()
