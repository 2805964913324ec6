"""Tests of tools.pretend_cuda: it computes as the CPU does, and each planted fault is refused by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from itertools import takewhile

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import lissom
from lissom.compiler.training.cache import TargetCache
from lissom.compiler.training.teacher import Targets
from lissom.frontends.models.huggingface_inputs import make_inputs
from lissom.ops.library import LIBRARY
from tests.support.mixtures import mixture, samples
from tests.support.models import Case, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens
from tests.support.neighbours import all_but_slow
from tests.tuning.searches import tiny_vit
from tools.pretend_cuda import PretendTensor, pretend_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def cuda() -> Generator[torch.device]:
    with pretend_cuda() as device:
        yield device


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(7, device="cuda") * 2,
        lambda: torch.full((2, 3), 1.5, device="cuda").to(torch.bfloat16),
        lambda: torch.linspace(0, 1, 5, device="cuda").view(5, 1).expand(5, 2),
        lambda: torch.eye(3, 4, device="cuda").t(),
        lambda: torch.zeros(3, device="cuda").index_put_((torch.tensor([1]),), torch.ones(1, device="cuda")),
        lambda: torch.tensor([3, 1, 2], device="cuda").sort().values,
        lambda: torch.linspace(-1, 1, 6, device="cuda").half().view(2, 3).softmax(-1, dtype=torch.float32),
    ],
)
def test_values_and_strides_are_those_of_the_cpu(cuda, make: Callable[[], torch.Tensor]) -> None:
    found = make()
    assert isinstance(found, PretendTensor)
    assert found.device == cuda
    made = found.to("cpu")
    assert type(made) is torch.Tensor
    assert (made.shape, made.dtype) == (found.shape, found.dtype)
    assert found.tolist() == made.tolist()


def test_modules_move_with_tied_weights_and_are_copied(cuda) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["table"].weight
    moved = model.to(cuda)
    assert moved["head"].weight is moved["table"].weight
    again = copy.deepcopy(moved)
    assert again["head"].weight is again["table"].weight is not moved["table"].weight
    assert again["head"].weight.device == cuda


def test_the_device_goes_with_the_block() -> None:
    with pretend_cuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        torch.zeros(1, device="cuda")


def recorded(function: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_a_graph_runs_again_into_the_same_memory(cuda) -> None:
    x = torch.ones(2, 3, device=cuda)
    graph, result = recorded(lambda: (x * 2).view(3, 2).sum(0))
    assert torch.isnan(result).all().item()  # recorded, not run
    graph.replay()
    assert result.tolist() == [6, 6]
    x.fill_(2)
    graph.replay()
    assert result.tolist() == [12, 12]


LIBRARY.define("planted_cpu_kernel(Tensor x) -> Tensor")
LIBRARY.impl("planted_cpu_kernel", torch.neg, "CPU")

FAULTS: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "a constant on the CPU": (lambda x: x + torch.ones(3), "two devices, cuda:0 and cpu"),
    "a mask on the CPU": (lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), 0), "two devices, cuda:0 and cpu"),
    "a weight on the CPU": (lambda x: functional.linear(x, torch.ones(2, 3)), "two devices, cuda:0 and cpu"),
    "numpy": (lambda x: x.numpy(), "not supported for tensor subclasses"),
    "a kernel of the CPU": (lambda x: torch.ops.lissom.planted_cpu_kernel(x), "Could not run 'lissom::planted_cpu_kernel'"),
    "few rows": (lambda x: torch._int_mm(x.char().expand(16, 3), x.char().expand(3, 3)), "greater than 16"),
    "a size of tiles": (
        lambda x: torch.ops.aten._convert_weight_to_int4pack(x.expand(8, 3).to(torch.uint8), 2),
        r"no multiple of \[8, 32\]",
    ),
    "2:4 rows": (
        lambda x: torch.ops.aten._sparse_semi_structured_mm(x.expand(32, 3).half(), x.short(), x.half()[:, None]),
        "1 columns are no multiple of 8",
    ),
}
WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "if": lambda x: 1 if (x > 0).all() else 2,
    "to the CPU": lambda x: x.to("cpu"),
    "from the CPU": lambda x: x.copy_(torch.ones(3)),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused(cuda, fault: str) -> None:
    run, message = FAULTS[fault]
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=message):
        run(torch.ones(3, device=cuda))


@pytest.mark.parametrize("fault", WAITING)
def test_waiting_is_refused_while_a_graph_records(cuda, fault: str) -> None:
    x = torch.ones(3, device=cuda)
    WAITING[fault](x)
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        recorded(lambda: WAITING[fault](x))  # pyright: ignore[reportArgumentType]
    assert not torch.cuda.is_current_stream_capturing()


def test_a_teachers_values_come_back_to_the_device(cuda) -> None:
    found = TargetCache()
    made = found.targets(0, lambda: Targets({0: normal(4, 8).to(cuda)}, {}, {0: None}))
    assert made.outputs[0].device == cuda
    found.close()


def test_example_inputs_are_on_the_models_device(cuda, tmp_path) -> None:
    config = transformers.T5Config(vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    inputs, _ = make_inputs(transformers.T5ForConditionalGeneration(config).to(cuda), None, tmp_path)
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    assert tensors and all(value.device == cuda for value in tensors)


@pytest.mark.parametrize("passes", all_but_slow(["exact", "balanced", "quantize-cache"], "balanced"))
def test_a_decoder_writes_the_tokens_of_the_cpu(passes: str) -> None:
    prompt = tokens(1, 7)
    wanted = lissom.compile_generation(decoder(), max_length=24, passes=passes).generate(prompt, max_new_tokens=6)
    with pretend_cuda() as device:
        fast = lissom.compile_generation(decoder().to(device), max_length=24, passes=passes)
        assert fast.generate(prompt.to(device), max_new_tokens=6).tolist() == wanted.tolist()  # pyright: ignore


def test_a_pool_on_the_device_answers_as_on_the_cpu() -> None:
    prompts = [[5, 6, 7, 8], [9, 5]]
    wanted = lissom.compile_pool(decoder(), max_length=24).generate(prompts, max_new_tokens=5)
    with pretend_cuda() as device:
        found = lissom.compile_pool(decoder().to(device), max_length=24).generate(prompts, max_new_tokens=5)
    assert [answer.tolist() for answer in found] == [answer.tolist() for answer in wanted]


def decoder() -> transformers.LlamaForCausalLM:
    """With sizes that are multiples of 8, as the device's int8 products take."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64
    )
    return seeded(lambda: transformers.LlamaForCausalLM(config))


