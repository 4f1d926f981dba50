"""The commands of the README run as written, against a real server on another port."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def shell_commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [line.split("    #")[0].strip() for line in lines if line.strip()]
    return [line for line in commands if not line.startswith("make ")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("readme")) as running:
        running.wait_ready()
        yield running


def run(command: list[str], answer: str = "") -> str:
    result = subprocess.run(
        command, input=answer, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("line", shell_commands())
def test_shell_commands(server, line):
    line = line.replace("30000", str(server.port))
    words = shlex.split(line)
    if words[:2] == ["headrace", "serve"]:
        return  # the server of the fixture
    if words[0] == "headrace":
        words = [sys.executable, "-m", *words]
    out = run(words, answer="Hello\n/quit\n" if "chat" in words else "")
    assert len(out.strip()) > 3
    if "capital of France" in line:
        assert "Paris" in out


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks(server, number):
    code = blocks("python")[number].replace("30000", str(server.port))
    assert len(run([sys.executable, "-c", code]).strip()) > 10


@pytest.mark.slow
def test_demo_command():
    out = run([sys.executable, "-m", "headrace", "demo", "--prompt", "What is 12 + 30?"])
    assert "tokens/s" in out and "time to first token" in out and "base_url" in out
