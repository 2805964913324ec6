"""Tests of lissom.frontends.capture.untouched: a model is as it was after capture, and after its program was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from lissom.errors import CaptureError, InputError
from lissom.frontends.capture.export import capture
from lissom.frontends.capture.untouched import alias, untouched
from lissom.frontends.generation.decoder import capture_decoder
from tests.support.models import normal, seeded, tiny_bert, tiny_gpt2, tiny_llama

SWITCH = 16
"""Tokens from which on the longrope model takes its long frequencies."""


def longrope() -> nn.Module:
    """Phi-3 with positions that are short up to 16 tokens."""
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0]}
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, original_max_position_embeddings=SWITCH, rope_parameters=rope | factors,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return seeded(lambda: Phi3ForCausalLM(config)).eval()


def inputs(tokens: int) -> dict[str, object]:
    ids = torch.randint(3, 64, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def attributes(model: nn.Module) -> dict[str, object]:
    """Everything every module holds, by path: parameters, buffers, modules, the mode, and plain attributes."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            found[f"{path}:{name}"] = value
            if name in ("_parameters", "_buffers", "_modules"):
                found |= {f"{path}:{name}:{key}": item for key, item in value.items()}
    return found


def is_same(left: Mapping[str, object], right: Mapping[str, object]) -> bool:
    return left.keys() == right.keys() and all(left[name] is right[name] for name in left)


@pytest.mark.parametrize("tokens", [pytest.param(9, marks=pytest.mark.slow), 40])
def test_length_dependent_frequencies_are_captured_and_restored(tokens: int) -> None:
    model, before = longrope(), copy.deepcopy(longrope())
    held = attributes(model)
    program = capture(model, (), inputs(tokens)).program
    assert is_same(attributes(model), held)
    assert not program.state
    for other in (SWITCH - 1, SWITCH, SWITCH + 1, 50):
        with torch.no_grad():
            wanted = before(**inputs(other)).logits
            assert torch.equal(model(**inputs(other)).logits, wanted)
            # The kernels of the model in another order.
            torch.testing.assert_close(program(**inputs(other))["logits"], wanted, rtol=1e-5, atol=1e-5)


def test_a_cache_stays_on_one_side_of_the_switch() -> None:
    model = longrope()
    held = attributes(model)
    frequencies = model.get_buffer("model.rotary_emb.inv_freq").clone()
    captured = capture_decoder(model, max_length=SWITCH)
    assert all(name.startswith("cache.") for name in captured.program.state)
    assert is_same(attributes(model), held)
    assert torch.equal(model.get_buffer("model.rotary_emb.inv_freq"), frequencies)
    message = r"other rotary frequencies in texts of more than 16 tokens \(longrope\), to which .* give 16 or less"
    with pytest.raises(InputError, match=message):
        capture_decoder(model, max_length=SWITCH + 1)


class Keeps(nn.Module):
    """Keeps what it computes, each kind in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(8))
        self.scale: torch.Tensor | None = None
        self.cache: dict[int, torch.Tensor] = {}
        self.lengths: list[int] = []
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = torch.full((8,), 2.0)
        size = x.shape[-1]
        if size not in self.cache:
            self.cache[size] = torch.arange(size) + 1.0
        self.lengths.append(size)
        self.calls += 1
        self.table = self.table.clone()
        return self.layer(x) * self.scale * self.cache[size] * self.table


def test_what_a_forward_keeps_is_put_back() -> None:
    model = Keeps().train()
    held, x = attributes(model), normal(2, 5, 8)
    program = capture(model, (x,)).program
    assert is_same(attributes(model), held)
    assert model.training and model.layer.training
    assert not model.cache and not model.lengths
    assert torch.equal(program(x), model.eval()(x))


class Registers(nn.Module):
    """Registers a buffer, or a layer, when it runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(8))
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.name == "layer":
            self.layer = nn.Linear(8, 8)
            return self.layer(x)
        self.register_buffer(self.name, torch.full((8,), 3.0), persistent=False)
        return x * self.get_buffer(self.name)


@pytest.mark.parametrize(("kind", "name"), [("buffer", "table"), ("buffer", "made"), ("submodule", "layer")])
def test_what_a_forward_registers_is_named(kind: str, name: str) -> None:
    model = Registers(name)
    held = attributes(model)
    message = f"Registers registers the {kind} '{name}' while it runs; call the model once before, or register it in __init__"
    with pytest.raises(CaptureError, match=message):
        capture(model, (normal(2, 8),))
    assert is_same(attributes(model), held)


