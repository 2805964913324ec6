"""The transformer found in programs, against what their configurations say."""

import pytest
import torch
import transformers
from torch import nn

from lissom.compiler.analysis.structure.transformer import Structure, structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.frontends.capture.export import capture
from tests.compiler.analysis.axes.test_axes import canonical
from tests.support import captures
from tests.support.models import normal, seeded, tied, tokens


def found_in(name: str) -> Structure:
    return canonical(name)[0].fact(structure)


@pytest.mark.parametrize(
    ("name", "heads", "groups", "packed", "gated", "mask", "positions"),
    [
        ("bert", 2, 2, False, False, "padding", "none here"),
        ("llama", 4, 2, False, True, "causal + padding", "rotary"),
        ("t5", 2, 2, False, True, "padding + bias", "relative"),
        ("gpt2", 2, 2, True, False, "causal + padding", "none here"),
        ("bloom", 4, 4, True, False, "causal + padding + bias", "relative"),
    ],
)
def test_sites_are_what_the_configuration_says(name, heads, groups, packed, gated, mask, positions):
    found = found_in(name)
    assert len(found.attention) == len(found.feed_forward) == len(found.layers) == 2
    site = found.attention[0]
    assert (site.heads, site.key_value_heads, site.packed, site.cross) == (heads, groups, packed, False)
    assert site.output is not None
    assert (str(site.mask), site.positions) == (mask, positions)
    assert found.feed_forward[0].gated is gated


def test_layers_hold_their_attention_and_feed_forward_in_order():
    layers = found_in("t5").layers
    assert [layer.path for layer in layers] == ["encoder.block.0", "encoder.block.1"]
    assert all(len(layer.attention) == len(layer.feed_forward) == 1 for layer in layers)


def test_tied_lm_head_is_seen_from_both_ends():
    found = capture(tied().model, tied().args).program.fact(structure)
    assert [item.tied for item in found.embeddings] == [True]
    assert len(found.lm_heads) == 1


def whisper() -> Program:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=50,
        pad_token_id=0,
        max_source_positions=20,
    )
    inputs = {"input_features": torch.randn(2, 80, 40), "decoder_input_ids": tokens(), "use_cache": False}
    return capture(seeded(lambda: transformers.WhisperModel(config)), (), inputs).program


def test_cross_attention_and_convolutional_stem():
    found = whisper().fact(structure)
    assert [site.cross for site in found.attention].count(True) == 2
    assert [site.mask.causal for site in found.attention].count(True) == 2
    assert len(found.convolutions) == 2


def test_sliding_window_is_measured():
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=37,
        sliding_window=7,
    )
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    found = capture(seeded(lambda: transformers.MistralModel(config)), (), inputs).program.fact(structure)
    assert str(found.attention[0].mask) == "causal + window 7 + padding"


def decoder(config: transformers.PreTrainedConfig) -> Program:
    """A causal language model after the recipe `exact`."""
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    model = seeded(lambda: transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    return captures.optimize(model, inputs).program


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 37, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def test_soft_caps_are_told():
    found = decoder(transformers.Gemma2Config(**SIZES, attn_logit_softcapping=30.0)).fact(structure)
    assert [(site.softcap, site.sinks, site.positions) for site in found.attention] == [(30.0, False, "rotary")] * 2


def test_sinks_and_experts_are_told():
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    found = decoder(config).fact(structure)
    assert [(site.softcap, site.sinks, site.key_value_heads) for site in found.attention] == [(None, True, 2)] * 2
    assert [(site.experts, site.top_k, site.path) for site in found.mixtures] == [
        (4, 2, f"model.layers.{layer}.mlp.router") for layer in range(2)
    ]


def test_sites_know_the_sum_that_joins_the_residual_stream():
    layer = found_in("llama").layers[0]
    after_attention, after_feed_forward = layer.attention[0].residual, layer.feed_forward[0].residual
    assert after_attention is not None
    assert after_feed_forward is not None
    assert layer.attention[0].output in after_attention.all_input_nodes
    assert {after_attention, layer.feed_forward[0].down} == set(after_feed_forward.all_input_nodes)


def test_a_norm_inside_a_feed_forward_belongs_to_it():
    class SubNormed(nn.Module):
        """As in BitNet: gate and up, a norm, then down."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.norm = nn.RMSNorm(12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.norm(nn.functional.silu(self.gate(x)) * self.up(x)))

    (site,) = capture(seeded(SubNormed), (normal(2, 5, 8),)).program.fact(structure).feed_forward
    assert (site.gated, site.width, len(site.up)) == (True, 12, 2)


def test_convolutions_over_several_places_are_no_feed_forward():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.GELU(), nn.Conv1d(8, 8, 3), nn.GELU())
    assert capture(seeded(lambda: model), (normal(2, 8, 20),)).program.fact(structure).feed_forward == ()


def test_heads_folded_with_batch_are_told_from_projection():
    layer = nn.TransformerEncoderLayer(16, 4, 24)
    program = captures.optimize(layer.eval(), normal(5, 2, 16)).program
    (site,) = program.fact(structure).attention
    assert (site.heads, site.key_value_heads, site.head_dim) == (4, 4, 4)
    assert len(program.fact(structure).feed_forward) == 1


@pytest.mark.parametrize("scaled", [True, False], ids=["soft cap", "scale"])
def test_lm_head_below_soft_cap_or_scale(scaled: bool) -> None:
    """Gemma 2 without tied weights: 30 · tanh(z / 30). Granite divides its logits."""

    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.head(self.body(x).relu())
            return (logits / 30).tanh() * 30 if scaled else logits / 8

    program = captures.optimize(seeded(Capped), normal(2, 3, 8)).program
    (head,) = program.fact(structure).lm_heads
    assert nodes.tensor_type(head).shape[-1] == 20
