"""Tests of lissom.backends.eager.chains, and of the operators that lissom/ops/native/views.h computes for it."""

import operator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import lissom
from lissom.backends.eager.backend import build_function, emit
from lissom.backends.eager.chains import Chain, Run, runs_of
from lissom.backends.eager.methods import METHODS
from lissom.frontends.capture.export import capture
from lissom.ops.native import load_kernels
from tests.support.models import normal, tiny_bert, tiny_gpt2, tiny_llama

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(bool(load_kernels()), reason=f"there are no kernels: {load_kernels()}")


def chains_of(program):
    """The chains of what `emit` makes of a program."""
    return [value for value in emit(program)[1].values() if isinstance(value, Chain)]


def from_python(program):
    """What eager builds of a program without chains."""
    return build_function(program, calls=lambda node: METHODS.get(node.target, node.target))


def chain_of(target, *args):
    """A chain of one operator, and the tensors it takes."""
    graph, tensors = fx.Graph(), [item for item in args if isinstance(item, torch.Tensor)]
    nodes = [graph.placeholder(f"x{place}") for place in range(len(tensors))]
    for node, tensor in zip(nodes, tensors, strict=True):
        node.meta["val"] = tensor
    rest = iter(nodes)
    node = graph.call_function(target, tuple(next(rest) if isinstance(item, torch.Tensor) else item for item in args))
    with torch.inference_mode():
        node.meta["val"] = target(*(item.clone() if isinstance(item, torch.Tensor) else item for item in args))
    outputs = [node]
    if isinstance(node.meta["val"], list):
        outputs = [graph.call_function(operator.getitem, (node, place)) for place in range(len(node.meta["val"]))]
    run = Run(tuple(dict.fromkeys([node, *outputs])), native=True, outputs=outputs)
    return Chain(run, {}.__getitem__), tensors


def call(target, *args):
    """The results of an operator that a chain calls."""
    chain, tensors = chain_of(target, *args)
    with torch.inference_mode():
        return chain(tensors, [])


@pytest.mark.parametrize("passes", ["exact", "cast,sink-casts,fold-casts", "int8"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama])
def test_a_chain_gives_the_bits_that_python_gives(make, passes):
    case = make()
    compiled = lissom.compile(case.model, case.kwargs, passes=passes, goal=None)
    sample = list(case.kwargs.values())
    assert chains_of(compiled.program)
    with torch.inference_mode():
        found, wanted = build_function(compiled.program)(sample), from_python(compiled.program)(sample)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.reshape.default, (normal(2, 3, 4), [6, -1])),
        (aten.reshape.default, (normal(2, 3, 4).transpose(1, 2), [8, 3])),
        (aten.reshape.default, (normal(2, 3, 4).transpose(1, 2), [2, 2, 2, 3])),
        (aten.reshape.default, (normal(2, 3, 4).transpose(0, 1), [-1])),
        (aten.reshape.default, (normal(0, 3), [3, 0, 2])),
        (aten.reshape.default, (torch.tensor(2.0), [1, 1])),
        (aten.view.default, (torch.arange(12), [3, 1, 4])),
        (aten.transpose.int, (normal(2, 3, 4), -1, 0)),
        (aten.permute.default, (normal(2, 3, 4, 1, 2, 1, 2, 2), [7, 0, -2, 1, 2, 3, 4, 5])),
        (aten.unsqueeze.default, (normal(2, 3), -1)),
        (aten.unsqueeze.default, (normal(2, 3).t(), 1)),
        (aten.expand.default, (normal(3, 1), [2, -1, 4])),
        (aten.select.int, (normal(2, 3, 4), 1, -1)),
        (aten.slice.Tensor, (normal(5, 4), 0, -4, 2**63 - 1, 2)),
        (aten.slice.Tensor, (normal(5, 4), 1, 3, 1)),
        (aten.slice.Tensor, (torch.ones(5, 4, dtype=torch.bool), 0, None, None, 3)),
        (aten.split_with_sizes.default, (normal(2, 7, 3), [1, 0, 6], -2)),
        (aten.split.Tensor, (normal(2, 7, 3), 3, 1)),
        (aten.split.Tensor, (normal(2, 0, 3), 3, 1)),
        (aten.chunk.default, (normal(2, 7, 3), 3, -2)),
        (aten.chunk.default, (normal(2, 6), 4, 1)),
        (aten.chunk.default, (normal(2, 0), 3, 1)),
        (aten.unbind.int, (normal(2, 3, 4), -2)),
        (aten.embedding.default, (normal(7, 5), torch.tensor([[6, 0, 6]]), 0)),
        (aten.embedding.default, (normal(5, 70).bfloat16().t(), torch.arange(70, dtype=torch.int32))),
        (aten.embedding.default, (torch.arange(12).reshape(4, 3), torch.tensor(2))),
        (aten.index_select.default, (normal(7, 5), 0, torch.tensor([6, 0, 6]))),
        (aten.index_select.default, (normal(1, 7, 12)[..., 4:8], 1, torch.tensor([2, 2, 5], dtype=torch.int32))),
        (aten.index_select.default, (normal(3, 4, 5).bfloat16().transpose(0, 2), -2, torch.tensor([3, 1]))),
        (aten.index_select.default, (normal(3, 4, 5), 2, torch.tensor([4]))),
        (aten.index_select.default, (normal(3, 0, 5), 0, torch.tensor([2, 2]))),
        (aten.index_select.default, (torch.arange(12).reshape(3, 4), 1, torch.empty(0, dtype=torch.int64))),
        (aten.index_select.default, (torch.ones(5, dtype=torch.bool), 0, torch.tensor(3))),
        (aten.layer_norm.default, (normal(3, 8), [8], normal(8), normal(8, seed=1), 1e-5, False)),
        (aten.layer_norm.default, (normal(3, 2, 4).bfloat16(), [2, 4])),
        (aten.add.Tensor, (normal(3, 5), normal(3, 5))),
        (aten.add.Tensor, (normal(70, 300).t(), normal(300, 70))),
        (aten.add.Tensor, (normal(3, 1, 5), normal(5))),
        (aten.add.Tensor, (normal(5).bfloat16(), normal(3, 5).bfloat16())),
    ],
)
def test_views_and_sums_are_those_of_pytorch(target, args):
    with torch.inference_mode():
        wanted = target(*args)
    for found, other in zip(call(target, *args), wanted if isinstance(wanted, list) else [wanted], strict=True):
        assert found.dtype == other.dtype
        assert torch.equal(found, other)
        if target is not aten.add.Tensor:
            assert found.stride() == other.stride() or found.numel() < 2


