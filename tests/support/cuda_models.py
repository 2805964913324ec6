"""Quantized models for CUDA devices, real and pretended, beside the programs that simulate them on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers

import lissom
from lissom.compiler.verify.divergence import compare, run_samples, tolerance_of
from lissom.compiler.verify.rounding import SHARE
from lissom.compiler.verify.rounding_loss import rounding_loss
from tests.support.models import Case, seeded, tokens

LAYERS = 1
BF16 = "cast{dtype=bf16},"


def bert() -> Case:
    """A BERT whose sizes are no multiples of 8, without padding."""
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=44,
        max_position_embeddings=64,
    )  # fmt: skip
    ids = tokens(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Case(seeded(lambda: transformers.BertModel(config, add_pooling_layer=False)), inputs)


def llama() -> Case:
    """A Llama whose sizes are no multiples of 8."""
    config = transformers.LlamaConfig(
        vocab_size=37, hidden_size=36, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=52, max_position_embeddings=64,
    )  # fmt: skip
    return Case(seeded(lambda: transformers.LlamaForCausalLM(config)), {"input_ids": tokens(2, 7), "use_cache": False})


MODELS: dict[str, Callable[[], Case]] = {"bert": bert, "llama": llama}
LINEAR = {"bert": 6, "llama": 7}
"""Linear layers of a layer."""


def on_cuda(case: Case) -> dict[str, object]:
    """The keyword arguments of a case on the device."""
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in case.kwargs.items()}


def same_as(
    simulated: lissom.Program, case: Case, run: lissom.CompiledModel, sizes: Sequence[tuple[int, int]] = ((1, 1), (3, 5))
) -> None:
    """The outputs at several sizes of batch and sequence; the third call replays a CUDA graph."""
    signature, example = simulated.signature, simulated.signature.flatten((), case.kwargs)
    for size in sizes:
        sample = signature.resize(example, dict(zip(signature.dimensions, size, strict=True)))
        wanted = run_samples(simulated, [sample])
        # Two programs that quantize activations, or compute in bfloat16, may differ by that much.
        allowed = max(tolerance_of(simulated), SHARE * rounding_loss(simulated, [sample], wanted))
        args, kwargs = signature.arguments([value.cuda() for value in sample])
        for _ in range(3):
            found = run(*args, **kwargs)
            output = found.last_hidden_state if "last_hidden_state" in found else found.logits
            assert compare([[wanted[0][0].cpu()]], [[output.cpu()]]).relative_error <= allowed
