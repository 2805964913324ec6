"""The gated delta rule and the selective scan against transformers' functions, in parts, by their gradients, and in ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

import lissom
from lissom.backends.base import Backend
from lissom.compiler.analysis.flops import operations
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.verify.divergence import relative_error
from lissom.ops import gated_delta_rule, selective_scan
from lissom.ops.native import load_kernels
from lissom.ops.recurrences import gated_delta_rule_reference, selective_scan_reference
from tests.support.harness import capture_model, every_backend
from tests.support.models import normal
from tests.support.neighbours import all_but_slow

# Sums of some hundred products in float32, in another order.
SUMS = 2e-5


def rule(tokens: int, *, heads: int = 4, key_heads: int = 2, width: int = 37, per_feature: bool = False) -> list[torch.Tensor]:
    """Queries, keys, values, decays and rates of the delta rule, in float32."""
    q, k = normal(2, tokens, key_heads, 18), normal(2, tokens, key_heads, 18, seed=1)
    decay = -normal(2, tokens, heads, *([18] if per_feature else []), seed=3).abs()
    return [q, k, normal(2, tokens, heads, width, seed=2), decay, normal(2, tokens, heads, seed=4).sigmoid()]


def scan(tokens: int, *, per_state: bool, width: int = 37) -> list[torch.Tensor]:
    """x, steps, a, b, c and d of the selective scan, in float32."""
    heads, channels, groups = (width, 1, 1) if per_state else (4, width, 2)
    x, step = normal(2, tokens, heads, channels), normal(2, tokens, heads, seed=1).exp()
    b, c = normal(2, tokens, groups, 18, seed=2), normal(2, tokens, groups, 18, seed=3)
    return [x, step, -normal(heads, *([18] if per_state else []), seed=4).abs(), b, c, normal(heads, seed=5)]


@pytest.mark.parametrize("tokens", [1, 63, 64, 130])
def test_the_gated_delta_rule_of_qwen3_next(tokens: int) -> None:
    q, k, v, decay, beta = rule(tokens)
    state = normal(2, 4, 18, 37, seed=5)
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    wanted = torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, **options)
    found = gated_delta_rule(q, k, v, decay, beta, state, scale=18**-0.5, normalizes=True)
    assert all(relative_error(one, other) < SUMS for one, other in zip(wanted, found, strict=True))


def test_the_delta_attention_of_kimi_linear() -> None:
    q, k, v, decay, beta = rule(70, heads=2, per_feature=True)
    wanted = chunk_kimi_delta_attention(q, k, v, decay, beta, output_final_state=True)
    found = gated_delta_rule(q, k, v, decay, beta, scale=18**-0.5, normalizes=False)
    assert all(relative_error(one, other) < SUMS for one, other in zip(wanted, found, strict=True))


@pytest.mark.parametrize("tokens", [1, 31, 50])
def test_the_scan_of_mamba_2(tokens: int) -> None:
    x, step, a, b, c, d = scan(tokens, per_state=False)
    state = normal(2, 4, 37, 18, seed=6)
    wanted = mamba2_chunk_scan(x, step, a, b, c, 16, D=d, initial_states=state, return_final_states=True)
    found = selective_scan(x, step, a, b, c, d, state)
    assert all(relative_error(one, other) < SUMS for one, other in zip(wanted, found, strict=True))


def test_the_scan_of_mamba() -> None:
    x, step, a, b, c, d = scan(50, per_state=True)
    turned = [item.transpose(1, 2) for item in (x.squeeze(-1), step, b.squeeze(2), c.squeeze(2))]
    wanted, last = mamba_selective_scan(turned[0], turned[1], a, *turned[2:], D=d, return_last_state=True)
    found, kept = selective_scan(x, step, a, b, c, d)
    assert relative_error(wanted, found.squeeze(-1).transpose(1, 2)) < SUMS
    assert relative_error(last, kept.squeeze(2)) < SUMS


CALLS = {
    "per head": lambda tokens: (gated_delta_rule, gated_delta_rule_reference, rule(tokens), {"scale": 0.3, "normalizes": True}),
    "per feature": lambda tokens: (
        gated_delta_rule,
        gated_delta_rule_reference,
        rule(tokens, width=70, per_feature=True),
        {"scale": 0.3, "normalizes": False},
    ),
    "scan": lambda tokens: (selective_scan, selective_scan_reference, scan(tokens, per_state=False), {}),
    "scan per state": lambda tokens: (selective_scan, selective_scan_reference, scan(tokens, per_state=True), {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    assert not load_kernels()
    operator, reference, operands, options = CALLS[name](9)
    operands = [item.to(dtype) for item in operands]
    # float64: sums in another order. Others: the same in float32, then rounded to the dtype.
    allowed = 1e-13 if dtype is torch.float64 else max(SUMS, torch.finfo(dtype).eps)
    for found, wanted in zip(operator(*operands, **options), reference(*operands, **options), strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert relative_error(wanted, found) < allowed


@pytest.mark.parametrize("name", CALLS)
def test_text_in_parts_gives_what_it_gives_at_once(name: str) -> None:
    operator, _, operands, options = CALLS[name](9)
    whole, last = operator(*operands, **options)
    state, parts = None, []
    fixed = (2, 5) if operator is selective_scan else ()
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        part = [item if index in fixed else item[:, begin:end] for index, item in enumerate(operands)]
        found, state = operator(*part, *([None] if operator is selective_scan and len(part) < 6 else []), state, **options)
        parts.append(found)
    assert relative_error(whole, torch.cat(parts, 1)) < SUMS
    assert relative_error(last, state) < SUMS


@pytest.mark.parametrize("name", all_but_slow(CALLS, "per head"))
def test_gradients(name: str) -> None:
    operator, _, operands, options = CALLS[name](3)
    narrow = [item[..., :5] if item.dim() == 4 and item.shape[-1] > 18 else item for item in operands]
    inputs = [item.double().requires_grad_() for item in narrow]
    assert torch.autograd.gradcheck(lambda *given: operator(*given, **options), inputs)


class Layer(nn.Module):
    """An operator whose outputs depend on a linear layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.operator, _, self.operands, self.options = CALLS[name](9)
        self.linear = nn.Linear(self.operands[0].shape[-1], self.operands[0].shape[-1])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.operator(self.linear(x), *self.operands[1:], **self.options)


