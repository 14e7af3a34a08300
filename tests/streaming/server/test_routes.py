"""The paths of a server: what each needs, and that a protocol is added by its own declaration."""

from __future__ import annotations

from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from streaming import adaptors
from streaming.app import build
from streaming.protocol import SessionClosed, Subscribe, encode_client
from streaming.server.auth import Need, Scope
from tests.streaming.support import receive_until, running_server, s16, said, utterances, with_port_0


@pytest.mark.parametrize(
    ("path", "need"),
    [
        ("/healthz", Need(None)),
        ("/readyz", Need(None)),
        ("/metrics", Need(Scope.READ, "*", is_for_this_machine=True)),
        ("/v1/streams", Need(Scope.READ, "*")),
        ("/v1/streams/a/messages", Need(Scope.READ, "a")),
        ("/v1/subscribe", Need(Scope.SUBSCRIBE)),
        ("/v1/stream/a", Need(Scope.PUBLISH, "a")),
        ("/v1/realtime", Need(Scope.PUBLISH, "openai-*")),
        ("/v1/listen", Need(Scope.PUBLISH, "deepgram-*")),
        ("/v1/streem/a", None),
        ("/metrics/", None),
        ("/v1/subscribe/a", None),
        ("/", None),
    ],
)
async def test_what_a_path_needs(path: str, need: Need | None, tmp_path: Path) -> None:
    """Known paths alone are looked at further."""
    _, server = build(with_port_0("", tmp_path))
    route = server.routes.find(path)
    assert (None if route is None else route.need(path)) == need


async def test_a_protocol_is_added_by_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the folder of the adaptors is served, with the scope and the names it declares."""
    folder = Path(__file__).with_name("toy_adaptor")
    monkeypatch.setattr(adaptors, "__path__", [*adaptors.__path__, str(folder)])
    async with running_server() as running, running.subscribe() as subscriber:
        route = running.server.routes.find("/v1/toy")
        assert route is not None
        assert route.need("/v1/toy") == Need(Scope.PUBLISH, "toy-*")
        uri = f"ws://127.0.0.1:{running.port}/v1/toy?name=one"
        async with connect(uri) as connection:
            await subscriber.send(encode_client(Subscribe(("toy-one",), after=0)))
            await connection.send(s16(utterances(1.5)))
            await connection.send("what?")
            await connection.send("bye")
            heard = [text async for text in connection]
        assert connection.close_code == 1000
        found = await receive_until(subscriber, SessionClosed)
    assert heard.count("no: what?") == 1
    assert " ".join(text for text in heard if isinstance(text, str) and text[:3] != "no:") == (
        " ".join(said(found))
    )
    assert len(said(found)) > 3
