"""Tests of lissom.driver.ranks: how many ranks share a model, and what is refused before they start."""

from __future__ import annotations

from pathlib import Path

import pytest

import lissom
from lissom.errors import UnsupportedError
from tests.support.models import FeedForward, normal, seeded
from tests.support.ranks import printed, run_ranks


def test_settings_that_do_not_fit():
    x = normal(2, 5, 8)
    for options, message in (
        ({"backend": "eager", "world_size": 2}, r"world_size=2 goes with backend='distributed', and backend is 'eager'"),
        ({"backend": "distributed"}, r"needs the number of ranks where there is no process group: world_size=2"),
        (
            {"backend": "distributed", "world_size": 1},
            r"world_size= is 1; give the number of ranks that share the model, 2 or more",
        ),
        ({"backend": "distributed", "world_size": 1025}, r"world_size is 1025; a program is shared by 2 to 1024 ranks"),
        (
            {"backend": lissom.Distributed(world_size=3), "world_size": 2},
            r"world_size is 2, and the backend's is 3; give the number once",
        ),
        (
            {"backend": "distributed", "world_size": 2, "passes": "shard{world_size=3},partition"},
            r"world_size is 2, and the passes have shard\{world_size=3\}",
        ),
    ):
        with pytest.raises(UnsupportedError, match=message):
            lissom.compile(seeded(FeedForward), x, **options)


@pytest.mark.multiprocess
def test_early_refusal_on_one_rank_is_refused_by_all(tmp_path: Path):
    script = """
    join()
    backend = lissom.Distributed(timeout_seconds=20)
    for passes in ("shard{world_size=3},partition", "exact,cut"):
        options = {"passes": passes if rank else "exact", "checks": "off", "backend": backend}
        took = said(lambda: lissom.compile(torch.nn.Linear(4, 4), torch.ones(2, 4), **options))
        print(took < 15)
    """
    lines = printed(run_ranks(script, tmp_path))
    assert lines[0] == lines[1]
    assert [line.split()[0] for line in lines[0] if "Error" in line.split()[0]] == ["UnsupportedError", "PipelineTextError"]
    assert lines[0].count("True") == 2
