"""Tiny models to search, with batches of their inputs."""

from __future__ import annotations

import torch
import transformers

from tests.support.models import Case, normal, seeded, tiny_bert, tiny_llama, tokens

Batches = list[object]


def tiny_vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
    )  # fmt: skip
    return Case(seeded(lambda: transformers.ViTModel(config)), {"pixel_values": normal(2, 3, 8, 8)})


def batches(case: Case, count: int = 4) -> Batches:
    """Batches like the inputs of a case, each with other values."""
    if "pixel_values" in case.kwargs:
        return [{"pixel_values": normal(2, 3, 8, 8, seed=seed)} for seed in range(count)]
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return [{"input_ids": tokens(seed=seed), "attention_mask": mask} for seed in range(count)]


FAMILIES = {"bert": tiny_bert, "llama": tiny_llama, "vit": tiny_vit}
