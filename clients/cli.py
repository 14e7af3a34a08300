"""`moss-live`: the entry point, which says what to install where a package is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from clients.commands import group
    except ModuleNotFoundError as exc:
        sys.exit(f"moss-live needs {exc.name}: pip install 'moss-live[clients]' (or [server])")
    group(prog_name="moss-live")


if __name__ == "__main__":
    main()
