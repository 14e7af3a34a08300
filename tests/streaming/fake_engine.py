"""An engine process without a model, for tests: it speaks the real frames and hears "words" in speech.

Every 320 ms of open speech are one word, whose text is the checksum of its samples: the text shows
that every sample arrived, once and at its place. Ticks, stops, flushes and questions behave as the
real scheduler's. Started as `python fake_engine.py [--fault NAME] --fd N`.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from streaming.engine import messages
from streaming.engine.contract import Answer, Findings, TimedWord
from streaming.engine.messages import Mark, PointKind

TICK = 10_240  # samples between decode points
MAX_STEP = 46_720  # samples: of more undecided audio than this, some is decided at once
WORD = 5_120  # samples of a word
BYTES = 4  # of a sample


def word_text(pcm: bytes) -> str:
    """The word that these samples are."""
    return f"{zlib.crc32(pcm):08x}"


@dataclass
class Stream:
    """One slot."""

    start: int  # of `audio`
    consumed: int
    next_word: int  # where the first uncommitted word begins
    is_speech: bool
    resume_at: int  # no tick before or at this position
    audio: bytearray = field(default_factory=bytearray)
    marks: list[Mark] = field(default_factory=list)
    is_unanswered: bool = False

    @property
    def end(self) -> int:
        """Position after the audio that came."""
        return self.start + len(self.audio) // BYTES

    def words(self, point: int, *, is_last: bool) -> tuple[TimedWord, ...]:
        """What is heard up to a point, after the committed words; at the end, also a last short one."""
        found = []
        at = self.next_word
        while self.is_speech and (at + WORD <= point or (is_last and at < point)):
            stop = min(at + WORD, point)
            pcm = bytes(self.audio[(at - self.start) * BYTES : (stop - self.start) * BYTES])
            assert len(pcm) == (stop - at) * BYTES, (self.start, at, stop)
            found.append(TimedWord(word_text(pcm), at, stop, 1.0))
            at = stop
        return tuple(found)


class FakeEngine:
    """All streams. Takes messages and says what it finds."""

    def __init__(self, say: Callable[[messages.FromEngine], None], fault: str = "") -> None:
        self._say = say
        self._fault = fault
        self.tasks = ("transcript",) if fault == "answers_nothing" else ("transcript", "answer")
        self._streams: dict[int, Stream] = {}
        self._n_results = 0

    def take(self, message: messages.ToEngine) -> None:
        """Do what the server asks for."""
        match message:
            case messages.Open():
                # Where no committed word lies in the window, it begins at the first that is not.
                committed_end = max((word.end for word in message.committed), default=message.window_start)
                self._streams[message.stream] = Stream(
                    start=message.start,
                    consumed=message.consumed,
                    next_word=max(message.speech_start, committed_end),
                    is_speech=message.is_speech,
                    resume_at=message.consumed,
                )
            case messages.Audio():
                stream = self._streams[message.stream]
                assert message.start == stream.end, (message.start, stream.end)
                stream.audio += message.pcm
                stream.marks += message.marks
                self._go_on(message.stream, stream)
            case messages.Commit():
                stream = self._streams[message.stream]
                assert stream.is_unanswered
                stream.is_unanswered = False
                words = stream.words(message.point, is_last=message.kind != "tick")
                assert message.n_words <= len(words), (message, words)
                if message.n_words:
                    stream.next_word = words[message.n_words - 1].end
                if message.kind in ("speech_stop", "flush") and stream.is_speech:
                    stream.next_word = max(stream.next_word, message.point)
                    stream.is_speech = stream.is_speech and message.kind != "speech_stop"
                stream.resume_at = message.point
                if not stream.is_speech:
                    # With audio waiting, the next result is unanswered before anything else is told.
                    self._progress(message.stream, stream)
                self._go_on(message.stream, stream)
            case messages.Configure():
                pass
            case messages.CloseStream():
                del self._streams[message.stream]

    def _go_on(self, number: int, stream: Stream) -> None:
        """Decide what can be decided, up to the next point that needs an answer."""
        before = stream.consumed
        while not stream.is_unanswered:
            tick = (max(stream.consumed, stream.resume_at) // TICK + 1) * TICK
            mark = stream.marks[0] if stream.marks else None
            if mark is not None and mark.at <= min(tick, stream.end):
                stream.marks.pop(0)
                stream.consumed = max(stream.consumed, mark.at)
                if mark.kind == "speech_start":
                    stream.is_speech = True
                    stream.next_word = max(stream.next_word, mark.boundary)
                    if self._fault == "hangs" and mark.boundary > 0:
                        time.sleep(3600)  # stands for a step that never ends
                elif mark.kind == "ask":
                    assert "answer" in self.tasks, mark  # as a runner that has no such fork
                    stream.is_unanswered = True
                    answer = Answer(mark.boundary, mark.at, f"{mark.question} Nothing much.")
                    result = messages.Result(
                        number, mark.at, "ask", (), "en", 0.0, 0, 0.0, found=Findings(answer=answer)
                    )
                    self._say(result)
                else:
                    self._result(number, stream, mark.at, mark.kind)
            elif tick <= stream.end:
                stream.consumed = tick
                if stream.is_speech:
                    self._result(number, stream, tick, "tick")
            else:
                stream.consumed = max(stream.consumed, stream.end)
                break
        if stream.consumed > before:
            self._progress(number, stream)

    def _result(self, number: int, stream: Stream, point: int, kind: PointKind) -> None:
        self._n_results += 1
        if self._fault == "wrong_result" and self._n_results == 2:
            kind, point = "flush", point + 1
        words = stream.words(point, is_last=kind != "tick")
        stream.is_unanswered = True
        self._say(messages.Result(number, point, kind, words, "en", 0.0, 0, 0.0))

    def _progress(self, number: int, stream: Stream) -> None:
        # A boundary lies at most 0.5 s before its mark; audio of open speech is needed from its next word.
        needed = min(stream.next_word, stream.consumed) if stream.is_speech else stream.consumed - 16_000
        if needed > stream.start and not stream.is_unanswered:
            del stream.audio[: (needed - stream.start) * BYTES]
            stream.start = needed
        # The last committed word stays in the window: speech may begin before the stop that was decided last,
        # and the next engine learns from that word alone how far its audio is spoken for.
        window_start = max(0, stream.start - WORD)
        self._say(messages.Progress(number, stream.consumed, stream.start, window_start))


class Process:
    """The pipe of an engine process."""

    def __init__(self, pipe: socket.socket, fault: str) -> None:
        self._pipe = pipe
        self._fault = fault
        self._engine = FakeEngine(self._send, fault)

    def run(self) -> None:
        """Serve until the pipe closes."""
        settings = json.loads(self._receive())
        if self._fault == "never_ready":
            self._receive()
        if self._fault == "fails_at_start":
            self._send(messages.Failed("no weights"))
            return
        if self._fault == "unfit_at_start":
            self._send(messages.Failed("events.labels: the model knows no sound 'Sirn'", is_unfit=True))
            return
        n_slots = settings["engine"]["n_slots"]
        self._send(messages.Ready("fake", self._engine.tasks, ("de", "en"), n_slots, 0.0, 0.0, MAX_STEP))
        while True:
            self._engine.take(messages.decode_to_engine(self._receive()))

    def _send(self, message: messages.FromEngine) -> None:
        self._pipe.sendall(messages.frame(message))

    def _receive(self) -> bytes:
        header = self._read(messages.HEADER_BYTES)
        return self._read(messages.frame_length(header))

    def _read(self, n_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < n_bytes:
            piece = self._pipe.recv(n_bytes - len(data))
            if not piece:
                sys.exit(0)  # the server is gone
            data += piece
        return bytes(data)


def main() -> None:
    """Run on the pipe named by `--fd`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--fault", default="")
    arguments = parser.parse_args()
    Process(socket.socket(fileno=arguments.fd), arguments.fault).run()


if __name__ == "__main__":
    main()
