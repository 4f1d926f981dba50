"""Low-bit weights: the native kernels against the reference, the reference against fp64.

Quantizing must agree bit by bit; products of integers are exact, so what remains is the rounding of
a few fp32 operations. A row must be the same bits in every batch, with every number of threads.
`tests/cpu/test_emulated_level.py` runs this file on kernels whose instructions are emulated.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headrace.ops import cpu, ref, ref_lowbit

if cpu.LIBRARY is None:
    pytest.skip("the native kernels are not built", allow_module_level=True)

from headrace.ops.cpu import library
from headrace.ops.cpu.library import Step
from headrace.ops.cpu.record import Arena, empty, recording

FORMATS = [("int8", 0), ("int4", 0), ("int4", 16), ("int4", 32), ("int4", 128), ("fp8", 0)]
# [out, in]: rests of panels, quads and groups, more than one block of rows
SHAPES = [(1, 1), (17, 33), (70, 533), (257, 512)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=library.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = library.level()
    library.set_level(request.param)
    yield request.param
    library.set_level(before)
    library.set_threads(1)


def close(ours: Tensor, oracle: Tensor, rounding: float) -> None:
    assert float((ours.double() - oracle).abs().max()) <= rounding * float(oracle.abs().max())


def everything(packed: ref.PackedWeight, operators: object = cpu) -> Tensor:
    """The whole matrix as fp32."""
    ids = torch.arange(packed.out_size)
    return operators.embedding_packed(ids, packed, torch.float32)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_quantizing_is_the_references_bit_by_bit(
    format: str, group: int, shape: tuple[int, int], level: str
) -> None:
    weight = torch.randn(shape) * torch.logspace(-9, 2, shape[0])[:, None]
    weight[0, :16] = 0
    for dtype in (torch.float32, torch.bfloat16):
        ours, definition = (o.pack(weight.to(dtype), format, group) for o in (cpu, ref))
        assert torch.equal(everything(ours), everything(definition, ref))
        picked = torch.tensor([shape[0] - 1, 0])
        rows = cpu.embedding_packed(picked, ours, torch.bfloat16)
        assert torch.equal(rows, ref.embedding_packed(picked, definition, torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_linear(format: str, group: int, shape: tuple[int, int], level: str) -> None:
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    ours, definition = (o.pack(weight, format, group) for o in (cpu, ref))
    for count, dtype in ((1, torch.float32), (7, torch.bfloat16), (25, torch.float16)):
        x = torch.randn(count, shape[1]).to(dtype)
        y = cpu.linear_packed(x, ours, bias)
        assert y.dtype == dtype
        close(y, ref.linear_packed(x, definition, bias), ROUNDING[dtype])
        scores = cpu.logits_packed(x, ours)
        assert scores.dtype == torch.float32
        close(scores, ref.logits_packed(x, definition), 3e-6)


def test_linear_int8_is_exact_but_for_its_scales(level: str) -> None:
    """One operation of integers, then the same three fp32 roundings: no bit differs."""
    weight, x, bias = torch.randn(70, 3000), torch.randn(5, 3000) * 9, torch.randn(70)
    expected = ref.linear_packed(x, ref.pack(weight, "int8"), bias)
    assert torch.equal(cpu.linear_packed(x, cpu.pack(weight, "int8"), bias), expected)


def test_the_largest_sums_do_not_overflow(level: str) -> None:
    values, x = torch.full((33, 1 << 16), 127, dtype=torch.int8), torch.ones(2, 1 << 16)
    y = cpu.linear_packed(x, cpu.pack_quantized(values, torch.ones(1), "int8"), None)
    close(y, torch.full((2, 33), 127.0 * (1 << 16)), 1e-6)
    for sign in (1, -1):
        most = torch.full((33, 128), 15, dtype=torch.uint8)
        packed = cpu.pack_quantized(most, torch.ones(33, 1), "int4", 128, torch.zeros(33, 1))
        y = cpu.linear_packed(sign * torch.ones(3, 128), packed, None)
        close(y, torch.full((3, 33), sign * 15.0 * 128), 1e-6)


def test_zeros_and_numbers_that_are_none(level: str) -> None:
    for format, group in FORMATS:
        packed = cpu.pack(torch.randn(40, 64), format, group)
        x = torch.zeros(3, 64)
        x[1, 5], x[2, 9] = float("nan"), 1e-38
        y = cpu.linear_packed(x, packed, None)
        assert not y[0].any()
        assert y[1].isnan().all()
        assert float(y[2].abs().max()) < 1e-30
        assert not everything(cpu.pack(torch.zeros(40, 64), format, group)).any()


def test_values_of_a_checkpoint_keep_their_meaning(level: str) -> None:
    """GGUF Q4_0; AWQ, GPTQ (zero points); GGUF Q4_K (offsets that are no multiple of a scale)."""
    values = torch.randint(0, 16, (50, 256), dtype=torch.uint8)
    scales = (torch.rand(50, 8) / 100).half().float()
    scales[3, 2] = 0
    zeros, wild = torch.randint(0, 16, (50, 8)).float(), torch.rand(50, 8)
    cases = [(scales, None), (scales, 8 * scales), (scales, zeros * scales), (scales, wild),
             (scales * 1.00001, None), (scales * 1e6 * wild, 3 * wild)]  # fmt: skip
    sizes = []
    for given, offsets in cases:
        asked = values, given, "int4", 32, offsets
        ours, definition = cpu.pack_quantized(*asked), ref.pack_quantized(*asked)
        shift = 8 * given if offsets is None else offsets
        spread = [part.repeat_interleave(32, 1) for part in (given, shift)]
        assert torch.equal(everything(ours), values * spread[0] - spread[1])
        x = torch.randn(9, 256)
        close(cpu.linear_packed(x, ours, None), ref.linear_packed(x, definition, None), 2e-6)
        sizes.append(ours.nbytes * 8 / (64 * 256))  # bits for each of 64 outputs, 50 used
    assert sizes == [4.5, 4.5, 5.0, 6.0, 6.0, 6.0]


def test_int8_of_a_checkpoint(level: str) -> None:
    values, scales = torch.randint(-128, 128, (50, 77), dtype=torch.int8), torch.rand(50, 1)
    for given in (scales, scales[:, 0], scales[:1, 0], scales[0, 0]):
        packed = cpu.pack_quantized(values, given, "int8")
        assert torch.equal(everything(packed), values * (given if given.dim() == 2 else
                                                         given.reshape(-1, 1)))  # fmt: skip


def test_fp8_of_a_checkpoint(level: str) -> None:
    """Every value there is; scales per tensor, output and block of 128 x 128."""
    codes = torch.arange(254, dtype=torch.uint8).repeat(200, 1)
    codes[:, 127] = 1
    values = codes.view(torch.float8_e4m3fn)
    for scales, group in ((torch.rand(()), 0), (torch.rand(200), 0), (torch.rand(2, 2), 128)):
        packed = cpu.pack_quantized(values, scales, "fp8", group)
        spread = scales.reshape(-1, 1)
        if group:
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :254]
        matrix = values.float() * spread
        assert torch.equal(everything(packed), matrix)
        x, bias = torch.randn(15, 254), torch.randn(200)
        close(cpu.linear_packed(x, packed, bias), x.double() @ matrix.T.double() + bias, 2e-6)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_a_row_is_the_same_in_every_batch(format: str, group: int, level: str) -> None:
    packed = cpu.pack(torch.randn(150, 700), format, group)
    x, bias = torch.randn(37, 700), torch.randn(150)
    together = cpu.linear_packed(x, packed, bias)
    for row in range(len(x)):
        alone = cpu.linear_packed(x[row : row + 1], packed, bias)
        assert torch.equal(alone[0], together[row]), row
    assert torch.equal(cpu.linear_packed(x[3:17], packed, bias), together[3:17])


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_threads_and_large_batches_change_nothing(format: str, group: int, level: str) -> None:
    weight, x = torch.randn(600, 300), torch.randn(600, 300)
    packed = cpu.pack(weight, format, group)
    matrix = everything(packed)
    one = cpu.linear_packed(x, packed, None)
    library.set_threads(2)
    assert torch.equal(cpu.linear_packed(x, packed, None), one)
    assert torch.equal(cpu.linear_packed(x[-5:], packed, None), one[-5:])
    assert torch.equal(everything(cpu.pack(weight, format, group)), matrix)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_replay_equals_calls(format: str, group: int, level: str) -> None:
    packed = cpu.pack(torch.randn(64, 64), format, group)
    ids = torch.tensor([5, 63, 0])
    with recording(Arena(1 << 20)) as program:
        y = cpu.linear_packed(cpu.embedding_packed(ids, packed, torch.float32), packed, None)
        scores = cpu.logits_packed(y, packed)
        assert empty((1,), torch.float32).shape == (1,)
    program.replay(Step(tokens=2, ids=ids.data_ptr(), picked=1))
    expected = cpu.linear_packed(cpu.embedding_packed(ids, packed, torch.float32), packed, None)
    assert torch.equal(y[:2], expected[:2])
    assert torch.equal(scores[:1], cpu.logits_packed(expected, packed)[:1])


def test_what_no_format_has_is_refused() -> None:
    bytes_, nibbles = torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 64, dtype=torch.uint8)
    cases = [
        ((bytes_, torch.ones(7), "int8"), "scales of shape"),
        ((bytes_, torch.ones(8, 3), "int8", 24), "group of int8"),
        ((nibbles, torch.ones(8), "int8"), "needs torch.int8"),
        ((nibbles * 16, torch.ones(8, 2), "int4", 32), "an int4 value is 16"),
        ((nibbles, torch.ones(8, 3), "int4", 32), "do not fit"),
        ((nibbles, torch.ones(8, 8), "int4", 8), "group of int4"),
        ((bytes_, torch.ones(8), "int8", 0, torch.ones(8)), "no offsets"),
        ((bytes_, torch.ones(8), "int3"), "format must be one of"),
        (((nibbles * 127).view(torch.float8_e4m3fn), torch.ones(8), "fp8"), "not a number"),
    ]
    for operators in (cpu, ref):
        for arguments, message in cases:
            with pytest.raises(ValueError, match=message):
                operators.pack_quantized(*arguments)
        for format, group in (("int3", 0), ("int8", 32), ("int4", 24), ("fp8", 128)):
            with pytest.raises(ValueError, match=format):
                operators.pack(torch.ones(8, 64), format, group)
        with pytest.raises(ValueError, match="at most 65536 inputs"):
            operators.pack(torch.ones(1, 65537), "int8")


# ---- the reference ------------------------------------------------------------------------------


def test_a_row_of_int8_is_within_half_a_step() -> None:
    x = torch.randn(6, 300) * torch.logspace(-20, 20, 6)[:, None]
    values, scales = ref_lowbit.quantize_int8(x)
    assert values.abs().amax(-1).tolist() == [127] * 6
    assert bool(((values * scales - x).abs() <= scales * 0.50001).all())


def test_int4_puts_the_farthest_at_level_0() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 1.74] * 4, [4.0, -2.0, 0.2, 1.0] * 4])
    values, scales = ref_lowbit.quantize_int4(weight, 16)
    assert scales.tolist() == [[0.25], [-0.5]]
    assert values[:, :4].tolist() == [[12, 0, 10, 15], [0, 12, 8, 6]]


def test_fp8_is_torchs() -> None:
    weight = torch.randn(5, 100)
    values, scales = ref_lowbit.quantize_fp8(weight)
    assert values.float().abs().amax(-1).tolist() == [448.0] * 5
    close(values.float() * scales, weight.double(), 1 / 16)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_the_reference_multiplies_what_it_stores(format: str, group: int) -> None:
    """fp64 products of the dequantized matrix, and of x as it was quantized."""
    weight, x = torch.randn(20, 96), torch.randn(4, 96)
    packed = ref.pack(weight, format, group)
    seen = x.double()
    if format == "int8":
        values, scales = ref_lowbit.quantize_int8(x)
        seen = values.double() * scales
    if format == "int4":
        size = packed.group
        padded = torch.nn.functional.pad(x, (0, -96 % size)).view(4, -1, size)
        values, scales = ref_lowbit.quantize_int8(padded)
        seen = (values.double() * scales).flatten(1)[:, :96]
    close(ref.linear_packed(x, packed, None), seen @ everything(packed, ref).double().T, 2e-6)