MODELS: dict[str, Callable[[], Case]] = {
    "bert": tiny_bert,
    "vit": tiny_vit,
    "t5": tiny_t5,
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixture": lambda: Case(mixture("mixtral"), samples(1)[0]),
}
PIPELINES = {
    "exact": MODELS,
    "cast{dtype=bf16}": ("bert", "vit"),
    "prune-heads{keep=0.5,criterion=magnitude}": ("bert", "llama"),
    "prune-neurons{keep=0.5,criterion=wanda}": ("vit", "gpt2"),
    "prune-experts{keep=0.5}": ("mixture",),
    "sparsify-attention{window=4}": ("t5",),
    "rotate{where=residual}": ("llama",),
    "pool-heads{keep=0.5}": ("llama",),
    "prune-layers{keep=0.5}": ("bert",),
}


PROGRAMS = [(passes, name) for passes, names in PIPELINES.items() for name in names]
QUICK = [
    ("exact", "bert"),
    ("exact", "llama"),
    ("cast{dtype=bf16}", "vit"),
]


@pytest.mark.parametrize(("passes", "name"), all_but_slow(PROGRAMS, *QUICK))
def test_a_program_on_the_device_is_the_one_on_the_cpu(passes: str, name: str) -> None:
    """The same steps change the same number of nodes, and the third call, which replays a graph, gives the same values."""
    case = MODELS[name]()
    wanted, steps = optimized(case, passes, "cpu")
    with pretend_cuda() as device:
        found, theirs = optimized(case, passes, device)
        found = [value.to("cpu") for value in found]
    assert theirs == steps
    # Both are computed on this CPU, the CPU's program by fused kernels that add in another order.
    allowed = 3e-2 if "bf16" in passes else 1e-5
    for left, right in zip(wanted, found, strict=True):
        assert (left.float() - right.float()).abs().max() <= allowed * left.float().abs().max()


@pytest.mark.parametrize(("capability", "graphs"), all_but_slow([((8, 0), False), ((9, 0), True)], ((8, 0), False)))
def test_a_mixture_in_bfloat16_runs_in_graphs_where_grouped_products_have_a_kernel(
    capability: tuple[int, int], graphs: bool
) -> None:
    """The host need not know how many tokens each expert gets. Elsewhere the executable says why there are no graphs."""
    model, inputs = mixture("mixtral").bfloat16(), samples(1)[0]
    with pretend_cuda(capability=capability):
        moved = {name: value.to("cuda") for name, value in inputs.items()}
        executable = lissom.compile(copy.deepcopy(model).to("cuda"), moved, goal=None)._executable
        found = [executable([*moved.values()])[0].to("cpu") for _ in range(3)][-1]
        notes = executable.notes
    assert [note.partition(":")[0] for note in notes] == ([] if graphs else ["no CUDA graphs"])
    wanted = model(**inputs).logits
    # Two layers in bfloat16, unit roundoff 4e-3, in other fused operators than the model's.
    assert (found.float() - wanted.float()).abs().max() <= 3e-2 * wanted.float().abs().max()


def optimized(case: Case, passes: str, device: torch.device | str) -> tuple[list[torch.Tensor], list[tuple[str, str]]]:
    """The tensors of a third call, and what each pass before lowering did."""

    def moved(value: object) -> object:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    inputs = pytree.tree_map(moved, case.inputs)
    model = copy.deepcopy(case.model).to(device)
    fast = lissom.compile(model, inputs, passes=passes, data=[inputs], goal=None)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    for _ in range(2):
        fast(*args, **kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(fast(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
    before = takewhile(lambda step: step.spelling != "fold-constants{shared=true}", fast.report.history.steps)
    # An export writes two copies to the CPU device otherwise than copies to another.
    kept = [(step.spelling, step.summary) for step in before if step.spelling not in ("capture", "remove-no-ops")]
    return leaves, kept
