"""Finds a checkpoint's files: one that ships, a local folder, or a Hugging Face id.

The only module of `model` that may use the network, through huggingface_hub: with progress, resuming
broken downloads, and from the cache alone where HF_HUB_OFFLINE is set or the hub cannot be reached.
Knows no format of any file.
"""

from __future__ import annotations

import re
from pathlib import Path

from model.errors import CheckpointError, CheckpointUnavailable

# Checkpoints that ship with the project, by name.
SHIPPED = {"moss-nano": Path(__file__).parent / "weights" / "moss-nano"}
_SHIPS = f"what ships is embedded and {' and '.join(SHIPPED)}"
# Everything but weights: a few megabytes.
DESCRIPTION = ("*.json", "merges.txt", "vocab.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find(name: str, *, with_weights: bool = True) -> Path:
    """The folder of a checkpoint: one that ships, `name` itself, or the download of that id.

    Args:
        name: A name in `SHIPPED`, a folder, or OWNER/NAME.
        with_weights: False fetches everything but weights; weights cached earlier are in the same
            folder.

    Raises:
        CheckpointError: no such folder and no such id, or the hub cannot be reached and the files
            are not all cached.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    if not _ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"{name!r} is neither a folder nor a hub id OWNER/NAME; {_SHIPS}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*DESCRIPTION, *(WEIGHTS if with_weights else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither a folder nor a hub id OWNER/NAME; {_SHIPS}: {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:  # an incomplete or empty cache is an OSError, too
        raise CheckpointUnavailable(
            f"{name!r} is no folder, and the hub does not give it: {error}"
        ) from error
