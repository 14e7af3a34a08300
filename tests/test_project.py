"""What a first user meets: the README, config.toml, and the commands both name."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from streaming.config import Config, load_config

ROOT = Path(__file__).resolve().parent.parent


def test_config_toml_holds_every_setting_with_its_default() -> None:
    """The file shows what there is; a setting that is added or changed is added or changed here."""
    path = ROOT / "config.toml"
    assert load_config(path) == Config()
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    expected = Config().model_dump()
    assert {section: sorted(keys) for section, keys in written.items()} == {
        section: sorted(keys) for section, keys in expected.items()
    }


def test_every_setting_has_a_comment() -> None:
    """Its unit, and what happens at the limit."""
    for line in (ROOT / "config.toml").read_text(encoding="utf-8").splitlines():
        if "=" in line.split("#")[0]:
            assert "  # " in line, line


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_names_the_first_commands(command: str) -> None:
    """A new user can start from the README alone."""
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_tree_has_a_line_for_every_file() -> None:
    """Every module and program is named, and everything named exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## What lies where\n.*?```text\n(.*?)```", readme, re.DOTALL)
    assert tree is not None
    named = {line.split()[0] for line in tree[1].splitlines() if line.strip()}
    for name in named:
        assert (ROOT / name).exists(), f"README names {name}, which is not there"
    for package in ("bench", "clients", "model", "scripts", "streaming", "training"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                assert str(path.relative_to(ROOT)) in named, f"README does not name {path}"


def test_ci_runs_what_a_developer_runs() -> None:
    """One command, and it can be run."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


def test_constraints_are_exact_and_name_no_host() -> None:
    """Every line is one version, without a build's local tag."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
