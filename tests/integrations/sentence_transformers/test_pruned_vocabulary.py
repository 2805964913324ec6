"""Tests of models of Sentence Transformers with a pruned vocabulary: the model carries the tokenizer that its program needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import lissom
from lissom.frontends.models.huggingface import find_directory
from tests.support.sentence_models import TEXTS, sentence_transformer


@pytest.mark.parametrize("ids", ["graph", "tokenizer"])
def test_embeddings_of_texts_in_the_vocabulary(ids: str, tmp_path: Path) -> None:
    model = sentence_transformer()
    options = f'coverage=1,ids={ids},tokenizer="{find_directory("minilm")}"'
    small = lissom.compile(model, passes=f"prune-vocabulary{{{options}}}", data=TEXTS, goal=None)
    # Kernels sum in another order.
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(small.encode(TEXTS), model.encode(TEXTS), **close)
    assert (len(small.tokenizer) < 200) == (ids == "tokenizer")
    assert len(model.tokenizer) == 30522
    small.save(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert len(loaded.tokenizer) == len(small.tokenizer)
    unknown = ["unfathomable wording"]
    np.testing.assert_allclose(loaded.encode([*TEXTS, *unknown]), small.encode([*TEXTS, *unknown]), **close)
