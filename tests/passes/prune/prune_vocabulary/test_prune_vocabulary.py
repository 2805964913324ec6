"""Tests of prune-vocabulary with ids=graph: outputs for kept ids are those of the original, others are masked or refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn

import lissom
from lissom.api import Optimized
from lissom.compiler.analysis.token_ids import token_ids
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.errors import InputError, LissomError, RequirementError, UnsupportedError
from lissom.frontends.models.huggingface import Checkpoint
from lissom.passes.prune.prune_vocabulary.prune_vocabulary import PruneVocabulary
from tests.support import captures
from tests.support.harness import check_golden, every_backend_but_eager_slow, rewrite
from tests.support.models import VOCABULARY, Case, Tied, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 64}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def _case(build: Callable[[], nn.Module]) -> Case:
    return Case(seeded(build), {"input_ids": tokens(), "attention_mask": torch.ones(2, 5, dtype=torch.long)})


def masked_bert() -> Case:
    return _case(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT)))


def xlm_roberta() -> Case:
    return _case(lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**_TEXT)))


def modernbert() -> Case:
    config = transformers.ModernBertConfig(**_TEXT, **_ENDS, reference_compile=False)
    return _case(lambda: transformers.ModernBertForMaskedLM(config))


def tied_llama() -> Case:
    return tiny_llama(tie_word_embeddings=True)


def gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return _case(lambda: transformers.GPT2LMHeadModel(config))


def gemma2() -> Case:
    """Its logits are capped after the LM head."""
    config = transformers.Gemma2Config(**_TEXT, num_key_value_heads=1, head_dim=8, use_cache=False)
    return _case(lambda: transformers.Gemma2ForCausalLM(config))


def t5() -> Case:
    """One table for encoder and decoder."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = seeded(lambda: transformers.T5ForConditionalGeneration(config))
    return Case(model, {"input_ids": tokens(), "decoder_input_ids": tokens(2, 3, seed=1)})


MODELS = {
    build.__name__: build
    for build in (tiny_bert, masked_bert, xlm_roberta, modernbert, tiny_llama, tied_llama, gpt2, tiny_gpt2, gemma2, tiny_t5, t5)
}
WITH_HEADS = ("masked_bert", "xlm_roberta", "modernbert", "tiny_llama", "tied_llama", "gpt2", "gemma2", "t5")


def pruned(case: Case, options: str, **more: object) -> Optimized:
    return captures.optimize(case.model, case.inputs, passes=f"prune-vocabulary{{{options}}}", **more)


def vocabulary_of(optimized: Optimized) -> Vocabulary:
    assert optimized.program.vocabulary is not None
    return optimized.program.vocabulary


def readable(case: Case, vocabulary: Vocabulary) -> dict[str, object]:
    """The inputs of a case with other ids than its own, all of which stay."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: vocabulary.kept[torch.randint(len(vocabulary.kept), value.shape, generator=draw)] if "ids" in name else value
        for name, value in case.kwargs.items()
        if isinstance(value, torch.Tensor)
    }


def first(outputs: object) -> torch.Tensor:
    """The first tensor of a model's output."""
    value = outputs[0]  # type: ignore[index]
    assert isinstance(value, torch.Tensor)
    return value


def test_rewrites() -> None:
    _, history = rewrite("prune-vocabulary{keep=20},eliminate-dead", seeded(Tied), tokens())
    steps = history.steps
    check_golden("prune_vocabulary", "\n".join(map(history.diff, range(2), range(1, 3))) + f"\n{steps[1].summary}\n")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "t5" else ()) for name in MODELS])
def test_outputs_for_kept_ids_are_the_same_bits(name: str) -> None:
    case = MODELS[name]()
    whole, small = captures.optimize(case.model, case.inputs), pruned(case, "keep=20")
    vocabulary = vocabulary_of(small)
    inputs = readable(case, vocabulary)
    wanted, actual = first(whole.program(**inputs)), first(small.program(**inputs))
    if name in WITH_HEADS:
        assert torch.equal(wanted[..., vocabulary.kept], actual[..., vocabulary.kept])
        assert bool((actual[..., vocabulary.dropped] == -torch.inf).all())
        assert actual.shape == wanted.shape
    else:
        assert torch.equal(wanted, actual)
    assert (len(vocabulary.kept), vocabulary.size) == (20, VOCABULARY)


