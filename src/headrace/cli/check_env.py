"""`headrace check-env`: what this machine is, and which implementation serves each operator.

As text and as JSON. Loads no model and starts nothing. Does not know how operators work.
"""

import argparse
import importlib.util
import platform
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from headrace import __version__
from headrace.core.hardware import detect

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn", "pyzmq")
# package -> what is missing without it
_EXTRAS = {"openai": "tests against the official SDK", "pytest": "tests", "hypothesis": "tests"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(namespace: argparse.Namespace) -> int:
    found = examine()
    if namespace.json:
        print(msgspec.json.encode(found).decode())
    else:
        print(report(found))
    return 0


def examine() -> dict[str, Any]:
    """Facts by section; sizes in bytes."""
    hardware = detect()
    return {
        "headrace": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": hardware.cores,
        "memory_limit": hardware.memory_limit,
        "memory_available": hardware.memory_available,
        "native_bf16": hardware.bf16,
        "kernels": _kernels(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "missing_extras": {
            name: why for name, why in _EXTRAS.items() if importlib.util.find_spec(name) is None
        },
    }


def _kernels() -> dict[str, Any]:
    from headrace import ops
    from headrace.ops.cpu import library

    operators = ops.implementations()
    if library.LIBRARY is None:
        reason = "the native library was not built (no C++ compiler at installation)"
        return {"native": False, "why": reason, "operators": operators}
    reason = "the highest that CPU and system allow"
    if library.level() != library.levels()[-1]:
        reason = "HEADRACE_CPU_ISA asks for it"
    return {
        "native": True,
        "level": library.level(),
        "levels": library.levels(),
        "why": reason,
        "amx": {"in_use": library.level() == "amx", "why": _amx(library.level(), library.amx())},
        "operators": operators,
    }


def _amx(level: str, found: str) -> str:
    """`found`: what CPU and system say to it."""
    if level == "amx":
        return f"{found}, used"
    return f"{found}, but HEADRACE_CPU_ISA asks for {level}" if "granted" in found else found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _wrapped(line: str) -> list[str]:
    """Continued under the second column."""
    return textwrap.wrap(line, 100, subsequent_indent=" " * 11)


def report(found: dict[str, Any]) -> str:
    """The facts for people, within 100 columns."""
    kernels = found["kernels"]
    lines = [
        f"headrace {found['headrace']}, Python {found['python']} ({sys.executable})",
        f"system     {found['platform']}",
        f"cores      {found['cores']} usable (affinity and cgroup quota)",
        f"ranks      up to {found['cores']} with cores of their own (--tp-size x --pp-size)",
        f"memory     {found['memory_available'] / 2**30:.1f} GiB available of "
        f"{found['memory_limit'] / 2**30:.1f} GiB",
    ]
    if kernels["native"]:
        others = ", ".join(kernels["levels"])
        lines.append(f"kernels    {kernels['level']}: {kernels['why']} (here: {others})")
        lines.append(f"amx        {kernels['amx']['why']}")
    else:
        lines.append(f"kernels    torch: {kernels['why']}")
    for name in sorted(set(kernels["operators"].values())):
        served = sorted(op for op, by in kernels["operators"].items() if by == name)
        lines += _wrapped(f"  by {name:<5} {', '.join(served)}")
    packages = (f"{name} {number}" for name, number in found["packages"].items())
    lines += _wrapped(f"packages   {', '.join(packages)}")
    for name, why in found["missing_extras"].items():
        lines.append(f"missing    {name}: {why}")
    return "\n".join(lines)
