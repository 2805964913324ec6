"""Tests of lissom.frontends.isolation."""

from types import SimpleNamespace

import pytest

from lissom.frontends.isolation import exchanged


def test_an_attribute_is_put_back_even_after_an_error():
    owner = SimpleNamespace(name="before")
    with pytest.raises(KeyError), exchanged(owner, "name", "meanwhile"):
        assert owner.name == "meanwhile"
        raise KeyError
    assert owner.name == "before"


def test_an_attribute_that_was_not_there_is_removed():
    owner = SimpleNamespace()
    with exchanged(owner, "name", "meanwhile"):
        assert owner.name == "meanwhile"
    assert not hasattr(owner, "name")