@pytest.mark.parametrize("name", MODELS)
def test_no_weight_holds_rows_of_dropped_ids(name: str) -> None:
    small = pruned(MODELS[name](), "keep=20").program
    tokens = token_ids(small)
    wide = {
        name for name, weight in small.weights().items() if VOCABULARY in weight.shape and not name.startswith("vocabulary.")
    }
    assert not wide
    assert tokens is not None and tokens.size == 20


@pytest.mark.parametrize("name", WITH_HEADS)
def test_compact_logits_are_those_of_the_ids_that_stay(name: str) -> None:
    case = MODELS[name]()
    full, compact = pruned(case, "keep=20"), pruned(case, "keep=20,logits=compact")
    inputs = readable(case, vocabulary_of(full))
    wanted = first(full.program(**inputs))[..., vocabulary_of(full).kept]
    assert torch.equal(wanted, first(compact.program(**inputs)))
    assert not any("index_select" in str(node.target) for node in compact.program.nodes())


def test_a_tied_table_is_still_one_tensor() -> None:
    program = pruned(tied_llama(), "keep=20").program
    tokens = token_ids(program)
    assert tokens is not None
    (lookup,), (head,) = tokens.lookups, tokens.heads
    assert head.linear.all_input_nodes[1] is lookup.args[0]
    assert nodes.tensor_type(lookup.args[0]).shape == (20, 16)


