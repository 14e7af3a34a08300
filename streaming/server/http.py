"""HTTP answers to a request that opens no WebSocket.

Knows no connection.
"""

from __future__ import annotations

import http
from email.utils import formatdate

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from streaming.protocol import HttpStatus


def split_target(request: Request) -> tuple[str, str]:
    """Path and query of a request; not by `urlsplit`, which finds hosts in paths and raises at some."""
    target = request.path
    if target[:8].lower().startswith(("http://", "https://")):  # the absolute form, which proxies may send
        target = "/" + target.split("://", 1)[1].partition("/")[2]
    path, _, query = target.partition("?")
    return path, query


def text_response(status: HttpStatus, text: str) -> Response:
    """A line of plain text."""
    return _response(status, "text/plain; charset=utf-8", f"{text}\n".encode())


def page(content_type: str, body: bytes) -> Response:
    """A document that is never the same twice."""
    response = _response(HttpStatus.OK, content_type, body)
    response.headers["Cache-Control"] = "no-store"
    return response


def empty_response(status: HttpStatus) -> Response:
    """A status without a body."""
    headers = Headers([("Date", formatdate(usegmt=True)), ("Connection", "close")])
    return Response(status, http.HTTPStatus(status).phrase, headers, b"")


def _response(status: HttpStatus, content_type: str, body: bytes) -> Response:
    headers = Headers(
        [
            ("Date", formatdate(usegmt=True)),
            ("Connection", "close"),
            ("Content-Length", str(len(body))),
            ("Content-Type", content_type),
        ]
    )
    return Response(status, http.HTTPStatus(status).phrase, headers, body)
