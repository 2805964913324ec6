"""Tests of lissom.artifacts.program_file against files written to do harm: refused in one sentence, and nothing runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.artifacts import program_file, weights
from lissom.errors import ArtifactError
from tests.support.hostile import change, node, seal
from tests.support.models import normal
from tests.support.saving import compiled, compiled_module

LINEAR, NORM, SOFTMAX = "aten.linear.default", "aten.layer_norm.default", "aten.scaled_dot_product_attention.default"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    for name in ("bert", "counter"):
        compiled(name).save(path / name)
    return path


@pytest.fixture
def saved(original, tmp_path):
    """A copy of a BERT's artifact."""
    return Path(shutil.copytree(original / "bert", tmp_path / "artifact"))


@pytest.fixture
def counting(original, tmp_path):
    """A copy of the artifact of a program with state."""
    return Path(shutil.copytree(original / "counter", tmp_path / "artifact"))


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        lissom.load(folder)
    said = str(caught.value).replace(str(folder), "DIR")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("target", [LINEAR, NORM])
def test_a_keyword_is_no_code(saved, tmp_path, target):
    ran = tmp_path / "ran"
    keyword = f"x=__import__('pathlib').Path({str(ran)!r}).touch(), bias"
    change(saved, lambda program: node(program, target)["kwargs"].update({keyword: None}))
    assert f"{target.removesuffix('.default')}.default has no argument" in refusal(saved)
    assert not ran.exists()


def test_call_without_type_of_its_tensor_is_refused(saved):
    change(saved, lambda program: node(program, LINEAR).pop("type"))
    assert "has not the type of a tensor, which its operator yields" in refusal(saved)


@pytest.mark.parametrize("name", ["a') or print('", "a\nprint(1)", "\x1b[2J", "", "x" * 2000])
def test_the_name_of_the_program_is_no_code(saved, name, capsys):
    change(saved, lambda program: program.update(name=name))
    if name.isprintable() and len(name) < 1000:
        assert lissom.load(saved).program.name == name
    else:
        assert "is not a name: it holds what cannot be printed, or is longer than 1000" in refusal(saved)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name", ['a") or print("', "a\\", "__class__.forward", "forward", "a.training", "a..b", "graph.x", "a\n"]
)
def test_name_of_weight_is_no_code_and_no_attribute(saved, name):
    def edit(program):
        old = next(item for item in program["nodes"] if item["op"] == "get_attr")["target"]
        program["weights"][name] = program["weights"].pop(old)
        for item in program["nodes"]:
            if item.get("target") == old:
                item["target"] = name

    change(saved, edit)
    assert "is not a name" in refusal(saved)
    assert torch.fx.GraphModule.forward is not None and not isinstance(nn.Module.forward, torch.Tensor)


def test_source_that_torch_fx_makes_of_name_reads_weight(saved):
    """Any other printable name is in quotes there, and is no code."""
    old = next(item for item in json.loads((saved / "program.json").read_text())["nodes"] if item["op"] == "get_attr")["target"]
    name = "{print(1)} f(x); #[0]"

    def edit(program):
        program["weights"][name] = program["weights"].pop(old)
        for item in program["nodes"]:
            item.update({"target": name} if item.get("target") == old else {})

    wanted = lissom.load(saved).program.weight(old)
    change(saved, edit)
    program = lissom.load(saved).program
    assert torch.equal(program.weight(name), wanted)
    assert f'getattr(self, "{name}")' in program.graph_module.code


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda call: call["args"].extend([1, 2, 3]), "aten.linear.default takes 3 arguments by position, and is given 6"),
        (lambda call: call["kwargs"].update(input={"node": "x"}), "is not an argument"),
        (lambda call: call["kwargs"].update(input=None), "aten.linear.default has 'input' twice"),
        (lambda call: call["args"].clear(), "aten.linear.default lacks its argument 'input'"),
        (
            lambda call: call["args"].__setitem__(1, "text"),
            "argument 'weight' of aten.linear.default is 'text', and is to be Tensor",
        ),
        (
            lambda call: call["args"].__setitem__(1, None),
            "argument 'weight' of aten.linear.default is None, and is to be Tensor",
        ),
        (lambda call: call["args"].__setitem__(1, 1), "argument 'weight' of aten.linear.default is 1, and is to be Tensor"),
        (lambda call: call["args"].__setitem__(1, [1]), "argument 'weight' of aten.linear.default is [1], and is to be Tensor"),
    ],
)
def test_a_call_fits_its_schema(saved, edit, said):
    change(saved, lambda program: edit(node(program, LINEAR)))
    assert said in refusal(saved)


