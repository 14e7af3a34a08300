#!/usr/bin/env python
"""Write docs/protocol.schema.json and the tables of docs/protocol.md from streaming/protocol.py.

Types come from the dataclasses, descriptions from their docstrings and comments. Run it after every
change of the protocol; a test compares what is committed with what it would write.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import tokenize
import types
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from streaming import protocol

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEMA_PATH = DOCS / "protocol.schema.json"
PAGE_PATH = DOCS / "protocol.md"
MARKERS = re.compile(r"(<!-- begin generated: (?P<name>[a-z ]+) -->\n).*?(<!-- end generated -->)", re.DOTALL)

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean"}


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
    comments = Comments()
    definitions: dict[str, Any] = {}
    for cls in protocol.MESSAGE_TYPES.values():
        head = {"stream": {"type": "string"}, "seq": {"type": "integer", "minimum": 0}}
        definitions[cls.type] = _message(cls, comments, head)
    for client in client_messages():
        definitions[client.type] = _message(client, comments, {}) | {"additionalProperties": False}
    for nested in nested_classes():
        definitions[nested.__name__] = _object(nested, comments, {}, [])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moss-live",
        "description": "Every message in a text frame. The server may add fields and message types; "
        "a client leaves out what it does not know. Made by scripts/make_protocol_schema.py.",
        "anyOf": [{"$ref": "#/$defs/server"}, {"$ref": "#/$defs/client"}],
        "$defs": {
            "server": {"oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in protocol.MESSAGE_TYPES]},
            "client": {"oneOf": [{"$ref": f"#/$defs/{cls.type}"} for cls in client_messages()]},
            **definitions,
        },
    }


def client_messages() -> tuple[type[protocol.ClientMessage], ...]:
    """The types of message that a client sends."""
    return get_args(protocol.ClientMessage)


def nested_classes() -> list[type]:
    """The dataclasses that are fields of messages, in the order in which they are met."""
    found: dict[type, None] = {}
    for cls in (*protocol.MESSAGE_TYPES.values(), *client_messages()):
        for hint in get_type_hints(cls).values():
            found |= dict.fromkeys(part for part in _parts(hint) if dataclasses.is_dataclass(part))
    return list(found)


def _parts(hint: Any) -> Iterable[type]:
    """A type and all types inside it."""
    if isinstance(hint, type):
        yield hint
    for argument in get_args(hint):
        yield from _parts(argument)


def _message(cls: type[Any], comments: Comments, head: Mapping[str, Any]) -> dict[str, Any]:
    return _object(cls, comments, {"type": {"const": cls.type}, **head}, ["type", *head])


def _object(
    cls: type[Any], comments: Comments, head: Mapping[str, Any], required: Sequence[str]
) -> dict[str, Any]:
    hints = get_type_hints(cls)
    properties = dict(head)
    for field in dataclasses.fields(cls):
        about = comments.of_field(cls, field.name)
        properties[field.name] = _typed(hints[field.name]) | ({"description": about} if about else {})
    is_needed = [field.name for field in dataclasses.fields(cls) if not may_be_left_out(cls, field)]
    return {
        "description": first_paragraph(cls),
        "type": "object",
        "properties": properties,
        "required": [*required, *is_needed],
    }


def may_be_left_out(cls: type[Any], field: dataclasses.Field[Any]) -> bool:
    """Whether a client may leave out a field; the server sends every one."""
    has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return has_default and cls in client_messages()


def _typed(hint: Any) -> dict[str, Any]:
    """The schema of one type.

    Raises:
        TypeError: a type that has none here yet.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        inner = [_typed(argument) for argument in arguments if argument is not type(None)]
        return {"anyOf": [*inner, {"type": "null"}]} if type(None) in arguments else {"anyOf": inner}
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return {"type": "array", "items": _typed(arguments[0])}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _typed(arguments[1])}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type), hint
        return {"$ref": f"#/$defs/{hint.__name__}"}
    raise TypeError(f"no schema for {hint}: add it to {Path(__file__).name}")


# --- the tables --------------------------------------------------------------------------