def test_every_reshape_is_view_exactly_where_pytorch_has_one():
    generator = torch.Generator().manual_seed(3)
    sizes = [1, 2, 3, 2, 1, 2]
    for _ in range(200):
        order = torch.randperm(len(sizes), generator=generator).tolist()
        x = torch.arange(24.0).reshape(sizes).permute(order)
        cuts = sorted(torch.randint(0, 7, (2,), generator=generator).tolist())
        parts = [x.shape[: cuts[0]], x.shape[cuts[0] : cuts[1]], x.shape[cuts[1] :]]
        wanted = x.reshape([part.numel() for part in parts])
        (found,) = call(aten.reshape.default, x, [part.numel() for part in parts])
        assert torch.equal(found, wanted)
        assert (found.data_ptr() == x.data_ptr()) == (wanted.data_ptr() == x.data_ptr())


@pytest.mark.parametrize("index", [-1, 7, 2**62])
def test_an_index_beyond_a_table_is_refused(index):
    table = normal(7, 5)
    chain, _ = chain_of(aten.embedding.default, table, torch.tensor([0]))
    with pytest.raises(IndexError, match="index out of range in self"):
        chain([table, torch.tensor([0, index])], [])


def test_more_elements_than_there_are_numbers_are_refused():
    expand = [0, 1, 1, 3, 1, 0, 8, 5, *[4, 8192] * 5, 5, 0, 0]
    reshape = [1, 2, 1, 2, 1, 1, 8, 1, 4, 0, 0]
    wide = make(operators=["aten::expand", "aten::reshape"], code=expand + reshape, registers=3, outputs=(2,))
    with pytest.raises(RuntimeError, match=r"a tensor of the sizes \[8192, 8192, 8192, 8192, 8192\] is too large"):
        torch.ops.lissom.run_chain(wide, [torch.ones(1)], [])


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_slices_are_copied_where_pytorch_copies_them(dim):
    x, index = normal(4, 5, 6), torch.tensor([3, 0])
    source = normal(2, 4, 5, 6)[0].narrow(dim, 1, 2).transpose(0, 2).contiguous().transpose(0, 2)
    wanted = x.index_copy(dim, index, source)
    (found,) = call(aten.index_copy_.default, x, dim, index, source)
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(x, wanted)


