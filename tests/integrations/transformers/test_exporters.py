"""Tests of lissom.integrations.transformers.exporters: the backend of transformers.exporters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree
from transformers import GenerationConfig
from transformers.exporters import AutoExportConfig, AutoHfExporter, DynamoConfig, DynamoExporter, ExportedModel

import lissom
from lissom.artifacts.packed import load_packed, pack
from lissom.errors import ArtifactError, CaptureError, InputError, PipelineTextError, UnsupportedError
from lissom.integrations.transformers.exported_generation import ExportedGenerator
from lissom.integrations.transformers.exporters import LissomConfig, LissomExporter, LissomRunner
from lissom.runtime.compiled_model import CompiledModel

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, in another order of summation
QUICK = {"checks": "structural", "goal": None}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
Inputs = dict[str, torch.Tensor]


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(rows))


def texts(rows: int = 2, length: int = 7) -> Inputs:
    """Token ids, the last two of the last row padding."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, -2:] = 0
    return {"input_ids": tokens(rows, length), "attention_mask": mask}


def encoder() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **SIZES)).eval()


def classifier() -> transformers.PreTrainedModel:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, num_labels=3, **SIZES)).eval()


def vision() -> transformers.PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)).eval()


def speech() -> transformers.PreTrainedModel:
    shapes = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SIZES, **shapes, **positions)).eval()


def encoder_decoder() -> transformers.PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=99, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def decoder() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=1, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


def windowed() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.MistralConfig(vocab_size=99, num_key_value_heads=1, sliding_window=5, **SIZES)
    return transformers.MistralForCausalLM(config).eval()


def half_windowed() -> transformers.PreTrainedModel:
    """Layers with a sliding window beside layers without."""
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    config = transformers.Gemma2Config(vocab_size=99, num_key_value_heads=1, head_dim=8, sliding_window=5, **{**SIZES, **kinds})
    return transformers.Gemma2ForCausalLM(config).eval()


def recurrent() -> transformers.PreTrainedModel:
    """Layers that keep the state of a recurrence, and no keys."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "state_size": 8, "n_groups": 1}
    config = transformers.Mamba2Config(vocab_size=99, **sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return transformers.Mamba2ForCausalLM(config).eval()


def translations(rows: int = 2, length: int = 7) -> Inputs:
    return texts(rows, length) | {"decoder_input_ids": tokens(rows, 4)}


def pictures(rows: int = 2) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def sounds(rows: int = 2, samples: int = 800) -> Inputs:
    return {"input_values": torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))}


def require_equal(model: transformers.PreTrainedModel, exported: ExportedModel, inputs: dict[str, object]) -> None:
    """The output has the class and the values of the model's."""
    with torch.no_grad():
        wanted = model(**copy.deepcopy(inputs))
    found = exported(**copy.deepcopy(inputs))
    assert type(found) is type(wanted)
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.fixture(scope="module")
def exported() -> ExportedModel:
    return LissomExporter().export(encoder(), texts(), LissomConfig())


@pytest.fixture(scope="module")
def saved(exported, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    exported.save_pretrained(folder)
    return folder


def test_the_backend_is_registered():
    config = AutoExportConfig.from_dict({"export_format": "lissom", "passes": "int8"})
    assert isinstance(config, LissomConfig) and config.dynamic
    assert isinstance(AutoHfExporter.from_config(config), LissomExporter)


def test_an_encoder_at_other_sizes(exported):
    for rows, length in ((2, 7), (1, 1), (3, 20)):
        require_equal(encoder(), exported, texts(rows, length))
    assert isinstance(exported.program, CompiledModel) and "fuse-epilogues" in str(exported.program.report)
    assert exported.device == torch.device("cpu") and exported.dtype is torch.float32


def test_a_saved_export_loads_without_trust(exported, saved):
    again = ExportedModel.from_pretrained(saved)
    require_equal(encoder(), again, texts(3, 9))
    assert isinstance(again.runners["model"], LissomRunner) and again.config.hidden_size == 16
    assert {path.name for path in saved.iterdir()} == {"config.json", "export.json", "model.lissom"}
    assert json.loads((saved / "export.json").read_text())["components"]["model"]["metadata"]["architecture"] == "BertModel"
    exported.save_pretrained(saved)  # over the old one, while it is in use
    require_equal(encoder(), again, texts())


def test_dropped_arguments(exported):
    given = texts() | {"token_type_ids": torch.zeros(2, 7, dtype=torch.int64)}
    torch.testing.assert_close(exported(**given).last_hidden_state, exported(**texts()).last_hidden_state)


def test_a_runner_refuses_arguments_that_were_not_exported(exported):
    types = torch.ones(2, 7, dtype=torch.int64)
    message = "argument 'token_type_ids' was not exported; the model was exported with input_ids, attention_mask: leave it out"
    with pytest.raises(InputError, match=message):
        exported.runners["model"](**texts(), token_type_ids=types)
    exported.runners["model"](**texts(), token_type_ids=None)


def test_bad_calls(exported):
    with pytest.raises(InputError, match="argument 'attention_mask' is missing; the model was exported with input_ids"):
        exported(input_ids=tokens(2, 7))
    with pytest.raises(InputError, match=r"argument 'input_ids' is f32\[2, 7\]"):
        exported(**texts() | {"input_ids": torch.ones(2, 7)})
    with pytest.raises(InputError, match="hold 3 tensors and numbers, and were exported with 2"):
        exported(**texts() | {"input_ids": [tokens(2, 7), tokens(2, 7)]})


def test_bad_configurations():
    exporter, model = LissomExporter(), encoder()
    with pytest.raises(TypeError, match="Expected config to be a LissomConfig or dict"):
        exporter.export(model, texts(), DynamoConfig())
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        exporter.export(model, texts(), {"colour": "red"})
    with pytest.raises(PipelineTextError, match="prune-head"):
        exporter.export(model, texts(), LissomConfig(passes="prune-head"))
    with pytest.raises(UnsupportedError, match="there is no backend 'onyx'"):
        exporter.export(model, texts(), LissomConfig(backend="onyx"))


def test_a_model_that_cannot_be_captured():
    with pytest.raises(CaptureError, match="BertModel cannot be captured by transformers' exporter") as caught:
        LissomExporter().export(encoder(), {"input_ids": tokens(2, 7).float()}, LissomConfig())
    assert "\n" not in str(caught.value)


class Loaded:
    """What is loaded from a folder."""

    def __init__(self, folder: Path) -> None:
        self.names = [path.name for path in folder.iterdir()]


def test_a_damaged_file(tmp_path):
    """Every byte changed in turn: the archive is read or refused, and nothing else is raised."""

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "a.json").write_text("{}")

    pack(save, tmp_path / "packed")
    whole = (tmp_path / "packed").read_bytes()
    refused = 0
    for place in range(len(whole)):
        (tmp_path / "packed").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            load_packed(tmp_path / "packed", Loaded)
        except ArtifactError:
            refused += 1
    assert refused > len(whole) / 4


