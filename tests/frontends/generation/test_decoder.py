"""Tests of lissom.frontends.generation.decoder."""

from __future__ import annotations

import pytest
import torch
import transformers

from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import kept_state
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.frontends.generation.decoder import INPUTS, capture_decoder
from lissom.passes import PASSES, RECIPES
from tests.support.decoders import DECODERS, GATED, MAX_LENGTH, ROTARY, WINDOWED, decoder
from tests.support.models import seeded, tiny_bert, tiny_t5
from tests.support.neighbours import all_but_slow

aten = torch.ops.aten
EXACT = parse_pipeline("exact", PASSES, RECIPES)


@pytest.mark.parametrize("name", all_but_slow(DECODERS, "llama", "gpt2", "bloom"))
def test_passes_recognise_the_model_behind_its_cache(name: str) -> None:
    model = decoder(name)
    captured = capture_decoder(model, max_length=MAX_LENGTH)
    program, _ = Pipeline(EXACT, samples=captured.samples).run(captured.program)
    found, layers = program.fact(structure), model.config.num_hidden_layers
    assert len(found.attention) == len(found.feed_forward) == len(found.layers) == layers
    groups = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    assert {(site.heads, site.key_value_heads) for site in found.attention} == {(4, groups)}
    assert {site.positions == "rotary" for site in found.attention} == {name in ROTARY}
    assert {site.gated for site in found.feed_forward} == {name in GATED}
    assert all(site.mask.causal and site.mask.padding for site in found.attention)
    assert any(site.mask.window for site in found.attention) == (name in WINDOWED)
    assert any(item.tied for item in found.embeddings) == (model.config.tie_word_embeddings)
    assert len(found.lm_heads) == 1


def test_state_is_written_by_places_at_the_end() -> None:
    program = capture_decoder(decoder("gemma3"), max_length=MAX_LENGTH, batch=2).program
    assert program.state == tuple(f"cache.{layer}.{part}" for layer in (0, 1) for part in ("keys", "values"))
    assert {tuple(program.weight(name).shape) for name in program.state} == {(2, 2, MAX_LENGTH, 8)}
    writes = program.nodes(aten.copy_.default)
    assert [str(write.args[0].target) for write in writes] == list(program.state)
    for write in writes:
        state, new = write.args
        assert nodes.is_call(new, aten.index_copy.default) and new.args[:2] == (state, 2)
    assert [leaf.path for leaf in program.signature.tensors] == list(INPUTS)


def test_prompt_in_parts_gives_what_it_gives_at_once() -> None:
    model = decoder("mistral")
    program = capture_decoder(model, max_length=MAX_LENGTH, all_logits=True).program
    ids = torch.randint(0, 99, (1, 30), generator=torch.Generator().manual_seed(1))
    mask, places = torch.ones(1, MAX_LENGTH, dtype=torch.int64), torch.arange(30)[None]
    found = []
    with kept_state(program), torch.no_grad():
        for begin, end in ((0, 11), (11, 12), (12, 30)):
            found += program.run([ids[:, begin:end], mask, places[:, begin:end], torch.tensor([begin])])
        wanted = model(ids).logits
    # Sums in another order over two layers, in float32; the window of 8 is passed three times.
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=2e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = decoder("llama").train()
    before = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    program = capture_decoder(model, max_length=16).program
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == before
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model)
    assert program.weight("lm_head.weight").data_ptr() == model.lm_head.weight.data_ptr()


def test_the_notes_say_what_the_cache_takes() -> None:
    notes = capture_decoder(decoder("llama"), max_length=MAX_LENGTH, batch=2).notes
    # Keys and values of 2 layers, 2 sequences, 2 heads, 64 tokens, 8 features of 4 bytes.
    assert "the cache holds 64 tokens of 2 sequences in 0.0328 MB" in notes


def test_a_model_without_a_cache_computes_the_whole_text() -> None:
    with pytest.warns(UserWarning, match="compiled without a KV cache, so that every token costs a forward over all 16 tokens"):
        captured = capture_decoder(decoder("openai_gpt"), max_length=16)
    assert captured.program.state == ("cache.0.text",)
    assert captured.notes[-1] == (
        "compiled without a KV cache, so that every token costs a forward over all 16 tokens: OpenAIGPTLMHeadModel cannot be "
        "run with a cache that holds the state of every layer"
    )


def bert() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=99, **sizes))


def xlnet() -> torch.nn.Module:
    sizes = {"d_model": 32, "d_inner": 32, "n_layer": 1, "n_head": 4}
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=99, **sizes))


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, UnsupportedError, "Linear is not a transformers model"),
        (lambda: tiny_bert().model, {}, UnsupportedError, "BertModel does not generate"),
        (lambda: tiny_t5().model, {}, UnsupportedError, "generation takes a language model, such as LlamaForCausalLM, or an"),
        (bert, {}, CaptureError, "BertLMHeadModel sees later tokens, since its configuration has is_decoder=False"),
        (xlnet, {}, UnsupportedError, "XLNetLMHeadModel cannot be run with a cache"),
        (DECODERS["llama"], {"max_length": 65}, InputError, "max_length is 65, and LlamaForCausalLM knows positions up to 64"),
        (DECODERS["llama"], {"max_length": 4}, InputError, "max_length is 4; give the tokens of prompt and answer together"),
        (DECODERS["llama"], {"batch": 0}, InputError, "batch is 0; give how many sequences"),
    ],
)
def test_what_cannot_be_captured_is_refused(build, options, error, message) -> None:
    with pytest.raises(error, match=message):
        capture_decoder(seeded(build), **{"max_length": 32, **options})
