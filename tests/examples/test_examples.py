"""The scripts in examples/ run as they stand."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import free_port

FOLDER = Path(__file__).parent.parent.parent / "examples"
# The servers do not end; they have tests of their own.
SERVERS = {"serve_embeddings", "serve_chat"}
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SERVERS)
# What a script needs beside transformers.
NEEDS = {"sentence_embeddings": "sentence_transformers", "finetune_classifier": "sklearn"}
SAID = {
    "feature_extraction": "features of 12 tokens, 384 numbers each\nequal to those of the original model\n",
    "sentence_embeddings": "equal to the original model's embeddings\n",
    "text_generation": "equal to the original model's answer\n",
    "tune": "the text gives the same program again: True\n",
    "distill": "BertConfig, 17.4 million weights\n",
    "distill_on_ranks": "10 steps ",
    "finetune_classifier": "of the weights, distilled: 0.9",
    "text_classification": ("cooking: Stir the soup and add some pepper.\nastronomy: The rocket left for Mars last night.\n"),
}


# Where its package is installed, Gemma is loaded, compiled, and generates twice; the others train or search.
SLOW = {"text_generation", "distill", "distill_on_ranks", "finetune_classifier", "tune"}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [], id=path.stem) for path in EXAMPLES]
)
def test_an_example_runs(path, capsys):
    needed = NEEDS.get(path.stem, "transformers")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'lissom[examples]'")
    runpy.run_path(str(path), run_name="__main__")
    assert SAID[path.stem] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_example_of_ranks_runs_on_two():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    path = next(path for path in EXAMPLES if path.stem == "distill_on_ranks")
    ended = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 ranks trained together") == 1
