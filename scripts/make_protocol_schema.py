#!/usr/bin/env python
"""Write docs/protocol.schema.json and the tables of docs/protocol.md from streaming/protocol/.

Types, bounds and descriptions come from the messages, through msgspec. Run it after every change of
the protocol; a test compares what is committed with what it would write.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from streaming import protocol
from streaming.refusals import Refusal

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEMA_PATH = DOCS / "protocol.schema.json"
PAGE_PATH = DOCS / "protocol.md"
MARKERS = re.compile(r"(<!-- begin generated: (?P<name>[a-z ]+) -->\n).*?(<!-- end generated -->)", re.DOTALL)

# Of every server message. Logs of servers before 0.2 lack the last two.
FRAME = {
    "stream": {"type": "string"},
    "seq": {"type": "integer", "minimum": 0},
    "session": {"type": "string"},
    "epoch_ms": {"type": "integer"},
}
LIMITS = {
    "MAX_ID_CHARS": "characters of the `id` of a `flush` or `ask`",
    "MAX_QUESTION_CHARS": "characters of the question of an `ask`",
    "MAX_GAP_MS": "milliseconds of one `gap`; a longer one is refused, and may be sent as several",
    "MAX_TEXT_CHARS": "characters of a client's text frame; a longer frame of a subscriber closes with 1009",
    "MAX_SUBSCRIBED_STREAMS": "names and patterns in one `subscribe`",
    "MAX_CHANNELS": "channels of a stream's audio, mixed to one",
}


def main() -> None:
    """Write both files."""
    SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
    PAGE_PATH.write_text(page_text(PAGE_PATH.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {SCHEMA_PATH.name} and the tables of {PAGE_PATH.name}")


def schema_text() -> str:
    """The text of the schema's file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def page_text(page: str) -> str:
    """The page with every generated part written anew.

    Raises:
        KeyError: it has a marker of a part that there is not.
    """
    parts = {name: "\n".join(lines) for name, lines in generated().items()}
    return MARKERS.sub(lambda found: f"{found[1]}\n{parts[found['name']]}\n\n{found[3]}", page)


# --- the schema --------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """JSON Schema of every message; `$defs/server` and `$defs/client` are either side's."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moss-live",
        "description": "Every message in a text frame. The server may add fields and message types; "
        "a client ignores what it does not know. Made by scripts/make_protocol_schema.py.",
        "anyOf": [{"$ref": "#/$defs/server"}, {"$ref": "#/$defs/client"}],
        "$defs": {
            "server": {"oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in protocol.MESSAGE_TYPES]},
            "client": {"oneOf": [{"$ref": f"#/$defs/{cls.type}"} for cls in client_messages()]},
            **definitions(),
        },
    }


def client_messages() -> tuple[type[protocol.ClientMessage], ...]:
    """The types of message that a client sends."""
    return get_args(protocol.ClientMessage)


def definitions() -> dict[str, dict[str, Any]]:
    """The schema of each message by its type, and of each nested object by its class's name."""
    found: dict[str, dict[str, Any]] = {}
    server = tuple(protocol.MESSAGE_TYPES.values())
    _, components = msgspec.json.schema_components(
        (*server, *client_messages()), ref_template="#/$defs/{name}"
    )
    for cls in (*server, *client_messages()):
        found[cls.type] = _message(cls, components.pop(cls.__name__), is_server=cls in server)
    for name, nested in components.items():
        found[name] = nested | {"description": _first_paragraph(nested["description"])}
        del found[name]["title"]
    return found


def _message(cls: type[Any], made: Mapping[str, Any], *, is_server: bool) -> dict[str, Any]:
    """What msgspec makes of a message, with what frames it."""
    properties: dict[str, Any] = {"type": {"const": cls.type}}
    required = ["type"]
    if is_server:
        properties |= FRAME
        required += ["stream", "seq"]
    for field in msgspec.structs.fields(cls):
        about = dict(made["properties"][field.encode_name])
        about.pop("default", None)
        properties.pop(field.encode_name, None)
        properties[field.encode_name] = about
        if not may_be_missing(cls, field):
            required.append(field.encode_name)
    closed = {} if is_server else {"additionalProperties": False}
    return {
        "description": _first_paragraph(made["description"]),
        "type": "object",
        "properties": properties,
        "required": required,
        **closed,
    }


