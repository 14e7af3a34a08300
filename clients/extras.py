"""What to install where a package is missing: moss-live comes as a wheel or a checkout, from no index."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml names."""
    return f"pip install '.[{extra}]' in the checkout, or pip install 'WHEEL[{extra}]' with the wheel's file"