@pytest.mark.parametrize(
    "target",
    [
        *(
            "aten.manual_seed.default",
            "aten._reshape_alias.default",
            "aten._nested_view_from_buffer.default",
            "aten.rand.default",
        ),
        *(
            "aten._sparse_coo_tensor_unsafe.default",
            "aten._print.default",
            "aten.set_.source_Tensor",
            "aten.empty.memory_format",
        ),
        *(
            "aten._unsafe_index.Tensor",
            "aten.randn_like.default",
            "aten.resize_.default",
            "aten.bernoulli.default",
            "aten.from_file.default",
        ),
        *(
            "aten._native_batch_norm_legit.no_stats",
            "aten._fft_c2r.default",
            "aten.save.default",
            "prim.device.default",
        ),
        *("lissom.barrier.default", "lissom.begin_call.default", "lissom.end_call.default", "aten._set_grad_enabled.default"),
    ],
)
def test_an_operator_that_does_more_than_compute_is_refused(saved, target):
    change(saved, lambda program: node(program, LINEAR).update(target=target))
    assert f"there is no operator '{target}', or none that an artifact may call" in refusal(saved)


def test_dropout_draws_nothing(saved):
    def edit(program):
        call = node(program, LINEAR)
        call.update(target="aten.dropout.default", args=[call["args"][0], 0.5, True])

    change(saved, edit)
    assert "aten.dropout.default draws random numbers: its argument 'train' is True, and not False" in refusal(saved)


class Windows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(x * 2, (3, 2), (1, 1))


def test_a_view_stays_within_its_memory(tmp_path):
    x = normal(4)
    lissom.compile(Windows(), x, dynamic=False).save(tmp_path / "artifact")
    assert lissom.load(tmp_path / "artifact")(x).shape == (3, 2)
    change(tmp_path / "artifact", lambda program: node(program, "aten.as_strided.default")["args"].__setitem__(1, [300, 2]))
    with pytest.raises(RuntimeError, match="out of bounds for storage"):
        lissom.load(tmp_path / "artifact")(x)


class Attends(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_attention_reads_no_key_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("lissom.backends.eager.backend.Eager.lowering", lambda self, device: ())
    q, k = normal(1, 2, 3, 8), normal(1, 2, 4, 8)
    model = lissom.compile(Attends(), (q, k, k), dynamic=False, passes="remove-no-ops")
    model.save(tmp_path / "artifact")

    def edit(program):
        call = node(program, SOFTMAX)
        call["args"] = [call["args"][1], call["args"][0], call["args"][2]]

    change(tmp_path / "artifact", edit)
    with pytest.raises(ValueError, match="attention has 3 keys and 4 values"):
        lissom.load(tmp_path / "artifact")(q, k, k)


class Ones(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(x), x.new_ones(x.shape[0])


def test_memory_that_nothing_wrote_is_zero(tmp_path):
    x = normal(500)
    lissom.compile(Ones(), x).save(tmp_path / "artifact")

    def edit(program):
        node(program, "aten.ones_like.default")["target"] = "aten.empty_like.default"
        node(program, "aten.new_ones.default")["target"] = "aten.new_empty.default"

    change(tmp_path / "artifact", edit)
    # Memory that is given back is used again.
    torch.full((500,), 7.0)
    assert all(not found.any() for found in lissom.load(tmp_path / "artifact")(x))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (["Pow", 7, 400_000_000], "may have 1200000000 bits; the limit is 4096"),
        (["Pow", "s0", ["Pow", 10, 9]], "the exponent ['Pow', 10, 9] is not a number"),
        (["PowByNatural", ["PowByNatural", ["PowByNatural", 7, 64], 64], 64], "bits; the limit is 4096"),
        (["Max", *range(1000)], "has 1001 parts; the limit is 512"),
        (-1, "is negative, or takes more than 2^63 bytes"),
        (2**62, "is negative, or takes more than 2^63 bytes"),
        (["Float", "nan"], "'nan' is not a finite number"),
        (["Rational", 1, 0], "is not a size"),
        (["Equality", 1, 1], "is not a size"),
    ],
    ids=str,
)
def test_a_size_is_bounded(saved, size, said):
    def edit(program):
        text = json.dumps(program).replace('"s0"', json.dumps(next(iter(program["symbols"]))))
        program.update(json.loads(text))
        node(program, LINEAR)["type"]["tensor"]["shape"][0] = json.loads(
            json.dumps(size).replace('"s0"', json.dumps(next(iter(program["symbols"]))))
        )

    change(saved, edit)
    assert said in refusal(saved)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"op"', '"op":1,"op"', "the field 'op' is there twice"),
        ('"args":[', '"args":[NaN,', "NaN is not a JSON number"),
        ('"args":[', '"args":[1e999,', "does not fit into 64 bits"),
        ('"args":[', '"args":[' + "9" * 20_000 + ",", "does not fit into 64 bits"),
        ('"args":[', '"args":[9223372036854775808,', "the number '9223372036854775808' does not fit into 64 bits"),
        ('"args":[', '"args":[' + "[" * 150 + "]" * 150 + ",", "are nested 154 deep; the limit is 100"),
        ('"args":[', '"args":[' + "[" * 200_000 + "]" * 200_000 + ",", "deep; the limit is 100"),
    ],
)
def test_json_is_bounded(saved, old, new, said):
    path = saved / "program.json"
    path.write_text(path.read_text().replace(old, new, 1))
    seal(saved)
    assert said in refusal(saved)


