"""Ordinary checkpoints of optimized models, loaded by plain transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.errors import ArtifactError, UnsupportedError
from tests.support.models import normal, seeded, tokens

WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 61}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**WIDTHS, num_hidden_layers=3, num_key_value_heads=2)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(**WIDTHS, num_hidden_layers=3, num_key_value_heads=2, head_dim=4)
    return seeded(lambda: transformers.Qwen3ForCausalLM(config))


def bert() -> nn.Module:
    return seeded(lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**WIDTHS, num_hidden_layers=2)))


def optimized(model: nn.Module, passes: str):
    inputs = {"input_ids": tokens(2, 6)}
    return lissom.optimize(model, inputs, passes=passes, data=[inputs], checks="off"), inputs


@pytest.mark.parametrize(
    ("build", "passes", "said"),
    [
        (bert, "prune-neurons{keep=0.5,scope=layer}", {"intermediate_size": 12}),
        pytest.param(bert, "exact", {}, marks=pytest.mark.slow),
        pytest.param(
            *(llama, "prune-layers{keep=0.67},prune-heads{keep=0.5}", {"num_hidden_layers": 2, "num_attention_heads": 2}),
            marks=pytest.mark.slow,
        ),
        pytest.param(qwen3, "prune-layers{keep=0.67}", {"num_hidden_layers": 2}, marks=pytest.mark.slow),
    ],
)
def test_plain_transformers_loads_what_was_pruned(build, passes, said, tmp_path):
    model = build()
    found, inputs = optimized(model, passes)
    found.save_pretrained(tmp_path / "checkpoint")
    again = type(model).from_pretrained(tmp_path / "checkpoint").eval()
    assert {name: getattr(again.config, name) for name in said} == said
    assert (again.num_parameters() < model.num_parameters()) == bool(said)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, found.program.run([*inputs.values()])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_layers_of_different_widths_are_padded_to_the_widest(tmp_path):
    model = llama()
    found, inputs = optimized(model, 'prune-neurons{amounts="model.layers.0=8,model.layers.1=12,model.layers.2=10"}')
    found.save_pretrained(tmp_path / "checkpoint")
    again = type(model).from_pretrained(tmp_path / "checkpoint").eval()
    assert again.config.intermediate_size == 12
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, found.program.run([*inputs.values()])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "passes", "sentence"),
    [
        (bert, "prune-heads{keep=0.5}", r"the configuration of Bert\w+ cannot say that '.*query.weight' is \[8, 16\]"),
        pytest.param(
            *(llama, "quantize{scheme=int8-dynamic}", r"an ordinary checkpoint of LlamaForCausalLM cannot hold this program"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_no_configuration_says_is_refused(build, passes, sentence, tmp_path):
    found, _ = optimized(build(), passes)
    with pytest.raises(UnsupportedError, match=sentence):
        found.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_directory_that_holds_something_is_not_mixed_with(tmp_path):
    """A shard or an artifact that was there would be read instead of the checkpoint, or be damaged by it."""
    found, _ = optimized(bert(), "exact")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    lissom.compile(nn.Linear(4, 2), normal(3, 4), checks="off").save(tmp_path / "artifact")
    for folder, sentence in ((tmp_path, "is not an artifact"), (tmp_path / "artifact", "which would be replaced")):
        with pytest.raises(ArtifactError, match=sentence):
            found.save_pretrained(folder)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine" and lissom.load(tmp_path / "artifact")


class Wrapped(nn.Module):
    """A module with a configuration of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bert()
        self.config = self.inner.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=input_ids).logits


class Narrow(transformers.BertForSequenceClassification):
    """A model that its configuration alone does not make."""

    def __init__(self, config: transformers.BertConfig, width: int) -> None:
        super().__init__(config)
        self.width = width


def test_model_not_constructible_from_configuration_is_refused(tmp_path):
    narrow = seeded(lambda: Narrow(bert().config, 3))
    cases = ((Wrapped().eval(), "was not captured from a transformers"), (narrow, "cannot be made from its configuration"))
    for model, sentence in cases:
        with pytest.raises(UnsupportedError, match=sentence):
            optimized(model, "exact")[0].save_pretrained(tmp_path / "checkpoint")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_are_merged_into_the_checkpoint(wrapped, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    model = (peft.get_peft_model(llama(), lora) if wrapped else peft.inject_adapter_in_model(lora, llama())).eval()
    found, inputs = optimized(model, "exact")
    found.save_pretrained(tmp_path / "checkpoint")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_other_models_have_no_checkpoint(tmp_path):
    found = lissom.optimize(nn.Linear(4, 2), normal(3, 4), checks="off")
    with pytest.raises(UnsupportedError, match="was not captured from a transformers model here, and has no checkpoint"):
        found.save_pretrained(tmp_path / "checkpoint")
    fast = lissom.compile(nn.Linear(4, 2), normal(3, 4), checks="off")
    with pytest.raises(UnsupportedError, match=r"lissom.optimize\(model, example_inputs, passes=...\).save_pretrained"):
        fast.save_pretrained(tmp_path / "checkpoint")


def test_weights_that_differ_in_their_configuration_are_not_padded(tmp_path):
    """Stages of a hierarchical transformer have numbers too, and widths of their own."""
    sizes = {"hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1], "num_attention_heads": [1, 2]}
    lists = {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    model = seeded(lambda: transformers.SegformerModel(transformers.SegformerConfig(**sizes, **lists, decoder_hidden_size=8)))
    pictures = normal(2, 3, 16, 16)
    found = lissom.optimize(model, {"pixel_values": pictures}, checks="off")
    found.save_pretrained(tmp_path / "checkpoint")
    again = transformers.SegformerModel.from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        assert torch.equal(again(pictures).last_hidden_state, model(pictures).last_hidden_state)
