"""Adapters of PEFT, merged before capture; skipped where PEFT is not installed."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.errors import UnsupportedError
from lissom.frontends.models.adapters import with_merged_adapters
from tests.frontends.capture.test_kv_cache import llama
from tests.support.models import tokens

peft = pytest.importorskip("peft", reason="PEFT is not installed")


def lora(*modules: str):
    return peft.LoraConfig(target_modules=list(modules), r=4, init_lora_weights=False)


def adapted(kind: str):
    if kind == "peft":
        return peft.get_peft_model(llama(), lora("q_proj", "down_proj")).eval()
    return peft.inject_adapter_in_model(lora("v_proj", "lm_head"), llama()).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_lora_is_merged_and_model_stays_as_it_was(kind: str) -> None:
    model, ids = adapted(kind), tokens(2, 6)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    fast = lissom.compile(model, {"input_ids": ids}, checks="structural")
    torch.testing.assert_close(fast(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert type(fast).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name in fast.program.weights())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_without_adapters_is_itself() -> None:
    model = llama()
    assert with_merged_adapters(model) is model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_adapter_that_is_no_change_of_weights_is_refused() -> None:
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedError, match="has an adapter of the kind PROMPT_TUNING, which is no change of weights"):
        lissom.compile(model, {"input_ids": tokens(2, 6)})
