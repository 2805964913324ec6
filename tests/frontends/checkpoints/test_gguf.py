"""Tests of lissom.frontends.checkpoints.gguf: which blocks of a file belong to which weight of the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lissom.errors import ArtifactError
from lissom.frontends.checkpoints.gguf import keep_blocks
from lissom.frontends.checkpoints.stored_weights import describe_stored, stored_form
from tests.support import captures

gguf_files = pytest.importorskip("tests.support.gguf_files")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


INPUTS = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "use_cache": False}


def read(file: Path) -> torch.nn.Module:
    options = {"gguf_file": file.name, "local_files_only": True, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_files.write_llama(path)
    return path


def test_every_weight_has_the_values_of_its_blocks(file: Path) -> None:
    model = read(file)
    keep_blocks(model, file)
    stored = {name: stored_form(weight) for name, weight in model.named_parameters()}
    assert {name for name, item in stored.items() if item is None} == {name for name in stored if "norm" in name}
    for name, item in stored.items():
        if item is not None:
            weight = model.get_parameter(name)
            assert torch.equal(item.unpack().dequantize(slice(None)), weight.detach()), name
            # Llama's rotary embedding turns other pairs of features than llama.cpp's.
            assert (item.order is not None) == name.endswith(("q_proj.weight", "k_proj.weight")), name
    assert describe_stored(model) == (
        "the file stores 16 weights in blocks (4 in Q6_K, 2 in Q4_K, 2 in Q5_0, 2 in Q8_0, 2 in Q5_K, 2 in Q4_1, 2 in Q4_0); "
        "use-stored-weights reads them as they are",
    )


def test_program_remembers_blocks_and_copy_of_model_does_not(file: Path) -> None:
    model = read(file)
    assert describe_stored(model) == ()
    keep_blocks(model, file)
    program = captures.optimize(model, INPUTS, checks="structural").program
    names = [name for name, weight in program.weights().items() if stored_form(weight)]
    assert len(names) == 16
    assert not any(stored_form(weight) for weight in program.own_copy().weights().values())
    assert describe_stored(copy.deepcopy(model)) == ()


def test_a_transposed_weight_is_found(tmp_path: Path) -> None:
    """As GPT-2's are; transformers' own code says which."""
    from transformers.modeling_gguf_pytorch_utils import GPT2TensorProcessor

    from lissom.frontends.checkpoints.gguf import block_order

    processor = GPT2TensorProcessor()
    assert block_order(processor, "blk.0.ffn_up.weight", 64, 32, {}) == (None, True)
    assert block_order(processor, "blk.0.ffn_up.weight", 32, 32, {}) == (None, True)
    assert block_order(processor, "token_embd.weight", 64, 32, {}) == (None, False)
    assert block_order(processor, "output.weight", 64, 32, {}) is None


def test_a_truncated_file_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another program shortens after its header was read."""
    import gguf

    reader, model, short = gguf.GGUFReader(str(file)), read(file), tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-200_000])
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: reader)
    with pytest.raises(ArtifactError, match=r"short.gguf has \d+ bytes, and '.*' ends at byte \d+; copy the file again"):
        keep_blocks(model, short)