def test_the_most_frequent_ids_of_the_data_stay_and_padding_does_not_count() -> None:
    case = tiny_bert()
    ids = torch.tensor([[5, 5, 5, 9, 36], [9, 8, 30, 30, 30]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    small = pruned(case, "keep=4", data=[{"input_ids": ids, "attention_mask": mask}])
    # The configuration's pad_token_id, 0, always stays; 8 and 36 occur once, and 8 is smaller.
    assert vocabulary_of(small).kept.tolist() == [0, 5, 8, 9]
    notes = small.report.history.steps[13].notes
    assert notes[:2] == (
        "4 of 37 token ids stay",
        "85.71% of 7 tokens of data= have ids that stay; 1 have dropped ids",
    )


@pytest.mark.parametrize("coverage", [0.25, 0.5, 0.7, 0.93, 1.0])
def test_coverage_keeps_the_fewest_ids_that_reach_it(coverage: float) -> None:
    data = [
        {"input_ids": tokens(8, 9, seed=seed) % 30, "attention_mask": torch.ones(8, 9, dtype=torch.long)} for seed in range(3)
    ]
    counts = Counter(int(index) for batch in data for index in batch["input_ids"].flatten())
    total, reached, wanted = counts.total(), counts[0], {0}
    for index, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if reached >= coverage * total - 1e-9:
            break
        if index:
            wanted.add(index)
            reached += count
    assert {*vocabulary_of(pruned(tiny_bert(), f"coverage={coverage}", data=data)).kept.tolist()} == wanted


def test_a_file_names_the_ids_that_stay(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("7\n\n 12 \r\n3\n7\n")
    assert vocabulary_of(pruned(tiny_bert(), f'tokens="{path}"')).kept.tolist() == [0, 3, 7, 12]
    more = vocabulary_of(pruned(tiny_bert(), f'tokens="{path}",keep=6')).kept.tolist()
    assert more == [0, 1, 2, 3, 7, 12]


def test_dropped_ids_are_refused_without_an_unknown_token() -> None:
    case = tied_llama()
    small = captures.compile(case.model, case.inputs, passes="prune-vocabulary{keep=20}")
    with pytest.raises(InputError) as caught:
        small(input_ids=torch.tensor([[3, 25]]), attention_mask=torch.ones(1, 2, dtype=torch.long))
    assert str(caught.value) == (
        "the inputs hold the token id 25, which prune-vocabulary dropped, and the model has no unknown token to read it as; "
        "pass ids of program.vocabulary.kept, or keep more"
    )
    with pytest.raises(InputError, match="has rows 0 to 36; pass token ids inside the vocabulary"):
        small(input_ids=torch.tensor([[3, 37]]), attention_mask=torch.ones(1, 2, dtype=torch.long))


@every_backend_but_eager_slow
def test_minilm(minilm: Checkpoint, backend: object) -> None:
    texts = ["The quick brown fox jumps over the lazy dog.", "A table has rows; a head has logits.", "zebra"]
    inputs = dict(minilm.encode(texts[:2]))
    small = lissom.compile(
        minilm.model, inputs, passes="prune-vocabulary{coverage=1}", data=[inputs], backend=backend, goal=None
    )
    vocabulary = small.program.vocabulary
    assert vocabulary is not None and vocabulary.unknown == 100
    # [PAD], [UNK], [CLS], [SEP] and [MASK] are special.
    assert {0, 100, 101, 102, 103} < {*vocabulary.kept.tolist()}
    with torch.inference_mode():
        wanted = minilm.model(**inputs).last_hidden_state
        torch.testing.assert_close(small(**inputs).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)  # other kernels
        rare = dict(minilm.encode(texts[2:]))
        unknown = rare | {"input_ids": torch.tensor([[101, *[100] * (rare["input_ids"].shape[1] - 2), 102]])}
        torch.testing.assert_close(
            small(**rare).last_hidden_state, minilm.model(**unknown).last_hidden_state, rtol=1e-4, atol=1e-5
        )
    step = next(step for step in small.report.history.steps if step.spelling.startswith("prune-vocabulary"))
    assert step.notes[-1] == "a dropped id in a call is read as the unknown token, id 100"


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-weight", "int8-weight"])
@pytest.mark.parametrize("order", ["{q},{p}", "{q},fold-quantized-weights,{p}", "{p},{q}"])
def test_quantized_tables_lose_rows(scheme: str, order: str) -> None:
    quantize = f"quantize{{scheme={scheme},embeddings=true,lm_head=true}}"
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, use_cache=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    model, inputs = seeded(lambda: transformers.LlamaForCausalLM(config)), {"input_ids": tokens() % 20}
    passes = order.format(q=quantize, p="prune-vocabulary{keep=33}")
    whole = captures.optimize(model, inputs, passes=quantize)
    small = captures.optimize(model, inputs, passes=passes)
    wide = [name for name, weight in small.program.weights().items() if weight.shape[:1] == (96,)]
    assert [name for name in wide if not name.startswith("vocabulary.")] == []
    kept = vocabulary_of(small).kept
    wanted, actual = first(whole.program(**inputs)), first(small.program(**inputs))
    torch.testing.assert_close(wanted[..., kept], actual[..., kept], rtol=0, atol=0)


class Joined(nn.Module):
    """A table of two weights that are joined in each call, so that no weight alone holds the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(30, 8), nn.Embedding(7, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(x, torch.cat([self.left.weight * scale, self.right.weight]))


_ERRORS: list[tuple[str, type[LissomError], str]] = [
    ("keep=38", UnsupportedError, r"keep=38\} is more than the vocabulary has, 37; give less"),
    ("keep=0", UnsupportedError, r"keep=0\} keeps no token id; give 1 or more"),
    ("coverage=0.9", RequirementError, r"coverage=\} needs calibration data: pass data=, or give keep="),
    ("coverage=1.5", UnsupportedError, r"takes coverage= above 0 and at most 1, not 1\.5"),
    ("keep=5,coverage=0.5", UnsupportedError, r"takes keep= or coverage=, not both; leave one out"),
    ("ids=graph", UnsupportedError, r"needs to know which ids stay; give keep=, coverage=, scripts= or tokens="),
    ("scripts=latin", RequirementError, r"needs the tokenizer, and the model's folder has none; give tokenizer=FOLDER"),
    ("scripts=klingon", UnsupportedError, r"knows no script 'klingon'; allowed are arabic, armenian, "),
    ("keep=9,ids=tokenizer", RequirementError, r"ids=tokenizer\} needs the tokenizer, and the model's folder has none"),
    ('tokens="nowhere.txt"', InputError, r"there is no file 'nowhere\.txt'; name a file with an id or a token per line"),
    ('keep=9,tokenizer="nowhere"', InputError, r"there is no file 'nowhere'; name a folder with tokenizer\.json"),
]


@pytest.mark.parametrize(("options", "kind", "message"), _ERRORS)
def test_bad_options(options: str, kind: type[LissomError], message: str) -> None:
    with pytest.raises(kind, match=message):
        pruned(tiny_bert(), options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"3\n37\n", r"line 2: the id 37 is outside the vocabulary; it has 0 to 36"),
        (b"9" * 400, r"line 1: the id 9{20} is outside the vocabulary"),
        (b"-1\n", r"line 1: '-1' is no id, and there is no tokenizer to look it up; give tokenizer=FOLDER"),
        (b"\xff\xfe\n", r"is no text in UTF-8 \(invalid start byte at byte 0\); save it as such"),
    ],
)
def test_bad_token_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        pruned(tiny_bert(), f'tokens="{path}"')


def test_fewer_than_must_stay() -> None:
    config = transformers.LlamaConfig(**_TEXT, bos_token_id=9, eos_token_id=[3, 5], pad_token_id=4)
    case = _case(lambda: transformers.LlamaForCausalLM(config))
    with pytest.raises(
        UnsupportedError, match=r"keep=3\} is less than the 4 tokens that must stay: special, .*; give 4 or more"
    ):
        pruned(case, "keep=3")


def test_models_without_token_ids() -> None:
    with pytest.raises(UnsupportedError, match="finds no embedding of token ids in Linear: no input is looked up in a table"):
        captures.optimize(seeded(lambda: nn.Linear(4, 2)), torch.randn(2, 4), passes="prune-vocabulary{keep=3}")


def test_tables_in_another_form_are_refused() -> None:
    message = "cannot remove rows of the token embedding or the LM head: 'cat' is computed from weights in a form whose rows"
    with pytest.raises(UnsupportedError, match=message):
        captures.optimize(seeded(Joined), (tokens(), torch.ones(1)), passes="prune-vocabulary{keep=3}")


def test_data_with_other_ids() -> None:
    case = tiny_bert()
    wrong = {"input_ids": torch.full((1, 3), 40), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(InputError, match=r"batch 0 of data= has the token id 40, and the vocabulary has 0 to 36"):
        pruned(case, "keep=5", data=[wrong])


def test_a_second_prune_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="ran on this program already; give all options to one pass"):
        captures.optimize(tiny_bert().model, tiny_bert().inputs, passes="prune-vocabulary{keep=9},prune-vocabulary{keep=5}")


def test_all_ids_stay() -> None:
    small = pruned(tiny_bert(), "keep=37")
    assert small.program.vocabulary is None
    assert small.report.history.steps[13].notes == ("all 37 token ids stay",)


def test_leaves_the_model_alone() -> None:
    case = tied_llama()
    before = {name: weight.clone() for name, weight in case.model.state_dict().items()}
    pruned(case, "keep=20")
    assert all(torch.equal(weight, before[name]) for name, weight in case.model.state_dict().items())


def test_options_are_text() -> None:
    text = str(PruneVocabulary(keep=9, scripts="latin,cyrillic"))
    assert re.search(r"keep=9.*scripts='latin,cyrillic'", text)


@pytest.mark.parametrize("trains", ["distill{steps=1}", "finetune{steps=1}"])
def test_masked_logits_are_not_trained(trains: str) -> None:
    message = r"requires that no logits are masked, .* breaks it, made so by .*: put this pass before prune-vocabulary"
    case = tiny_llama()
    data = [case.kwargs | {"labels": case.kwargs["input_ids"]}]
    with pytest.raises(RequirementError, match=message):
        captures.optimize(case.model, case.inputs, passes=f"prune-vocabulary{{keep=20}},{trains}", data=data)


def test_encoders_are_trained_after_it() -> None:
    case = tiny_bert()
    passes = "prune-vocabulary{keep=20},distill{steps=1}"
    assert vocabulary_of(captures.optimize(case.model, case.inputs, passes=passes, data=[case.kwargs])).size == VOCABULARY


def test_ranks_share_a_pruned_vocabulary(tmp_path: Path) -> None:
    """With an unknown token; what ranks cannot take is refused."""
    case = tiny_llama(tie_word_embeddings=True)
    passes = "prune-vocabulary{keep=20},shard{world_size=2},partition"
    with pytest.raises(
        UnsupportedError, match=r"is partitioned, which prune-vocabulary supports with ids=graph, logits=full and"
    ):
        captures.optimize(case.model, case.inputs, passes=passes)
    library = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    library.save(str(tmp_path / "tokenizer.json"))
    small = captures.optimize(case.model, case.inputs, passes=passes.replace("keep=20", f'keep=20,tokenizer="{tmp_path}"'))
    whole = captures.optimize(case.model, case.inputs)
    vocabulary = vocabulary_of(small)
    inputs = readable(case, vocabulary)
    wanted, actual = first(whole.program(**inputs)), first(small.program(**inputs))
    # Each rank sums a part of the terms.
    torch.testing.assert_close(actual[..., vocabulary.kept], wanted[..., vocabulary.kept])
