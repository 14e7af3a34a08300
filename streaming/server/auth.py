"""Who may do what: bearer tokens with scopes per stream, and the origins of pages.

Pure but for reading the tokens file; knows no socket and no request. A token is kept as its SHA-256
alone and appears in no error text.
"""

from __future__ import annotations

import enum
import json
import logging
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from streaming.config import ConfigError, is_loopback
from streaming.patterns import Patterns
from streaming.problems import problems
from streaming.protocol import TOKEN_PARAMETER
from streaming.tokens import digest_of
from streaming.tokens import new_token as secret_token

logger = logging.getLogger(__name__)

MAX_TOKEN_CHARS = 512  # a longer one is not looked at
MAX_TOKENS = 10_000  # entries of one file
MAX_FILE_BYTES = 16 * 1024 * 1024
TOKEN_BYTES = 32  # of randomness in a token that is made here
HASH_PREFIX = "sha256:"
# Names and `*` alone, so that one pattern can be seen to lie within another: see `Grant.covers`.
PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,64}")
_SCHEMES = ("bearer", "token")  # of the header `Authorization`; Deepgram's clients say "Token"
NULL_ORIGIN = "null"  # of sandboxed frames and of files, in most browsers: any page can have it
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class Scope(enum.StrEnum):
    """What a token may be good for."""

    PUBLISH = "publish"  # send a stream's audio
    SUBSCRIBE = "subscribe"  # read streams as they come
    READ = "read"  # read what is kept over HTTP; on every stream, the metrics too
    ADMIN = "admin"  # all of it


