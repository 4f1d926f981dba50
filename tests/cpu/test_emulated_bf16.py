"""The kernels of level avx512_bf16 on a CPU without bf16 instructions.

The float linear family is compiled for that level with its one instruction emulated (dot_bf16.h),
into a library of its own, and takes the place of the native linear operators.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace.ops import cpu, ref

if cpu.LIBRARY is None or "avx512" not in cpu.library.levels() or shutil.which("g++") is None:
    pytest.skip("needs a compiler and AVX-512", allow_module_level=True)

import hatch_build
from headrace.ops.cpu import matmul
from headrace.ops.cpu.library import Operator, Step

pytestmark = pytest.mark.slow

BEST = """#include "isa.h"
namespace hr { hr_level best_level() { return HR_AVX512_BF16; } }
"""
KERNELS = ("linear", "linear_block", "linear_tile")


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


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("emulated")
    sources, stub = hatch_build.SOURCES, folder / "best.cpp"
    stub.write_text(BEST)
    files = [stub, *(sources / f"{name}.cpp" for name in ("api", "pool", "program", "weight"))]
    files += [sources / "kernels" / f"{name}.cpp" for name in KERNELS]
    flags = [*hatch_build.FLAGS, *hatch_build.LEVELS["avx512"], f"-I{sources}"]
    made = folder / "libemulated.so"
    command = ["g++", *flags, "-DHR_LEVEL=3", "-DHR_EMULATE", "-shared", *files, "-o", made]
    subprocess.run([str(word) for word in command], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture(autouse=True)
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    pairs = {"_LINEAR": matmul._LinearArgs, "_GATED_LINEAR": matmul._GatedLinearArgs}
    for name, args in pairs.items():
        monkeypatch.setattr(matmul, name, Emulated(library, getattr(matmul, name), args))
    yield
    library.hr_set_threads(1)


def as_documented(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 [rows, out] in the instruction's order: of each pair of inputs the odd one first.

    Exact products, so fp64 sums rounded to fp32 after each addition are those of the instruction.
    """
    sums = torch.zeros(len(x), len(weight))
    for k in range(0, x.shape[1], 2):
        for i in (k + 1, k):
            product = x[:, i, None].double() * weight[:, i].double()
            sums = (sums.double() + product).float()
    return sums


def test_sums_have_the_documented_order() -> None:
    x, weight = torch.randn(31, 1100).bfloat16(), torch.randn(40, 1100).bfloat16()
    ours = cpu.logits_packed(x, cpu.pack(weight))
    assert torch.equal(ours, as_documented(x, weight))


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (100, 1101), (512, 1024)], ids=str)
def test_linear(shape: tuple[int, int]) -> None:
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):  # the last two are widened
        x = torch.randn(50, shape[1]).to(dtype)
        exact = x.double() @ weight.double().T
        ours = cpu.logits_packed(x, cpu.pack(weight)).double()
        assert float((ours - exact).abs().max()) <= 4e-6 * float(exact.abs().max())
    x = torch.randn(50, shape[1]).bfloat16()
    ours = cpu.linear_packed(x, cpu.pack(weight), bias)
    torch.testing.assert_close(ours, ref.linear_packed(x, ref.pack(weight), bias))


def test_a_row_is_the_same_in_every_batch(library: ctypes.CDLL) -> None:
    packed, x = cpu.pack(torch.randn(150, 1300).bfloat16()), torch.randn(300, 1300).bfloat16()
    together = cpu.linear_packed(x, packed, None)
    for count in (*range(1, 27), 100):
        assert torch.equal(cpu.linear_packed(x[:count], packed, None), together[:count])
    library.hr_set_threads(3)
    assert torch.equal(cpu.linear_packed(x, packed, None), together)
    gated = cpu.pack(torch.randn(128, 1300).bfloat16())
    two = cpu.gated(cpu.linear_packed(x, gated, None), "silu")
    assert torch.equal(cpu.gated_packed(x, gated, "silu", None), two)
