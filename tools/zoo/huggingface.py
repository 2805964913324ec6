"""Tiny random models of every model type in transformers."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from functools import partial

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import Case
from tools.zoo import overrides
from tools.zoo.entry import Entry, Expected, words
from tools.zoo.expected import expected
from tools.zoo.inputs import example_inputs
from tools.zoo.shrink import shrink
from tools.zoo.weights import woken

MAPPINGS: Mapping[str, tuple[str, ...]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "classifier": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "encoder-decoder": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "speech": (
        "MODEL_FOR_CTC_MAPPING_NAMES",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    ),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES"),
    "encoder": ("MODEL_MAPPING_NAMES",),
}
"""The families, and the model tables of transformers for each."""

ENCODERS = words(
    """
    dpr splinter bros visual_bert openai_privacy_filter clip_text_model tipsv2_text_model sam3_lite_text_text_model
    qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text glm4v_text glm4v_moe_text glm_ocr_text glm_image_text
    granite_docling_text muse_glimmer_text molmo2_text mistral_large4_text embedding_gemma2_text clip_vision_model
    chinese_clip_vision_model siglip_vision_model siglip2_vision_model aimv2_vision_model idefics3_vision
    internvl_vision qianfan_ocr_vision mlcd_vision_model pixtral vit_mae dpt yolos glpn sam_vision_model sam3_vit_model
    videomae vivit timesformer glmasr_encoder voxtral_encoder voxtral_realtime_encoder qwen2_audio_encoder patchtst
    patchtsmixer
    """
)
"""Encoders, and towers of larger models, in the table of plain models; the rest are in a family above, or composite."""


def entries(attention: str | None = None, mappings: Mapping[str, tuple[str, ...]] = MAPPINGS) -> Iterator[Entry]:
    """Every type of every family that is not left out, with the class from the first table that lists it.

    attention: the attention implementation, `eager` or `sdpa`; the default of transformers if None. mappings: the families,
        and the tables for each.
    """
    for family, tables in mappings.items():
        class_names: dict[str, str] = {}
        for table in tables:
            for model_type, class_name in getattr(modeling_auto, table).items():
                class_names.setdefault(model_type, class_name if isinstance(class_name, str) else class_name[0])
        for model_type, class_name in class_names.items():
            name = f"{family}/{model_type}"
            if overrides.left_out(name) or (family == "encoder" and model_type not in ENCODERS):
                continue
            make = partial(build, family, model_type, class_name, attention)
            yield Entry(name, family, make, partial(_expect, family, model_type, class_name))


def build(family: str, model_type: str, class_name: str, attention: str | None = None) -> Case:
    """The tiny model and its inputs."""
    transformers.logging.set_verbosity_error()
    config = config_of(family, model_type)
    if attention is not None:
        config._attn_implementation = attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_class = _model_class(class_name, config)
        config = _own_config(model_class, config)
        model = overrides.adjust_model(model_type, woken(lambda: model_class(config)))
    return Case(model, example_inputs(family, model_type, model, config))


def _expect(family: str, model_type: str, class_name: str) -> Expected:
    config = config_of(family, model_type)
    return expected(family, model_type, _own_config(_model_class(class_name, config), config))


def config_of(family: str, model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes = overrides.changes(family, model_type)
        config = shrink(CONFIG_MAPPING[model_type](), changes)
    config.return_dict = True
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if getattr(part, "use_cache", None):
            part.use_cache = False
    return config


def _model_class(class_name: str, config: PreTrainedConfig) -> type[nn.Module]:
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        module = type(config).__module__.replace("configuration_", "modeling_")
        model_class = getattr(importlib.import_module(module), class_name)
    return model_class


def _own_config(model_class: type[nn.Module], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the class: the text part of a composite one, if the class is the text model only."""
    wanted = getattr(model_class, "config_class", None) or type(config)
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return config if isinstance(config, wanted) else next((part for part in parts if isinstance(part, wanted)), config)
