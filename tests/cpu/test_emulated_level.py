"""The two highest levels, on machines that lack their instructions.

Their kernels are compiled with these instructions emulated (HR_EMULATE: csrc/kernels/dot_bf16.h,
dot_int8.h, amx/emulated.h) into the library of a copy of the package, on which the tests of the
operators then run: layouts, logic and the order of sums of those levels are the tested ones.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace.ops import cpu

if cpu.LIBRARY is None or "avx512" not in cpu.library.levels() or not shutil.which("g++"):
    pytest.skip("needs the native kernels, AVX-512 and g++", allow_module_level=True)

import hatch_build
from hatch_build import LEVELS, SOURCES, Unit
from headrace.ops.cpu import matmul
from headrace.ops.cpu.library import Operator, Step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
EMULATED = ("avx512_bf16", "amx")
HIGHEST = """#include "isa.h"
namespace hr {
hr_level best_level() { return HR_AMX; }
hr_permission amx_permission() { return HR_GRANTED; }
}
"""


def build(folder: Path, library: Path) -> None:
    """The objects of the real library, but for emulated levels and what allows them."""
    isa = folder / "isa.cpp"
    isa.write_text(HIGHEST)
    units = [
        Unit(path, f"{path.stem}-{level}", LEVELS["avx512"], flags)
        for level in EMULATED
        for flags in [["-O2", "-DHR_EMULATE", hatch_build.number(level)]]
        for path in hatch_build.kernels(level)
        if path.stem != "probe"
    ]
    units.append(Unit(isa, "isa", flags=[f"-I{SOURCES}"]))
    # Levels below avx512 are not needed: what a level lacks is looked for in those below it.
    command, replaced = hatch_build.compiler(), {"isa", "portable", "avx2", *EMULATED}
    objects = hatch_build.compile_all(command, units, folder)
    real = [unit for unit in hatch_build.units() if unit.name.split("-")[-1] not in replaced]
    objects += hatch_build.compile_all(command, real, hatch_build.OBJECTS)
    library.parent.mkdir()
    subprocess.run([*command, "-shared", "-o", library, *objects], check=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of headrace whose best level is emulated."""
    folder = tmp_path_factory.mktemp("emulated")
    made = folder / "copy" / "headrace"
    left_out = shutil.ignore_patterns("_native", "__pycache__")
    shutil.copytree(ROOT / "src" / "headrace", made, ignore=left_out)
    build(folder, made / "ops" / "_native" / "libheadrace.so")
    return made


def test_operators(package: Path) -> None:
    files = [
        f"tests/cpu/test_native_{name}.py" for name in ("linear", "lowbit", "experts", "attention")
    ]
    asked = ["-q", "-p", "no:cacheprovider", "-k", " or ".join(EMULATED), *files]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(package.parent), "HEADRACE_CPU_ISA": "amx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


# ---- sums in the documented order --------------------------------------------------------------


class Emulated:
    """Stands in for an `Operator`: the same arguments to the other library."""

    def __init__(self, library: ctypes.CDLL, operator: Operator, args: type) -> None:
        self.library = library
        self.index = library.hr_operator(
            operator.name.encode(), ctypes.c_int64(ctypes.sizeof(args))
        )
        assert self.index >= 0

    def __call__(self, args: ctypes.Structure, step: Step) -> None:
        self.library.hr_call(self.index, ctypes.byref(args), ctypes.byref(step))


@pytest.fixture(params=EMULATED)
def level(
    package: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The products of this process are those of the copy, at one level."""
    library = ctypes.CDLL(str(package / "ops" / "_native" / "libheadrace.so"))
    assert library.hr_set_level(list(LEVELS).index(request.param)) == 0
    pairs = {"_LINEAR": matmul._LinearArgs, "_GATED_LINEAR": matmul._GatedLinearArgs}
    for name, args in pairs.items():
        monkeypatch.setattr(matmul, name, Emulated(library, getattr(matmul, name), args))
    torch.manual_seed(0)
    yield request.param


def add(sums: Tensor, x: Tensor, weight: Tensor, k: int) -> Tensor:
    """One fma: products are exact, so fp64 sums rounded to fp32 are those of the instruction."""
    return (sums.double() + x[:, k, None].double() * weight[:, k].double()).float()


def of_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """VDPBF16PS, fp32 [rows, out]: of each pair of inputs the odd one first."""
    sums = torch.zeros(len(x), len(weight))
    for k in range(0, x.shape[1], 2):
        sums = add(add(sums, x, weight, k + 1), x, weight, k)
    return sums


def of_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """TDPBF16PS, fp32 [rows, out]: of 32 inputs the even and the odd ones apart, then together."""
    sums = torch.zeros(len(x), len(weight))
    for begin in range(0, x.shape[1], 32):
        even, odd = torch.zeros_like(sums), torch.zeros_like(sums)
        for k in range(begin, min(begin + 32, x.shape[1]), 2):
            even, odd = add(even, x, weight, k), add(odd, x, weight, k + 1)
        sums = sums + (even + odd)
    return sums


ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"avx512_bf16": of_pairs, "amx": of_tiles}


@pytest.mark.parametrize("inputs", [30, 1100])
def test_sums_have_the_documented_order(level: str, inputs: int) -> None:
    x, weight = torch.randn(75, inputs).bfloat16(), torch.randn(40, inputs).bfloat16()
    assert torch.equal(cpu.logits_packed(x, cpu.pack(weight)), ORDERS[level](x, weight))


def test_subnormal_numbers_count_as_zero_in_tiles(level: str) -> None:
    x = torch.full((1, 64), 2.0**-130).bfloat16()
    sums = cpu.logits_packed(x, cpu.pack(torch.full((32, 64), 2.0**60).bfloat16()))
    assert level != "amx" or not sums.any()
