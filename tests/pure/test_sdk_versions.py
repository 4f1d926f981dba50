"""The table of tested packages in docs/protocols.md has the versions that tests/sdk pins."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SDK = ROOT / "tests" / "sdk"


def test_the_table_has_the_pinned_versions():
    page = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    python = dict(
        line.split("==")
        for line in (SDK / "requirements.txt").read_text(encoding="utf-8").split()
        if "==" in line
    )
    node = json.loads((SDK / "node" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    names = ("langchain-openai", "litellm", "instructor", "lm_eval", "schemathesis")
    for name in names:
        assert re.search(rf"^\| `{name}` \| {re.escape(python[name])} \|", page, re.M), name
    assert f"`openai` (Python) | {python['openai']} and" in page
    assert f"`langchain-tests` {python['langchain-tests']}" in page
    assert f"`openai` (Node) | {node['openai']} |" in page
    three = (node[name] for name in ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai"))
    assert f"| {', '.join(three)} |" in page


def test_the_lock_file_names_no_registry():
    lock = (SDK / "node" / "package-lock.json").read_text(encoding="utf-8")
    assert "resolved" not in lock
