"""Tests of rotate{where=residual}: the stream in another basis, norms without scale, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding, Norm
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops import change_basis
from lissom.passes import PASSES
from lissom.passes.quantize.rotate.bases import hadamard
from lissom.passes.quantize.rotate.rotate import Rotate
from tests.support import captures
from tests.support.decoders import decoder, prompt
from tests.support.harness import aten, calls, rewrite
from tests.support.models import Case, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens
from tests.support.neighbours import all_but_slow


def woken(case: Case) -> Case:
    """The model with scales that differ and biases that are not zero."""
    with torch.no_grad():
        for index, parameter in enumerate(case.model.parameters()):
            if parameter.dim() == 1:
                parameter.add_(normal(*parameter.shape, seed=index), alpha=0.3)
    return case


def rotated(case: Case, passes: str = "rotate{where=residual}") -> tuple[Program, Sample, Program, History]:
    program = captures.optimize(case.model, case.inputs).program
    sample = program.signature.flatten(case.args, case.kwargs)
    return program, sample, *Pipeline(parse_pipeline(passes, PASSES), samples=[sample], data=[sample]).run(program)


def stream(program: Program, sample: Sample) -> list[torch.Tensor]:
    """The values of the residual adds."""
    sums, seen = program.fact(structure).residuals, list[torch.Tensor]()
    with torch.no_grad():
        program.run(sample, lambda node, value: seen.append(value.double()) if node in sums else None)  # pyright: ignore
    return seen


@pytest.mark.parametrize("build", all_but_slow([tiny_llama, tiny_t5, tiny_gpt2], tiny_llama, tiny_gpt2))
def test_the_stream_is_in_the_basis(build) -> None:
    before, sample, after, history = rotated(woken(build()))
    assert history.steps[1].relative_error is not None and history.steps[1].relative_error < 5e-6
    for old, new in zip(stream(before, sample), stream(after, sample), strict=True):
        basis = hadamard(old.shape[-1])
        assert basis is not None
        if before.nodes(aten.layer_norm.default):
            old = old - old.mean(-1, keepdim=True)
        # Some tens of layers in float32, whose values are of size 1 to 10.
        torch.testing.assert_close(new, old @ basis, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5, tiny_gpt2])
def test_norms_are_left_without_scale(build) -> None:
    _, _, after, _ = rotated(woken(build()))
    assert not after.nodes(aten.layer_norm.default)
    assert all(Norm(norm).weight is None for norm in after.nodes(aten.rms_norm.default))


@pytest.mark.parametrize(
    ("name", "matrices"), all_but_slow([("gemma3", 5), ("gpt2", 0), ("bloom", 1)], ("gpt2", 0), ("bloom", 1))
)
def test_scales_that_cannot_be_folded_stay_as_matrices(name: str, matrices: int) -> None:
    """Norms after layers and before a tied head in Gemma; after the embedding in BLOOM; GPT-2's head is untied."""
    model = decoder(name)
    case = woken(Case(model, {"input_ids": prompt()["input_ids"], "use_cache": False}))
    _, _, after, history = rotated(case)
    assert calls(after, change_basis) == matrices
    assert any("keep their scale as a matrix" in note for note in history.steps[1].notes) == bool(matrices)
    assert any("is a copy of the embedding table" in note for note in history.steps[1].notes) == (name != "gemma3")


