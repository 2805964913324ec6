"""GGUF files of small models for tests, their weights of random blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from lissom.ops.gguf_blocks import BLOCK_TYPES

# Where the float16 numbers of a block are; all other bytes may be anything.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (),
}
KINDS = {"attn_q": "Q4_K", "attn_k": "Q5_0", "attn_v": "Q8_0", "attn_output": "Q5_K", "ffn_gate": "Q4_1", "ffn_up": "Q4_0"}
WIDTH, VOCABULARY, LAYERS = 256, 96, 2


def random_blocks(name: str, count: int, largest: float | None = None, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes with finite float16 numbers of both signs, [count, bytes]; those of the first block are zero.

    largest: bounds the float16 numbers; without it they are of any size.
    """
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, BLOCK_TYPES[name].bytes), dtype=np.uint8)
    if name == "MXFP4":
        # The first byte is an exponent, and 255 is NaN; a scale of 2^-127 is the least.
        blocks[:, 0] = generator.integers(0, 252 if largest is None else 127 + int(np.floor(np.log2(largest))), count)
        blocks[0, 1:] = 0
    for at in HALVES[name]:
        numbers = generator.integers(0, 0x7C00, count, dtype=np.uint16) | (
            generator.integers(0, 2, count, dtype=np.uint16) << 15
        )
        if largest is not None:
            numbers = generator.uniform(-largest, largest, count).astype(np.float16).view(np.uint16)
        numbers[0] = 0
        blocks[:, at : at + 2] = numbers[:, None].view(np.uint8)
    return blocks


def write_llama(file: Path, kinds: dict[str, str] = KINDS, *, tied: bool = False, size: float = 1e-4) -> dict[str, np.ndarray]:
    """Write a small Llama with weights in these types, all others in Q6_K, and return its weights in float32 by name."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(VOCABULARY)
    found: dict[str, np.ndarray] = {}
    sizes = {"attn_k": WIDTH // 2, "attn_v": WIDTH // 2}
    names = ["token_embd", *([] if tied else ["output"])]
    names += [f"blk.{layer}.{leaf}" for layer in range(LAYERS) for leaf in (*KINDS, "ffn_down")]
    for seed, name in enumerate(names):
        leaf = name.rpartition(".")[2]
        kind, rows = kinds.get(leaf, "Q6_K"), sizes.get(leaf, VOCABULARY if name in ("token_embd", "output") else WIDTH)
        blocks = random_blocks(kind, rows * WIDTH // BLOCK_TYPES[kind].size, size, seed).reshape(rows, -1)
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=type_)
        found[f"{name}.weight"] = gguf.dequantize(blocks, type_)
    for name in ["output_norm", *(f"blk.{layer}.{leaf}" for layer in range(LAYERS) for leaf in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