def test_an_index_out_of_range_copies_nothing():
    x, source = torch.zeros(3, 2), torch.ones(2, 2)
    chain, _ = chain_of(aten.index_copy_.default, x, 0, torch.tensor([0, 1]), source)
    with torch.inference_mode(), pytest.raises(IndexError, match="index 3 is out of bounds for dimension 0 with size 3"):
        chain([x, torch.tensor([0, 3]), source], [])
    assert not x.any()


class Interleaved(nn.Module):
    """Views, one operator that no chain calls and that reads none of them, and one that does."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = x.transpose(0, 1).unsqueeze(0)
        b = torch.cos(y)
        c = a.transpose(1, 2).unsqueeze(0)
        d = torch.sin(c)
        return (d + b).transpose(0, 1).unsqueeze(0).transpose(1, 2).unsqueeze(0)


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_a_loaded_program_has_the_same_chains(tmp_path, make):
    case = make()
    compiled = lissom.compile(case.model, case.inputs, checks="off")
    compiled.save(tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved")

    def names(found):
        return [(run.native, [node.name for node in run.nodes]) for run in runs_of(found.program, lambda _: False)]

    assert any(native for native, _ in names(compiled))
    assert names(loaded) == names(compiled)


def test_a_replaced_call_stays_in_its_place():
    program = capture(Interleaved(), (normal(3, 4), normal(1, 1, 3, 4))).program
    replaced = (aten.cos.default, aten.sin.default)
    runs = runs_of(program, lambda node: node.target in replaced)
    before = [node.target for run in runs for node in run.nodes]
    assert before == [node.target for node in program.nodes()]


def test_call_that_reads_no_result_does_not_divide_chain():
    program = capture(Interleaved(), (normal(3, 4), normal(1, 1, 3, 4))).program
    found = [("native", len(run.nodes)) if run.native else run.nodes[0].target for run in runs_of(program, lambda _: False)]
    assert found == [aten.cos.default, ("native", 4), aten.sin.default, ("native", 5)]


class Cache(nn.Module):
    """State that is written in a chain, and read by an operator that no chain calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(4, 3))

    def forward(self, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        before = torch.cos(self.kept)
        self.kept.index_copy_(0, at, rows.transpose(0, 1).unsqueeze(0).transpose(1, 2).select(0, 0))
        return before + torch.cos(self.kept)


def test_state_is_read_before_and_after_chain_writes_it():
    case = (normal(2, 3), torch.tensor([3, 1]))
    run = lissom.compile(Cache(), case)
    model = Cache()
    for _ in range(2):
        torch.testing.assert_close(run(*case), model(*case), rtol=0, atol=0)


def test_threads_run_one_chain_at_once():
    case = tiny_bert()
    compiled = lissom.compile(case.model, case.kwargs, passes="int8", goal=None)
    assert chains_of(compiled.program)
    wanted = compiled(**case.kwargs)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: compiled(**case.kwargs), range(40)):
            assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)


def test_a_chain_is_freed_with_its_object():
    chain, tensors = chain_of(aten.unsqueeze.default, torch.ones(3), 0)
    number = chain._chain.clone()
    assert chain(tensors, [])[0].shape == (1, 3)
    with FakeTensorMode():  # a chain may be freed while PyTorch traces
        del chain
    with pytest.raises(RuntimeError, match="there is no chain of this number"):
        torch.ops.lissom.run_chain(number, [], [])


def test_a_weight_whose_memory_was_resized_is_not_read():
    case = tiny_bert()
    compiled = lissom.compile(case.model, case.kwargs, goal=None)
    name = next(name for name in compiled.program.weights() if name.endswith("weight_packed"))
    compiled.program.weight(name).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the memory of a weight was moved or resized after the model was compiled"):
        compiled(**case.kwargs)


VALID = {"operators": ["aten::unsqueeze"], "code": [0, 1, 1, 2, 1, 0, 4, 0, 0], "floats": [], "texts": [], "constants": []}


