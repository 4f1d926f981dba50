"""Packed weights and their products at every instruction-set level of this machine.

The oracle is the same product in fp64. Bitwise tests need none: a row must be the same number in
every batch, with every number of threads.
"""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headrace.core.errors import BadRequest
from headrace.ops import cpu, ref

if cpu.LIBRARY is None:
    pytest.skip("the native kernels are not built", allow_module_level=True)

from headrace.ops.cpu import library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [out, in]: rests of panels and pairs, more than one block of k, projections of real models
SHAPES = [(1, 1), (17, 33), (64, 128), (100, 4101), (1024, 2048)]
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=library.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    before = library.level()
    library.set_level(request.param)
    yield request.param
    library.set_level(before)
    library.set_threads(1)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


def close(ours: Tensor, oracle: Tensor, rounding: float) -> None:
    assert float((ours.double() - oracle).abs().max()) <= rounding * float(oracle.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_are_packed_where_the_whole_has_them(dtype: torch.dtype, level: str) -> None:
    weight = torch.randn(100, 80).to(dtype)[:, :70]  # rows lie apart, as a rank's columns do
    whole, packed = cpu.pack(weight), cpu.open_packed((100, 70), dtype)
    for first, last in ((64, 100), (0, 64)):
        cpu.pack_rows(packed, first, weight[first:last])
    assert torch.equal(packed.data, whole.data)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_loses_nothing(dtype: torch.dtype, shape: tuple[int, int], level: str) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = cpu.pack(weight)
    everything = torch.arange(shape[0])
    assert torch.equal(cpu.embedding_packed(everything, packed, dtype), weight)
    assert torch.equal(cpu.embedding_packed(everything, packed, torch.float32), weight.float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, shape: tuple[int, int], bias: bool, level: str) -> None:
    weight, b = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = cpu.pack(weight)
    for count in (1, 7, 25):
        x = torch.randn(count, shape[1]).to(dtype)
        y = cpu.linear_packed(x, packed, b if bias else None)
        assert y.dtype == dtype
        close(y, exact(x, weight, b if bias else None), ROUNDING[dtype])
        close(cpu.logits_packed(x, packed), exact(x, weight, None), 4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp32_activations_with_narrow_weights(dtype: torch.dtype, level: str) -> None:
    weight, x = torch.randn(70, 90).to(dtype), torch.randn(9, 90)
    y = cpu.linear_packed(x, cpu.pack(weight), None)
    assert y.dtype == torch.float32
    close(y, exact(x, weight, None), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_added_before_rounding(dtype: torch.dtype, level: str) -> None:
    weight, bias = torch.randn(70, 90).to(dtype), torch.randn(70).to(dtype)
    x, residual = torch.randn(29, 90).to(dtype), torch.randn(29, 70).to(dtype)
    packed = cpu.pack(weight)
    y = cpu.linear_packed(x, packed, bias, residual)
    oracle = exact(x, weight, bias) + residual.double()
    close(y, oracle, ROUNDING[dtype])
    close(ref.linear_packed(x, ref.pack(weight), bias, residual), oracle, ROUNDING[dtype])
    assert torch.equal(cpu.linear_packed(x[3:4], packed, bias, residual[3:4])[0], y[3])
    if dtype == torch.float32:
        assert torch.equal(y, cpu.linear_packed(x, packed, bias) + residual)
    with pytest.raises(ValueError, match="residual must be"):
        cpu.linear_packed(x, packed, bias, residual[:, 1:])


GATES = {
    "silu": lambda module, x: module.gated(x, "silu"),
    "gelu_tanh": lambda module, x: module.gated(x, "gelu_tanh"),
    "gelu_erf": lambda module, x: module.gated(x, "gelu_erf"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("inner", [1, 64, 352])
def test_gated_is_a_product_and_an_activation(
    dtype: torch.dtype, activation: str, inner: int, level: str
) -> None:
    """The same bits in one call as in two, for rows alone and together, on any threads."""
    weight = (torch.randn(2 * inner, 1100) / 30).to(dtype)
    x, bias = torch.randn(61, 1100).to(dtype), torch.randn(2 * inner).to(dtype)
    for module in (cpu, ref):
        packed = module.pack(weight)
        y = module.gated_packed(x, packed, activation, bias)
        two = GATES[activation](module, module.linear_packed(x, packed, bias))
        assert torch.equal(y, two)
    packed = cpu.pack(weight)
    y = cpu.gated_packed(x, packed, activation, None)
    library.set_threads(3)
    assert torch.equal(cpu.gated_packed(x, packed, activation, None), y)
    for rows in (slice(7, 8), slice(20, 36), slice(40, 61)):
        assert torch.equal(cpu.gated_packed(x[rows], packed, activation, None), y[rows])


def test_values_that_were_bf16_are_stored_as_bf16(level: str) -> None:
    weight, x = torch.randn(70, 91).bfloat16(), torch.randn(9, 91)
    widened, narrow = cpu.pack(weight.float()), cpu.pack(weight)
    assert (widened.format, widened.nbytes) == ("bfloat16", narrow.nbytes)
    product = cpu.linear_packed(x, widened, None)
    assert torch.equal(product, cpu.linear_packed(x, narrow, None))
    # One more output, which is not bf16, changes the storage but no other output.
    mixed = cpu.pack(torch.cat((weight.float(), torch.full((1, 91), 0.1))))
    assert mixed.format == "float32"
    assert torch.equal(product, cpu.linear_packed(x, mixed, None)[:, :-1])


def test_x_may_be_rows_of_something_wider(level: str) -> None:
    wide, weight = torch.randn(5, 100), torch.randn(40, 60)
    y = cpu.linear_packed(wide[:, 20:80], cpu.pack(weight), None)
    close(y, exact(wide[:, 20:80], weight, None), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype, level: str) -> None:
    packed = cpu.pack(torch.randn(150, 2100).to(dtype))
    x, bias = torch.randn(37, 2100), torch.randn(150)
    together = cpu.linear_packed(x, packed, bias)
    for row in range(len(x)):
        alone = cpu.linear_packed(x[row : row + 1], packed, bias)
        assert torch.equal(alone[0], together[row]), row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_batches_of_every_size(dtype: torch.dtype, level: str) -> None:
    """Of rows in the weights' own type: one tile, two, those that share widened weights, blocks."""
    packed = cpu.pack(torch.randn(70, 1000).to(dtype))
    x = torch.randn(200, 1000).to(dtype)
    together = cpu.linear_packed(x, packed, None)
    for count in (*range(1, 40), 67, 99, 150):
        assert torch.equal(cpu.linear_packed(x[:count], packed, None), together[:count]), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 130, 600])
def test_threads_and_large_batches_change_nothing(
    dtype: torch.dtype, rows: int, level: str
) -> None:
    packed = cpu.pack(torch.randn(600, 300).to(dtype))
    x = torch.randn(rows, 300)
    one = cpu.linear_packed(x, packed, None)
    library.set_threads(3)
    assert torch.equal(cpu.linear_packed(x, packed, None), one)
    assert torch.equal(cpu.linear_packed(x[-5:], packed, None), one[-5:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_has_the_same_operators(dtype: torch.dtype) -> None:
    weight, x, bias = torch.randn(30, 20).to(dtype), torch.randn(4, 20).to(dtype), torch.randn(30)
    bias, packed = bias.to(dtype), ref.pack(weight)
    close(ref.linear_packed(x, packed, bias), exact(x, weight, bias), ROUNDING[dtype])
    close(ref.logits_packed(x, packed), exact(x, weight, None), ROUNDING[dtype])
    ids = torch.tensor([3, 0, 29])
    assert torch.equal(ref.embedding_packed(ids, packed, dtype), weight[ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_are_no_work(dtype: torch.dtype, level: str) -> None:
    packed = cpu.pack(torch.randn(64, 20).to(dtype))
    assert cpu.linear_packed(torch.randn(0, 20), packed, None).shape == (0, 64)
    assert cpu.gated_packed(torch.randn(0, 20).to(dtype), packed, "silu", None).shape == (0, 32)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="7 columns"):
        cpu.linear_packed(torch.randn(2, 7), cpu.pack(torch.randn(3, 8)), None)


def test_a_level_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadRequest, match="HEADRACE_CPU_ISA must be one of portable"):
        library.set_level("avx1024")


def test_the_environment_chooses_the_level() -> None:
    code = "from headrace.ops.cpu import library; print(library.level())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"HEADRACE_CPU_ISA": "portable", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "portable"
