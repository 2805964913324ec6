"""The transformer found in programs, against what their configurations say."""

import pytest
import torch
import transformers

from lissom.compiler.program import Program
from lissom.compiler.structure import Structure, structure
from lissom.frontends.export import capture
from tests.compiler.test_axes import canonical
from tests.models import seeded, tied, tokens


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


def test_tied_output_head_is_seen_from_both_ends():
    found = capture(tied().model, tied().args).program.fact(structure)
    assert [item.tied for item in found.embeddings] == [True]
    assert len(found.output_heads) == 1


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