def may_be_missing(cls: type[Any], field: msgspec.structs.FieldInfo) -> bool:
    """Whether a client may leave out a field; or whether logs of older servers lack it."""
    return not field.required if cls in client_messages() else "since" in _extra(field)


def _extra(field: msgspec.structs.FieldInfo) -> Mapping[str, Any]:
    for part in getattr(field.type, "__metadata__", ()):
        if isinstance(part, msgspec.Meta) and part.extra:
            return part.extra
    return {}


def _first_paragraph(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


# --- the tables --------------------------------------------------------------------------


def generated() -> dict[str, list[str]]:
    """The lines of every generated part, by the name in its marker."""
    found = definitions()
    client = [cls.type for cls in client_messages()]
    nested = [name for name in found if name not in protocol.MESSAGE_TYPES and name not in client]
    return {
        "server messages": [line for kind in protocol.MESSAGE_TYPES for line in _section(kind, found[kind])],
        "client messages": [line for kind in client for line in _section(kind, found[kind])],
        "nested objects": [line for kind in nested for line in _section(kind, found[kind])],
        "error codes": _table(
            ("code", "meaning"), [(f"`{code}`", text) for code, text in protocol.ERROR_CODES.items()]
        ),
        "close codes": _codes(protocol.CloseCode),
        "http statuses": _codes(protocol.HttpStatus),
        "refusals": _table(
            ("reason", "answer", "text"),
            [(f"`{refusal.label}`", _answer(refusal.value.code), refusal.value.text) for refusal in Refusal],
        ),
        "constants": _table(
            ("limit", "value", "meaning"),
            [(f"`{name}`", str(getattr(protocol, name)), meaning) for name, meaning in LIMITS.items()],
        ),
    }


def _section(kind: str, definition: Mapping[str, Any]) -> list[str]:
    lines = [f"### `{kind}`", "", definition["description"], *_logged(kind)]
    optional = ", not sent before 0.2" if kind in protocol.MESSAGE_TYPES else ", may be left out"
    rows = [
        (
            f"`{name}`",
            _shown(about) + ("" if name in definition["required"] else optional),
            about.get("description", ""),
        )
        for name, about in definition["properties"].items()
        if name != "type" and about is not FRAME.get(name)
    ]
    return [*lines, "", *(_table(("field", "type", "meaning"), rows) if rows else ["No fields."]), ""]


def _logged(kind: str) -> list[str]:
    return (
        ["", "Not logged: carries the `seq` of the last logged message."] if kind in protocol.UNLOGGED else []
    )


def _codes(enum: type[protocol.CloseCode] | type[protocol.HttpStatus]) -> list[str]:
    rows = [(str(member.value), f"`{member.name}`", member.meaning) for member in enum]
    return _table(("code", "name", "meaning"), rows)


def _answer(code: protocol.HttpStatus | protocol.CloseCode | None) -> str:
    if code is None:
        return "connection dropped"
    kind = "HTTP" if isinstance(code, protocol.HttpStatus) else "close"
    return f"{kind} {code.value}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def _shown(about: Mapping[str, Any]) -> str:
    """The schema of a type for people to read."""
    if "enum" in about:
        return "one of " + ", ".join(f"`{value}`" for value in about["enum"])
    if "anyOf" in about:
        return " or ".join(_shown(part) for part in about["anyOf"])
    if "$ref" in about:
        return f"`{about['$ref'].rsplit('/', 1)[1]}`"
    if about["type"] == "array":
        return f"list of {_shown(about['items'])}"
    if about["type"] == "object":
        return f"object: string to {_shown(about['additionalProperties'])}"
    return str(about["type"])


if __name__ == "__main__":
    main()
