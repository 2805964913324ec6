"""Tests of lissom.errors."""

import pytest

from lissom import errors
from lissom.compiler.pipeline.history import History, Interrupted
from lissom.errors import LissomError, nearest


def test_the_nearest_known_word_is_offered():
    assert nearest("raise-atention", ["raise-attention", "low-rank"]) == "; did you mean 'raise-attention'?"


def test_nothing_is_offered_where_nothing_is_near():
    assert nearest("zebra", ["raise-attention", "low-rank"]) == ""


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_error_is_of_the_one_family(name):
    assert issubclass(getattr(errors, name), LissomError)


def test_a_wrong_input_is_a_value_error_too():
    assert issubclass(errors.InputError, ValueError)


def test_an_interrupt_is_no_error_and_holds_the_history():
    history = History("some-pass", "numeric")
    stopped = Interrupted(history)
    assert isinstance(stopped, KeyboardInterrupt)
    assert not isinstance(stopped, Exception)
    assert stopped.history is history
    assert str(stopped) == "interrupted after 0 finished steps"