@every_backend
@pytest.mark.parametrize("name", CALLS)
def test_every_backend(name: str, backend: Backend) -> None:
    layer = Layer(name).eval()
    example = {"x": layer.operands[0]}
    compiled = lissom.compile(layer, example, backend=backend, dynamic=False)
    with torch.no_grad():
        for found, wanted in zip(compiled(**example), layer(**example), strict=True):
            assert relative_error(wanted, found) < SUMS


@pytest.mark.parametrize(("name", "count"), [("per head", 4 * 2 * 9 * 4 * 37 * 18), ("scan", 3 * 2 * 9 * 4 * 37 * 18)])
def test_operations(name: str, count: int) -> None:
    program = capture_model(Layer(name).eval(), CALLS[name](9)[2][0]).program
    (node,) = program.nodes(gated_delta_rule, selective_scan)
    assert operations(node, shape_of) == 2 * count


@pytest.mark.parametrize("per_state", [False, True])
def test_what_does_not_fit_is_refused(per_state: bool) -> None:
    q, k, v, decay, beta = rule(5, per_feature=per_state)
    x, step, a, b, c, d = scan(5, per_state=per_state)
    rules = [(q[..., :4], k, v, decay, beta), (q, k, v[:, :4], decay, beta), (q, k, v[:, :, :3], decay, beta)]
    for operands in [*rules, (q, k, v, decay[:, :2], beta)]:
        for call in (gated_delta_rule, gated_delta_rule_reference):
            with pytest.raises(RuntimeError):
                call(*operands, scale=1.0, normalizes=True)
    for operands in ((x, step[:, :2], a, b, c), (x, step, a[:2], b, c), (x, step, a, b[..., :2], c), (x, step, a, b, c, d[:1])):
        for call in (selective_scan, selective_scan_reference):
            with pytest.raises(RuntimeError):
                call(*operands)
    with pytest.raises(RuntimeError, match="state"):
        gated_delta_rule(q, k, v, decay, beta, x, scale=1.0, normalizes=True)


def test_no_tokens() -> None:
    state = normal(2, 4, 18, 37)
    found, kept = gated_delta_rule(*rule(0), state, scale=1.0, normalizes=True)
    assert found.shape == (2, 0, 4, 37)
    assert torch.equal(kept, state)
    found, kept = selective_scan(*scan(0, per_state=False), normal(2, 4, 37, 18))
    assert found.shape == (2, 0, 4, 37)
