"""`torch.compile(model, backend="lissom")` gives what the model gives, whatever changes between two calls."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from torch._dynamo.backends import registry
from torch.utils import _pytree as pytree

import lissom
from lissom import backends
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import LissomError
from lissom.passes.quantize.quantize import Quantize
from lissom.torch_compile import compile_graph
from tests.support.models import CASES, Case, counter, feed_forward, normal, seeded, tiny_bert, tiny_llama, tokens

TOLERANCE = 1e-5  # float32: exact passes and kernels only change the order of sums


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The backend under its name, as an installation has it, and nothing left of what Dynamo compiled before."""
    if "lissom" not in registry.list_backends():
        registry.register_backend(compile_graph, name="lissom")
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend="lissom", **options)  # pyright: ignore


def error(wanted: object, found: object) -> float:
    left, left_spec = pytree.tree_flatten(wanted)
    right, right_spec = pytree.tree_flatten(found)
    assert left_spec == right_spec
    return max(map(relative_error, left, right))


def lowered() -> list[bool]:
    """Of the graphs so far, which are programs."""
    return [found.report is not None for found in lissom.dynamo_reports()]


class Gate(nn.Module):
    """A layer, a break, and a layer; the second graph writes to what the first gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, factor: float = 0.5, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, int]:
        y, z = self.first(x).relu() * factor, x.clone()
        torch._dynamo.graph_break()
        z += 1
        return self.second(y) * count, z, x.shape[0] * 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


SMALL = [(name, dynamic) for name in ("feed_forward", "nested", "blocked", "tied") for dynamic in (None, True)]


@pytest.mark.parametrize(("name", "dynamic"), [*SMALL, ("bert", False), ("llama", None)])
def test_equal(name: str, dynamic: bool | None) -> None:
    case = CASES[name]()
    with torch.no_grad():
        found = compiled(case.model, dynamic=dynamic, fullgraph=True)(*case.args, **case.kwargs)
        assert error(case.model(*case.args, **case.kwargs), found) <= TOLERANCE
    assert lowered() == [True]


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_sizes_that_vary_are_one_graph(build: object) -> None:
    case: Case = build()  # pyright: ignore[reportCallIssue]
    model = compiled(case.model, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 7), (4, 12)):
            inputs = {"input_ids": tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
            inputs["attention_mask"][-1, -2:] = 0
            assert error(case.model(**inputs), model(**inputs)) <= TOLERANCE
    assert lowered() == [True]
    report = lissom.dynamo_reports()[0].report
    assert report is not None
    text = report.history.texts[0]
    assert "# encoder.layer.0.attention.self" in text or "# model.layers.0.self_attn" in text
    assert "weight @encoder.layer.1.output.dense.bias" in text or "@lm_head.weight" in text
    assert "dynamic: batch (1 or more), sequence (1 " in str(report)


def test_size_only_the_program_fixes_gets_its_own_graph() -> None:
    case = CASES["blocked"]()
    model = compiled(case.model, dynamic=True)
    with torch.no_grad():
        for length in (8, 12, 16):
            x = normal(2, length, 8)
            assert error(case.model(x), model(x)) <= TOLERANCE


def test_weights_that_change_are_seen() -> None:
    case = feed_forward()
    model, (x,) = compiled(case.model), case.args
    other = {name: tensor * 2 + 1 for name, tensor in case.model.state_dict().items()}

    def optimizer_step() -> None:
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        with torch.enable_grad():
            case.model(x).square().mean().backward()
        optimizer.step()

    def replace() -> None:
        case.model.up.weight = nn.Parameter(torch.ones_like(case.model.up.weight))

    def give_other_data() -> None:
        case.model.up.weight.data = torch.full_like(case.model.up.weight, 0.25)

    changes = (
        lambda: None,
        lambda: case.model.up.weight.add_(0.5),
        lambda: case.model.up.weight.data.mul_(2),
        lambda: case.model.load_state_dict(other),
        lambda: case.model.load_state_dict({name: tensor.clone() for name, tensor in other.items()}, assign=True),
        optimizer_step,
        replace,
        give_other_data,
    )
    with torch.no_grad():
        for count, change in enumerate(changes, 1):
            change()
            assert error(case.model(x), model(x)) <= TOLERANCE
            assert error(case.model(x), model(x)) <= TOLERANCE
            assert len(lissom.dynamo_reports()) == count
    assert all(lowered())


def test_weights_changing_every_call_are_given_up_on() -> None:
    case = feed_forward()
    model, (x,) = compiled(case.model), case.args
    with torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(12):
            case.model.up.bias.add_(0.1)
            assert error(case.model(x), model(x)) <= TOLERANCE
    # Said once, so that the reports of other graphs stay.
    assert sum(report.report is None for report in lissom.dynamo_reports()) <= 1
    told = [str(item.message) for item in found]
    assert sum("its weights or numbers change too often to compile it for each" in sentence for sentence in told) == 1


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = seeded(Layer)
        fast, x = compiled(model), normal(3, 8)
        assert error(model(x), fast(x)) <= TOLERANCE
        model.linear.weight[2, 3] += 1  # pyright: ignore
        assert error(model(x), fast(x)) <= TOLERANCE
    assert lowered() == [True, True]


@pytest.mark.parametrize("dynamic", [None, True])
def test_graph_breaks_and_numbers(dynamic: bool | None) -> None:
    model = seeded(Gate)
    fast = compiled(model, dynamic=dynamic)
    with torch.no_grad(), warnings.catch_warnings():
        # What writes to its input runs as it is.
        warnings.filterwarnings("ignore", "torch.compile with backend 'lissom'")
        for rows, factor, count in ((2, 0.5, 3), (2, 0.5, 4), (4, 0.25, 5), (5, 0.75, 6)):
            x, kept = normal(rows, 8), normal(rows, 8)
            assert error(model(x, factor, count), fast(x, factor, count)) <= TOLERANCE
            assert torch.equal(x, kept)
    assert lowered()[0]
    reasons = {found.reason for found in lissom.dynamo_reports() if found.reason}
    assert reasons == {"the model changes its argument 'z' in place; pass a copy inside the model"}


def test_two_models_and_layers_of_one_class() -> None:
    models = [seeded(Layer) for _ in range(3)]
    x = normal(4, 8)
    with torch.no_grad():
        for index, model in enumerate(models):
            model.linear.weight.mul_(index + 1)  # pyright: ignore
        fast = [compiled(model) for model in models]
        for _ in range(3):
            for model, other in zip(models, fast, strict=True):
                assert error(model(x), other(x)) <= TOLERANCE
    assert lowered() == [True] * 3


def test_gradients() -> None:
    case = feed_forward()
    model, x = compiled(case.model), normal(2, 5, 8).requires_grad_()
    with pytest.warns(UserWarning, match=r"runs Graph_0_0 as it is: it may be asked for gradients.*torch.no_grad\(\)"):
        model(x).sum().backward()
    wanted = torch.autograd.grad(case.model(x).sum(), [x])[0]
    assert error(wanted, x.grad) == 0
    with torch.no_grad():
        result = model(x)
    assert lowered() == [False, True]
    # What comes out may be used in what is trained.
    head = nn.Linear(8, 1)
    head(result).sum().backward()
    assert head.weight.grad is not None


def test_training_mode_draws_what_the_model_draws() -> None:
    case = feed_forward()
    case.model.train()
    model, (x,) = compiled(case.model), case.args
    with torch.no_grad():
        torch.manual_seed(1)
        with pytest.warns(
            UserWarning, match=r"aten.dropout.default at models.py:\d+ draws random numbers; call model.eval\(\)"
        ):
            found = model(x)
        torch.manual_seed(1)
        assert error(case.model(x), found) == 0
        case.model.eval()
        assert error(case.model(x), model(x)) <= TOLERANCE


def test_state_is_kept_in_the_model() -> None:
    case, other = counter(), counter()
    model, (x,) = compiled(case.model), case.args
    with torch.no_grad(), pytest.warns(UserWarning, match="writes to the buffer 'seen' of its module"):
        for _ in range(3):
            assert error(other.model(x), model(x)) == 0
    assert torch.equal(case.model.seen, other.model.seen)  # pyright: ignore


def test_inference_mode_and_autocast() -> None:
    case = feed_forward()
    model, (x,) = compiled(case.model), case.args
    with torch.inference_mode():
        found = model(x)
        assert found.is_inference()
        assert error(case.model(x), found) <= TOLERANCE
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"torch.autocast\('cpu'\) is on"):
            found = model(x)
        assert error(case.model(x), found) == 0


def test_results_share_memory_as_the_models_do() -> None:
    def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.view(-1), x.clone(), x + 0, torch.arange(3), x[:0]

    fast = torch.compile(views, backend="lissom")
    for _ in range(2):
        x = torch.ones(2, 3)
        flat, copy, added, counted, empty = fast(x)
        flat[0] = 5
        counted += 1
        assert x[0, 0] == 5
        assert empty.numel() == 0
        assert copy[0, 0] == added[0, 0] == 1
        assert counted.tolist() == [1, 2, 3]


def test_options() -> None:
    case = feed_forward()
    (x,) = case.args
    with torch.no_grad():
        options = {"passes": [Quantize()], "simulate": True, "checks": "structural", "data": [{"x": x}]}
        found = compiled(case.model, options=options)(x)
        assert 1e-4 < error(case.model(x), found) < 0.05
        report = lissom.dynamo_reports()[0].report
        assert report is not None
        assert "quantize" in str(report)
        torch.compiler.reset()
        assert lissom.dynamo_reports() == ()
        found = compiled(case.model, options={"backend": lissom.OnnxRuntime(timing_seconds=0.0)}, dynamic=True)(x)
        assert error(case.model(x), found) <= TOLERANCE
        assert lissom.dynamo_reports()[0].report.title.endswith("on onnxruntime")  # pyright: ignore


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor takes some twenty seconds a graph, and tests/backends/test_fastest.py has it compete in a slow test.
    monkeypatch.setattr(backends, "BACKENDS", {name: item for name, item in backends.BACKENDS.items() if name != "inductor"})
    case = feed_forward()
    with torch.no_grad():
        assert error(case.model(*case.args), compiled(case.model, mode=mode)(*case.args)) <= TOLERANCE
    report = lissom.dynamo_reports()[0].report
    assert report is not None
    assert ("fastest:" in str(report)) == (mode == "max-autotune")


WRONG = [
    ({"mode": "max-autotune-no-cudagraphs"}, "has no mode 'max-autotune-no-cudagraphs'; did you mean 'max-autotune'?"),
    ({"options": {"pases": "exact"}}, "has no option 'pases'; did you mean 'passes'? it has passes, checks"),
    ({"options": {"passes": "quantise"}}, "there is no pass 'quantise'; did you mean 'quantize'?"),
    ({"options": {"backend": "eagr"}}, "there is no backend 'eagr'; did you mean 'eager'?"),
    ({"options": {"checks": "some"}}, "checks='some' is not known"),
    ({"options": {"data": iter(())}}, "data is an iterator, which can be read once"),
    (
        {"options": {"data": [(torch.ones(1),)]}},
        "a batch of data is not a mapping; name the tensors as the graph does, which takes x",
    ),
    ({"options": {"max_drop": 0.1}}, "max_drop needs a metric"),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG)
def test_wrong_options_are_refused(wrong: dict[str, object], sentence: str) -> None:
    case = feed_forward()
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as found:
        compiled(case.model, **wrong)(*case.args)
    assert isinstance(found.value.inner_exception, LissomError)
    assert sentence in str(found.value)


@torch.no_grad()
def test_what_vmap_batches_is_lowered() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.vmap(lambda row: row.cumsum(0) * row.amax())(self.first(x))

    fast = compiled(model := seeded(Batched), dynamic=True)
    for rows in (3, 5):
        assert error(model(x := normal(rows, 8)), fast(x)) <= TOLERANCE
    (report,) = lissom.dynamo_reports()
    assert report.report is not None and "first.weight" in report.report.history.texts[0]


@pytest.mark.filterwarnings("ignore")  # Dynamo's and transformers' own, and what is said of graphs that run as they are
@pytest.mark.parametrize("dynamic", [pytest.param(x, marks=pytest.mark.slow) for x in (None, True)])
@torch.no_grad()
def test_a_recurrence_that_is_scanned(dynamic: bool | None) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4, use_cache=False)
    model = seeded(lambda: MambaForCausalLM(config))
    torch.compiler.reset()
    fast = compiled(model, dynamic=dynamic)
    for length in (3, 4):
        assert error(model(ids := tokens(2, length)).logits, fast(ids).logits) <= TOLERANCE
    # With a length that varies the scan's splits are at fixed places, and the graph may run as it is.
    assert dynamic or lowered()[0]


@torch.no_grad()
def test_weights_read_from_a_modules_dictionary() -> None:
    class Looked(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.__dict__["_parameters"]["weight"])

    model = seeded(lambda: Looked(8, 8))
    assert error(model(x := normal(2, 8)), compiled(model)(x)) <= TOLERANCE
    assert lowered() == [True]


def test_graphs_without_tensor_operators() -> None:
    def shapes(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x, x.shape[0] + x.shape[1]

    fast = torch.compile(shapes, backend="lissom", dynamic=True)
    for rows in (3, 4):
        x = torch.ones(rows, 5)
        same, total = fast(x)
        assert same is x
        assert total == rows + 5


def test_no_import_is_needed() -> None:
    """Where the installation has the entry point, a new process finds the backend by its name."""
    found = entry_points(group="torch_dynamo_backends")
    if "lissom" not in found.names:
        pytest.skip("the installation of lissom is older than the entry point; install it again")
    assert found["lissom"].load() is compile_graph
    code = (
        "import sys, torch; assert 'lissom' not in sys.modules; assert 'lissom' in torch._dynamo.list_backends();"
        "model = torch.nn.Linear(4, 2).requires_grad_(False); x = torch.randn(3, 4);"
        "assert torch.allclose(torch.compile(model, backend='lissom')(x), model(x), atol=1e-6)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
