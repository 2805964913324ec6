"""Plans for transformers' own tensor parallelism, on two ranks that torchrun starts and that know nothing of Lissom."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lissom
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import ArtifactError, UnsupportedError
from lissom.io.processes import python_environment

# Two ranks sum in another order, in float32; 1e-7 to 4e-7 was measured.
ALLOWED = 2e-6
RANK = """
import json, os, sys
import torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
os.environ["CUDA_VISIBLE_DEVICES"] = ""
folder, name = Path(sys.argv[1]), sys.argv[2]
plan = json.loads((folder / "plan.json").read_text())
kind = getattr(transformers, name)
model = kind.from_pretrained(folder / "model", distributed_config=plan, local_files_only=True)
with torch.no_grad():
    output = model(**load_file(folder / "inputs.safetensors"))[0].contiguous()
rank = torch.distributed.get_rank()
save_file({"output": output}, folder / f"{rank}.safetensors")
sizes = {key: [p.nbytes, p.to_local().nbytes] for key, p in model.named_parameters() if isinstance(p, DTensor)}
(folder / f"{rank}.json").write_text(json.dumps(sizes))
assert "lissom" not in sys.modules
torch.distributed.destroy_process_group()
"""
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert(**changes: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return transformers.BertModel(transformers.BertConfig(**{**SIZES, **changes})), {"input_ids": IDS}


def masked() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The bias of its LM head is a parameter of another module too."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), {"input_ids": IDS}


def modernbert(**changes: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.ModernBertConfig(**SIZES, **TOKENS, cls_token_id=1, sep_token_id=2, **changes)
    return transformers.ModernBertModel(config), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **sizes)), {"pixel_values": pixels}


def t5() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    return model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5].contiguous()}


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **TOKENS)), {"input_ids": IDS}


def written(make: Callable[..., tuple[nn.Module, dict[str, torch.Tensor]]], folder: Path, **changes: int):
    torch.manual_seed(0)
    model, inputs = make(**changes)
    optimized = lissom.optimize(model.eval(), inputs, passes="shard{world_size=2}")
    return model, inputs, optimized.export_tp_plan(folder / "plan.json")


def torchrun(folder: Path, model: nn.Module, ranks: int) -> subprocess.CompletedProcess[str]:
    (folder / "rank.py").write_text(RANK)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, str(folder / "rank.py"), str(folder), type(model).__name__]
    settings = python_environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return subprocess.run(command, check=False, capture_output=True, text=True, env=settings)


GATHERED = {
    modernbert: "values inside 'layers.*.attn' are gathered, because transformers has no style for 3 packed weights",
    t5: "values inside 'decoder.block.*.layer.*.EncDecAttention' are gathered, because the model's forward fails on a part",
    gpt2: "values inside 'transformer.h.*.mlp' are gathered, because transformers has no style for parts of Conv1D",
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("make", [bert, masked, modernbert, vit, t5, gpt2], ids=lambda make: make.__name__)
def test_two_ranks_have_the_outputs_of_one(make, tmp_path: Path) -> None:
    model, inputs, plan = written(make, tmp_path)
    assert plan.relative_error < ALLOWED
    assert plan.megabytes < plan.whole_megabytes
    assert "run by transformers on 2 gloo ranks" in str(plan)
    assert any(GATHERED[make] in note for note in plan.notes) if make in GATHERED else plan.notes == ()
    assert json.loads((tmp_path / "plan.json").read_text()) == {"tp_size": 2, "tp_plan": plan.plan}
    model.save_pretrained(tmp_path / "model")
    save_file(inputs, tmp_path / "inputs.safetensors")
    ran = torchrun(tmp_path, model, 2)
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        wanted = model(**inputs)[0]
    for rank in range(2):
        assert relative_error(wanted, load_file(tmp_path / f"{rank}.safetensors")["output"]) < ALLOWED
        sizes = json.loads((tmp_path / f"{rank}.json").read_text())
        # Each rank holds half of each sharded weight, and all of the biases that are added after the sum.
        halves = {name for name, (whole, local) in sizes.items() if local * 2 == whole}
        assert {name for name in sizes if not name.endswith("bias")} <= halves
        assert all(name.endswith(".bias") and whole == local for name, (whole, local) in sizes.items() if name not in halves)


@pytest.mark.multiprocess
def test_more_ranks_than_planned_are_refused_by_transformers(tmp_path: Path) -> None:
    model, inputs, _ = written(bert, tmp_path)
    model.save_pretrained(tmp_path / "model")
    save_file(inputs, tmp_path / "inputs.safetensors")
    ran = torchrun(tmp_path, model, 3)
    assert ran.returncode != 0
    assert "The parallel mesh requires 2 processes, but world_size is 3." in ran.stderr


@pytest.mark.multiprocess
def test_heads_that_do_not_divide_are_gathered(tmp_path: Path) -> None:
    _, _, plan = written(bert, tmp_path, hidden_size=48, num_attention_heads=3)
    assert plan.relative_error < ALLOWED
    assert plan.notes == (
        "values inside 'encoder.layer.*.attention' are gathered, because an axis of 3 does not divide by 2 ranks",
    )
    assert plan.plan["encoder.layer.*.attention.self.query"] == "colwise_gather_output"


@pytest.mark.multiprocess
def test_packed_biases_are_gathered(tmp_path: Path) -> None:
    """The style `packed_colwise` gives a rank the first half of a bias, not half of each part."""
    _, _, plan = written(modernbert, tmp_path, mlp_bias=True)
    assert plan.relative_error < ALLOWED
    assert "no style for 2 packed weights with a bias" in plan.notes[-1]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("exact", "BertModel has no placements on ranks; end the passes with shard{world_size=2}"),
        ("shard{world_size=2},partition", "BertModel is partitioned already; leave partition out of the passes"),
        (
            "shard{world_size=2,plan=[*:replicate],fraction=0}",
            "no plan of tensor parallelism: shard found nothing to shard in it",
        ),
        (
            "prune-neurons{keep=0.5},shard{world_size=2}",
            r"the passes changed '.*' of BertModel, and a plan is for the model's own",
        ),
        ("quantize{scheme=int8-weight},shard{world_size=2}", "the passes changed"),
    ],
)
def test_programs_without_a_plan_are_refused(passes: str, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = bert()
    with pytest.raises(UnsupportedError, match=message.replace("{", r"\{")):
        lissom.optimize(model.eval(), inputs, passes=passes).export_tp_plan(tmp_path / "plan.json")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_one_layer_that_stays_whole_keeps_all_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = bert()
    whole = "shard{world_size=2,plan=[encoder.layer.0.attention*:replicate]}"
    plan = lissom.optimize(model.eval(), inputs, passes=whole).export_tp_plan(tmp_path / "plan.json")
    assert "'encoder.layer.*.attention' stays whole, because transformers has one rule for all layers" in plan.notes[0]
    assert "encoder.layer.*.attention.self.query" not in plan.plan


def test_other_modules_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="was not captured from a transformers model here"):
        lissom.optimize(nn.Linear(4, 4), torch.rand(2, 4)).export_tp_plan(tmp_path / "plan.json")
    model, inputs = bert()
    with pytest.raises(ArtifactError, match="none"):
        lissom.optimize(model.eval(), inputs).export_tp_plan(tmp_path / "none" / "plan.json")
