"""Tests of generation on several ranks: decoders cut with their caches, compiled, saved, and started by torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import lissom
from lissom.errors import UnsupportedError
from tests.support.decoders import MAX_LENGTH, decoder, prompt
from tests.support.ranks import printed, run_ranks

GREEDY = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

GENERATES = """
from tests.support.decoders import MAX_LENGTH, decoder, prompt
from tests.generation.test_ranks import GREEDY
join()
model = decoder(NAME)
fast = lissom.compile_generation(model, max_length=MAX_LENGTH, batch=2, backend="distributed", world_size=2)
print(*(list(state.shape) for state in fast.compiled.state().values()))
tokens = fast.generate(**prompt(2, padding=3), **GREEDY)
print(tokens.tolist())
fast.save(folder / "saved")
again = lissom.load_generation(folder / "saved")
print(torch.equal(again.generate(**prompt(2, padding=3), **GREEDY), tokens))
torch.manual_seed(7)
print(again.generate(**prompt(2), max_new_tokens=9, do_sample=True, eos_token_id=None, pad_token_id=0).tolist())
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_ranks_generate_what_one_process_and_transformers_generate(name: str, tmp_path: Path) -> None:
    lines = printed(run_ranks(GENERATES.replace("NAME", repr(name)), tmp_path))
    assert lines[0] == lines[1]
    states, tokens, again, _ = lines[0]
    model, inputs = decoder(name), prompt(2, padding=3)
    one = lissom.compile_generation(model, max_length=MAX_LENGTH, batch=2)
    wanted = model.generate(**inputs, **GREEDY)
    assert torch.equal(one.generate(**inputs, **GREEDY), wanted)
    assert tokens == str(wanted.tolist()) and again == "True"
    # Half of the heads of every cache.
    assert states.replace("] [", "]|[").split("|") == [
        str([2, state.shape[1] // 2, *state.shape[2:]]) for state in one.compiled.state().values()
    ]


FROM_A_FOLDER = """
from lissom.compiler import paging
from tests.support.decoders import MAX_LENGTH, prompt
from tests.generation.test_ranks import GREEDY
paging.LARGE, paging.SPILLED, paging._LEAST_HELD = 0, 1, 0
join()
spilled = []
move = paging._Pager._move
paging._Pager._move = lambda self, tensor, place: (spilled.append(tensor.nbytes), move(self, tensor, place))[1]
fast = lissom.compile_generation(
    folder / "model", max_length=MAX_LENGTH, backend="distributed", world_size=2, passes="quantize{scheme=int8-weight}"
)
print(fast.generate(**prompt(), **GREEDY).tolist())
print(fast.compiled.program.parameter_bytes)
print(bool(spilled))
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_ranks_generate_from_a_folder_that_is_compiled_from_the_disk(tmp_path: Path) -> None:
    """Ranks move what their passes make to files, and each then holds its own part."""
    decoder("llama").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    first, second = printed(run_ranks(FROM_A_FOLDER, tmp_path))
    one = lissom.compile_generation(tmp_path / "model", max_length=MAX_LENGTH, passes="quantize{scheme=int8-weight}", goal=None)
    assert first[0] == second[0] == str(one.generate(**prompt(), **GREEDY).tolist())
    assert first[1] == second[1] and int(first[1]) < one.compiled.program.parameter_bytes
    assert first[2] == second[2] == "True"


@pytest.mark.multiprocess
def test_torchrun_generates_from_what_was_saved(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(99)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = decoder("llama")
    model.generation_config.eos_token_id = None
    held = lissom.compile_generation(model, max_length=MAX_LENGTH, backend="distributed", world_size=2)
    with pytest.raises(UnsupportedError, match=r"is compiled for 2 ranks, and this process is in no process group"):
        held.step(prompt()["input_ids"])
    held.save(tmp_path / "saved", PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    with pytest.raises(UnsupportedError, match=r"`torchrun --nproc-per-node 2 -m lissom generate .*saved PROMPT`"):
        lissom.load_generation(tmp_path / "saved")
    for rest in ([], ["--temperature", "0.9", "--seed", "5"]):
        command = ["-m", "lissom", "generate", str(tmp_path / "saved"), "w5 w9 w40", "--max-new-tokens", "12", *rest]
        ranks = run_ranks("", tmp_path, command=command)
        lines = printed(ranks)
        assert len(lines[0]) == 1 and lines[1] == [] and len(lines[0][0].split()) == 12
        assert "prompt: 3 tokens" in ranks[0].err and "prompt:" not in ranks[1].err
        if not rest:
            wanted = model.generate(torch.tensor([[5, 9, 40]]), **{**GREEDY, "max_new_tokens": 12})[0, 3:]
            assert lines[0][0].split() == [f"w{int(token)}" for token in wanted]
