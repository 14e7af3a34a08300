"""Patterns of names: `*` stands for any characters."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.patterns import Patterns, matches

patterns = st.text("ab.*", max_size=8)
names = st.text("ab.*", max_size=12)


@given(st.lists(patterns, max_size=5), names)
def test_a_name_matches_as_in_a_shell(wanted: list[str], name: str) -> None:
    """One by one and together; a `*` in a name is matched by a `*` alone."""
    expected = [fnmatch.fnmatchcase(name, pattern) for pattern in wanted]
    assert [matches(pattern, name) for pattern in wanted] == expected
    assert Patterns(wanted).match(name) == any(expected)


@given(patterns, patterns, st.text("ab.", max_size=12))
def test_a_pattern_that_matches_another_one_covers_its_names(wide: str, narrow: str, name: str) -> None:
    """What a token with pattern `wide` relies on when its bearer asks for `narrow`."""
    if matches(wide, narrow) and matches(narrow, name):
        assert matches(wide, name)


def test_names_and_patterns_are_told_apart() -> None:
    """Names are looked up, patterns are compared."""
    wanted = Patterns(("a", "b-*", "*c*d"))
    assert wanted.names == {"a"}
    assert wanted.has_patterns
    assert not Patterns(("a",)).has_patterns


@pytest.mark.parametrize("pattern", ["*a" * 32 + "b", "*" * 64 + "b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    """A pattern on which a backtracking matcher would not come to an end."""
    assert not any(matches(pattern, "a" * 64) for _ in range(1000))
