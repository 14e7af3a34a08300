"""`moss-live`: the entry point, which says what to install where a package is missing."""

from __future__ import annotations

import io
import os
import sys

from clients.extras import how_to_install

TOKEN_OPTION, TOKEN_ENV = "--token", "MOSS_LIVE_TOKEN"


def main() -> None:
    """Run the command line."""
    _hide_token()
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a console that has no ♪ must not end a stream
    try:
        from clients.commands import group
    except ModuleNotFoundError as exc:
        sys.exit(f"moss-live needs {exc.name}: {how_to_install('clients')} (or [server])")
    group(prog_name="moss-live")


def _hide_token() -> None:
    """Restart with the token of the command line moved to the environment.

    Every user of a machine can read every command line, but not another user's environment.
    """
    rest, token = without_token(sys.orig_argv)
    if token is not None and os.name == "posix":
        os.execve(sys.executable, rest, os.environ | {TOKEN_ENV: token})


def without_token(argv: list[str]) -> tuple[list[str], str | None]:
    """A command line without its token, and the token; the last one where there are several."""
    rest: list[str] = []
    token: str | None = None
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != TOKEN_OPTION:
            rest.append(argument)
        elif equals:
            token = value
        else:
            token = next(arguments, None)
    return rest, token


if __name__ == "__main__":
    main()
