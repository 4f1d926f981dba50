"""The rules of the house, checked on the source: layers, sizes, names, unsafe calls."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "headrace"
FILES = sorted(SOURCE.rglob("*.py"))

# package -> packages of ours that it may import (docs/architecture.md shows the same table)
LAYERS: dict[str, set[str]] = {
    "core": set(),
    "ipc": {"core"},
    "cache": {"core"},
    "metrics": {"core"},
    "text": {"core"},
    "assets": set(),
    "ops": {"core"},
    "dist": {"core", "ops"},
    "quant": {"core", "ops", "dist"},
    "layers": {"core", "ops", "dist", "quant"},
    "models": {"core", "ops", "dist", "quant", "layers"},
    "loader": {"core", "ops", "dist", "quant", "layers", "models"},
    "scheduler": {"core", "cache", "metrics"},
    "sim": {"core", "cache", "scheduler"},
    "runner": {"core", "ipc", "ops", "dist", "layers", "loader"},
    "grammar": {"core", "text", "metrics", "scheduler", "ops"},
    "processors": {"core", "text", "scheduler"},
    "frontend": {"core", "ipc", "text", "metrics"},
    "server": {"core", "frontend", "text", "metrics"},
    "engine": {
        "core", "ipc", "cache", "metrics", "text", "assets", "ops", "dist", "quant", "layers",
        "models", "loader", "scheduler", "runner", "frontend", "server", "grammar",
        "processors",
    },
    "bench": {"core", "text", "engine", "assets", "ops", "dist", "loader", "runner", "grammar"},
    "cli": {"core", "engine", "bench", "assets", "text", "ops", "sim"},
}  # fmt: skip
NO_TORCH = {
    "core",
    "cache",
    "scheduler",
    "ipc",
    "text",
    "frontend",
    "server",
    "metrics",
    "bench",
    "sim",
}
# Words that name features; only their own folder, the composition root and config may use them.
UNSAFE = re.compile(
    r"\b(pickle|dill|cloudpickle|marshal)\b|recv_pyobj|send_pyobj|(?<![\w.])eval\(|(?<![\w.])exec\("
    r"|torch\.load\(|yaml\.load\(|shell=True"
)
# Reads .bin files, if the operator asks for it, with torch's restricted reader.
MAY_BE_UNSAFE = {"loader/torch_file.py"}


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """Every imported module, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downward(path):
    package = package_of(path)
    if not package:
        return
    assert package in LAYERS, f"{package} is not in the table of layers"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "headrace" and len(parts) > 1 and (SOURCE / parts[1]).is_dir():
            assert parts[1] in LAYERS[package] | {package}, f"{path.name} imports {name}"
        if package in NO_TORCH:
            assert parts[0] != "torch", f"{path.name} imports torch"


def test_layers_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(LAYERS):
        free = [name for name, below in LAYERS.items() if name not in done and below <= done]
        assert free, f"cycle among {LAYERS.keys() - done}"
        done.update(free)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_sizes_and_names(path):
    text = path.read_text(encoding="utf-8")
    tree = tree_of(path)
    assert len(text.splitlines()) <= 450, "a file holds one idea in at most 450 lines"
    if text.strip():
        assert ast.get_docstring(tree), "a file opens with what it does"
    assert path.stem not in {"utils", "common", "helpers", "managers", "util", "misc"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith("Mixin")
            assert node.end_lineno - node.lineno <= 300, f"{node.name} is too long"
    for function in functions_of(path):
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{function.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_unsafe(path):
    if str(path.relative_to(SOURCE)) in MAY_BE_UNSAFE:
        assert "weights_only=True" in path.read_text(encoding="utf-8")
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        code = line.split("#")[0]
        assert not UNSAFE.search(code), f"{path.name}:{number}: {line.strip()}"


def test_import_is_light():
    """Importing headrace and building the command line pull in nothing heavy."""
    import subprocess
    import sys

    code = (
        "import sys, headrace, headrace.cli.main as m; m.build_parser('serve');"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'zmq', 'tokenizers'} - {'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_every_option_is_read():
    """An option that nothing reads is a promise that nobody keeps."""
    from headrace.core.config import Config

    declaring = ("config.py", "weight_options.py")
    everything = "".join(
        path.read_text(encoding="utf-8") for path in FILES if path.name not in declaring
    )
    unread = [
        field.name
        for field, _ in Config().items()
        if not re.search(rf"\.{field.name}\b", everything)
    ]
    assert not unread, f"nothing reads {unread}"
