"""Tests of tools.children: a crash or a hang costs one item, and the others are told of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tools.children import Child, Tell, run_apart


def prepare() -> Callable[[str, Tell], None]:
    def work(item: str, tell: Tell) -> None:
        tell(f"begins {item}")
        if item == "dies":
            os._exit(3)
        while item == "hangs":
            time.sleep(1)
        tell(item.upper())

    return work


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_item_has_a_result(jobs: int) -> None:
    blocks = [["a", "dies", "b"], ["c", "hangs"], ["d"]]
    found = list(run_apart(iter(blocks), prepare, jobs, lambda _, seconds: seconds > 2))
    told = {result.item: (result.told, result.late, result.code) for result in found}
    assert len(found) == len(told) == 6
    for item in "abcd":
        assert told[item] == ([f"begins {item}", item.upper()], False, None)
    assert told["dies"] == (["begins dies"], False, 3)
    assert told["hangs"] == (["begins hangs"], True, None)


def test_items_given_later_are_worked_on_too() -> None:
    child = Child(prepare)
    for item in "ab":
        child.give(item)
        child.connection.poll(30)
        found = []
        while not found:
            found = list(child.results(lambda _, seconds: seconds > 30))
        assert [result.told for result in found] == [[f"begins {item}", item.upper()]]
    child.close()
    assert not child.process.is_alive()
