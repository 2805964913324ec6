"""Tests of lissom.artifacts.artifact: what is saved is loaded, in another process too, with nothing of it unpickled."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import lissom
from lissom.artifacts import rank_files
from lissom.artifacts.artifact import PROGRAM, WEIGHTS
from lissom.backends.base import Backend
from lissom.backends.eager.backend import Eager
from lissom.backends.microbatches import Cutting
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.samples import check_samples
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.compiler.verify.structure import verify_structure
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.ops import block_sparse_attention
from lissom.ops.native import load_kernels
from lissom.ops.pattern import LAYOUT, Condition, Pattern
from lissom.passes import RECIPES, known_passes
from tests.support.models import CASES, capture_of, counter, feed_forward, normal, tied, tiny_bert, tiny_llama
from tests.support.saving import (
    CHECK,
    compiled,
    compiled_module,
    in_a_fresh_process,
    reloaded,
    tensors_of,
    write_expectation,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every model of tests.support.models as an artifact, with what it answers."""
    root = tmp_path_factory.mktemp("saved")
    for name in CASES:
        folder = root / name
        folder.mkdir()
        model = compiled(name)
        model.save(folder / "artifact")
        write_expectation(model, capture_of(name).example, folder / "expected.safetensors")
        (folder / "text").write_text(model.program.text())
    return root


@pytest.fixture(scope="module")
def lowered():
    """A BERT with all passes and, where there are kernels, packed weights."""
    case = tiny_bert()
    return lissom.compile(case.model, case.inputs, checks="off")


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was pickled or unpickled")

    for module in (torch, pickle):
        for name in ("load", "loads", "save", "dump", "dumps"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("bert_eager", "llama_eager", "t5", "gpt2") else ())
        for name in CASES
    ],
)
def test_a_model_comes_back(name, tmp_path, no_pickle):
    model = compiled(name)
    again = reloaded(model, tmp_path / "artifact")
    assert again.program.text() == model.program.text()
    assert again.program.signature == model.program.signature
    assert str(again.report) == str(model.report)
    assert again.report.history == model.report.history
    assert repr(again) == repr(model)
    for sizes in ({}, {symbol: max(4, item.minimum) for symbol, item in model.program.signature.dimensions.items()}):
        example = capture_of(name).example
        sample = model.program.signature.resize(example, sizes) if sizes else example
        args, kwargs = model.program.signature.arguments(sample)
        wanted, found = model(*args, **kwargs), again(*args, **kwargs)
        assert type(found) is type(wanted)
        assert all(map(torch.equal, tensors_of(wanted), tensors_of(found)))


@pytest.mark.parametrize("name", ["counter", "nested", "blocked", "convolution", "bert_eager"])
def test_loaded_program_is_well_formed_and_can_be_optimized(name, tmp_path):
    program = reloaded(compiled(name), tmp_path / "artifact").program
    verify_structure(program)
    exact = parse_pipeline(RECIPES["exact"], known_passes())
    samples = check_samples(program.signature, capture_of(name).example)
    wanted, _ = Pipeline(exact, samples=samples, checks="structural").run(capture_of(name).program.copy())
    found, _ = Pipeline(exact, samples=samples, checks="structural").run(program)
    assert found.text() == wanted.text()


def test_every_node_keeps_its_origin_and_type(lowered, tmp_path):
    again = reloaded(lowered, tmp_path / "artifact")
    for one, other in zip(lowered.program, again.program, strict=True):
        assert (one.op, one.name, str(one.target)) == (other.op, other.name, str(other.target))
        assert nodes.origin(one) == nodes.origin(other)
        if nodes.has_value(one) and one.op != "output":
            assert nodes.node_type(one) == nodes.node_type(other)
            if nodes.is_tensor(one):
                assert str(nodes.value(one).stride()) == str(nodes.value(other).stride())


