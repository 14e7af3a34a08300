"""What holds for every test: each message that it sees is one of docs/protocol.schema.json."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.protocol_schema import SCHEMA, SchemaCheck

_check = pytest.StashKey[SchemaCheck]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module imports the protocol's functions by name."""
    check = SchemaCheck(json.loads(SCHEMA.read_text(encoding="utf-8")))
    check.install()
    config.stash[_check] = check


@pytest.fixture
def schema_check(pytestconfig: pytest.Config) -> SchemaCheck:
    """The check that every test goes through."""
    return pytestconfig.stash[_check]


@pytest.fixture(autouse=True)
def _messages_are_of_the_schema(schema_check: SchemaCheck) -> Iterator[None]:
    """Fail the test in which a message was not."""
    yield
    assert not (faults := schema_check.take()), faults