class Writes(nn.Module):
    """Writes to a tensor that is no buffer, where no graph sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(8)), torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            self.seen.add_(1)
        return x * self.weight


def test_irreversible_in_place_write_names_its_tensor() -> None:
    model = Writes()
    with (
        pytest.raises(CaptureError, match=r"Writes writes to 'seen' in place.*register what it keeps as a buffer"),
        untouched(model),
    ):
        model(torch.ones(8))


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_llama])
def test_training_a_program_leaves_the_model(build: Callable[[], object]) -> None:
    case = build()
    model = case.model.requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    held = attributes(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needs = {name: weight.requires_grad for name, weight in model.named_parameters()}
    program = capture(model, case.args, case.kwargs, dynamic=False).program
    sample = program.signature.flatten(case.args, case.kwargs)
    before = program.run(sample)[0]
    trained = program.own_copy()
    optimizer = torch.optim.AdamW(trained.graph_module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained.run(sample)[0].square().mean().backward()
        optimizer.step()
    assert not torch.equal(trained.run(sample)[0], before)
    assert torch.equal(program.run(sample)[0], before)
    assert is_same(attributes(model), held)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == needs
    assert all(weight.grad is None for weight in model.parameters())


def test_program_shares_model_memory_and_cannot_be_trained() -> None:
    model = nn.Linear(4, 2)
    program = capture(model, (normal(3, 4),)).program
    assert program.weight("weight").data_ptr() == model.weight.data_ptr()
    assert not any(weight.requires_grad for weight in program.weights().values())
    own = program.own_copy()
    assert all(weight.requires_grad for weight in own.weights().values())
    assert own.weight("weight").data_ptr() != model.weight.data_ptr()
    assert list(dict(own.graph_module.named_parameters())) == ["weight", "bias"]


def test_alias_is_parameter_where_weight_is_trained() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert isinstance(alias(weight), nn.Parameter) and not alias(weight).requires_grad
    assert not isinstance(alias(weight.requires_grad_(False)), nn.Parameter)
    with torch.inference_mode():
        made = torch.ones(3)
    assert not alias(made).is_inference() and alias(made).data_ptr() == made.data_ptr()


class ExtraState(nn.Linear):
    """Saves something that is no tensor."""

    def get_extra_state(self) -> object:
        return {"version": 1}

    def set_extra_state(self, state: object) -> None:
        pass


class Tied(nn.Module):
    """Two layers with one weight, a third with its transpose in the same memory, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.c.weight = nn.Parameter(self.a.weight.detach().T)
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x))) * self.scale


KINDS: dict[str, Callable[[], nn.Module]] = {
    "extra state": lambda: ExtraState(8, 8),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "tied": Tied,
}


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_every_kind_are_captured_and_left_alone(kind: str) -> None:
    model, x = seeded(lambda: nn.Sequential(KINDS[kind]())).eval(), normal(2, 5, 8)
    wanted, held = model(x), attributes(model)
    program = capture(model, (x,)).program
    torch.testing.assert_close(program(x), wanted)
    assert is_same(attributes(model), held)


def test_a_lazy_weight_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"weight '0\.weight' has no size before the model's first call; call the"):
        capture(nn.Sequential(nn.LazyLinear(8)), (normal(2, 8),))


class Averages(nn.Module):
    """Keeps a moving average in a buffer that it assigns, or writes to."""

    def __init__(self, *, assigns: bool) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.assigns = assigns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        average = 0.9 * self.average + 0.1 * x.mean((0, 1))
        if self.assigns:
            self.average = average
        else:
            self.average.copy_(average)
        return x - average


class Holds(nn.Module):
    def __init__(self, *, assigns: bool) -> None:
        super().__init__()
        self.inner = Averages(assigns=assigns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("make", [Averages, Holds])
@pytest.mark.parametrize("assigns", [False, True])
def test_a_buffer_starts_where_the_model_s_does(make, assigns: bool) -> None:
    model = make(assigns=assigns).eval()
    found = capture(model, (normal(2, 5, 8),))
    buffer = dict(model.named_buffers())
    assert all(not tensor.any() for tensor in buffer.values())
    assert found.notes[0] == "dynamic: batch (1 or more), sequence (1 or more)"
    with torch.no_grad():
        for seed in range(3):
            x = normal(2, 5, 8, seed=seed)
            torch.testing.assert_close(found.program(x), model(x), rtol=1e-6, atol=1e-6)  # a few float32 operations


class Counts(nn.Module):
    """Keeps a number that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_state_that_is_no_buffer_is_refused_with_cause() -> None:
    with pytest.raises(CaptureError, match=r"keeps state (that is not a buffer|outside its buffers)"):
        capture(Counts(), (normal(2, 5, 8),))


@pytest.mark.parametrize("script", [torch.jit.script, lambda module: torch.jit.trace(module, normal(2, 8))])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_submodule_is_refused_by_name(script) -> None:
    model = nn.Sequential(nn.Linear(8, 8), script(nn.Linear(8, 8)))
    with pytest.raises(
        CaptureError, match=r"submodule '1' was made by TorchScript; replace it by the torch\.nn\.Module it was made from"
    ):
        capture(model, (normal(2, 8),))
