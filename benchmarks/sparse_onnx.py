"""Block-sparse attention in ONNX Runtime: by key blocks, compared with its own dense and sparse attention.

    python benchmarks/sparse_onnx.py --update
    python benchmarks/sparse_onnx.py --tokens 4096 --width 32 --runs 9

An eighth of all keys is visible: a symmetric window, a causal window, a window with global keys and queries at the start, and
random blocks of 64. Queries, keys and values are the outputs of projections, [1, tokens, heads · width]. Sessions are timed in
turn: medians with quartiles. `dense` sees everything; `masked` is dense attention with the pattern's mask; the rest are the
variants of the backend `onnxruntime`, and ONNX Runtime's own operators for causal windows and blocks.
Prints a Markdown table; `--update` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from quality import conditions
from readme import put_table
from torch import nn

from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.variants import ATTENTION, PAIRS, write_variant
from lissom.backends.onnxruntime.session import SessionOptions, open_session
from lissom.frontends.capture.export import capture
from lissom.measure.timing import Timing, time_calls
from lissom.ops import block_sparse_attention
from lissom.ops.pattern import LAYOUT, Condition, Pattern

BLOCK = 64
KEPT = 0.125
MASKED_BYTES = 2**31
"""Dense attention with a mask is skipped if the scores of all pairs take more bytes."""

_ARENA_TOKENS = 8192
"""Sessions release memory after each call beyond this many tokens."""

Run = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Setting:
    """One attention: its pattern and its sizes. layout: for patterns that need one."""

    pattern: Pattern
    layout: torch.Tensor | None
    tokens: int
    heads: int
    width: int
    threads: int

    @property
    def causal_window(self) -> int | None:
        """The number of keys a query sees up to its own position, if the pattern is a causal window and nothing else."""
        conditions = self.pattern.alternatives[0]
        alone = len(self.pattern.alternatives) == len(conditions) == 1 and not conditions[0].asks_layout
        return 1 - conditions[0].low if alone and conditions[0].high == 0 else None


class Attention(nn.Module):
    """q, k, v: [batch, tokens, heads · width]; dense if there is no pattern."""

    def __init__(self, setting: Setting, dense: bool = False) -> None:
        super().__init__()
        self.setting, self.dense = setting, dense
        self.register_buffer("layout", setting.layout)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        setting = self.setting
        q, k, v = (operand.unflatten(-1, (setting.heads, -1)).transpose(1, 2) for operand in (q, k, v))
        if self.dense:
            output = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            options = {"pattern": setting.pattern.encode(), "block": setting.pattern.block, "scale": setting.width**-0.5}
            output = block_sparse_attention(q, k, v, None, self.layout, **options)
        return output.transpose(1, 2).flatten(2)


def patterns(tokens: int) -> Mapping[str, tuple[Pattern, torch.Tensor | None]]:
    """Patterns that keep an eighth of the keys at this length, with their layouts."""
    kept = round(KEPT * tokens)
    front = BLOCK // 4
    window = Condition(-1, 1, low=-(kept - front) // 2, high=(kept - front) // 2)
    blocks = tokens // BLOCK
    drawn = torch.rand(1, blocks, blocks, generator=torch.Generator().manual_seed(0))
    drawn += torch.eye(blocks)
    layout = torch.zeros(1, blocks, blocks, dtype=torch.bool)
    layout.scatter_(2, drawn.topk(max(1, round(KEPT * blocks)), -1).indices, True)
    return {
        "window": (Pattern(((Condition(-1, 1, low=-(kept // 2), high=kept // 2),),)), None),
        "causal window": (Pattern(((Condition(-1, 1, low=1 - kept, high=0),),)), None),
        "window and global tokens": (
            Pattern(((window,), (Condition(0, 1, high=front - 1),), (Condition(1, 0, high=front - 1),))),
            None,
        ),
        "random blocks": (Pattern(((LAYOUT,),), BLOCK), layout),
    }


def sessions(setting: Setting, folder: Path) -> Iterator[tuple[str, Run]]:
    """Each variant by name, as a function that runs it once on the same random inputs. folder: for the models."""
    drawn = np.random.default_rng(0)
    inputs = {name: drawn.standard_normal((1, setting.tokens, setting.heads * setting.width), np.float32) for name in "qkv"}
    small = tuple(torch.randn(1, 3 * BLOCK, setting.heads * setting.width) for _ in range(3))
    # All variants at once would need more memory than most machines have.
    options = SessionOptions([("CPUExecutionProvider", {})], setting.threads, arena=setting.tokens <= _ARENA_TOKENS)

    def opened(name: str, model: ir.Model) -> Run:
        (folder / name).mkdir()
        session = open_session(save_onnx(model, folder / name), options)
        return partial(_first, session, inputs)

    for dense, forms in (
        (True, {"dense": (ATTENTION,)}),
        (False, {"masked": (PAIRS, ATTENTION), "key blocks, apart": (), "key blocks, one operator": (ATTENTION,)}),
    ):
        captured = capture(Attention(setting, dense), small)
        exported = export_onnx(captured.program, captured.example)
        for name, chosen in forms.items():
            if name != "masked" or 4 * setting.heads * setting.tokens**2 <= MASKED_BYTES:
                yield name, opened(name, write_variant(exported, chosen)[0])
    own = 4 * setting.heads * setting.tokens**2 <= MASKED_BYTES
    if setting.causal_window is not None and own:
        yield "GroupQueryAttention", opened("GroupQueryAttention", _grouped(setting))
        yield "SparseAttention", _sparse(setting, inputs, folder / "sparse.onnx", options)


def _first(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    outputs: Any = session.run(None, dict(inputs))
    return outputs[0]


def _constant(tape: ir.tape.Tape, array: np.ndarray) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(array)})


def _inputs(setting: Setting) -> list[ir.Value]:
    sizes = ir.Shape([1, setting.tokens, setting.heads * setting.width])
    return [ir.Value(name=name, shape=sizes, type=ir.TensorType(ir.DataType.FLOAT)) for name in "qkv"]


def _model(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], tape: ir.tape.Tape) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=tape.nodes, opset_imports={"": 23, "com.microsoft": 1}, name="attention")
    return ir.Model(graph, ir_version=10)


def _grouped(setting: Setting) -> ir.Model:
    """`GroupQueryAttention` with the window."""
    tape, inputs = ir.tape.Tape(), _inputs(setting)
    last, total = (np.array(number, np.int32) for number in ([setting.tokens - 1], setting.tokens))
    options = {"num_heads": setting.heads, "kv_num_heads": setting.heads, "local_window_size": setting.causal_window}
    given = [*inputs, None, None, _constant(tape, last), _constant(tape, total)]
    output, *_ = tape.op_multi_out("GroupQueryAttention", given, options, domain="com.microsoft", num_outputs=3)
    output.name, output.type = "output", ir.TensorType(ir.DataType.FLOAT)
    return _model(inputs, [output], tape)


def _sparse(setting: Setting, given: Mapping[str, np.ndarray], path: Path, options: SessionOptions) -> Run:
    """`SparseAttention` with the blocks the window touches, slightly more than the window; it updates its cache in place."""
    tape, inputs = ir.tape.Tape(), _inputs(setting)
    blocks, reach = -(-setting.tokens // BLOCK), -(-((setting.causal_window or 1) - 1) // BLOCK)
    columns = [range(max(0, row - reach), row + 1) for row in range(blocks)]
    starts = np.cumsum([0, *map(len, columns)], dtype=np.int32)[None]
    indices = np.array([column for row in columns for column in row], np.int32)[None]
    sizes = [1, setting.heads, blocks * BLOCK, setting.width]
    past = [ir.Value(name=f"past_{name}", shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.FLOAT)) for name in "kv"]
    numbers = [starts, indices, np.array([setting.tokens], np.int32), np.array([setting.tokens], np.int32)]
    results = tape.op_multi_out(
        "SparseAttention",
        [*inputs, *past, *(_constant(tape, number) for number in numbers)],
        {"num_heads": setting.heads, "kv_num_heads": setting.heads, "sparse_block_size": BLOCK, "scale": setting.width**-0.5},
        domain="com.microsoft",
        num_outputs=3,
    )
    for name, result in zip(("output", "present_k", "present_v"), results, strict=True):
        result.name, result.type = name, ir.TensorType(ir.DataType.FLOAT)
    ir.save(_model([*inputs, *past], results, tape), path)
    session = open_session(path, options)
    binding = session.io_binding()
    held = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(sizes, np.float32)) for _ in "kv"]
    for name, array in given.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name, memory in zip("kv", held, strict=True):
        binding.bind_ortvalue_input(f"past_{name}", memory)
    binding.bind_output("output")
    for name, memory in zip("kv", held, strict=True):
        binding.bind_ortvalue_output(f"present_{name}", memory)

    def run() -> np.ndarray:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return run


def measure(setting: Setting, runs: int) -> dict[str, Timing]:
    """The time of each variant. Raises: ValueError if one gives other outputs."""
    with TemporaryDirectory(prefix="lissom-") as folder:
        calls = dict(sessions(setting, Path(folder)))
        results = {name: call() for name, call in calls.items() if name not in ("dense", "SparseAttention")}
        wanted = next(iter(results.values()))
        for name, output in results.items():
            # float32: sums of thousands of terms in another order.
            if not np.abs(output - wanted).max() < 1e-4 * np.abs(wanted).max():
                raise ValueError(f"'{name}' gives something else than '{next(iter(results))}'")
        return time_calls(calls, 0.0, least=runs)


def table(rows: Sequence[tuple[str, Setting, Mapping[str, Timing]]]) -> str:
    """The times as Markdown, with their ratios to dense attention."""
    lines = ["| pattern | tokens | heads | form | ms | dense takes |", "|---|---:|---:|---|---:|---:|"]
    for name, setting, times in rows:
        for form, timing in times.items():
            sizes = f"{setting.tokens:,} | {setting.heads} of {setting.width}"
            lines.append(f"| {name} | {sizes} | {form} | {timing} | {times['dense'].median_ms / timing.median_ms:.2f} × |")
    return "\n".join(lines)


def main() -> None:
    """Time the selected variants, and print the table."""
    parser = argparse.ArgumentParser(description="Block-sparse attention in ONNX Runtime.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--width", type=int, nargs="+", default=[64])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--patterns", nargs="+", default=list(patterns(BLOCK)))
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for width in chosen.width:
        for tokens in chosen.tokens:
            for name in chosen.patterns:
                setting = Setting(*patterns(tokens)[name], tokens, chosen.heads, width, chosen.threads)
                rows.append((name, setting, measure(setting, chosen.runs)))
                print(table(rows[-1:]).split("\n", 2)[2], file=sys.stderr, flush=True)
    printed = f"{table(rows)}\n\nonnxruntime {onnxruntime.__version__}. {conditions()}.\n"
    print(printed)
    if chosen.update:
        put_table("sparse_onnx", printed)


if __name__ == "__main__":
    main()