@dataclass(frozen=True, slots=True)
class Grant:
    """What one bearer may do, with streams whose names match one of the patterns."""

    name: str  # of the token in its file; not secret
    scopes: frozenset[Scope]
    patterns: tuple[str, ...] = ("*",)
    max_streams: int | None = None  # live at once; None: the server's setting
    max_subscribers: int | None = None

    def has(self, scope: Scope) -> bool:
        """Whether the bearer may do this with some stream."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def covers(self, scope: Scope, wanted: str) -> bool:
        """Whether the bearer may do this with the stream, or with every stream of a pattern.

        A `*` in `wanted` is only matched by a `*` here, which matches whatever stands for it too.
        """
        return self.has(scope) and Patterns(self.patterns).match(wanted)

    def allows_all_of(self, other: Grant) -> bool:
        """Whether nothing that another grant allows is missing here."""
        has_scopes = Scope.ADMIN in self.scopes or other.scopes <= self.scopes
        return has_scopes and all(Patterns(self.patterns).match(pattern) for pattern in other.patterns)


EVERYTHING = Grant("", frozenset(Scope))  # where no tokens are asked for


class TokenEntry(BaseModel):
    """One `[[token]]` of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1)]
    streams: Annotated[list[Annotated[str, Field(pattern=f"^{PATTERN.pattern}$")]], Field(min_length=1)] = [
        "*"
    ]
    expires: AwareDatetime | None = None
    max_streams: Annotated[int, Field(ge=1)] | None = None
    max_subscribers: Annotated[int, Field(ge=1)] | None = None

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the token."""
        return bytes.fromhex(self.hash.removeprefix(HASH_PREFIX))

    @property
    def grant(self) -> Grant:
        """What it allows."""
        return Grant(
            self.name, frozenset(self.scopes), tuple(self.streams), self.max_streams, self.max_subscribers
        )


class _TokensFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    token: Annotated[list[TokenEntry], Field(max_length=MAX_TOKENS)] = []


class Tokens:
    """The tokens of one file, read again when the file changes."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: it cannot be used; says why.
        """
        self.path = path
        self._entries, self._signature = _load(path)

    @property
    def n_tokens(self) -> int:
        """Entries of the file."""
        return len(self._entries)

    def grant(self, token: str, now: datetime) -> Grant | None:
        """What the bearer of a token may do; None where it is not known or has expired.

        What the time of the look-up tells is about the digest, from which no token can be guessed.
        """
        return self.still(digest_of(token), now)

    def still(self, digest: bytes, now: datetime) -> Grant | None:
        """As `grant`, for a token that was presented before; by its digest."""
        self._refresh()
        found = self._entries.get(digest)
        return None if found is None or found.is_over(now) else found.grant

    def reload(self) -> None:
        """Read the file again, whether or not it looks changed.

        Raises:
            ConfigError: it cannot be used; the tokens that were read before stay in force.
        """
        self._entries, self._signature = _load(self.path)

    def _refresh(self) -> None:
        """Take a changed file; one that cannot be used changes nothing, and that is said once."""
        signature = _signature(self.path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._entries, self._signature = _load(self.path)
        except ConfigError as exc:
            logger.error("the tokens read before stay in force: %s", exc)  # noqa: TRY400  the file is wrong, not the server
        else:
            logger.info("tokens read again: %d", len(self._entries))


@dataclass(frozen=True, slots=True)
class _Entry:
    expires: datetime | None
    grant: Grant

    def is_over(self, now: datetime) -> bool:
        """Whether the token has expired."""
        return self.expires is not None and self.expires <= now


_Signature = tuple[int, int, int] | None  # None: the file cannot be looked at


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _load(path: Path) -> tuple[dict[bytes, _Entry], _Signature]:
    """The entries by digest, and what the file looked like before it was read."""
    signature = _signature(path)  # before the text: a change in between is read next time
    try:
        status = path.stat()
        mode = status.st_mode
        if not stat.S_ISREG(mode) or status.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"access.tokens: {path}: expected a file of at most {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"access.tokens: {path}: cannot be read: {exc}") from exc
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"access.tokens: {path}: has mode {stat.S_IMODE(mode):04o}; others may write it, and so let "
            "anybody in (chmod 600)"
        )
    if mode & stat.S_IROTH:
        logger.warning("%s can be read by everybody on this machine (chmod 600)", path)
    entries = parse_tokens(text, str(path))
    return {entry.digest: _Entry(entry.expires, entry.grant) for entry in entries}, signature


def parse_tokens(text: str, source: str = "tokens") -> tuple[TokenEntry, ...]:
    """Read the text of a tokens file.

    Raises:
        ConfigError: no TOML, an unknown key, an impossible value, a name or a token that comes twice.
    """
    try:
        entries = _TokensFile.model_validate(tomllib.loads(text)).token
    except ValidationError as exc:
        raise ConfigError(problems(source, exc, is_secret=True)) from exc
    except (ValueError, RecursionError) as exc:  # of deep arrays, and of numbers of thousands of digits
        raise ConfigError(f"{source}: no TOML: {exc}"[:500]) from exc
    for kind in ("name", "hash"):
        counts = Counter(getattr(entry, kind) for entry in entries)
        for entry in entries:
            if counts[getattr(entry, kind)] > 1:
                raise ConfigError(f"{source}: token {entry.name}: its {kind} comes twice; expected once")
    return tuple(entries)


def new_token() -> str:
    """A token that nobody can guess."""
    return f"moss_{secret_token(TOKEN_BYTES)}"


def entry_text(
    token: str, name: str, scopes: Sequence[Scope], streams: Sequence[str], expires: datetime | None = None
) -> str:
    """The `[[token]]` of a token, for the tokens file.

    Raises:
        ConfigError: a name, scope or pattern that the file could not hold.
    """
    lines = [
        "[[token]]",
        f"name = {json.dumps(name)}",
        f"hash = {json.dumps(HASH_PREFIX + digest_of(token).hex())}",
        f"scopes = {json.dumps(scopes)}",
        f"streams = {json.dumps(streams)}",
    ]
    if expires is not None:
        lines.append(f"expires = {expires.astimezone(UTC).isoformat(timespec='seconds')}")
    text = "\n".join(lines) + "\n"
    parse_tokens(text, "token")
    return text


# --- what a path needs -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Need:
    """What a request to a path needs."""

    scope: Scope | None  # None: it is open to everybody
    stream: str | None = None  # or a pattern; None: which stream it is about is seen later
    is_for_this_machine: bool = False  # which needs no token for it; without tokens nobody else may

    @property
    def text(self) -> str:
        """What is needed, for who is refused; a name that no stream can have is not repeated."""
        if self.stream is None:
            return f"{self.scope} is needed here"
        on = self.stream if PATTERN.fullmatch(self.stream) else "this name"
        return f"{self.scope} on {'every stream' if on == '*' else on} is needed here"

    def is_met(self, grant: Grant) -> bool:
        """Whether a grant allows the request."""
        assert self.scope is not None, self
        return grant.has(self.scope) if self.stream is None else grant.covers(self.scope, self.stream)


# --- what a request presents -------------------------------------------------------------


def offered_token(protocols: Sequence[str]) -> tuple[str, str] | None:
    """Scheme and token that a browser offers as two subprotocols, since its WebSockets have no headers.

    Such as "token, KEY", as Deepgram's client does it. None: these are others.
    """
    names = [name.strip() for name in ",".join(protocols).split(",")]
    return (names[0], names[1]) if len(names) == 2 and names[0].lower() in _SCHEMES else None


def presented(authorization: Sequence[str], query: str, protocols: Sequence[str] = ()) -> str | None:
    """The token of a request: of its `Authorization` header (Bearer or Token), its query or its subprotocols.

    None where there is none, or something that cannot be one: several headers, an unknown scheme,
    more than `MAX_TOKEN_CHARS`.
    """
    if authorization:
        scheme, _, token = authorization[0].strip().partition(" ")
        token = token.strip()
        is_usable = len(authorization) == 1 and scheme.lower() in _SCHEMES
    elif (offered := offered_token(protocols)) is not None:
        token, is_usable = offered[1], True
    else:
        values = [value for key, value in parse_qsl(query) if key == TOKEN_PARAMETER]
        token = values[0] if values else ""
        is_usable = len(values) == 1
    return token if is_usable and 0 < len(token) <= MAX_TOKEN_CHARS else None


def without_token(query: str) -> str:
    """A query without its token, for whoever reads the other parameters or writes a log."""
    pairs = query.split("&")
    return "&".join(pair for pair in pairs if unquote_plus(pair.partition("=")[0]) != TOKEN_PARAMETER)


# --- where a page may come from, and where a server may listen ---------------------------


def is_origin_allowed(
    origins: Sequence[str], host: str, allowed: Sequence[str], *, is_loopback_only: bool
) -> bool:
    """Whether a request may come from a page.

    Args:
        origins: The `Origin` headers: none where no browser asks, and none either where a page's plain
            GET goes to the host it came from; what that host may be, `is_host_allowed` says.
        host: The `Host` header.
        allowed: Origins such as "https://captions.example.org"; "*" is every one.
        is_loopback_only: No token protects the server. Then a page is only its own when it came from
            this machine's name, because any name can be made to point here (DNS rebinding).
    """
    if not origins:
        return True
    if len(origins) > 1:
        return False
    if is_listed(origins[0], allowed):
        return True
    origin = site_of(origins[0])
    if origin is None or origin[0] not in _DEFAULT_PORTS or origin != site_of(f"{origin[0]}://{host}"):
        return False
    return not is_loopback_only or is_loopback(origin[1])


def is_listed(origin: str, allowed: Sequence[str]) -> bool:
    """Whether the configuration names an origin: by itself, or by "*"."""
    if "*" in allowed or (origin == NULL_ORIGIN and NULL_ORIGIN in allowed):
        return True
    site = site_of(origin)
    return site is not None and site in [site_of(other) for other in allowed]


def is_host_allowed(hosts: Sequence[str], allowed: Sequence[str]) -> bool:
    """Whether a request may be made to a host, on a server that no token protects.

    A page of a name that was made to point here (DNS rebinding) reads what it likes, with no `Origin`:
    to its browser this server is where it came from. Its own name is in `Host` all the same.

    Args:
        hosts: The `Host` headers; without one it is no browser that asks.
        allowed: As for `is_origin_allowed`; their hosts are let in beside this machine's own names.
    """
    if "*" in allowed:
        return True
    named = {site[1] for site in map(site_of, allowed) if site is not None and site[0] in _DEFAULT_PORTS}
    sites = [site_of(f"http://{host}") for host in hosts]
    return all(site is not None and (is_loopback(site[1]) or site[1] in named) for site in sites)


def site_of(origin: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin of any scheme; None for "null" and what else is none.

    Of "file://" the host is empty; where the scheme has no port of its own, the port is 0.
    """
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    has_host = bool(parts.hostname) or origin.lower() == "file://"
    if not parts.scheme or not has_host or "://" not in origin or parts.path or parts.query or parts.fragment:
        return None
    return parts.scheme, parts.hostname or "", port or _DEFAULT_PORTS.get(parts.scheme, 0)
