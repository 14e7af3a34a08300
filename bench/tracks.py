"""Which of two sound tracks has the speech: how often `clients/tracks.py` is right.

Takes every pair of a speech recording and a recording without speech as the two tracks of a file, each
in turn as the default:

    python -m bench.tracks --speech FOLDER ... --other FOLDER ...
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import soxr

from clients.sources import SourceError, decode
from clients.tracks import PROBE_RATE_HZ, PROBE_S, Track, speech_score, with_speech
from streaming.protocol import SAMPLE_RATE_HZ

MIN_S = 4  # shorter recordings are no track
SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3")


def scores(folders: Iterable[str], half: int, most: int) -> list[float]:
    """`speech_score` of the recordings below some folders, of one half of them by their names."""
    files = sorted(path for folder in folders for path in Path(folder).rglob("*") if path.suffix in SUFFIXES)
    files.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
    found = []
    for path in files[half::2]:
        try:
            pcm = np.frombuffer(b"".join(islice(decode(str(path), 1000), PROBE_S)), "<i2") / np.float32(32768)
        except SourceError:
            continue
        if len(pcm) >= MIN_S * SAMPLE_RATE_HZ:
            found.append(speech_score(soxr.resample(pcm, SAMPLE_RATE_HZ, PROBE_RATE_HZ)))
        if len(found) == most:
            break
    return found


def share_right(speech: Sequence[float], other: Sequence[float], *, is_default: bool) -> float:
    """In how many pairs the track with speech is taken, where it is the default or where it is not."""
    tracks = (Track(1, is_default=is_default), Track(2, is_default=not is_default))
    pairs = [(a, b) for a in speech for b in other]
    return sum(with_speech(tracks, pair) is tracks[0] for pair in pairs) / len(pairs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--speech", nargs="+", required=True)
    parser.add_argument("--other", nargs="+", required=True)
    parser.add_argument("--half", type=int, choices=(0, 1), default=1)
    parser.add_argument("--most", type=int, default=60, help="recordings of a folder, at most")
    options = parser.parse_args()
    speech = list(chain.from_iterable(scores([f], options.half, options.most) for f in options.speech))
    other = list(chain.from_iterable(scores([f], options.half, options.most) for f in options.other))
    print(f"{len(speech)} recordings of speech, {len(other)} without")
    for is_default in (True, False):
        share = share_right(speech, other, is_default=is_default)
        print(f"speech is {'the default' if is_default else 'the other track'}: {share:.1%} right")


if __name__ == "__main__":
    main()
