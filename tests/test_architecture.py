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

# The parts of `streaming`: each imports only leaves and what stands before it here.
LEVELS = (
    "streaming.engine.contract",
    "streaming.engine.messages",
    "streaming.engine.client",
    "streaming.engine",  # its process and its commands: whatever else lies in the folder
    "streaming.timeline",
    "streaming.audio",
    "streaming.log",
    "streaming.stream",
    "streaming.server",
    "streaming.adaptors",
    "streaming.app",
    "streaming.cli",
)
# Leaves of `streaming`: each knows the standard library, other leaves before it, and no folder.
LEAVES = (
    "streaming.protocol",
    "streaming.aio",
    "streaming.descriptors",
    "streaming.text",
    "streaming.patterns",
    "streaming.tokens",
    "streaming.errors",
    "streaming.refusals",
    "streaming.query",
    "streaming.problems",
    "streaming.config",
    "streaming.metrics",
    "streaming.logging_setup",
)
# What server and engine say to each other: the engine's own side of it imports no more than the server does.
CONTRACT = ("streaming.engine.contract", "streaming.engine.messages")
# Package -> the modules of ours it may import. Programs beside the product may use all of it.
MAY_IMPORT = {
    "model": ("model",),
    "streaming": ("streaming",),  # app and cli, which put the parts together
    "streaming/protocol": ("streaming.protocol",),
    "streaming/audio": ("streaming.audio", *CONTRACT, *LEAVES),
    "streaming/timeline": ("streaming.timeline", *CONTRACT, *LEAVES),
    "streaming/log": ("streaming.log", *LEAVES),
    "streaming/stream": (
        "streaming.stream",
        "streaming.audio",
        "streaming.timeline",
        "streaming.log",
        "streaming.engine.client",
        *CONTRACT,
        *LEAVES,
    ),
    "streaming/server": (
        "streaming.server",
        "streaming.stream",
        "streaming.log",
        "streaming.audio.ingest",
        "streaming.engine.client",
        *LEAVES,
    ),
    "streaming/adaptors": (
        "streaming.adaptors",
        "streaming.server.conversation",
        "streaming.server.routes",
        "streaming.server.ws",
        "streaming.stream",
        "streaming.log.row",
        "streaming.audio",
        *LEAVES,
    ),
    "streaming/engine": ("streaming.engine", "model", *LEAVES),
    "streaming/engine/runners": ("streaming.engine", "model", *LEAVES),
    "clients": ("clients", "streaming.protocol"),
}
# What may not even be named: no clock and no event loop where results must follow from samples alone.
IS_PURE = {
    "streaming/timeline": ("asyncio", "time", "datetime", "socket", "threading"),
    "streaming/audio": ("asyncio", "time", "datetime", "socket", "threading", "websockets"),
    "streaming/stream": ("socket", "websockets"),
    "streaming/log": ("socket", "websockets"),
}
MAY_NAME = {"streaming/audio/container.py": ("asyncio", "threading")}  # its decoder is a thread of its own
SANS_IO = ("streaming/stream/feed.py", "streaming/stream/snapshot.py", "streaming/audio/vad.py")
# Weights are a file, or come by a library; nothing else leaves `model`, and nothing runs beside it.
NOT_IN_MODEL = ("asyncio", "socket", "threading", "multiprocessing", "subprocess", "websockets", "concurrent")
MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 450, 300, 60
OUR_FILES = sorted(path.relative_to(ROOT) for package in OURS for path in (ROOT / package).rglob("*.py"))
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


@pytest.mark.parametrize("package", IS_PURE)
def test_a_folder_keeps_its_invariant(package: str) -> None:
    """Its results follow from what it is given: it names no clock, no socket and no event loop."""
    for path in files_of(package):
        allowed = MAY_NAME.get(str(path.relative_to(ROOT)), ())
        for name in imported(path):
            assert not within(name, IS_PURE[package]) or within(name, allowed), f"{path} imports {name}"


@pytest.mark.parametrize("name", SANS_IO)
def test_the_dialogue_does_no_io(name: str) -> None:
    """One stream's dialogue with an engine, for any caller: a server, a test, a bench."""
    for module in imported(ROOT / name):
        assert not within(module, (*NOT_IN_MODEL, "time", "datetime")), f"{name} imports {module}"


def test_leaves_import_leaves_alone() -> None:
    """Each only those that stand before it in the list."""
    for idx, leaf in enumerate(LEAVES):
        path = ROOT / leaf.replace(".", "/")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            for name in imported(file):
                if within(name, OURS):
                    assert within(name, LEAVES[: idx + 1]), f"{file} imports {name}"


def test_no_import_runs_against_the_levels() -> None:
    """The parts of `streaming` have an order, so there is no circle of any length among them."""
    for path in sorted((ROOT / "streaming").rglob("*.py")):
        importer = _level_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imported(path):
            if within(name, ("streaming",)):
                assert _level_of(name) <= importer, f"{path} imports {name}"


def _level_of(module: str) -> int:
    """Where a module stands: the index of the narrowest part of LEVELS that holds it; a leaf is below all."""
    parts = [part for part in LEVELS if within(module, (part,))]
    if parts:
        return LEVELS.index(max(parts, key=len))
    assert within(module, LEAVES) or module in ("streaming", "streaming.__init__"), f"{module} has no level"
    return -1


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


def test_files_classes_and_functions_are_small() -> None:
    """No file over 450 lines; in the product no class over 300 and no function over 60."""
    assert [name for path in OUR_FILES for name in _larger_in(path)] == []


def _larger_in(path: Path) -> Iterator[str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    if text.count("\n") > MAX_FILE_LINES:
        yield str(path)
    if path.parts[0] not in ("model", "streaming", "clients"):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            most = MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES
            if node.end_lineno - node.lineno + 1 > most:
                yield f"{path}: {node.name}"


def _file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
