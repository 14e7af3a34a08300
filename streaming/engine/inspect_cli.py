"""The `moss-live inspect` command: what a checkpoint is, what it needs in memory, whether it fits.

Reads configuration, tokenizer and the headers of weight files; never a weight. Of a hub id it fetches
only what describes it, unless `--fetch` asks for the weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from streaming.config import ConfigError, config_path, find_config, with_overrides


@click.command()
@click.argument("model")
@click.option("--streams", type=int, help="Live streams at once. Default: engine.n_slots.")
@click.option("--window", type=float, help="Seconds of audio kept per stream. Default: moss.window_s.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: model.device.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Default: model.dtype."
)
@click.option("--config", "path", type=click.Path(path_type=Path), help="As of `serve`.")
@click.option("--fetch", is_flag=True, help="Download the weights of a hub id, too, with progress.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    model: str,
    streams: int | None,
    window: float | None,
    device: str | None,
    dtype: str | None,
    path: Path | None,
    *,
    fetch: bool,
    as_json: bool,
) -> None:
    """Say what MODEL (a name that ships, a folder or a hub id) is, what it needs, and whether it fits.

    The status is 0 where it fits or that is unknown, 1 where it does not fit or its weights are
    wrong, 2 where it cannot be read.
    """
    from model.errors import CheckpointError
    from streaming.engine.inspect_report import describe

    given: dict[str, dict[str, object]] = {
        "engine": {"n_slots": streams},
        "moss": {"window_s": window},
        "model": {"name": model, "device": device, "dtype": dtype},
    }
    overrides = {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in given.items()
    }
    try:
        found = describe(with_overrides(find_config(path or config_path()), overrides), fetch=fetch)
    except (ConfigError, CheckpointError) as exc:
        click.echo(str(exc), err=True)
        sys.exit(2)
    click.echo(json.dumps(found) if as_json else _text(found))
    sys.exit(1 if found.get("problems") or found["memory"]["fits"] is False else 0)


def _text(found: Mapping[str, Any]) -> str:
    """The facts for people: a paragraph per section, a line per fact."""
    lines = [f"{found['name']}: {found['what']}"]
    lines += [f"  {key.replace('_', ' '):<14}{value}" for key, value in found["facts"].items()]
    memory = found["memory"]
    lines += ["", f"Memory for {memory['for']}"]
    lines += [f"  {part['name']:<14}{part['text']:>10}  {part['of']}".rstrip() for part in memory["parts"]]
    lines.append(f"  {'needed':<14}{memory['needed_text']:>10}")
    lines.append(f"  {'available':<14}{memory['available_text']:>10}  {memory['where']}")
    lines.append(f"  {memory['verdict']}")
    lines += ["", *found["problems"]] if found.get("problems") else []
    return "\n".join(lines)
