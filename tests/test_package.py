"""The wheel: built, installed into an environment of its own, and run outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import wave
import zipfile
from pathlib import Path

import pytest

from scripts.demo import HOST, free_port, stop, wait_until_ready
from scripts.make_demo_recording import RecordingError, make
from tests.test_project import PROJECT, ROOT

SPEECH_S = 12  # of the demo's call: enough for a sentence
TIMEOUT_S = 240


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built by what is installed here: no network."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # A copy: a build leaves files behind, and the next one would pack those that were removed since.
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]:
        package = pattern.rstrip("*")
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", str(source), "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder))
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel, and of this one the third parties' packages alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    theirs = [path for path in sys.path if Path(path).name == "site-packages"]
    # A folder that a .pth names is searched, but its own .pth files, such as an editable install's,
    # are not read: nothing of the checkout can be imported.
    (packages / "third_parties.pth").write_text("\n".join(theirs))
    scheme = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    assert Path(scheme["purelib"]) == packages
    _pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    return folder


@pytest.mark.slow
def test_the_wheel_holds_code_data_and_weights_and_no_tests(wheel: Path) -> None:
    """What a run needs, under the version of pyproject.toml."""
    version = PROJECT["project"]["version"]
    assert wheel.name == f"moss_live-{version}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("streaming", "model", "clients"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "docs/"))]


@pytest.mark.slow
def test_an_environment_with_the_wheel_runs_the_main_job(environment: Path, tmp_path: Path) -> None:
    """Outside of the checkout: `serve` with the embedded model, `stream`, and a transcript."""
    recording = tmp_path / "call.wav"
    if (ROOT / ".demo" / "call.wav").exists():
        whole = ROOT / ".demo" / "call.wav"
    else:
        whole = tmp_path / "whole.wav"
        try:
            make(whole, tmp_path / "packages")
        except RecordingError as exc:
            pytest.skip(f"the demo's recording cannot be made here: {exc}")
    _cut(whole, recording)
    command = str(environment / "bin" / "moss-live")
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [command, *arguments],
            cwd=tmp_path,
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        ).stdout

    where = "import streaming, model, clients; print(streaming.__file__, model.__file__, clients.__file__)"
    found = subprocess.run(
        [str(environment / "bin" / "python"), "-c", where],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(path.startswith(str(environment)) for path in found.split()), found
    assert PROJECT["project"]["version"] in run("--version")
    port = free_port()
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [command, "serve", "--host", HOST, "--port", str(port)],
            cwd=tmp_path,
            env=surroundings,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(server, port)
        text = run("stream", str(recording), "--name", "call", "--fast", "--server", f"{HOST}:{port}")
        assert len(text.split()) > 5, text
        address = ("--server", f"{HOST}:{port}")
        created = run("subscribe", "call", "--after", "0", "--no-follow", *address).splitlines()[0]
        shown = run("captions", "call", "--session", json.loads(created)["session"], *address)
        assert text.split()[0] in shown
    finally:
        stop(server)


def _cut(source: Path, target: Path) -> None:
    """The first seconds of a WAV file."""
    with wave.open(str(source), "rb") as whole, wave.open(str(target), "wb") as part:
        part.setparams(whole.getparams())
        part.writeframes(whole.readframes(SPEECH_S * whole.getframerate()))
