"""A small decoder and its tokenizer for the tests of examples/serve_chat.py, and the script."""

from __future__ import annotations

import pytest

from tests.support.chat_server import small_pool, small_tokenizer
from tests.support.servers import load_example


@pytest.fixture(scope="package")
def chat_example():
    return load_example("serve_chat")


@pytest.fixture(scope="package")
def decoder():
    return small_pool()


@pytest.fixture(scope="package")
def words():
    return small_tokenizer()
