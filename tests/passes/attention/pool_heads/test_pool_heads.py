"""Tests of pool-heads, with attention written by hand over few key/value heads, and Llama's own, as the oracles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.backends.base import Backend
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.frontends.generation.decoder import capture_decoder
from lissom.passes.attention.pool_heads.pool_heads import PoolHeads
from tests.support import captures
from tests.support.canonical_programs import reasons
from tests.support.dead_structure import sites_of
from tests.support.decoders import decoder, prompt
from tests.support.harness import Calls, check_golden, every_backend, rewrite
from tests.support.models import VOCABULARY, Case, normal, seeded, tiny_gpt2, tiny_llama, tiny_t5, tokens
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.usefixtures("shared_captures")
PLAIN = "align=false,regroup=false"


class Attention(nn.Module):
    """Self-attention of so many heads of so many features."""

    def __init__(self, heads: int = 4, features: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        width = heads * features
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def grouped_by_hand(module: Attention, x: torch.Tensor, groups: int) -> torch.Tensor:
    """Every head with the mean of the keys and values of its group, one head after another."""
    features, size = module.q.out_features // module.heads, module.heads // groups
    result = x + module.out.bias
    for head in range(module.heads):
        rows = slice(head * features, (head + 1) * features)
        members = [
            slice(other * features, (other + 1) * features) for other in range(module.heads) if other // size == head // size
        ]
        k, v = (sum(x @ layer.weight[rows].T + layer.bias[rows] for rows in members) / size for layer in (module.k, module.v))
        scores = (x @ module.q.weight[rows].T + module.q.bias[rows]) @ k.transpose(-1, -2) / features**0.5
        result = result + scores.softmax(-1) @ v @ module.out.weight[:, rows].T
    return result


def test_rewrites() -> None:
    """Only values change, so the text stays as it is; the notes say how much."""
    program, history = rewrite("pool-heads{groups=2}", seeded(Attention), normal(2, 5, 8))
    check_golden("pool_heads", f"{program.text()}\n{history.steps[1].summary}\n" + "\n".join(history.steps[1].notes) + "\n")


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(PoolHeads(groups=1), Calls(lambda x: x.relu()), normal(2, 4))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].rewritten == 0


@pytest.mark.parametrize(("heads", "features", "groups"), [(4, 2, 2), (6, 3, 2), (6, 5, 1), (3, 4, 1)])
def test_numbers(heads: int, features: int, groups: int) -> None:
    module, x = seeded(lambda: Attention(heads, features)), normal(2, 5, heads * features)
    program, _ = rewrite(f"pool-heads{{groups={groups},{PLAIN}}}", module, x)
    with torch.no_grad():
        # Sums of some 30 terms in float32, in another order.
        torch.testing.assert_close(program(x), grouped_by_hand(module, x, groups), rtol=0, atol=1e-5)


def test_numbers_of_grouped_attention() -> None:
    """Llama with the pooled weights, as transformers itself computes fewer groups."""
    case = tiny_llama()
    program = captures.optimize(case.model, case.inputs, passes=f"pool-heads{{groups=1,{PLAIN}}}").program
    config = transformers.LlamaConfig(**{**case.model.config.to_dict(), "num_key_value_heads": 1})
    weights = dict(case.model.state_dict())
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].unflatten(0, (2, 4)).mean(0)
    oracle = transformers.LlamaForCausalLM(config).eval()
    oracle.load_state_dict(weights)
    with torch.no_grad():
        wanted = oracle(**case.inputs).logits
        # Two layers in float32.
        torch.testing.assert_close(program(**case.inputs).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_equivalent_heads_are_pooled_without_loss(bias: bool) -> None:
    """Heads 0 and 3, and 1 and 2, have the same scores and values, in other coordinates."""
    module, x = seeded(lambda: Attention(4, 3, bias)), normal(3, 7, 12)
    with torch.no_grad():
        for first, second in ((0, 3), (1, 2)):
            one, two = (slice(3 * head, 3 * head + 3) for head in (first, second))
            turn = normal(3, 3, seed=second) + 2 * torch.eye(3)
            for layer in (module.k, module.v):
                layer.weight[two] = turn @ layer.weight[one]
                if bias:
                    layer.bias[two] = turn @ layer.bias[one]
    before = module(x)
    program, history = rewrite("pool-heads{groups=2}", module, x)
    with torch.no_grad():
        # Square roots and their inverses of matrices that are far from singular.
        torch.testing.assert_close(program(x), before, rtol=0, atol=1e-4)
    assert "relative error of keys 0.00, values 0.00" in history.steps[1].notes[0]
    v = program.weight("v.weight").unflatten(0, (2, 2, 3))
    assert torch.equal(v[:, 0], v[:, 1])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_fitting_and_grouping_lose_less_and_data_helps(make: Callable[[], Case]) -> None:
    case = make()
    data = [{**case.inputs, "input_ids": tokens(seed=seed)} for seed in range(1, 9)]
    found = [
        captures.optimize(case.model, case.inputs, passes=f"pool-heads{{groups=1,{options}}}", data=samples)
        for options, samples in ((PLAIN, ()), ("align=true", ()), ("align=true", data))
    ]
    plain, fitted, informed = (item.report.history.steps[-1].relative_error for item in found)
    assert fitted < 0.8 * plain
    assert informed < 0.8 * plain


def test_regrouping_alone_changes_nothing() -> None:
    """With pairs of equal heads apart from each other, only the order tells what is pooled."""
    module, x = seeded(lambda: Attention(6, 2)), normal(2, 5, 12)
    with torch.no_grad():
        for layer in (module.k, module.v):
            layer.weight.view(3, 2, 2, 12)[:] = layer.weight.view(3, 2, 2, 12)[[0, 1, 2]]
            for first, second in ((0, 4), (1, 5), (2, 3)):
                layer.weight[2 * second : 2 * second + 2] = layer.weight[2 * first : 2 * first + 2]
                layer.bias[2 * second : 2 * second + 2] = layer.bias[2 * first : 2 * first + 2]
    program, _ = rewrite("pool-heads{groups=3,align=false}", module, x)
    with torch.no_grad():
        # The same heads in another order.
        torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-5)


def test_a_share_keeps_as_many_heads_as_divide() -> None:
    for keep, groups in ((0.5, 3), (0.49, 2), (0.34, 2), (0.05, 1), (1.0, 6)):
        program, _ = rewrite(f"pool-heads{{keep={keep}}},merge-equal-heads", seeded(lambda: Attention(6, 2)), normal(2, 5, 12))
        assert sites_of(program).attention[0].key_value_heads == groups


def test_protected_attentions_keep_their_heads() -> None:
    case = tiny_gpt2()
    program = captures.optimize(case.model, case.inputs, passes="pool-heads{groups=1,protect=h.0},merge-equal-heads").program
    assert [site.key_value_heads for site in sites_of(program).attention] == [2, 1]


def test_heads_that_share_bias_of_positions_stay_in_order() -> None:
    case = tiny_t5()
    step = captures.optimize(case.model, case.inputs, passes="pool-heads{groups=1}").report.history.steps[-1]
    assert step.rewritten == 2
    assert any("neighbouring heads are pooled: other attentions have the same heads" in note for note in step.notes)


def test_heads_of_one_axis_are_left_alone() -> None:
    """GPT-NeoX keeps the query, key and value of a head side by side in one weight."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, use_cache=False
    )
    model = seeded(lambda: transformers.GPTNeoXForCausalLM(config))
    report = captures.optimize(model, {"input_ids": tokens()}, passes="pool-heads{groups=2}").report
    assert reasons(report.history)[-1] == "its key and value heads stay: one axis of a weight numbers them with the query heads"


