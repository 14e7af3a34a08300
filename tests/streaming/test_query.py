"""A URL's query as a struct: what is taken, and what is said of what is not."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from streaming.errors import BadQuery
from streaming.query import MAX_PARAMETERS, read


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every kind of parameter there is."""

    rate: Annotated[int, Meta(ge=8_000, le=48_000)] = 16_000
    kind: Annotated[Literal["s16le", "f32le"], Meta(description="of samples")] = "s16le"
    tag: Annotated[str, Meta(min_length=1, max_length=5)] | None = None
    is_new: bool = False
    types: tuple[str, ...] = ()
    after: Annotated[int, Meta(ge=0, le=2**53)] | None = None


class Lenient(msgspec.Struct, frozen=True, rename={"has_end": "with-end"}):
    """Of a third-party protocol, with a parameter that must be there."""

    name: Annotated[str, Meta(pattern="^[a-z]+$")]
    has_end: bool = False


def test_parameters_fill_the_fields() -> None:
    """Each by its type; what is left out has its default."""
    assert read("", Strict) == Strict()
    query = "rate=8000&kind=f32le&tag=a%20b&is_new=True&types=one,,two&after=9007199254740992"
    assert read(query, Strict) == Strict(8_000, "f32le", "a b", True, ("one", "two"), 2**53)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("rate=7999", "rate is '7999'; expected an integer from 8000 to 48000"),
        ("rate=", "rate is ''; expected an integer"),
        ("rate=+8000", "rate is ' 8000'; expected an integer"),
        ("rate=8e3", "rate is '8e3'; expected an integer"),
        ("rate=8000.0", "rate is '8000.0'; expected an integer"),
        ("rate=%D9%A8000", "expected an integer"),
        ("rate=" + "9" * 5000, "expected an integer"),
        ("after=9007199254740993", f"expected an integer from 0 to {2**53}"),
        ("kind=mp3", "kind is 'mp3'; expected one of f32le, s16le"),
        ("kind=" + "m" * 100, f"kind is '{'m' * 80}'; expected one of"),
        ("is_new=1", "is_new is '1'; expected true or false"),
        ("tag=", "tag is ''; expected a text of 1 to 5 characters"),
        ("tag=123456", "tag is '123456'; expected a text of 1 to 5 characters"),
        ("speed=2", "'speed' is no parameter; expected one of rate, kind, tag, is_new, types, after"),
        ("rate=8000&rate=8000", "rate was given twice; expected once"),
        ("&".join(["rate=8000"] * (MAX_PARAMETERS + 1)), "too many parameters; expected one of rate"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_named(query: str, expected: str) -> None:
    """With what came and what was expected."""
    with pytest.raises(BadQuery) as refused:
        read(query, Strict)
    assert expected in str(refused.value)


def test_a_struct_that_allows_unknown_fields_ignores_parameters() -> None:
    """Of a repeated one the last counts; one without a default must be there."""
    assert read("name=a&other=1&name=b&with-end=true", Lenient) == Lenient("b", has_end=True)
    with pytest.raises(BadQuery, match=r"name is missing; expected a text that matches \^\[a-z\]\+\$"):
        read("other=1", Lenient)
    with pytest.raises(BadQuery, match="name is 'A'; expected a text that matches"):
        read("name=A", Lenient)


@given(st.text(max_size=100))
def test_any_query_is_read_or_refused(query: str) -> None:
    """And nothing else is ever raised."""
    for kind in (Strict, Lenient):
        with suppress(BadQuery):
            read(query, kind)