def make(inputs=1, numbers=0, registers=2, outputs=(1,), **changed):
    given = {**VALID, **changed}
    return torch.ops.lissom.make_chain(*given.values(), inputs, numbers, registers, list(outputs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"code": [0, 1, 1, 2, 1]}, "ends within an instruction"),
        ({"code": [1, 1, 1, 2, 1, 0, 4, 0, 0]}, "holds 1 where there are 1"),
        ({"code": [0, 0, 1, 2, 1, 0, 4, 0, 0]}, "an instruction writes to an input"),
        ({"code": [0, 1, 2, 2, 1, 0, 4, 0, 0]}, "holds 2 where there are 2"),
        ({"code": [0, 1, 1, 2, 1, 2, 4, 0, 0]}, "holds 2 where there are 2"),
        ({"code": [0, 1, 1, 2, 1, -1, 4, 0, 0]}, "holds -1 where there are 2"),
        ({"code": [0, 1, 1, 2, 1, 0, 6, 0, 0]}, "holds 0 where there are 0"),
        ({"code": [0, 1, 1, 2, 4, 0, 4, 0, 0]}, "the arguments of aten::unsqueeze do not fit its parameters"),
        ({"code": [0, 1, 1, 1, 1, 0, 0]}, "the arguments of aten::unsqueeze do not fit its parameters"),
        ({"code": [0, 1, 1, 2, 1, 0, 9, 0, 0]}, "an argument of an unknown kind"),
        ({"code": [0, 1, 1, 2, 1, 0, 8, 1, 8, 0, 0]}, "a list of integers holds a list"),
        ({"code": [0, 1, 1, 2, 1, 0, 4, 0, 1, 2]}, "holds 2 where there are 2"),
        ({"operators": ["aten::nonsense"]}, "an operator without a kernel"),
        ({"outputs": (2,)}, "has no register 2"),
        ({"registers": 0}, "a chain has 0 registers for 1 inputs"),
        ({"registers": 2**40}, "registers for 1 inputs"),
    ],
)
def test_a_malformed_chain_is_refused(changed, message):
    with pytest.raises(RuntimeError, match=message):
        make(**changed)


def test_a_chain_checks_what_it_is_given():
    chain = make()
    assert torch.ops.lissom.run_chain(chain, [torch.ones(3)], [])[0].shape == (1, 3)
    with pytest.raises(RuntimeError, match="a chain takes 1 tensors and 0 numbers, not 0 and 1"):
        torch.ops.lissom.run_chain(chain, [], [1])
    with pytest.raises(RuntimeError, match="a chain returns a register that holds no tensor"):
        torch.ops.lissom.run_chain(make(code=[]), [torch.ones(3)], [])
    twice = [0, 1, 1, 2, 1, 0, 4, 0, 1, 0, 0, 1, 1, 2, 1, 0, 4, 0, 0]
    with pytest.raises(RuntimeError, match="an instruction reads a register that holds no tensor"):
        torch.ops.lissom.run_chain(make(code=twice), [torch.ones(3)], [])


def test_numbers_by_chance_are_refused_or_run():
    """Views, a sum and a copy of slices with some numbers of the chain replaced: a sentence, and no access out of bounds."""
    operators = ["aten::transpose.int", "aten::reshape", "aten::add.Tensor", "aten::slice.Tensor", "aten::index_copy_"]
    views = [0, 2, 1, 3, 1, 0, 4, 0, 4, 1, 0, 1, 3, 1, 2, 1, 2, 8, 2, 4, 3, 4, -1, 1, 2]
    sums = [2, 4, 1, 3, 1, 3, 2, 0, 4, 1, 1, 3, 3, 5, 1, 5, 1, 4, 4, 0, 4, 0, 4, 2, 4, 1, 0]
    copies = [4, 6, 1, 4, 1, 4, 4, 0, 1, 1, 1, 5, 0]
    code = views + sums + copies
    given = {"operators": operators, "constants": [torch.ones(4)], "inputs": 2, "registers": 7, "outputs": (6,)}
    generator, ran = torch.Generator().manual_seed(5), 0
    for turn in range(400):
        changed = list(code)
        for place in torch.randint(len(code), (turn % 4,), generator=generator).tolist():
            changed[place] = int(torch.randint(-9, 10, (1,), generator=generator)) * (2**40 if turn % 3 == 0 else 1)
        try:
            torch.ops.lissom.run_chain(make(code=changed, **given), [normal(4, 3), torch.tensor([2, 0])], [])
            ran += 1
        except (RuntimeError, IndexError) as error:
            assert str(error)
    assert ran >= 100


class ValueAndView(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x):
        y = x + self.norm(self.linear(x))
        return y, y[:, 0]


@pytest.mark.parametrize("checks", ["numeric", "off"])
def test_a_chain_gives_a_value_and_its_view(checks):
    torch.manual_seed(0)
    model, x = ValueAndView().eval(), normal(4, 5, 8)
    found = lissom.compile(model, x, checks=checks)(x)
    with torch.no_grad():
        wanted = model(x)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)  # float32 products in another order