@pytest.mark.parametrize("content", [b"", b"something else", b"PK\x05\x06" + 18 * b"\0"])
def test_a_file_that_holds_something_else(saved, tmp_path, content):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(content if path.suffix == ".lissom" else path.read_bytes())
    with pytest.raises(ArtifactError) as caught:
        ExportedModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_generate_needs_the_two_programs(exported):
    with pytest.raises(UnsupportedError, match="the export has the components model of format 'lissom'"):
        ExportedGenerator(exported)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "inputs"),
    [(classifier, texts), (vision, pictures), (speech, sounds), (encoder_decoder, translations), (decoder, texts)],
)
def test_families(build: Callable[[], transformers.PreTrainedModel], inputs: Callable[..., Inputs], tmp_path):
    model = build()
    exported = LissomExporter().export(model, inputs(), LissomConfig(goal=None))
    exported.save_pretrained(tmp_path)
    again = ExportedModel.from_pretrained(tmp_path)
    for given in (inputs(), inputs(3)):
        require_equal(model, exported, given)
        require_equal(model, again, given)


@pytest.mark.slow
def test_passes_and_backend_of_the_configuration():
    model = encoder()
    config = LissomConfig(passes="prune-neurons{keep=0.5}", backend="onnxruntime", goal=None)
    exported = LissomExporter().export(model, texts(), config)
    smaller = lissom.compile(model, texts(), passes=config.passes, goal=None)
    assert exported.program.backend == "onnxruntime"
    torch.testing.assert_close(exported(**texts()).last_hidden_state, smaller(**texts()).last_hidden_state, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "padded"), [(decoder, False), (decoder, True), (windowed, True), (half_windowed, True), (recurrent, True)]
)
def test_generate(build, padded, tmp_path):
    model = build()
    prompts = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    if padded:
        prompts["attention_mask"][1, :2] = 0
    LissomExporter().export_for_generation(model, prompts, LissomConfig(**QUICK)).save_pretrained(tmp_path)
    fast = ExportedGenerator(ExportedModel.from_pretrained(tmp_path))
    others = {"input_ids": tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    for given, options in ((prompts, {}), (others, {}), (prompts, {"num_beams": 2})):
        wanted, found = (each.generate(**given, max_new_tokens=8, do_sample=False, **options) for each in (model, fast))
        assert torch.equal(found, wanted)
    if not padded:
        others["attention_mask"][0, 0] = 0
        with pytest.raises(InputError, match="the prompts have padding, and the model was exported without"):
            fast.generate(**others, max_new_tokens=2)


@pytest.mark.slow
# The runner that it is compared with reads a deprecated attribute of torch 2.13.
@pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning")
def test_a_cache_of_fixed_size_is_changed_in_place():
    model = decoder()
    config = GenerationConfig(cache_implementation="static", max_cache_len=16)
    prompt = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    options = {"generation_config": config, "multi_token_decode": True}
    found = LissomExporter().export_for_generation(model, copy.deepcopy(prompt), LissomConfig(**QUICK), **options)
    other = DynamoExporter().export_for_generation(model, copy.deepcopy(prompt), DynamoConfig(dynamic=True), **options)
    caches = []
    for exported in (found, other):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        cache.early_initialization(batch_size=2, num_heads=1, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))
        for start in (0, 3):
            places = torch.arange(start, start + 3)
            mask = (torch.arange(16) <= places[:, None]).expand(2, 1, 3, 16)
            step = {"input_ids": tokens(2, 3), "position_ids": places.expand(2, 3), "attention_mask": mask, "cache": cache}
            logits = exported.runners["decode"](**step).logits
        caches.append((logits, cache.layers[0].keys, cache.layers[0].get_seq_length()))
    (one, keys, length), (two, wanted_keys, wanted) = caches
    torch.testing.assert_close(one, two, **CLOSE)
    torch.testing.assert_close(keys, wanted_keys, **CLOSE)
    assert int(length) == int(wanted) == 6
