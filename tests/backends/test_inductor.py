"""Tests of lissom.backends.inductor."""

import shutil
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.base import confirm
from lissom.backends.inductor import Inductor, Package
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import InputError, UnsupportedError, VerifyError
from lissom.frontends.capture.export import capture
from tests.support.minilm import assert_as_exact_as_pytorch
from tests.support.models import CASES, capture_of, captured, feed_forward, normal, tiny_gpt2, tokens


@pytest.fixture(scope="module")
def built():
    """A feed-forward that TorchInductor compiled once."""
    found = capture_of("feed_forward")
    return found, Inductor().build(found.program, found.example)


def test_inductor_gives_what_the_program_gives_at_other_sizes(built):
    found, package = built
    for batch, sequence in [(1, 1), (1, 9), (4, 3)]:
        x = normal(batch, sequence, 8, seed=batch)
        (wanted,) = found.program.run([x])
        # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8.
        torch.testing.assert_close(package([x])[0], wanted, rtol=1e-5, atol=1e-6)


def test_inputs_may_lie_in_any_order(built):
    found, package = built
    x = normal(8, 5, 2).transpose(0, 2)
    # As above.
    torch.testing.assert_close(package([x])[0], found.program.run([x])[0], rtol=1e-5, atol=1e-6)


def test_package_is_file_and_nothing_else_is_kept(built):
    _, package = built
    assert package.path.suffix == ".pt2"
    assert [path.name for path in package.path.parent.iterdir()] == [package.path.name]
    again = torch._inductor.aoti_load_package(str(package.path))
    assert torch.equal(again(normal(2, 3, 8))[0], package([normal(2, 3, 8)])[0])


def test_the_files_go_with_the_executable(built):
    found, compiled = built
    path = Path(shutil.copy(compiled.path, mkdtemp()))
    package = Package(found.program, path)
    assert package(found.example)
    del package
    assert not path.parent.exists()


def test_results_need_no_gradients(built):
    assert built[1]([normal(2, 5, 8)])[0].is_inference()


def test_a_program_with_state_is_refused():
    found = capture_of("counter")
    with pytest.raises(UnsupportedError) as caught:
        Inductor().build(found.program, found.example)
    assert str(caught.value) == "backend 'inductor' keeps no state, and Counter writes to 'seen'; choose backend 'eager'"


class Sized(nn.Module):
    """Returns a size with its result."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, x.shape[0]


def test_a_program_that_returns_a_size_is_refused():
    found = capture(Sized(), (normal(2, 3),))
    with pytest.raises(UnsupportedError) as caught:
        Inductor().build(found.program, found.example)
    assert str(caught.value).startswith("backend 'inductor' returns tensors, and Sized returns the size 'sym_size")


def test_without_a_compiler_inductor_is_refused_before_anything_runs():
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(UnsupportedError) as caught:
        lissom.compile(feed_forward().model, ("nothing that could be captured",), backend="inductor")
    assert str(caught.value).startswith("backend 'inductor' needs a C++ compiler, and there is none")
    assert "choose backend 'eager'" in str(caught.value)


def test_what_is_compiled_wrong_is_refused():
    found = capture_of("feed_forward")
    with pytest.raises(VerifyError) as caught:
        confirm("wrong", lambda inputs: [found.program.run(inputs)[0] * 1.01], found.program, found.example)
    assert str(caught.value).startswith("what backend 'wrong' built from FeedForward differs from the program by 0.01 relative")
    assert str(caught.value).endswith("on inputs [2, 5, 8], allowed 2e-05; choose another backend")


def test_what_is_compiled_for_one_size_is_refused():
    found = capture_of("feed_forward")

    def fixed(inputs):
        return found.program.run([inputs[0].reshape(2, 5, 8)])

    with pytest.raises(VerifyError) as caught:
        confirm("fixed", fixed, found.program, found.example)
    assert "what backend 'fixed' built from FeedForward does not run on inputs [3, 7, 8]: RuntimeError: " in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "counter"])
def test_inductor_compiles_every_model(name):
    found = capture_of(name)
    package = Inductor().build(found.program, found.example)
    sizes = {symbol: 4 for symbol in found.program.signature.dimensions}
    sample = found.program.signature.resize(found.example, sizes)
    with torch.no_grad():
        wanted = found.program.run(sample)
    assert max(map(relative_error, wanted, package(sample))) < tolerance_of(captured(name))


@pytest.mark.slow
def test_call_that_leads_out_of_table_names_table():
    case = tiny_gpt2()
    fast = lissom.compile(case.model, case.inputs, backend="inductor")
    ids = torch.full((2, 5), 1000)
    with pytest.raises(InputError, match=r"the inputs ask for row 1000 of 'wte.weight'"):
        fast(input_ids=ids, attention_mask=torch.ones_like(ids))
    ids = tokens(2, 5, seed=1)
    assert fast(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape == (2, 5, 16)


@pytest.mark.slow
def test_minilm_compiled_by_inductor_equals_the_original(minilm):
    fast = lissom.compile(minilm.model, minilm.example_inputs, backend="inductor")
    assert fast.backend == "inductor"
    assert any(note.startswith("inductor built the program in ") for note in fast.report.history.steps[-1].notes)
    assert_as_exact_as_pytorch(minilm, fast)
