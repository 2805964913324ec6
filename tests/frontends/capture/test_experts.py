"""Tests of lissom.frontends.capture.experts: mixtures of experts whose loops no graph can hold."""

from __future__ import annotations

import pytest
import torch
import transformers

from lissom.frontends.capture.experts import experts_for_all_tokens
from lissom.frontends.capture.export import capture
from tests.support.models import seeded


def dbrx() -> transformers.PreTrainedModel:
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 99, "max_seq_len": 32}
    return seeded(lambda: transformers.DbrxModel(transformers.DbrxConfig(attn_config=attention, ffn_config=experts, **sizes)))


@pytest.mark.slow
def test_the_program_routes_other_tokens_as_the_model_does() -> None:
    model = dbrx()
    program = capture(model, (), {"input_ids": torch.arange(14).view(2, 7), "use_cache": False}).program
    for tokens in (1, 9):
        ids = torch.randint(0, 99, (3, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            wanted = model(ids, use_cache=False).last_hidden_state
            found = program.run([ids])[0]
        # The sum of the experts in another order, in float32.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_outside_of_export_code_of_model_runs() -> None:
    model = dbrx()
    with experts_for_all_tokens(model), torch.no_grad():
        seen = [module for module in model.modules() if "forward" in vars(module)]
        assert [type(module).__name__ for module in seen] == ["DbrxExperts"]
        found = model(torch.arange(5)[None]).last_hidden_state
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(found, model(torch.arange(5)[None]).last_hidden_state)