class BlockSparse(nn.Module):
    """Attention under a layout and a window, which its operator is given as numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("layout", torch.eye(3, dtype=torch.bool)[None])

    def forward(self, x):
        pattern = Pattern(((LAYOUT, Condition(-1, 1, -3, 0)), (Condition(0, 1, high=1),)), 8)
        return block_sparse_attention(x, x, x, None, self.layout, pattern=pattern.encode(), block=pattern.block, scale=0.5)


def test_attention_under_a_pattern_comes_back(tmp_path):
    x = normal(1, 2, 24, 16)
    model = compiled_module(BlockSparse(), x)
    again = reloaded(model, tmp_path / "artifact")
    assert again.program.text() == model.program.text()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama], ids=lambda build: build.__name__)
def test_a_lowered_model_comes_back_with_its_packed_weights(build, lowered, tmp_path):
    case = build()
    model = lowered if build is tiny_bert else lissom.compile(case.model, case.inputs, checks="off")
    again = reloaded(model, tmp_path / "artifact")
    assert again.program.text() == model.program.text()
    assert str(again.report) == str(model.report)
    assert again.report.history.diff(0, 2) == model.report.history.diff(0, 2)
    wanted, found = (tensors_of(item(*case.args, **case.kwargs)) for item in (model, again))
    assert all(map(torch.equal, wanted, found))


@pytest.mark.parametrize(
    "passes",
    ["quantize{scheme=int8-dynamic,embeddings=true,lm_head=true}", "quantize{scheme=int4-weight,embeddings=true}"],
    ids=["int8", "int4"],
)
def test_packed_tables_of_integers_come_back(passes, tmp_path):
    """Found by tools/fuzz: no kernel computes in integers, and a lookup was taken for one."""
    case = tied()
    model = lissom.compile(case.model, case.inputs, passes=passes, checks="off", goal=None)
    assert model.program.nodes(torch.ops.lissom.packed_embedding.default)
    again = reloaded(model, tmp_path / "artifact")
    wanted, found = (tensors_of(item(*case.args, **case.kwargs)) for item in (model, again))
    assert all(map(torch.equal, wanted, found))


def test_saved_twice_it_is_same_files_but_for_times(tmp_path):
    model = compiled("bert")
    model.save(tmp_path / "one")
    lissom.load(tmp_path / "one").save(tmp_path / "two")
    for name in (PROGRAM, WEIGHTS, "steps.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_loaded_model_may_overwrite_its_own_artifact(tmp_path):
    again = reloaded(compiled("llama"), tmp_path / "artifact")
    again.save(tmp_path / "artifact")
    assert lissom.load(tmp_path / "artifact").program.text() == again.program.text()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_every_model_answers_alike_in_a_fresh_process(saved, minilm, tmp_path):
    """Those of tests.support.models, and a real one that was lowered."""
    model = lissom.compile(minilm.model, minilm.example_inputs, checks="off")
    folder = tmp_path / "minilm"
    folder.mkdir()
    model.save(folder / "artifact")
    example = model.program.signature.flatten((), minilm.encode(["a sentence", "another that is longer"]))
    write_expectation(model, example, folder / "expected.safetensors")
    (folder / "text").write_text(model.program.text())
    printed = in_a_fresh_process(CHECK, *(saved / name for name in CASES), folder)
    assert len(printed.splitlines()) == len(CASES) + 1
    for name in ("bert", "minilm"):
        assert f"{name} transformers.modeling_outputs BaseModelOutputWithPoolingAndCrossAttentions" in printed


def test_without_transformers_a_model_answers_alike(saved):
    printed = in_a_fresh_process(CHECK, saved / "bert", saved / "t5", saved / "llama", "--without-transformers")
    assert printed.splitlines() == [f"{name} lissom.artifacts.nesting Output" for name in ("bert", "t5", "llama")]


def test_state_begins_where_it_was_when_compiled(tmp_path):
    model, rows = compiled("counter"), counter().inputs[0]
    first, second = model(rows), model(rows)
    again = reloaded(model, tmp_path / "artifact")
    assert again.program.state == ("seen",)
    assert torch.equal(again(rows), first)
    assert torch.equal(again(rows), second)
    assert torch.equal(lissom.load(tmp_path / "artifact")(rows), first)


def test_weights_are_mapped_and_not_copied(tmp_path):
    again = reloaded(compiled("bert"), tmp_path / "artifact")
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        mapped = [line for line in maps if WEIGHTS in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    for tensor in again.program.weights().values():
        # Those too small to lie well in the file are copied.
        assert tensor.nbytes % 64 or any(low <= tensor.data_ptr() < high for low, high in spans)


def test_call_that_does_not_fit_is_refused_as_before(tmp_path):
    again = reloaded(compiled("bert"), tmp_path / "artifact")
    with pytest.raises(InputError, match="argument 'input_ids' is missing"):
        again()
    with pytest.raises(InputError, match=r"the inputs ask for row 1000 of 'embeddings.word_embeddings.weight'"):
        again(input_ids=torch.full((1, 3), 1000), attention_mask=torch.ones(1, 3, dtype=torch.long))


def test_conditions_on_sizes_come_back(tmp_path):
    again = reloaded(compiled("blocked"), tmp_path / "artifact")
    assert again(normal(3, 12, 8)).shape == (3, 12, 8)
    with pytest.raises(InputError, match="break a condition found while capturing the model"):
        again(normal(3, 10, 8))


class Odd(nn.Module):
    """Has arguments that JSON has no word for."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(x.shape[-1], dtype=torch.bool)
        filled = x.masked_fill(mask, float("-inf")).clamp(max=float("inf"))
        return filled.to(torch.float64), torch.nan_to_num(x, nan=float("nan")).contiguous(memory_format=torch.contiguous_format)


def test_odd_arguments_come_back(tmp_path):
    model, x = compiled_module(Odd(), normal(2, 3)), normal(4, 3)
    again = reloaded(model, tmp_path / "artifact")
    assert again.program.text() == model.program.text()
    assert all(map(torch.equal, model(x), again(x)))


