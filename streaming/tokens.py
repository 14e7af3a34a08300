"""Secret tokens: made here, and kept as digests only."""

from __future__ import annotations

import hashlib
import hmac
import secrets


def new_token(n_bytes: int) -> str:
    """A token of so many random bytes, as text for a URL."""
    return secrets.token_urlsafe(n_bytes)


def digest_of(token: str) -> bytes:
    """The SHA-256 of a token, as it is kept: who reads the digest does not have the token.

    A plain hash is enough: a token holds at least 192 random bits, so there is nothing to guess.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def is_token_of(token: str, digest: bytes) -> bool:
    """Whether it is the token of this digest; takes as long whether or not."""
    return hmac.compare_digest(digest_of(token), digest)
