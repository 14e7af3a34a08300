"""Tokens, scopes, patterns and origins."""

from __future__ import annotations

import fnmatch
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.config import ConfigError, is_loopback
from streaming.server.auth import (
    MAX_TOKEN_CHARS,
    Grant,
    Scope,
    Tokens,
    entry_text,
    is_host_allowed,
    is_origin_allowed,
    new_token,
    parse_tokens,
    presented,
    without_token,
)

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def write(path: Path, text: str) -> Path:
    """A tokens file that its owner alone may read."""
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the tokens are."""
    return tmp_path / "tokens.toml"


def test_a_token_opens_what_its_entry_says_and_nothing_else(path: Path) -> None:
    """The entry that `moss-live token` writes, read again."""
    token = new_token()
    write(path, entry_text(token, "desk", [Scope.PUBLISH], ["desk-*", "hall"]))
    grant = Tokens(path).grant(token, NOW)
    assert grant == Grant("desk", frozenset({Scope.PUBLISH}), ("desk-*", "hall"))
    assert grant.covers(Scope.PUBLISH, "desk-1")
    assert grant.covers(Scope.PUBLISH, "hall")
    assert not grant.covers(Scope.PUBLISH, "hall-2")
    assert not grant.covers(Scope.SUBSCRIBE, "desk-1")
    assert token not in path.read_text()


def test_a_stranger_and_an_expired_token_get_nothing(path: Path) -> None:
    """Neither a token of the same form nor one of yesterday."""
    token = new_token()
    write(path, entry_text(token, "old", [Scope.ADMIN], ["*"], expires=NOW))
    tokens = Tokens(path)
    assert tokens.grant(new_token(), NOW) is None
    assert tokens.grant(token, NOW) is None
    assert tokens.grant(token, NOW.replace(year=2025)) is not None


def test_admin_may_everything_on_its_streams_alone() -> None:
    """The scope holds the others; the patterns stay."""
    grant = Grant("root", frozenset({Scope.ADMIN}), ("a*",))
    assert all(grant.covers(scope, "abc") for scope in Scope)
    assert not any(grant.covers(scope, "b") for scope in Scope)


names = st.text("ab-", min_size=0, max_size=6)
patterns = st.text("ab*", min_size=1, max_size=5)


@given(own=patterns, wanted=patterns, fillings=st.lists(names, min_size=5, max_size=5))
def test_a_pattern_that_is_covered_matches_no_stream_outside(
    own: str, wanted: str, fillings: list[str]
) -> None:
    """Whatever stands for the stars of a pattern that somebody may read, they may read it."""
    grant = Grant("g", frozenset({Scope.SUBSCRIBE}), (own,))
    pieces = wanted.split("*")
    name = pieces[0] + "".join(filling + piece for filling, piece in zip(fillings, pieces[1:], strict=False))
    assert fnmatch.fnmatchcase(name, wanted)
    if grant.covers(Scope.SUBSCRIBE, wanted):
        assert grant.covers(Scope.SUBSCRIBE, name)


def test_the_file_is_read_again_when_it_changes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New tokens are let in; a file that cannot be used changes nothing and is reported once."""
    first, second = new_token(), new_token()
    write(path, entry_text(first, "first", [Scope.READ], ["*"]))
    tokens = Tokens(path)
    write(path, entry_text(second, "second-one", [Scope.READ], ["*"]))
    assert tokens.grant(first, NOW) is None
    assert tokens.grant(second, NOW) is not None
    write(path, "[[token")
    for _ in range(3):
        assert tokens.grant(second, NOW) is not None
    path.unlink()
    for _ in range(3):
        assert tokens.grant(second, NOW) is not None
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(path: Path, mode: int) -> None:
    """They could let anybody in."""
    write(path, "").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Tokens(path)


