#!/usr/bin/env python3
"""What is heard beside words, through the real engine and timeline on a virtual clock.

    bench/understanding.py --manifest DATA/events/scenes_train/manifest.jsonl --root DATA
    bench/understanding.py --manifest DATA/emotion/manifest.jsonl --root DATA --every 4

The manifest's fields tell whether it is about sound events (`events`) or emotion (`emotion`). The
last line is JSON. `--fold-weights` measures every scene with weights that were trained without its
clips (`training/events.py --folds`), or every clip with a head that was trained without its actor
(`folds` in the cache of `training/emotion.py`); without it the weights that ship are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import understanding_emotion, understanding_events
from bench.manifest import add_clip_options
from model.errors import CheckpointError
from streaming.config import Config, ConfigError, load_config


def main() -> int:
    """Measure and print; the exit status is 1 where there is nothing to measure."""
    arguments = parse_arguments()
    try:
        config = load_config(arguments.config) if arguments.config else Config()
        rows = read_rows(arguments.manifest, arguments.filter)[:: arguments.every][: arguments.limit]
        report = measure(rows, config, arguments)
    except (CheckpointError, ConfigError, ValueError, OSError) as exc:
        print(f"understanding: {exc}", file=sys.stderr)
        return 1
    print(json.dumps({"bench": "understanding", **report}))
    return 0


def measure(
    rows: list[Mapping[str, Any]], config: Config, arguments: argparse.Namespace
) -> Mapping[str, Any]:
    """The report of whichever kind the rows are.

    Raises:
        ValueError: the rows are neither about events nor about emotion.
    """
    if rows and "events" in rows[0]:
        return understanding_events.measure(
            rows,
            config,
            understanding_events.Options(
                root=arguments.root,
                n_streams=arguments.streams,
                has_words=not arguments.no_words,
                fold_weights=arguments.fold_weights,
                quiet_s=arguments.quiet_s,
            ),
        )
    if rows and "emotion" in rows[0]:
        if arguments.no_words:
            raise ValueError("--no-words: emotion is read from the pass that the words use")
        return understanding_emotion.measure(
            rows,
            config,
            understanding_emotion.Options(
                root=arguments.root,
                n_streams=arguments.streams,
                fold_weights=arguments.fold_weights,
                read_s=arguments.quiet_s,
            ),
        )
    raise ValueError(f"{arguments.manifest}: no row with `events` or `emotion`")


def read_rows(manifest: Path, path_part: str) -> list[Mapping[str, Any]]:
    """The rows of a manifest whose path contains `path_part`.

    Raises:
        ValueError: a line is no row; names it.
    """
    rows: list[Mapping[str, Any]] = []
    for line_number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if path_part in row["path"]:
                rows.append(row)
        except (ValueError, KeyError, TypeError) as exc:
            raise ValueError(f"{manifest}:{line_number}: no row: {exc!r}") from exc
    return rows


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_clip_options(parser)
    parser.add_argument("--every", type=int, default=1, help="only every so many-th row")
    parser.add_argument("--limit", type=int, default=None, help="only so many rows, the first ones")
    parser.add_argument("--config", type=Path, default=None, help="a config.toml; else the defaults")
    parser.add_argument("--streams", type=int, default=1, help="streams at once, in one engine")
    parser.add_argument("--no-words", action="store_true", help="hear sounds alone: the same events, cheaper")
    parser.add_argument(
        "--fold-weights", type=Path, default=None, help="folder of heads trained without what they hear"
    )
    parser.add_argument(
        "--quiet-s",
        type=float,
        default=900.0,
        help="seconds of speech, and of music, for false alarms and neutral reading",
    )
    arguments = parser.parse_args()
    if arguments.streams < 1 or arguments.every < 1:
        parser.error("--streams, --every: expected at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
