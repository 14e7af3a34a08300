"""Put together the demo's recording: a telephone call, spoken by a person.

The sentences and their texts come from Debian's `asterisk-core-sounds-en*` (Allison Smith,
CC BY-SA 3.0), the ringing from `sound-theme-freedesktop`. They are downloaded and unpacked into a
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

PACKAGES = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-g722", "sound-theme-freedesktop")
VOICE = Path("usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
SOUNDS = Path("usr/share/sounds/freedesktop/stereo")
APT_TIMEOUT_S = 300


class RecordingError(RuntimeError):
    """The recording cannot be made here; says what is missing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One sound of the call and the silence after it."""

    name: str
    pause_ms: int
    is_speech: bool = True


CALL = (
    Piece("phone-incoming-call", 700, is_speech=False),
    Piece("priv-introsaved", 900),
    Piece("tt-allbusy", 1200),
    Piece("followme/status", 800),
    Piece("demo-echotest", 1000),
    Piece("bell", 700, is_speech=False),
    Piece("followme/sorry", 900),
    Piece("demo-thanks", 1000),
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
        RecordingError: the packages cannot be had or do not hold what they should.
        SourceError: a sound in them cannot be decoded.
    """
    unpacked = packages / "unpacked"
    if not (unpacked / TEXTS).exists():
        fetch(packages)
    texts = read_texts(unpacked / TEXTS)
    audio = bytearray(bytes_of_ms(500))
    said = []
    for piece in CALL:
        if piece.is_speech:
            audio += b"".join(decode(str(unpacked / VOICE / f"{piece.name}.g722")))
            if piece.name not in texts:
                raise RecordingError(f"{TEXTS.name} has no text of {piece.name!r}")
            said.append(texts[piece.name])
        else:
            audio += b"".join(decode(str(unpacked / SOUNDS / f"{piece.name}.oga")))
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
