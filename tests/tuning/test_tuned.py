"""Tests of lissom.tune on small models: what it finds, that its text gives the same program again, and how it ends."""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import cycle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lissom
from lissom.errors import InputError, UnsupportedError
from lissom.generation.scoring import Scorer
from lissom.inspect.tables import plain
from lissom.passes import RECIPES
from lissom.tuning.store import Store
from lissom.tuning.tuned import _identity
from tests.support.models import feed_forward, normal, seeded, tiny_bert, tokens
from tests.support.quantized_checkpoints import small_config, small_model
from tests.tuning.searches import FAMILIES, batches


def leaves(outputs):
    return [value for value in outputs.values() if isinstance(value, torch.Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_gives_the_same_program_again(family):
    case = FAMILIES[family]()
    data = batches(case)
    tuned = lissom.tune(case.model, case.inputs, data=data, max_drop=0.2, goal="memory", minutes=0.5)
    chosen = next(item for item in tuned.report.candidates if item.pipeline == tuned.pipeline)
    assert chosen.drop <= 0.2
    assert chosen.bytes < tuned.report.candidates[0].bytes
    again = lissom.compile(case.model, case.inputs, passes=tuned.pipeline, data=data, goal=None, backend=tuned.backend)
    for batch in data:
        for one, other in zip(leaves(tuned.best(**batch)), leaves(again(**batch)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_what_is_found_for_a_server_is_a_checkpoint_for_it(tmp_path):
    """Several schemes, with q, k and v in one of them, which transformers loads."""
    pytest.importorskip("compressed_tensors")
    model = small_model(small_config(kind="qwen3")).float()
    data = [{"input_ids": torch.arange(3, 27).view(2, 12) + shift} for shift in range(4)]
    tuned = lissom.tune(model, data[0], data=data, max_drop=0.1, goal="memory", minutes=0.4, distill=False, for_server="vllm")
    assert "checkpoints for vllm" in str(tuned.report)
    found = lissom.optimize(model, data[0], passes=tuned.pipeline, data=data)
    written = found.save_compressed(tmp_path / "checkpoint")
    assert tuned.pipeline != "exact" and sum(written.schemes.values()) >= 6


@pytest.mark.slow
def test_drop_without_metric_is_relative_output_error(tmp_path):
    case = tiny_bert()
    data = batches(case)
    tuned = lissom.tune(
        case.model, case.inputs, data=data, max_drop=0.3, goal="memory", minutes=0.4, distill=False, store=tmp_path
    )
    chosen = next(item for item in tuned.report.candidates if item.pipeline == tuned.pipeline)
    wanted, found = [], []
    with torch.no_grad():
        for batch in data:
            real = batch["attention_mask"].bool()
            wanted.append(case.model(**batch).last_hidden_state[real])
            found.append(tuned.best(**batch).last_hidden_state[real])
    error = (torch.cat(found) - torch.cat(wanted)).norm() / torch.cat(wanted).norm()
    # The other output, of the pooler, may be the worse one.
    assert float(error) <= chosen.drop * (1 + 1e-4)
    assert "relative output errors" in str(tuned.report)
    # The same search with another bound measures nothing anew that it needs.
    started = time.monotonic()
    again = lissom.tune(
        case.model, case.inputs, data=data, max_drop=0.01, goal="memory", minutes=0.05, distill=False, store=tmp_path
    )
    assert len(again.report.candidates) >= len(tuned.report.candidates)
    assert time.monotonic() - started < 60
    assert all(item.drop <= 0.01 for item in again.report.candidates if item.pipeline == again.pipeline)


@pytest.mark.slow
def test_target_takes_most_accurate_program_that_reaches_it():
    case = tiny_bert()
    tuned = lissom.tune(
        case.model, case.inputs, data=batches(case), goal="memory", target=1.5, minutes=0.5, distill=False, max_drop=0
    )
    exact, *others = tuned.report.candidates
    chosen = next(item for item in others if item.pipeline == tuned.pipeline)
    reaching = [item for item in others if not item.failed and item.bytes <= exact.bytes / 1.5]
    assert chosen in reaching
    assert chosen.drop == min(item.drop for item in reaching)


@pytest.mark.slow
def test_unreachable_bound_leaves_exact_program_and_names_nearest():
    case = tiny_bert()
    tuned = lissom.tune(case.model, case.inputs, data=batches(case), max_drop=0, goal="memory", minutes=0.2, distill=False)
    assert tuned.pipeline == "exact"
    assert len(tuned.report.candidates) > 1
    assert any("the exact program is kept; the nearest loses" in note for note in tuned.report.notes)


def test_exact_program_exists_when_time_ends_at_once():
    case = feed_forward()
    tuned = lissom.tune(case.model, case.inputs, data=[case.inputs], minutes=1e-6)
    assert tuned.pipeline == "exact"
    assert torch.allclose(tuned.best(*case.inputs), case.model(*case.inputs), atol=1e-6)
    assert [item.pipeline for item in tuned.frontier] == ["exact"]
    assert "chosen" in plain(tuned.report, 120)
    assert any("the exact program is kept" in note for note in tuned.report.notes)
    assert any(note.startswith("data= holds one batch") for note in tuned.report.notes)


def test_unreachable_target_leaves_exact_program_and_names_nearest():
    case = feed_forward()
    tuned = lissom.tune(case.model, case.inputs, data=[case.inputs] * 2, goal="memory", target="0.00001 MB", minutes=0.02)
    assert tuned.pipeline == "exact"
    sentence = "no cheaper candidate meets the bound, and the exact program is kept; the nearest misses the target: "
    assert any(note.startswith(sentence) for note in tuned.report.notes), tuned.report.notes


def test_second_call_takes_time_of_exact_program_from_store(tmp_path):
    case, options = feed_forward(), {"minutes": 1e-6, "store": tmp_path}
    scores = cycle([0.5, 0.501])
    tuned = [
        lissom.tune(case.model, case.inputs, data=[case.inputs], metric=lambda model: next(scores), **options) for _ in range(2)
    ]
    first, second = (item.report.candidates[0].milliseconds for item in tuned)
    assert first == second
    assert "two measurements of the exact program's metric differ by 0.001; drops are as uncertain" in tuned[1].report.notes


def test_a_store_of_another_model_is_named(tmp_path):
    case, options = feed_forward(), {"minutes": 1e-6, "store": tmp_path}
    other = lissom.tune(torch.nn.LayerNorm(16).eval(), torch.randn(2, 16), data=[torch.randn(2, 16)], **options)
    tuned = lissom.tune(case.model, case.inputs, data=[case.inputs], **options)
    again = lissom.tune(case.model, case.inputs, data=[case.inputs], **options)
    named = [
        any(note.startswith("nothing in the store fits this call") for note in item.report.notes)
        for item in (other, tuned, again)
    ]
    assert named == [False, True, False]


def test_a_model_without_sites_has_no_groups_to_search():
    data = [torch.randn(2, 16) for _ in range(2)]
    tuned = lissom.tune(torch.nn.LayerNorm(16).eval(), data[0], data=data, goal="memory", minutes=0.05, distill=False)
    assert tuned.report.groups == ()
    assert all(not candidate.failed for candidate in tuned.report.candidates)


def test_ctrl_c_gives_the_best_program_so_far():
    case, calls = feed_forward(), []

    def metric(model):
        calls.append(model)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return 1.0

    tuned = lissom.tune(case.model, case.inputs, data=[case.inputs], metric=metric, goal="memory", minutes=1)
    assert tuned.pipeline == "exact"
    assert any(note.startswith("interrupted after") for note in tuned.report.notes)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (lambda model: 1 / 0, "metric raised ZeroDivisionError: division by zero"),
        (lambda model: math.nan, "metric returned nan for the model as it is"),
        (lambda model: "good", "metric returned a str"),
        (lambda model, seen=[]: seen.append(1) or float(len(seen)), "metric returned 1 and then 2 for the same model"),
    ],
)
def test_a_metric_that_does_not_measure_is_refused(metric, sentence):
    case = feed_forward()
    with pytest.raises(InputError, match=sentence):
        lissom.tune(case.model, case.inputs, data=[case.inputs], metric=metric, minutes=1)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"data": []}, InputError, "data= holds no batch"),
        ({"data": [normal(2, 5, 9)]}, InputError, "batch 0 of data= does not fit"),
        ({"metric": 3}, UnsupportedError, "metric= is 3; give a callable"),
        ({"max_drop": -1}, UnsupportedError, "max_drop= is -1"),
        ({"max_drop": math.nan}, UnsupportedError, "max_drop= is nan"),
        ({"max_drop": True}, UnsupportedError, "max_drop= is True"),
        ({"goal": "speed"}, UnsupportedError, "goal='speed' is not known; choose latency, throughput, memory"),
        ({"target": 1.0}, UnsupportedError, "target= is 1.0; give a factor above 1"),
        ({"target": "5 MB"}, UnsupportedError, "target= is '5 MB'; give a factor above 1, such as 2.0, or a time"),
        ({"target": "5 ms", "goal": "memory"}, UnsupportedError, "or a size such as '20 MB'"),
        ({"for_server": "tgi"}, UnsupportedError, "for_server= is 'tgi'; choose vllm, or leave it out"),
        ({"minutes": 0}, UnsupportedError, "minutes= is 0"),
        ({"minutes": math.inf}, UnsupportedError, "minutes= is inf"),
        ({"backends": ()}, UnsupportedError, "backends= is empty"),
        ({"backends": None}, UnsupportedError, "backends= is None; give one or more"),
        ({"backends": ("eager", "eager")}, UnsupportedError, "backends= holds 'eager' twice"),
        ({"backends": ("egaer",)}, UnsupportedError, "there is no backend 'egaer'; did you mean 'eager'"),
        ({"backends": ("distributed",)}, UnsupportedError, "programs that run in one process"),
        ({"distill": 1}, UnsupportedError, "distill= is 1; give True or False"),
    ],
)
def test_bad_options_are_refused(options, error, sentence):
    case = feed_forward()
    with pytest.raises(error, match=sentence):
        lissom.tune(case.model, case.inputs, **{"data": [case.inputs], **options})


