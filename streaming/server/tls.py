"""The server's certificate."""

from __future__ import annotations

import ssl

from streaming.config import ConfigError


def tls_context(cert: str, key: str) -> ssl.SSLContext | None:
    """TLS with the certificate and key of two PEM files; None where none are named.

    Raises:
        ConfigError: they cannot be used.
    """
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"server.tls_cert, server.tls_key: {cert}, {key}: cannot be used: {exc}") from exc
    return context


def renew(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Use another certificate for connections from now on; those that are open keep theirs.

    Raises:
        ConfigError: the files cannot be used; the certificate before stays.
    """
    tls_context(cert, key)  # a chain that is loaded with another's key would be left half replaced
    context.load_cert_chain(cert, key, password=_no_password)


def _no_password() -> str:
    """Instead of a prompt on the terminal, which a service does not have."""
    raise ValueError("the key is encrypted; expected one without a password")