class Chosen(nn.Module):
    """Yields as many rows as its input has positive numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0].unsqueeze(-1) * 2


def test_sizes_that_depend_on_values_come_back(tmp_path):
    model, x = compiled_module(Chosen(), normal(3, 5)), normal(4, 6, seed=1)
    again = reloaded(model, tmp_path / "artifact")
    assert again.program.text() == model.program.text()
    assert torch.equal(again(x), model(x))
    (index,) = again.program.nodes(torch.ops.aten.index.Tensor)
    typed_anew = nodes.type_of(fake.fake_call(again.program.fake_mode, index))
    # A size of its own, and not the name of one that is there.
    assert str(typed_anew.shape[0]) not in {str(size) for size in nodes.tensor_type(index).shape}


def test_operator_artifact_cannot_call_is_refused_when_saving(tmp_path):
    library = torch.library.Library("lissom_tests", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

    class Foreign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.lissom_tests.twice(x)

    model = compiled_module(Foreign(), normal(2, 3))
    with pytest.raises(ArtifactError) as caught:
        model.save(tmp_path / "artifact")
    assert str(caught.value) == (
        "the program calls lissom_tests.twice, which an artifact cannot hold: it is not on the list of operators in "
        "lissom/artifacts/allowed.py; if it is safe to call with any arguments, pass it to lissom.artifacts.operators.allow "
        "before saving and before loading"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_a_backend_cannot_save_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Eager, "save_files", Backend.save_files)
    with pytest.raises(UnsupportedError, match="what backend 'eager' builds cannot be saved"):
        compiled("bert").save(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(bool(load_kernels()), reason="needs the C++ kernels")
def test_lowered_model_runs_slowly_without_kernels_and_says_so(lowered, tmp_path):
    case = tiny_bert()
    lowered.save(tmp_path / "artifact")
    wanted = lowered(**case.kwargs).last_hidden_state
    script = f"""
import os, warnings
os.environ["LISSOM_NATIVE"] = "0"
import torch, lissom
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = lissom.load({str(tmp_path / "artifact")!r})
print(*(item.message for item in caught))
ids = torch.tensor({case.kwargs["input_ids"].tolist()})
print(model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.flatten().tolist())
"""
    said, numbers = in_a_fresh_process(script).splitlines()
    assert said == (
        "BertModel was compiled for C++ kernels and runs slowly without them: LISSOM_NATIVE=0 switches the C++ kernels off"
    )
    # The kernels sum in another order: float32 (unit roundoff 6e-8), sums of at most 24 terms in two layers.
    torch.testing.assert_close(torch.tensor(eval(numbers)).reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(bool(load_kernels()), reason="needs the C++ kernels")
def test_what_was_lowered_for_a_cpu_does_not_move(lowered, tmp_path):
    lowered.save(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="was lowered to kernels of a CPU; compile the model again for meta"):
        rank_files.load(tmp_path / "artifact", torch.device("meta"))


def test_options_of_the_backend_come_back_or_are_replaced(tmp_path):
    case = feed_forward()
    backend = lissom.OnnxRuntime(threads=1, arena=False, optimization="basic", timing_seconds=0.0)
    model = lissom.compile(case.model, case.inputs, backend=backend)
    model._executable.cutting = Cutting((0,), 80)
    again = reloaded(model, tmp_path / "artifact")
    assert again._backend == backend
    assert again._executable.cutting == Cutting((0,), 80)
    x = normal(9, 5, 8)
    assert torch.equal(again(x), model(x))
    options = again._executable._session.get_session_options()
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)
    other = lissom.load(tmp_path / "artifact", backend=lissom.OnnxRuntime(threads=2))
    assert other._executable._session.get_session_options().intra_op_num_threads == 2
    with pytest.raises(UnsupportedError, match="was saved for backend 'onnxruntime', and backend= is 'eager'; compile"):
        lissom.load(tmp_path / "artifact", backend=Eager())


@pytest.mark.slow
def test_inductor_s_package_is_saved_and_loaded(tmp_path, no_pickle):
    case = tiny_bert()
    model = lissom.compile(case.model, case.inputs, backend="inductor", checks="off")
    model.save(tmp_path / "artifact")
    again = lissom.load(tmp_path / "artifact", allow_native=True)
    assert again.backend == "inductor"
    del model
    other = lissom.load(tmp_path / "artifact", allow_native=True)
    assert torch.equal(again(**case.kwargs).last_hidden_state, other(**case.kwargs)[0])
    del again
    assert (tmp_path / "artifact" / "model.pt2").is_file()


@pytest.mark.gpu
def test_a_model_moves_between_a_gpu_and_the_cpu(tmp_path):
    case = tiny_bert()
    model = lissom.compile(case.model, case.inputs, device="cuda", checks="off")
    again = reloaded(model, tmp_path / "artifact")
    on_gpu = again(**{name: tensor.cuda() for name, tensor in case.kwargs.items()}).last_hidden_state
    on_cpu = lissom.load(tmp_path / "artifact", device="cpu")(**case.kwargs).last_hidden_state
    assert on_gpu.is_cuda and not on_cpu.is_cuda
    # Other kernels sum in another order: float32, unit roundoff 6e-8, sums of at most 24 terms.
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)
