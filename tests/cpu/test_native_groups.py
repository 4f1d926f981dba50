"""Matrices of 8 bits and of e2m1 in groups, experts of low-bit weights, and columns of x."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headrace.ops import cpu, ref
from headrace.ops.cpu import library
from headrace.ops.experts import ClampedSwiglu, PackedExperts
from headrace.ops.packed import TABLES, PackedWeight
from tests.support.native import native_level, native_levels

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason="the kernels are not built")
CLAMPED = ClampedSwiglu(1.702, 0.7)


@pytest.fixture(params=native_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with native_level(request.param):
        yield request.param


def close(ours: Tensor, oracle: Tensor, rounding: float = 3e-6) -> None:
    assert float((ours.double() - oracle).abs().max()) <= rounding * float(oracle.abs().max())


def everything(packed: PackedWeight, operators: object = cpu) -> Tensor:
    ids = torch.arange(packed.out_size)
    return operators.embedding_packed(ids, packed, torch.float32)  # type: ignore[attr-defined]


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_eight_bits_in_groups(group: int, level: str) -> None:
    """GGUF Q8_0; GPTQ of 8 bits with zero points; GGUF Q6_K (fp32 scales); GGUF Q5_1."""
    groups, width = -(-200 // group), 200
    values = torch.randint(-128, 128, (50, width), dtype=torch.int8)
    scales = (torch.rand(50, groups) / 100).half().float()
    zeros, wild = torch.randint(-128, 128, (50, groups)).float(), torch.rand(50, groups)
    cases = [(scales, None), (scales, zeros * scales), (scales * 1.00001, None), (scales, wild)]
    bits = []
    for given, offsets in cases:
        asked = values, given, "int8", group, offsets
        ours, definition = cpu.pack_quantized(*asked), ref.pack_quantized(*asked)
        spread = given.repeat_interleave(group, 1)[:, :width] * values
        if offsets is not None:
            spread = spread - offsets.repeat_interleave(group, 1)[:, :width]
        assert torch.equal(everything(ours), spread)
        for count in (1, 9, 30):
            x = torch.randn(count, width)
            close(cpu.linear_packed(x, ours, None), ref.linear_packed(x, definition, None))
        bits.append(ours.nbytes * 8 / (64 * groups * group))
    assert bits == [8 + 16 / group, 8 + 32 / group, 8 + 32 / group, 8 + 64 / group]


def test_the_largest_sums_of_bytes(level: str) -> None:
    for value in (-128, 127):
        values = torch.full((33, 128), value, dtype=torch.int8)
        packed = cpu.pack_quantized(values, torch.ones(33, 1), "int8", 128)
        for sign in (1, -1):
            y = cpu.linear_packed(sign * torch.ones(3, 128), packed, None)
            close(y, torch.full((3, 33), sign * value * 128.0), 1e-6)
    most = torch.full((33, 128), 7, dtype=torch.uint8)  # 6
    packed = cpu.pack_quantized(most, torch.ones(33, 1), "mxfp4", 128)
    close(cpu.linear_packed(-torch.ones(3, 128), packed, None), torch.full((3, 33), -768.0), 1e-6)


@pytest.mark.parametrize("group", [16, 32])
def test_e2m1(group: int, level: str) -> None:
    groups, width = -(-168 // group), 168
    values = torch.randint(0, 16, (50, width), dtype=torch.uint8)
    scales = torch.ldexp(torch.ones(50, groups), torch.randint(-120, 3, (50, groups)))
    asked = values, scales, "mxfp4", group
    ours, definition = cpu.pack_quantized(*asked), ref.pack_quantized(*asked)
    assert torch.equal(everything(ours), everything(definition, ref))
    assert ours.nbytes == 64 * groups * (group // 2 + 2)
    scales = torch.ldexp(torch.ones(50, groups), torch.randint(-9, -4, (50, groups)))
    ours, definition = (o.pack_quantized(values, scales, "mxfp4", group) for o in (cpu, ref))
    for count, dtype, rounding in ((1, torch.float32, 3e-6), (30, torch.bfloat16, 8e-3)):
        x = torch.randn(count, width).to(dtype)
        close(cpu.linear_packed(x, ours, None), ref.linear_packed(x, definition, None), rounding)


def test_scales_of_mxfp4_are_powers_of_two(level: str) -> None:
    values = torch.zeros(8, 32, dtype=torch.uint8)
    for scale in (3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no power of two"):
            cpu.pack_quantized(values, torch.full((8, 1), scale), "mxfp4", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns(dtype: torch.dtype, level: str) -> None:
    x, order = torch.randn(5, 70).to(dtype), torch.randint(0, 70, (90,))
    assert torch.equal(cpu.columns(x, order), x[:, order])


def experts(format: str, biases: bool) -> tuple[PackedExperts, PackedExperts]:
    """Seven experts of hidden 72, inner 40: from the library, and as they are defined."""
    shapes = (80, 72), (72, 40)
    given = [[torch.randn(shape) / 6 for _ in range(7)] for shape in shapes]
    bias = (torch.randn(7, 80), torch.randn(7, 72)) if biases else (None, None)
    found = []
    for operators in (cpu, ref):
        gates, ups, downs = (
            tuple(operators.pack(part.contiguous(), format) for part in parts)
            for parts in ([w[:40] for w in given[0]], [w[40:] for w in given[0]], given[1])
        )
        found.append(PackedExperts(gates, ups, downs, *bias))
    return found[0], found[1]


@pytest.mark.parametrize("format", ["float32", "int8", "int4", "fp8"])
def test_experts_of_any_format(format: str, level: str) -> None:
    ours, definition = experts(format, biases=format != "int8")
    activation = "silu" if format == "fp8" else CLAMPED
    ids = torch.rand(40, 7).argsort(1)[:, :3].int().contiguous()
    x, weights = torch.randn(40, 72), torch.rand(40, 3)
    y = cpu.moe_packed(x, ours, ids, weights, activation)
    # Sums in another order give another int8 here and there.
    limit = 1e-5 if format in ("float32", "fp8") else 2e-2
    close(y, ref.moe_packed(x, definition, ids, weights, activation), limit)
    for row in (0, 17):
        one = slice(row, row + 1)
        alone = cpu.moe_packed(x[one], ours, ids[one].contiguous(), weights[one], activation)
        assert torch.equal(alone, y[one])


def test_experts_whose_matrices_take_inputs_in_their_own_order(level: str) -> None:
    """As if x were put in order before; some take more inputs than there are (act-order)."""
    orders, stored = [], []
    for shape in ((40, 96), (40, 96), (72, 48)):
        width = 72 if shape[1] == 96 else 40
        order = [torch.randint(0, width, (shape[1],)) for _ in range(4)]
        orders += order
        stored.append([torch.randn(shape) / 6 for _ in range(4)])
    ids = torch.rand(30, 4).argsort(1)[:, :2].int().contiguous()
    x, weights = torch.randn(30, 72), torch.rand(30, 2)
    gates, ups, downs = (tuple(cpu.pack(w, "int4", 16) for w in part) for part in stored)
    ours = PackedExperts(gates, ups, downs, orders=tuple(orders))
    y, expected = cpu.moe_packed(x, ours, ids, weights, "silu"), torch.zeros(30, 72)
    for token, chosen in enumerate(ids.tolist()):
        for place, e in enumerate(chosen):
            one = x[token : token + 1]
            gate, up = (
                cpu.linear_packed(one[:, orders[kind * 4 + e]].contiguous(), part[e], None)
                for kind, part in enumerate((gates, ups))
            )
            inner = cpu.gated(torch.cat([gate, up], 1), "silu")
            down = cpu.linear_packed(inner[:, orders[8 + e]].contiguous(), downs[e], None)
            expected[token] += weights[token, place] * down[0]
    close(y, expected, 1e-6)
    definition = PackedExperts(
        *(tuple(ref.pack(w, "int4", 16) for w in part) for part in stored), orders=tuple(orders)
    )
    close(y, ref.moe_packed(x, definition, ids, weights, "silu"), 2e-2)


def test_experts_with_biases(level: str) -> None:
    gate_up, down = torch.randn(5, 80, 72) / 6, torch.randn(5, 72, 40) / 6
    biases = torch.randn(5, 80), torch.randn(5, 72)
    ids = torch.rand(20, 5).argsort(1)[:, :2].int().contiguous()
    x, weights = torch.randn(20, 72), torch.rand(20, 2)
    found = []
    for operators in (cpu, ref):
        plain = operators.pack_experts(gate_up, down)
        packed = PackedExperts(plain.gates, plain.ups, plain.downs, *biases)
        found.append(operators.moe_packed(x, packed, ids, weights, CLAMPED))
    close(*found, 1e-5)


@pytest.mark.parametrize("format", TABLES)
@pytest.mark.parametrize("group", [16, 64])
def test_places_in_a_table(format: str, group: int, level: str) -> None:
    groups, width = -(-168 // group), 168
    values = torch.randint(0, 16, (70, width), dtype=torch.uint8)
    scales = torch.rand(70, groups)
    asked = values, scales, format, group
    ours, definition = cpu.pack_quantized(*asked), ref.pack_quantized(*asked)
    spread = scales.repeat_interleave(group, 1)[:, :width]
    assert torch.equal(everything(ours), TABLES[format][values.long()] * spread)
    for count in (1, 9, 30):
        x = torch.randn(count, width)
        close(cpu.linear_packed(x, ours, None), ref.linear_packed(x, definition, None))
