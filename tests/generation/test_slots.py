"""Tests of lissom.generation.slots: regions, shared pages, and who makes room."""

from __future__ import annotations

import random

from lissom.frontends.generation.pool import PAGE
from lissom.generation.slots import Region, Slots


def read(region: Region, tokens: list[int]) -> None:
    """Let a region hold all these tokens."""
    region.tokens = list(tokens)


def test_a_prompt_shares_whole_pages_and_leaves_a_token_to_read() -> None:
    slots = Slots(20 * PAGE)
    prompt = list(range(2 * PAGE))
    first = slots.take(prompt, 3 * PAGE)
    assert first is not None and first.shared == 0
    read(first, prompt)
    same, longer = slots.take(prompt, 3 * PAGE), slots.take([*prompt, 5], 3 * PAGE)
    assert same is not None and longer is not None
    assert (same.shared, longer.shared) == (PAGE, 2 * PAGE)
    assert (same.tokens, longer.tokens) == (prompt[:PAGE], prompt)
    assert longer.slots(PAGE, 3 * PAGE) == [*range(PAGE, 2 * PAGE), *range(longer.begin, longer.begin + PAGE)]
    other = slots.take([9, *prompt], 3 * PAGE)
    assert other is not None and other.shared == 0


def test_idle_regions_make_room_the_least_recently_used_first() -> None:
    slots = Slots(4 * PAGE)
    regions = [slots.take([number], PAGE) for number in range(4)]
    assert slots.take([7], PAGE) is None
    assert all(region is not None for region in regions)
    for index in (2, 0):
        slots.release(regions[index])  # pyright: ignore[reportArgumentType]
    found = slots.take([7], PAGE)
    assert found is not None and found.begin == 2 * PAGE
    assert slots.take([7], 2 * PAGE) is None


def test_a_region_that_another_reads_is_kept() -> None:
    slots = Slots(4 * PAGE)
    prompt = list(range(PAGE + 1))
    first = slots.take(prompt, 2 * PAGE)
    assert first is not None
    read(first, prompt)
    slots.release(first)
    second = slots.take(prompt, 2 * PAGE)
    assert second is not None and second.source is first
    assert slots.reserved == second.size == PAGE  # the first is idle, though the second reads it
    assert slots.take([3], 2 * PAGE) is None  # one page is left
    slots.release(second)
    assert slots.reserved == 0
    assert slots.take([3], 4 * PAGE) is not None


def test_regions_never_overlap() -> None:
    """Random sequences that share prompts: no slot is written by two, and each holds what its sequence read."""
    source = random.Random(0)
    slots, held, running = Slots(40 * PAGE), dict[int, tuple[int, int]](), list[tuple[Region, list[int]]]()
    shared = 0
    for _ in range(400):
        if running and source.random() < 0.5:
            slots.release(running.pop(source.randrange(len(running)))[0])
        prompt = [source.randrange(2)] * source.randrange(1, 5 * PAGE) + [source.randrange(50) for _ in range(3)]
        region = slots.take(prompt, len(prompt) + source.randrange(1, 40))
        if region is None:
            continue
        shared += region.shared > 0
        for position, slot in enumerate(region.slots(0, region.shared)):
            assert held[slot] == (position, prompt[position])
        own = region.slots(region.shared, region.shared + region.size)
        assert min(own) % PAGE == region.shared % PAGE == 0
        assert region.source is None or min(own) >= region.source.end
        taken = {slot for other, text in running for slot in other.slots(0, len(text))}
        assert not taken.intersection(own)
        for position in range(region.shared, len(prompt)):
            held[region.slots(position, position + 1)[0]] = position, prompt[position]
        read(region, prompt)
        running.append((region, prompt))
    assert shared > 20
