"""Names of streams and patterns of them, in which `*` stands for any characters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


def matches(pattern: str, name: str) -> bool:
    """Whether a name is what the pattern says. In linear time, whatever the pattern is.

    A `*` in `name` is a character like any other: only a `*` of the pattern stands for it. So a
    pattern that matches another one covers all its names.
    """
    return Patterns((pattern,)).match(name)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What stands between the `*` of one pattern."""

    first: str
    middle: tuple[str, ...]
    last: str

    def match(self, name: str) -> bool:
        if not (name.startswith(self.first) and name.endswith(self.last)):
            return False
        at, end = len(self.first), len(name) - len(self.last)
        for part in self.middle:  # the leftmost place of each part leaves the most room for the next
            found = name.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return at <= end


class Patterns:
    """Some names and patterns, taken apart once for many names that are compared with them."""

    def __init__(self, wanted: Iterable[str]) -> None:
        names: set[str] = set()
        prefixes: set[str] = set()
        others: dict[_Parts, None] = {}
        for pattern in wanted:
            first, *rest = pattern.split("*")
            if not rest:
                names.add(pattern)
            elif not any(rest):  # `*` at the end alone, the usual one
                prefixes.add(first)
            else:
                others[_Parts(first, tuple(filter(None, rest[:-1])), rest[-1])] = None
        self.names = frozenset(names)  # those without a `*`
        self.has_patterns = bool(prefixes or others)
        self._prefixes = tuple(prefixes)
        self._others = tuple(others)

    def match(self, name: str) -> bool:
        """Whether one of them stands for a name."""
        if name in self.names or name.startswith(self._prefixes):
            return True
        return any(parts.match(name) for parts in self._others)
