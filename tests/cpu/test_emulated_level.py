"""The highest level's low-bit kernels, on machines that lack its int8 dot instruction.

The kernels are compiled with the instruction emulated (HR_EMULATE, csrc/kernels/dot_int8.h) into
the library of a copy of the package, on which tests/cpu/test_native_lowbit.py then runs: layouts
and logic of that level are the tested ones, but for one instruction.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headrace.ops.cpu import library

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "csrc"
LOWBIT = ("linear_int8", "linear_int4", "linear_fp8")
FLAGS = [
    *("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno"),
    *("-fno-trapping-math", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-w"),
]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
HIGHEST = "hr_level hr::best_level() { return HR_AVX512_BF16; }"

if library.LIBRARY is None or "avx512" not in library.levels() or not shutil.which("g++"):
    pytest.skip("needs the native kernels, AVX-512 and g++", allow_module_level=True)


def build(folder: Path, target: Path) -> None:
    """Low-bit kernels of level 3 with the emulation; of all others only the names matter."""
    isa = folder / "isa.cpp"
    isa.write_text(f'#include "{SOURCES}/isa.h"\n{HIGHEST}\n')
    kernels = sorted((SOURCES / "kernels").glob("*.cpp"))
    emulated = ["-O1", "-DHR_LEVEL=3", "-DHR_EMULATE", *AVX512]
    units = [(path, emulated) for path in kernels if path.stem in LOWBIT]
    units += [(path, ["-O0", "-DHR_LEVEL=0"]) for path in kernels if path.stem not in LOWBIT]
    units += [(path, ["-O1"]) for path in SOURCES.glob("*.cpp") if path.stem != "isa"]
    units.append((isa, ["-O1"]))

    def compile(unit: tuple[Path, list[str]]) -> str:
        made = folder / f"{unit[0].stem}.o"
        subprocess.run(["g++", *FLAGS, *unit[1], "-c", unit[0], "-o", made], check=True)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(compile, units))
    target.parent.mkdir()
    subprocess.run(["g++", "-shared", "-pthread", "-o", target, *objects], check=True)


@pytest.mark.slow
def test_low_bit_kernels_of_the_highest_level(tmp_path: Path) -> None:
    package = tmp_path / "copy" / "headrace"
    left_out = shutil.ignore_patterns("_native", "__pycache__")
    shutil.copytree(ROOT / "src" / "headrace", package, ignore=left_out)
    objects = tmp_path / "objects"
    objects.mkdir()
    build(objects, package / "ops" / "_native" / "libheadrace.so")
    asked = ["-q", "-p", "no:cacheprovider", "-k", "avx512_bf16", "tests/cpu/test_native_lowbit.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(package.parent), "HEADRACE_CPU_ISA": "avx512_bf16"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