def generated() -> dict[str, list[str]]:
    """The lines of every generated part, by the name in its marker."""
    comments = Comments()
    return {
        "server messages": [
            line for cls in protocol.MESSAGE_TYPES.values() for line in _section(cls, comments)
        ],
        "client messages": [line for cls in client_messages() for line in _section(cls, comments)],
        "nested objects": [line for cls in nested_classes() for line in _section(cls, comments)],
        "error codes": _table(
            ("code", "meaning"), [(f"`{code}`", text) for code, text in comments.of_literal("ErrorCode")]
        ),
        "close codes": _codes(protocol.CloseCode, comments),
        "http statuses": _codes(protocol.HttpStatus, comments),
        "refusals": _table(
            ("reason", "answer", "text"),
            [
                (f"`{refusal.label}`", _answer(refusal.value.code), refusal.value.text)
                for refusal in protocol.Refusal
            ],
        ),
        "constants": _table(
            ("limit", "value", "meaning"),
            [
                (f"`{name}`", str(getattr(protocol, name)), comments.of_assignment(name))
                for name in (
                    "MAX_ID_CHARS",
                    "MAX_QUESTION_CHARS",
                    "MAX_TEXT_CHARS",
                    "MAX_SUBSCRIBED_STREAMS",
                    "MAX_CHANNELS",
                )
            ],
        ),
    }


def _section(cls: type[Any], comments: Comments) -> list[str]:
    name = getattr(cls, "type", cls.__name__)
    lines = [f"### `{name}`", "", first_paragraph(cls), *_logged(name)]
    rows = [
        (
            f"`{field.name}`",
            _shown(get_type_hints(cls)[field.name])
            + (", may be left out" if may_be_left_out(cls, field) else ""),
            comments.of_field(cls, field.name),
        )
        for field in dataclasses.fields(cls)
    ]
    return [*lines, "", *(_table(("field", "type", "meaning"), rows) if rows else ["No fields."]), ""]


def _logged(kind: str) -> list[str]:
    return ["Not in the log: carries the `seq` before it."] if kind in protocol.UNLOGGED else []


def _codes(enum: type[protocol.CloseCode] | type[protocol.HttpStatus], comments: Comments) -> list[str]:
    rows = [(str(member.value), f"`{member.name}`", comments.of_member(enum, member.name)) for member in enum]
    return _table(("code", "name", "meaning"), rows)


def _answer(code: protocol.HttpStatus | protocol.CloseCode | None) -> str:
    if code is None:
        return "connection dropped"
    kind = "HTTP" if isinstance(code, protocol.HttpStatus) else "close"
    return f"{kind} {code.value}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def _shown(hint: Any) -> str:
    """A type for people to read."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _shown(a) for a in arguments)
    if origin is tuple:
        return f"list of {_shown(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"object: {_shown(arguments[0])} to {_shown(arguments[1])}"
    return _SIMPLE.get(hint, f"`{hint.__name__}`")


def first_paragraph(cls: type[Any]) -> str:
    """What a class is, by its docstring."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


class Comments:
    """The comments of protocol.py, by what they stand beside or above."""

    def __init__(self) -> None:
        source = inspect.getsource(protocol)
        self._tree = ast.parse(source)
        self._beside: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        lines = source.splitlines()
        for token in tokenize.generate_tokens(StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                where = self._beside if lines[row - 1][:column].strip() else self._alone
                where[row] = token.string.removeprefix("#").strip()

    def of_field(self, cls: type[Any], name: str) -> str:
        """The comment of a dataclass's field."""
        for node in self._class(cls).body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id == name
            ):
                return self._at(node)
        return ""

    def of_member(self, cls: type[Any], name: str) -> str:
        """The comment of an enum's member."""
        for node in self._class(cls).body:
            if isinstance(node, ast.Assign) and _is_name(node.targets[0], name):
                return self._at(node)
        return ""

    def of_assignment(self, name: str) -> str:
        """The comment of a constant."""
        for node in self._tree.body:
            if isinstance(node, ast.Assign) and _is_name(node.targets[0], name):
                return self._at(node)
        return ""

    def of_literal(self, name: str) -> list[tuple[str, str]]:
        """The values of a `Literal` and their comments."""
        for node in self._tree.body:
            if isinstance(node, ast.Assign) and _is_name(node.targets[0], name):
                constants = [c for c in ast.walk(node.value) if isinstance(c, ast.Constant)]
                return [(str(constant.value), self._at(constant)) for constant in constants]
        return []

    def _class(self, cls: type[Any]) -> ast.ClassDef:
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                return node
        raise LookupError(cls)

    def _at(self, node: ast.stmt | ast.expr) -> str:
        """The comment at the end of a node, or the lines of comment right above it."""
        assert node.end_lineno is not None
        if node.end_lineno in self._beside:
            return self._beside[node.end_lineno]
        above: list[str] = []
        row = node.lineno - 1
        while row in self._alone:
            above.insert(0, self._alone[row])
            row -= 1
        return textwrap.dedent(" ".join(above))


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


if __name__ == "__main__":
    main()