def test_requirements() -> None:
    with pytest.raises(RequirementError, match="put this pass before the one that quantizes"):
        rewrite("quantize{scheme=int8-weight},pool-heads{groups=2}", seeded(Attention), normal(2, 5, 8))
    with pytest.raises(UnsupportedError, match="neither is given"):
        PoolHeads()
    with pytest.raises(UnsupportedError, match="both are given"):
        PoolHeads(groups=2, keep=0.5)
    with pytest.raises(UnsupportedError, match="groups is 0; give 1 or more"):
        PoolHeads(groups=0)
    with pytest.raises(UnsupportedError, match=r"keep is 1\.5; give a fraction above 0 and up to 1"):
        PoolHeads(keep=1.5)
    with pytest.raises(UnsupportedError, match="groups=3 does not divide the key and value heads of any attention: 4"):
        rewrite("pool-heads{groups=3}", seeded(Attention), normal(2, 5, 8))


def test_values_in_cache_are_pooled_like_those_to_come() -> None:
    """What was kept is averaged, and nothing is fitted that would read it in other coordinates."""
    captured = capture_decoder(decoder("gpt2"), max_length=16)
    with torch.no_grad():
        captured.program.run(captured.samples[0])
    after, _ = Pipeline([PoolHeads(groups=2, regroup=False)], samples=captured.samples).run(captured.program)
    for name in captured.program.state:
        wanted = captured.program.weight(name).unflatten(1, (2, 2)).mean(2).repeat_interleave(2, 1)
        torch.testing.assert_close(after.weight(name), wanted)


@every_backend
def test_composes(backend: Backend) -> None:
    module, x = seeded(lambda: Attention(4, 4)), normal(2, 5, 16)
    compiled = captures.compile(
        module, x, passes=f"pool-heads{{groups=2,{PLAIN}}},merge-equal-heads", backend=backend, goal=None
    )
    with torch.no_grad():
        # Sums of 16 terms in float32, in another order.
        torch.testing.assert_close(compiled(x), grouped_by_hand(module, x, 2), rtol=0, atol=1e-5)
    assert compiled.program.parameter_count < sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", all_but_slow(["llama", "gemma3", "gpt2"], "llama"))
def test_a_decoder_generates_the_same_with_a_smaller_cache(name: str) -> None:
    model, ids = decoder(name), prompt()["input_ids"]
    pooled, merged = (
        lissom.compile_generation(model, max_length=32, passes=f"generation,pool-heads{{groups=1}}{more}", goal=None)
        for more in ("", ",merge-equal-heads")
    )
    texts = [item.generate(ids, max_new_tokens=16, do_sample=False) for item in (pooled, merged)]
    assert torch.equal(*texts)
    sizes = [sum(item.program.weight(state).numel() for state in item.program.state) for item in (pooled, merged)]
    assert sizes[1] * (4 if name == "gpt2" else 2) == sizes[0]
