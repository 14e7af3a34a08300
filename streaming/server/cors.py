"""What a browser needs to let a page of another origin read an answer: the CORS protocol, and HEAD.

Pure: requests and responses in, responses out. Only origins that `server.origins` names are let in.
"""

from __future__ import annotations

from collections.abc import Sequence

from websockets.http11 import Request, Response

from streaming.protocol import HttpStatus
from streaming.server.auth import is_listed
from streaming.server.http import empty_response

METHODS = "GET, HEAD"
MAX_AGE_S = 600  # a browser remembers an answer to its question for so long


def preflight(request: Request, allowed: Sequence[str]) -> Response | None:
    """The answer to a browser's question whether a page may ask; None: it is another request.

    It needs no token, because browsers send none with it, and tells nothing of streams.
    """
    is_question = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not is_question or _listed_origin(request, allowed) is None:
        return None
    response = empty_response(HttpStatus.NO_CONTENT)
    response.headers["Access-Control-Allow-Methods"] = METHODS
    response.headers["Access-Control-Allow-Headers"] = "Authorization"
    response.headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
    return response


def for_request(response: Response, request: Request, allowed: Sequence[str]) -> Response:
    """A response as its request wants it: readable by a listed page, and without a body for HEAD."""
    if allowed:
        response.headers["Vary"] = "Origin"
    origin = _listed_origin(request, allowed)
    if origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "Retry-After"
    if request.method == "HEAD":
        return Response(response.status_code, response.reason_phrase, response.headers, b"")
    return response


def _listed_origin(request: Request, allowed: Sequence[str]) -> str | None:
    origins = request.headers.get_all("Origin")
    return origins[0] if len(origins) == 1 and is_listed(origins[0], allowed) else None
