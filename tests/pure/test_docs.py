"""The documents are true: files they name exist, generated pages are current, commands parse."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.main import build_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:src|tests|tools|docs|csrc)/[\w./-]+)`", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [link for link in linked if not (page.parent / link).exists()]


def names_in(path):
    """Every name that a module defines: classes, functions, fields, variables."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    defined = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in nodes if isinstance(node, defined)} | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_names_exist(page):
    """What is said to be `in` a module of ours is there, and so is each file beside another."""
    text = page.read_text(encoding="utf-8")
    for names, path in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `(src/[\w/]+\.py)`", text):
        known = names_in(ROOT / path)
        missing = [name for name in re.findall(r"\w+", names) if name not in known | {"and"}]
        assert not missing, f"{path} has no {missing}"
    for folder, beside in re.findall(r"`(src/[\w/]+)/\w+\.py`((?:, `\w+\.py`)+)", text):
        for name in re.findall(r"\w+\.py", beside):
            assert (ROOT / folder / name).exists(), f"{folder}/{name}"


def test_generated_pages_are_current():
    command = [sys.executable, str(ROOT / "tools" / "make_docs.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def documented_commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.split(" #")[0], comments=True)
                if words[:1] == ["headrace"]:
                    yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", documented_commands())
def test_documented_flags_exist(words):
    """Every `headrace ...` line in the documents is understood by the command line."""
    words = [word for word in words if word != "&"]
    parser = build_parser(words[0])
    old, sys.argv = sys.argv, ["headrace", *words]
    try:
        assert build_parser(words[0]).parse_args(words).run
    finally:
        sys.argv = old
    assert parser
