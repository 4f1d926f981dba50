"""Builds the native kernels into src/headrace/ops/_native/libheadrace.so.

A hatchling hook, also for editable installs; `python hatch_build.py` does the same by hand. Files
in csrc/ are compiled once, files in csrc/kernels/ once per instruction-set level. Objects are kept
in build/native, named by a hash of what they depend on. Without a compiler the package installs
all the same and its operators run in torch. Knows nothing of what the kernels compute.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"
OBJECTS = ROOT / "build" / "native"
LIBRARY = ROOT / "src" / "headrace" / "ops" / "_native" / "libheadrace.so"

# Contraction is off so that only explicit fma fuses; -ffast-math and -march=native never appear.
# gcc 12 takes the intrinsics' own undefined values for mistakes: hence two warnings less.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
# Kernels that name all their vectors gain nothing from -O3, which doubles their compile time; loops
# over a tile must be unrolled whole all the same, which -fpeel-loops allows.
_PLAIN = ["-O2", "-fpeel-loops"]
_PLAIN_KERNELS = {"copy", "elementwise", "linear", "linear_pack", "moe", "norm", "rope"}
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"],
}
"""Level names in the order of hr_level, with their flags; other machines build the first only."""


class NativeHook(BuildHookInterface[Any]):
    """Called by hatchling for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        try:
            build()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"headrace: no native kernels, torch will serve ({error})", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
        build_data["artifacts"].append("src/headrace/ops/_native/*.so")


def build() -> Path:
    """Compile what changed and link; returns the library.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.CalledProcessError: the compiler refused; its words are on stderr.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        raise FileNotFoundError("no C++ compiler; install g++ or set CXX")
    command = [*compiler.split(), *FLAGS]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.h")))
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(lambda unit: _compile(command, *unit, headers), _units()))
    for stale in set(OBJECTS.glob("*.o")) - set(objects):
        stale.unlink()
    _check_nothing_shared([path for path in objects if any(f"-{x}-" in path.name for x in LEVELS)])
    LIBRARY.parent.mkdir(exist_ok=True)
    fresh = LIBRARY.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run([*command, "-shared", "-o", str(fresh), *map(str, objects)], check=True)
    fresh.replace(LIBRARY)  # a process that has the old one mapped keeps it
    return LIBRARY


def _units() -> list[tuple[Path, list[str], str]]:
    """(source, extra flags, name of the object), the slow ones first."""
    levels = (
        list(LEVELS.items()) if platform.machine() in ("x86_64", "AMD64") else [("portable", [])]
    )
    wanted = os.environ.get("HEADRACE_BUILD_LEVELS")
    if wanted:  # for work on kernels: the levels left out must not be chosen at run time
        levels = [level for level in levels if level[0] in wanted.split(",")]
    kernels = sorted((SOURCES / "kernels").glob("*.cpp"), key=lambda path: -path.stat().st_size)
    return [
        (path, [*_optimization(path), *flags, _number(level)], f"{path.stem}-{level}")
        for path in kernels
        for level, flags in levels
    ] + [(path, [], path.stem) for path in sorted(SOURCES.glob("*.cpp"))]


def _optimization(path: Path) -> list[str]:
    return _PLAIN if path.stem in _PLAIN_KERNELS else []


def _number(level: str) -> str:
    return f"-DHR_LEVEL={list(LEVELS).index(level)}"


def _compile(command: list[str], source: Path, flags: list[str], name: str, headers: bytes) -> Path:
    arguments = [*command, *flags]
    what = hashlib.sha256(" ".join(arguments).encode() + headers + source.read_bytes())
    target = OBJECTS / f"{name}-{what.hexdigest()[:16]}.o"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*arguments, "-c", str(source), "-o", str(fresh)], check=True)
        fresh.replace(target)
    return target


def _check_nothing_shared(objects: list[Path]) -> None:
    """The linker keeps one copy of a weak function: it could be one this CPU cannot run."""
    if not shutil.which("nm"):
        return
    listing = subprocess.run(
        ["nm", "--defined-only", "-A", *map(str, objects)],
        check=True,
        capture_output=True,
        text=True,
    )
    weak = [line for line in listing.stdout.splitlines() if line.split()[-2] in ("W", "V", "u")]
    if weak:
        raise OSError(f"a kernel file defines a function that levels would share: {weak[0]}")


if __name__ == "__main__":
    print(build())
