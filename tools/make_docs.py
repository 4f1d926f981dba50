"""Writes docs/options.md and docs/metrics.md from the declarations in the code.

`--check` only says whether the files are current (used by the tests).
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from headrace.core.config import Config
from headrace.core.option import Option, value_type
from headrace.core.secret import Secret
from headrace.metrics.catalog import CATALOG
from headrace.metrics.compat import TABLES

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by tools/make_docs.py; do not edit. -->\n"


def options_page() -> str:
    """A table of flags for each component."""
    lines = ["# Server options", "", NOTE]
    lines += [
        "`headrace serve --help` prints the same. A YAML file given by `--config` may set any of",
        "them by name; flags win over the file.",
    ]
    for part in dataclasses.fields(Config):
        section: Any = part.default
        lines += ["", f"## {part.name}", "", (type(section).__doc__ or "").strip(), ""]
        lines += ["| flag | type | default | meaning |", "|---|---|---|---|"]
        lines += [option_row(field) for field in dataclasses.fields(section)]
    return "\n".join(lines) + "\n"


def option_row(field: "dataclasses.Field[Any]") -> str:
    details: Option = field.metadata["option"]
    flags = ["--" + field.name.replace("_", "-"), *details.aliases]
    kind = " \\| ".join(details.choices) or value_type(field).__name__
    default = "" if field.default in (None, "", Secret()) else f"`{field.default}`"
    names = " ".join(f"`{flag}`" for flag in flags)
    return f"| {names} | {kind} | {default} | {details.help} |"


def metrics_page() -> str:
    """A table of everything /metrics serves."""
    lines = ["# Metrics", "", NOTE, "Served at `/metrics` in the Prometheus text format.", ""]
    lines += ["| name | type | meaning |", "|---|---|---|"]
    lines += [f"| `{metric.name}` | {metric.kind} | {metric.help} |" for metric in CATALOG]
    for server, table in TABLES.items():
        if table.aliases:
            lines += ["", *compat_lines(server)]
    return "\n".join(lines) + "\n"


def compat_lines(server: str) -> list[str]:
    """The names of another server, and what they show."""
    table = TABLES[server]
    labels = ", ".join(f'`{name}="{value}"`' for name, value in table.labels.items())
    lines = [f"## `--metrics-compat {server}`", "", f"Besides `model_name` they have {labels}.", ""]
    lines += ["| name | is |", "|---|---|"]
    for alias in table.aliases:
        named = ",".join(f'{name}="{value}"' for name, value in alias.labels.items())
        name = f"{alias.name}{{{named}}}" if named else alias.name
        lines.append(f"| `{name}` | `{alias.metric.name}` |")
    lines += [f"| `{info.name}` | {info.help} |" for info in table.infos]
    return lines


PAGES = {"options.md": options_page, "metrics.md": metrics_page}


def main() -> int:
    """Write the pages, or with --check compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != page()
    ]
    for name in stale:
        if check:
            print(f"docs/{name} is stale: run `make docs`", file=sys.stderr)
        else:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