def test_a_store_gives_only_what_a_call_may_have(tmp_path):
    """Candidates of other backends, trained ones, and those of another goal stay out."""
    case = feed_forward()
    given = {"data": [case.inputs] * 2, "store": tmp_path, "max_drop": 0.5}
    first = lissom.tune(case.model, case.inputs, goal="memory", minutes=0.05, distill=False, **given)
    candidates = [item for item in Store(tmp_path).all("candidate") if item["pipeline"] != "exact"]
    for change in ({"backend": "onnxruntime"}, {"distilled": True, "pipeline": "distill{steps=3}"}):
        Store(tmp_path).add(
            "candidate", str(candidates[0]["key"]), str(change), **{**_fields(candidates[0]), **change, "bytes": 1}
        )
    again = lissom.tune(case.model, case.inputs, goal="memory", minutes=1e-6, distill=False, **given)
    assert {item.backend for item in again.report.candidates} == {"eager"}
    assert not any(item.distilled for item in again.report.candidates)
    assert len(again.report.candidates) == len([item for item in first.report.candidates if not item.failed])
    other = lissom.tune(case.model, case.inputs, goal="latency", minutes=1e-6, distill=False, **given)
    assert {item.pipeline for item in other.report.candidates} <= {"exact", RECIPES["mixed-precision"]}


