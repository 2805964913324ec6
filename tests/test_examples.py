"""The scripts in examples/ run as they stand."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
# What a script needs beside transformers.
NEEDS = {"sentence_embeddings": "sentence_transformers", "finetune_classifier": "sklearn"}
SAID = {
    "feature_extraction": "features of 12 tokens, 384 numbers each\nequal to those of the original model\n",
    "sentence_embeddings": "equal to the original model's embeddings\n",
    "text_generation": "equal to the original model's answer\n",
    "distill": "BertConfig, 17.4 million weights\n",
    "finetune_classifier": "of the weights, distilled: 0.9",
    "text_classification": ("cooking: Stir the soup and add some pepper.\nastronomy: The rocket left for Mars last night.\n"),
}


# Where its package is installed, Gemma is loaded, compiled, and generates twice; the others train.
SLOW = {"text_generation", "distill", "finetune_classifier"}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [], id=path.stem) for path in EXAMPLES]
)
def test_an_example_runs(path, capsys):
    needed = NEEDS.get(path.stem, "transformers")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'lissom[examples]'")
    runpy.run_path(str(path), run_name="__main__")
    assert SAID[path.stem] in capsys.readouterr().out