def test_the_length_of_json_is_bounded(saved, monkeypatch):
    monkeypatch.setattr("lissom.io.fields.MOST_BYTES", 1000)
    assert "it is longer than 1000 bytes" in refusal(saved)


def test_the_number_of_nodes_is_bounded(saved, monkeypatch):
    monkeypatch.setattr(program_file, "MOST_NODES", 10)
    assert "nodes; the limit is 10" in refusal(saved)


def test_a_state_that_would_fill_memory_is_refused(counting):
    def edit(program):
        (name,) = program["state"]
        entry = program["weights"][name]
        entry.pop("nonzero", None)
        entry["shape"] = [1 << 45, *node(program, name)["type"]["tensor"]["shape"]]

    change(counting, edit)
    assert "the state would take" in refusal(counting)
    assert "bytes of memory; the limit is" in refusal(counting)


def test_a_weight_that_would_fill_memory_is_refused(tmp_path):
    compiled_module(nn.Linear(64, 64), normal(2, 64))
    layer = nn.Linear(64, 64)
    nn.init.zeros_(layer.weight)
    lissom.compile(layer, normal(2, 64), passes="remove-no-ops").save(tmp_path / "artifact")

    def edit(program):
        entry = next(item for item in program["weights"].values() if "nonzero" in item)
        entry["nonzero"] = [1 << 45]

    change(tmp_path / "artifact", edit)
    assert "compressed weights would take 175921860444160 bytes of memory; the limit is" in refusal(tmp_path / "artifact")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda program: program.update(state=["nothing"]), "there is no weight for the state 'nothing'"),
        (lambda program: program["nodes"].append(program["nodes"][-1] | {"name": "output_1"}), "does not end in its outputs"),
        (lambda program: program["symbols"].update({"a b": {}}), "'a b' is not a name for a symbol"),
        (lambda program: next(iter(program["symbols"].values())).update(minimum=9, maximum=3), "is to be from 9 to 3"),
        (lambda program: program["signature"]["dimensions"][0].update(symbol="s99"), "there is no symbol 's99'"),
        (lambda program: program["signature"]["dimensions"][0].update(name="\x1b[31m"), "is not a name: it holds what cannot"),
        (lambda program: program["signature"]["dimensions"].pop(), "that no dimension defines"),
        (lambda program: program["signature"]["keyword"].append(program["signature"]["keyword"][0]), "have one name"),
        (lambda program: program["signature"]["keyword"][0].update(name="\n"), "is not a name: it holds what cannot"),
    ],
)
def test_another_program_is_refused(saved, edit, said):
    change(saved, edit)
    assert said in refusal(saved)


@pytest.mark.parametrize(
    ("world_size", "said"),
    [
        (10**9, "is for 1000000000 ranks, and a program is shared by 2 to 1024; save the model again"),
        (10**30, "is not a whole number of 64 bits"),
        (None, "is for None ranks"),
    ],
)
def test_the_number_of_ranks_is_bounded(saved, world_size, said):
    seal(saved, backend="distributed", options={"world_size": world_size})
    assert said in refusal(saved)


@pytest.mark.parametrize("name", ["program.json", "weights.safetensors", "steps.json"])
def test_file_exchanged_while_artifact_is_loaded_is_refused(saved, name, monkeypatch):
    """What is used is what is checked, and not what had the name before."""
    real = lissom.artifacts.artifact.find_saved_backend

    def exchange(*arguments):
        path = saved / name
        (saved / "copy").write_bytes(path.read_bytes()[:-1] + b"?")
        (saved / "copy").rename(path)
        return real(*arguments)

    monkeypatch.setattr("lissom.artifacts.artifact.find_saved_backend", exchange)
    assert f"'DIR/{name}' was changed after it was written: its SHA-256 is another" in refusal(saved)


def test_weights_may_be_copied_from_the_file(saved, monkeypatch):
    monkeypatch.setenv(weights.SWITCH, "0")
    again = lissom.load(saved)
    wanted = {name: tensor.clone() for name, tensor in again.program.weights().items()}
    path = saved / "weights.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(100)
    assert all(torch.equal(wanted[name], tensor) for name, tensor in again.program.weights().items())
