"""Builds the native kernels into src/headrace/ops/_native/libheadrace.so.

A hatchling hook, also for editable installs; `python hatch_build.py` does the same by hand. Files
in csrc/ are compiled once, files in csrc/kernels/ once per instruction-set level that they differ
at. Objects are kept in build/native, named by a hash of what they depend on. Without a compiler the
package installs all the same and its operators run in torch. Knows nothing of what kernels compute.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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
_PLAIN_KERNELS = {
    *("collective", "copy", "elementwise", "linear", "linear_heads", "linear_pack", "moe"),
    *("norm", "rope"),
}
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vnni"]
LEVELS = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": _AVX512_BF16,  # its own instructions are inline assembly
}
"""Level names in the order of hr_level, with their flags; other machines build the first only."""

# An operator that a level lacks is that of the level below (csrc/api.cpp): these files name nothing
# that avx512_bf16 adds, and all that amx adds is in csrc/kernels/amx and reached from these.
_SAME_AS_AVX512 = {
    *("attention", "collective", "copy", "elementwise", "linear_fp8", "linear_pack"),
    *("log_probs", "mask", "norm", "rope", "sample"),
}
_REACH_AMX = {"linear", "linear_block", "linear_heads", "linear_tile", "moe"}
_WORTH_PARSING_ONCE = 3
_LONGEST = "attention"  # a third of the work: it is in headers, once per type of the cache


class Unit(NamedTuple):
    """One compilation; `level` flags are all that decides what the compiler's own headers hold."""

    source: Path
    name: str  # of the object
    level: Sequence[str] = ()
    flags: Sequence[str] = ()


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
    command = compiler()
    objects = compile_all(command, units(), OBJECTS)
    for stale in set(OBJECTS.glob("*.o")) - set(objects):
        stale.unlink()
    _check_nothing_shared([path for path in objects if any(f"-{x}-" in path.name for x in LEVELS)])
    LIBRARY.parent.mkdir(exist_ok=True)
    fresh = LIBRARY.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run([*command, "-shared", "-o", str(fresh), *map(str, objects)], check=True)
    fresh.replace(LIBRARY)  # a process that has the old one mapped keeps it
    return LIBRARY


def compiler() -> list[str]:
    """How every compilation begins; FileNotFoundError as in `build`."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found or not shutil.which(found.split()[0]):
        raise FileNotFoundError("no C++ compiler; install g++ or set CXX")
    return [*found.split(), *FLAGS]


def units() -> list[Unit]:
    """All of this machine's library, the slow ones first, going by their size but for one."""
    levels = list(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]
    wanted = os.environ.get("HEADRACE_BUILD_LEVELS")
    if wanted:  # for work on kernels: the levels left out must not be chosen at run time
        levels = [level for level in levels if level in wanted.split(",")]
    made = [
        Unit(path, f"{path.stem}-{level}", LEVELS[level], [*_optimization(path), number(level)])
        for level in levels
        for path in kernels(level)
    ]
    made.sort(key=lambda unit: (unit.source.stem != _LONGEST, -unit.source.stat().st_size))
    return made + [Unit(path, path.stem) for path in sorted(SOURCES.glob("*.cpp"))]


def kernels(level: str) -> list[Path]:
    """The kernel files that are compiled for a level."""
    folder = SOURCES / "kernels"
    files = sorted(folder.glob("*.cpp"))
    if level == "avx512_bf16":
        return [path for path in files if path.stem not in _SAME_AS_AVX512]
    if level == "amx":
        own = sorted((folder / "amx").glob("*.cpp"))
        return [path for path in files if path.stem in _REACH_AMX] + own
    return files


def _optimization(path: Path) -> list[str]:
    return _PLAIN if path.stem in _PLAIN_KERNELS else []


def number(level: str) -> str:
    """What tells a kernel file its level."""
    return f"-DHR_LEVEL={list(LEVELS).index(level)}"


def compile_all(command: list[str], units: Sequence[Unit], folder: Path) -> list[Path]:
    """The objects in `folder`, in the order of `units`; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.h")))
    objects = [folder / _object_name(command, unit, headers) for unit in units]
    missing = [pair for pair in zip(units, objects, strict=True) if not pair[1].exists()]
    often = Counter(tuple(unit.level) for unit, _ in missing if unit.level)
    levels = [level for level, count in often.items() if count >= _WORTH_PARSING_ONCE]
    with TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(os.cpu_count()) as workers:
        parse = partial(_parse_intrinsics, command, Path(scratch))
        parsed = dict(zip(levels, workers.map(parse, levels), strict=True))
        for done in [
            workers.submit(_compile, [*command, *parsed.get(tuple(unit.level), ())], unit, target)
            for unit, target in missing
        ]:
            done.result()
    return objects


def _object_name(command: list[str], unit: Unit, headers: bytes) -> str:
    arguments = " ".join([*command, *unit.level, *unit.flags])
    what = hashlib.sha256(arguments.encode() + headers + unit.source.read_bytes())
    return f"{unit.name}-{what.hexdigest()[:16]}.o"


def _parse_intrinsics(command: list[str], folder: Path, level: Sequence[str]) -> list[str]:
    """Arguments that let units begin with the compiler's intrinsics already parsed, which is most
    of the work for small files. gcc alone: where it cannot use that, it reads the text instead."""
    if "clang" in command[0]:
        return []
    text = folder / f"{hashlib.sha256(' '.join(level).encode()).hexdigest()[:16]}.h"
    text.write_text("#include <immintrin.h>\n")
    result = [*command, *level, "-x", "c++-header", str(text), "-o", f"{text}.gch"]
    subprocess.run(result, check=True)
    return ["-include", str(text)]


def _compile(command: list[str], unit: Unit, target: Path) -> None:
    fresh = target.with_suffix(f".{os.getpid()}.tmp")
    arguments = [*command, *unit.level, *unit.flags, "-c", str(unit.source), "-o", str(fresh)]
    subprocess.run(arguments, check=True)
    fresh.replace(target)


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