class PreNorm(nn.Module):
    """A residual branch whose input and output are those of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(12), nn.Linear(12, 20, bias=False), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.relu(self.up(self.norm(x))))


def test_inputs_and_outputs_keep_their_basis() -> None:
    program, _ = rewrite(Rotate(where="residual"), seeded(PreNorm), normal(2, 5, 12))
    first, last = program.nodes(change_basis)
    basis = hadamard(12)
    assert basis is not None
    for node, wanted in ((first, basis), (last, basis.T)):
        found = program.weight(str(nodes.operand(node, 1).target)).double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)  # one rounding to float32


def test_principal_components_come_first() -> None:
    _, sample, after, _ = rotated(woken(tiny_llama()), "rotate{where=residual,basis=pca}")
    energy = torch.zeros(16, dtype=torch.float64)

    def look(node: object, value: object) -> None:
        if node in norms and isinstance(value, torch.Tensor):
            nonlocal energy
            energy = energy + value.double().square().flatten(0, -2).mean(0)

    norms = set(after.nodes(aten.rms_norm.default))
    with torch.no_grad():
        after.run(sample, look)  # pyright: ignore[reportArgumentType]
    assert float(energy[:4].sum()) > 2 * float(energy[-4:].sum())


def test_pruning_after_principal_components_loses_less() -> None:
    errors: dict[str, float] = {}
    prune = "prune-hidden{keep=0.5},eliminate-dead"
    for passes in (prune, f"rotate{{where=residual,basis=pca}},{prune}"):
        before, sample, after, _ = rotated(woken(tiny_llama()), passes)
        with torch.no_grad():
            wanted, found = (program.run(sample)[0] for program in (before, after))
        assert isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor)
        errors[passes] = float((wanted - found).norm() / wanted.norm())
    plain, turned = errors.values()
    assert turned < 0.7 * plain


def test_a_tied_table_keeps_its_width() -> None:
    """Its head reads a norm times its scale, which has components other than those of the stream."""
    case = woken(Case(decoder("gemma3"), {"input_ids": prompt()["input_ids"], "use_cache": False}))
    passes = "rotate{where=residual,basis=pca},prune-hidden{keep=0.5},eliminate-dead"
    before, _, after, history = rotated(case, passes)
    (table,) = {Embedding(node).table.target for node in after.nodes(*Embedding.targets)}
    assert torch.equal(after.weight(str(table)), before.weight(str(table)))
    assert {nodes.tensor_type(total).shape[-1] for total in after.fact(structure).residuals} == {16}
    assert history.steps[1].relative_error is not None and history.steps[1].relative_error < 5e-6


def test_a_layer_norm_on_the_shortcut_is_refused() -> None:
    with pytest.raises(UnsupportedError) as refusal:
        rotated(tiny_bert())
    sentence = str(refusal.value)
    assert sentence.startswith("rotate{where=residual} cannot rotate the residual stream of 'add")
    assert sentence.endswith(
        "is a LayerNorm whose output is also the shortcut, so its scale and mean act on the stream; use a model whose "
        "LayerNorms are on the branches, or rotate{where=heads}"
    )


def test_a_stream_read_without_layer_norm_is_refused() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.up, self.down = nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            return self.head(x + self.down(nn.functional.gelu(self.up(self.norm(x)))))

    with pytest.raises(UnsupportedError, match="reads the stream without a LayerNorm, so the mean of its channels counts"):
        rewrite(Rotate(where="residual"), seeded(Raw), tokens() % 7)


def test_an_activation_on_the_stream_is_refused() -> None:
    class Bent(PreNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.tanh(x))

    with pytest.raises(UnsupportedError, match="treats its channels one by one"):
        rewrite(Rotate(where="residual"), seeded(Bent), normal(2, 5, 12))


def test_a_layer_that_reads_the_stream_twice_is_no_principal_reader() -> None:
    class Wide(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(24, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return self.wide(torch.cat([x, x], -1))

    assert rotated(Case(seeded(Wide), (normal(2, 5, 12),)), "rotate{where=residual,basis=pca}")[3].steps[1].rewritten


def test_without_a_stream_or_without_data_it_says_so() -> None:
    with pytest.raises(UnsupportedError) as refusal:
        rewrite(Rotate(where="residual"), seeded(lambda: nn.Linear(8, 8)), normal(2, 5, 8))
    assert "rotate{where=residual} finds no residual stream in this program" in str(refusal.value)
    with pytest.raises(RequirementError) as missing:
        rewrite(Rotate(where="residual", basis="pca"), seeded(PreNorm), normal(2, 5, 12))
    assert "rotate{basis=pca} needs calibration data: pass data=, or choose basis=hadamard" in str(missing.value)
