"""Imports point one way: clients see the protocol, the server sees no tensor, the model nothing of ours."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("bench", "clients", "model", "scripts", "streaming", "tests", "training")

# Package -> the modules of ours it may import. Programs beside the product may use all of it.
MAY_IMPORT = {
    "model": ("model",),
    "streaming": ("streaming",),
    "streaming/protocol": ("streaming.protocol",),
    "streaming/engine": ("streaming", "model"),
    "clients": ("clients", "streaming.protocol"),
}
# Weights are a file, or come by a library; nothing else leaves `model`, and nothing runs beside it.
NOT_IN_MODEL = ("asyncio", "socket", "threading", "multiprocessing", "subprocess", "websockets", "concurrent")
TENSORS = ("torch", "transformers", "safetensors")


def imported(path: Path) -> Iterator[str]:
    """Every module a file names in an import, lazy ones too; `from a import b` may name a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            yield from (f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of `packages` or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def files_of(package: str) -> list[Path]:
    """A package's files, without those of a package inside it that has rules of its own."""
    inner = [ROOT / name for name in MAY_IMPORT if name.startswith(f"{package}/")]
    return [
        path
        for path in sorted((ROOT / package).rglob("*.py"))
        if not any(folder in path.parents for folder in inner)
    ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    """Clients see the protocol alone, the engine sees the model, the model sees neither."""
    assert files_of(package)
    for path in files_of(package):
        for name in imported(path):
            if within(name, OURS):
                assert within(name, MAY_IMPORT[package]), f"{path} imports {name}"


@pytest.mark.parametrize("package", ["streaming", "clients"])
def test_tensors_stay_in_the_engine(package: str) -> None:
    """The server's process and the clients run without torch."""
    for path in files_of(package):
        for name in imported(path):
            assert not within(name, TENSORS), f"{path} imports {name}"


def test_the_server_starts_the_engine_without_importing_its_model() -> None:
    """Of `streaming.engine`, the server imports only modules that import no tensor themselves."""
    for path in files_of("streaming"):
        for name in imported(path):
            if within(name, ("streaming.engine",)):
                engine_file = _file_of(name)
                heavy = [other for other in imported(engine_file) if within(other, (*TENSORS, "model"))]
                assert not heavy, f"{path} imports {name}, which imports {heavy}"


def test_the_protocol_needs_msgspec_alone() -> None:
    """A client can be written with this one package: no other module of ours, no other library."""
    for path in files_of("streaming/protocol"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top == "msgspec" or within(name, ("streaming.protocol",))


def test_the_model_does_no_io_and_starts_nothing() -> None:
    """No socket, no thread, no process, no event loop."""
    for path in files_of("model"):
        for name in imported(path):
            assert not within(name, NOT_IN_MODEL), f"{path} imports {name}"


@pytest.mark.parametrize(
    "module", ["clients.cli", "clients.commands", "clients.captions", "clients.subscriber"]
)
def test_clients_import_without_torch(module: str) -> None:
    """What is imported at run time, by any detour."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'model' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def _file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
