"""A call that is wrong, and the one sentence it has to be refused with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lissom.errors import LissomError, PipelineTextError

Refusal = tuple[type[LissomError], str, Callable[[], object]]
"""The kind of error, what its sentence says, and the call."""


def table(refusals: dict[str, Refusal]) -> pytest.MarkDecorator:
    """One test for each row, by its name."""
    return pytest.mark.parametrize("refusal", refusals.values(), ids=[name.replace(" ", "-") for name in refusals])


def check(refusal: Refusal) -> None:
    """The call raises an error of that kind and no other, with one sentence that says so."""
    kind, text, call = refusal
    with pytest.raises(LissomError) as caught:
        call()
    sentence = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert text in sentence
    # The text of a pipeline is shown below its error, with a mark where it is wrong.
    assert "\n" not in sentence or kind is PipelineTextError
    assert "Traceback" not in sentence
