"""Models that return a KV cache where none was asked for."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.errors import CaptureError
from lissom.frontends.capture.export import capture
from tests.support.models import seeded, tokens
from tests.support.neighbours import all_but_slow

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQ2SEQ = {
    "vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip


def llama() -> nn.Module:
    return seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))


def bart() -> nn.Module:
    config = transformers.BartConfig(**SEQ2SEQ, max_position_embeddings=32)
    return seeded(lambda: transformers.BartForConditionalGeneration(config))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return seeded(lambda: transformers.T5Model(config))


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=8, max_source_positions=12, max_target_positions=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return seeded(lambda: transformers.WhisperForConditionalGeneration(config))


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1)
    return seeded(lambda: transformers.MambaForCausalLM(config))


class Wrapped(nn.Module):
    """A decoder inside a module of the caller's own, which has no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, ids: torch.Tensor) -> object:
        return self.inner(input_ids=ids)


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, Wrapped):
        return {"ids": tokens(2, 5)}
    main = {"input_ids": tokens(2, 6)}
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        main = {"input_features": torch.randn(2, 8, 24)}
    return main | ({"decoder_input_ids": tokens(2, 4)} if model.config.is_encoder_decoder else {})  # pyright: ignore


@pytest.mark.parametrize("build", all_but_slow([llama, bart, Wrapped, t5, whisper, mamba], llama, bart, Wrapped))
def test_it_is_captured_without_the_cache(build) -> None:
    model = build().eval()
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    caching = [getattr(config, "use_cache", None) for config in configs]
    inputs = inputs_of(model)
    with torch.no_grad():
        wanted = model(**inputs)
        found = capture(model, (), inputs)
        answer = found.program.signature.unflatten(found.program.run(found.example))
    assert type(answer) is type(wanted)
    assert set(answer) == set(wanted) - {"cache"}
    for name, value in answer.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-5)
    assert any("captured without the KV cache" in note for note in found.notes)
    generates = build not in (Wrapped, t5)  # T5 without a head does not
    assert any("lissom.compile_generation" in note for note in found.notes) == generates
    assert [getattr(config, "use_cache", None) for config in configs] == caching


def test_a_compiled_decoder_says_where_its_cache_is() -> None:
    fast = lissom.compile(llama(), {"input_ids": tokens(2, 6)}, checks="structural")
    assert fast(input_ids=tokens(1, 3), use_cache=False).logits.shape == (1, 3, 61)
    with pytest.raises(lissom.LissomError, match=r"for generation compile with lissom\.compile_generation"):
        fast(input_ids=tokens(1, 3), use_cache=True)


def test_a_cache_that_is_asked_for_is_refused() -> None:
    ids = tokens(2, 6)
    with pytest.raises(CaptureError, match="the example inputs have use_cache=True, and a program keeps no KV cache"):
        capture(llama(), (), {"input_ids": ids, "use_cache": True})
    with pytest.raises(CaptureError, match=r"example input \['cache'\] is a KV cache, and a program keeps none; leave it out"):
        capture(llama(), (), {"input_ids": ids, "cache": transformers.DynamicCache()})


def test_cache_is_left_out_after_transformers_registers_it() -> None:
    """Its exporters register the class once; caches are then no leaves by themselves."""
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    model = llama().eval()
    register_cache_pytrees_for_model(model)
    found = capture(model, (), inputs_of(model))
    assert set(found.program.signature.unflatten(found.program.run(found.example))) == {"logits"}