def test_a_file_that_everybody_may_read_is_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It holds hashes of random tokens, which are of little use."""
    write(path, "").chmod(0o644)
    assert Tokens(path).n_tokens == 0
    assert "can be read by everybody" in caplog.text


ENTRY = f'[[token]]\nname = "a"\nhash = "sha256:{"0" * 64}"\nscopes = ["read"]\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[token", "no TOML"),
        ("[[tokens]]", "tokens: unknown key"),
        (ENTRY.replace("read", "reed"), r"token\.0\.scopes\.0"),
        (ENTRY.replace('"read"', ""), r"token\.0\.scopes"),
        (ENTRY.replace("sha256:", ""), r"token\.0\.hash"),
        (ENTRY + 'streams = ["a?"]', r"token\.0\.streams\.0"),
        (ENTRY + "expires = 2026-01-01T00:00:00", r"token\.0\.expires"),
        (ENTRY + "max_streams = 0", r"token\.0\.max_streams"),
        (ENTRY + ENTRY, "its name comes twice"),
        (ENTRY + ENTRY.replace('"a"', '"b"'), "its hash comes twice"),
    ],
)
def test_what_is_wrong_with_a_tokens_file_is_named(text: str, named: str) -> None:
    """The key and what was expected."""
    with pytest.raises(ConfigError, match=f"^tokens: .*{named}"):
        parse_tokens(text)


def test_a_token_in_the_place_of_its_hash_is_not_repeated() -> None:
    """The likeliest mistake must not bring the token into a log."""
    token = new_token()
    with pytest.raises(ConfigError) as caught:
        parse_tokens(ENTRY.replace(f"sha256:{'0' * 64}", token))
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "query", "expected"),
    [
        ([], "", None),
        (["Bearer abc"], "", "abc"),
        (["bearer  abc "], "", "abc"),
        (["Token abc"], "rate=8000", "abc"),
        (["Basic abc"], "", None),
        (["abc"], "", None),
        (["Bearer "], "", None),
        (["Bearer a", "Bearer b"], "", None),
        (["Basic abc"], "token=abc", None),
        ([], "rate=8000&token=a%2Bb", "a+b"),
        ([], "token=a&token=b", None),
        ([], "token=", None),
        (["Bearer " + "a" * MAX_TOKEN_CHARS], "", "a" * MAX_TOKEN_CHARS),
        (["Bearer " + "a" * (MAX_TOKEN_CHARS + 1)], "", None),
    ],
)
def test_where_a_token_is_looked_for(headers: list[str], query: str, expected: str | None) -> None:
    """One header of a known scheme, or one parameter."""
    assert presented(headers, query) == expected


def test_a_query_without_its_token_is_the_rest() -> None:
    """However the key is written."""
    assert without_token("rate=8000&token=x&%74oken=y&format=alaw") == "rate=8000&format=alaw"
    assert without_token("") == without_token("token=x") == ""


@pytest.mark.parametrize(
    ("origins", "host", "allowed", "loopback_only", "expected"),
    [
        ([], "a.org", (), False, True),
        (["https://a.org"], "a.org", (), False, True),
        (["https://a.org:443"], "a.org", (), False, True),
        (["https://A.org"], "a.org:443", (), False, True),
        (["https://a.org"], "a.org:8765", (), False, False),
        (["https://b.org"], "a.org", (), False, False),
        (["https://b.org"], "a.org", ("https://b.org",), False, True),
        (["http://b.org"], "a.org", ("https://b.org",), False, False),
        (["https://b.org.evil"], "a.org", ("https://b.org",), False, False),
        (["https://b.org@a.org"], "b.org", ("https://b.org",), False, False),
        (["null"], "a.org", ("https://b.org",), False, False),
        (["null"], "null", (), False, False),
        (["https://b.org"], "a.org", ("*",), False, True),
        (["https://a.org", "https://a.org"], "a.org", (), False, False),
        (["http://rebound.evil:8765"], "rebound.evil:8765", (), True, False),
        (["http://localhost:8765"], "localhost:8765", (), True, True),
        (["http://[::1]:8765"], "[::1]:8765", (), True, True),
        (["http://[::1"], "[::1", (), True, False),
        (["http://a.org:99999"], "a.org:99999", (), False, False),
    ],
)
def test_which_pages_may_connect(
    origins: list[str], host: str, allowed: tuple[str, ...], loopback_only: bool, expected: bool
) -> None:
    """No page at all, the server's own, and those that are named; a rebound name is not its own."""
    assert is_origin_allowed(origins, host, allowed, is_loopback_only=loopback_only) is expected


@pytest.mark.parametrize(
    ("hosts", "allowed", "expected"),
    [
        ([], (), True),
        (["localhost:8765"], (), True),
        (["LOCALHOST"], (), True),
        (["127.0.0.1:8765"], (), True),
        (["127.8.8.8"], (), True),
        (["[::1]:8765"], (), True),
        (["rebound.evil:8765"], (), False),
        (["localhost.evil:8765"], (), False),
        (["127.0.0.1.evil"], (), False),
        (["10.0.0.1:8765"], (), False),
        (["captions.org"], ("https://captions.org",), True),
        (["captions.org:8765"], ("https://captions.org",), True),
        (["evil.org"], ("https://captions.org",), False),
        (["evil.org"], ("*",), True),
        (["localhost", "evil.org"], (), False),
        ([""], (), False),
        (["[::1"], (), False),
        (["localhost:99999"], (), False),
        (["localhost/.evil"], (), False),
    ],
)
def test_which_hosts_a_server_without_tokens_answers_as(
    hosts: list[str], allowed: tuple[str, ...], expected: bool
) -> None:
    """This machine's own and those of the named pages: a rebound name is in `Host`, whoever asks."""
    assert is_host_allowed(hosts, allowed) is expected


@given(st.text(max_size=40), st.text(max_size=20))
def test_no_origin_is_a_fault(origin: str, host: str) -> None:
    """Garbage is an answer of no, whatever it is."""
    is_origin_allowed([origin], host, ("https://b.org",), is_loopback_only=False)
    is_host_allowed([host], ("https://b.org",))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("", False),
        ("::", False),
        ("localhost.evil.org", False),
        ("10.0.0.1", False),
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    """This machine's own addresses, and no other that looks like them."""
    assert is_loopback(host) is expected


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    """However generous the umask is."""
    from click.testing import CliRunner

    from streaming.cli import token

    path = tmp_path / "tokens.toml"
    before = os.umask(0)
    try:
        made = CliRunner().invoke(token, ["a", "--scope", "read", "--file", str(path)])
    finally:
        os.umask(before)
    assert made.exit_code == 0, made.output
    assert path.stat().st_mode & 0o777 == 0o600
    again = CliRunner().invoke(token, ["a", "--scope", "read", "--file", str(path)])
    assert again.exit_code == 1
    assert "its name comes twice" in again.stderr
    grant = Tokens(path).grant(made.stdout.strip(), NOW)
    assert grant is not None
    assert grant.covers(Scope.READ, "any")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 200_000,
        "a = " + "9" * 5000,
        "token = 7",
        "token = [7]",
        "[[token]]\nname = [1]",
        "\x00",
    ],
)
def test_a_strange_tokens_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    """Deep nesting, long numbers, other types."""
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"tokens\.toml"):
        Tokens(path)


def test_a_tokens_file_is_a_file_of_bounded_size(tmp_path: Path) -> None:
    """Not a folder, a device or gigabytes."""
    path = tmp_path / "tokens.toml"
    with path.open("wb") as file:
        file.truncate(1 << 33)
    path.chmod(0o600)
    for other in (path, tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="expected a file of at most"):
            Tokens(other)
