"""What holds for every test: the settings of Hypothesis, and that each message is one of the schema."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.protocol_schema import SCHEMA, SchemaCheck

# The first call of a codec or a kernel may take longer than Hypothesis' default deadline. In continuous
# integration the examples are the same each time: new ones are found where somebody can look at them.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

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