def _fields(record):
    return {name: value for name, value in record.items() if name not in ("version", "kind", "key", "name")}


def test_labels_in_the_data_are_passed_over():
    case = feed_forward()
    name = lissom.optimize(case.model, case.inputs).program.signature.parameters[0]
    labelled = [{name: normal(2, 5, 8, seed=seed), "labels": torch.zeros(2)} for seed in range(2)]
    tuned = lissom.tune(case.model, case.inputs, data=labelled, goal="memory", minutes=0.05, distill=False, max_drop=0.5)
    assert len(tuned.report.candidates) > 1


def test_metrics_are_told_apart_by_their_code():
    """Those of decoders, partial ones, and code in nested functions."""

    class Scored:
        noise, score = 0.0, 1.0

    metrics = [
        Scorer(lambda logits_of: 1.0, 1, 8),
        Scorer(lambda logits_of: 2.0, 1, 8),
        partial(lambda model, by: 3.0, by=1),
        lambda model: (lambda: 4.0)(),
        lambda model: (lambda: 5.0)(),
    ]
    assert len({_identity(metric, Scored()) for metric in metrics}) == len(metrics)


@pytest.mark.slow
def test_uniform_scheme_far_over_bound_is_not_built(tmp_path):
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = seeded(lambda: LlamaForCausalLM(config))
    data = [{"input_ids": tokens(2, 8, seed=seed)} for seed in range(4)]
    options = {"goal": "memory", "minutes": 0.3, "distill": False, "store": tmp_path}
    loose, tight = (lissom.tune(model, data[0], data=data, max_drop=bound, **options) for bound in (0.3, 0.001))
    int4 = {item.pipeline for item in loose.report.candidates if "int4" in item.pipeline}
    assert int4
    # The store knows those of the first call.
    assert all(item.pipeline in int4 for item in tight.report.candidates if "int4" in item.pipeline)


@pytest.mark.slow
def test_tables_that_save_much_are_measured_by_themselves():
    config = LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = seeded(lambda: LlamaForCausalLM(config))
    data = [{"input_ids": tokens(2, 8, seed=seed)} for seed in range(4)]
    # int4 everywhere loses more than the bound, so that it is not the first solution.
    tuned = lissom.tune(model, data[0], data=data, goal="memory", minutes=0.8, distill=False, max_drop=0.05)
    # Each quantize of its passes names a table; in bfloat16 its loss has that of the casts too.
    quantized = [(item, item.pipeline.split("quantize{")[1:]) for item in tuned.report.candidates if item.table_tables]
    tables = [item for item, passes in quantized if all("only=" in options for options in passes)]
    assert tables
    assert all("layers" not in item.pipeline for item in tables)
