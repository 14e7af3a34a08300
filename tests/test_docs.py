"""The protocol's page and schema are what the code says; the operator's page names what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from scripts.make_protocol_schema import page_text, schema_text
from streaming import protocol
from streaming.protocol import Envelope, Flush, Lag, encode, encode_client
from tests.protocol_schema import SchemaCheck

DOCS = Path(__file__).resolve().parent.parent / "docs"
HOW = "run scripts/make_protocol_schema.py"


def read(name: str) -> str:
    """A file of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_schema_is_the_protocols() -> None:
    """The committed file is what the script writes, and a schema."""
    assert read("protocol.schema.json") == schema_text(), HOW
    Draft202012Validator.check_schema(json.loads(schema_text()))


def test_the_tables_are_the_protocols() -> None:
    """Every message, field, code and refusal, with a meaning for each code."""
    page = read("protocol.md")
    assert page_text(page) == page, HOW
    for codes in (protocol.CloseCode, protocol.HttpStatus):
        for code in codes:
            assert re.search(rf"\\| {code.value} \\| `{code.name}` \\| .+ \\|", page), code


def test_every_example_is_a_message() -> None:
    """By the schema, with no field that it does not name."""
    validator = Draft202012Validator(json.loads(read("protocol.schema.json")))
    blocks = re.findall(r"```json\n(.*?)```", read("protocol.md"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        validator.validate(json.loads(line))
        if "seq" in line:
            assert json.loads(encode(protocol.decode(line))) == json.loads(line)


def test_a_message_that_is_not_of_the_schema_is_noticed(schema_check: SchemaCheck) -> None:
    """A wrong type, a field that is missing, and one that the schema does not name."""
    encode(Envelope("a", 1, Lag("many")))  # type: ignore[arg-type]
    encode(Envelope("a", -1, Lag(1)))
    schema_check.see('{"type": "flush"}', is_ours=True)
    schema_check.see('{"type": "flush", "id": "a", "more": 1}', is_ours=True)
    encode_client(Flush("fine"))
    assert [fault.split(":")[0] for fault in schema_check.take()] == ["lag", "lag", "flush", "flush"]


@pytest.mark.parametrize("kind", protocol.MESSAGE_TYPES)
def test_every_type_of_message_is_on_the_page(kind: str) -> None:
    """With a section of its own."""
    assert f"### `{kind}`\n" in read("protocol.md")
