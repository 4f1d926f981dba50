"""Native operators against the reference with shapes of real models, at every level, bit by bit.

`test_ops` checks formulas on small shapes; here are long rows, long contexts and head layouts, and
the promise of kernels: a row has the same bits alone, in a batch, and with any threads.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from headrace.ops import cpu, ref
from headrace.ops.meta import AttentionMeta, KvCache
from tests.support.native import native_level, native_levels

DTYPES = [torch.float32, torch.bfloat16]
# hidden, inner, heads, kv_heads, head_dim
MODELS = {
    "qwen3-0.6b": (1024, 3072, 16, 8, 128),
    "llama-3.2-1b": (2048, 8192, 32, 8, 64),
    "demo": (192, 512, 6, 2, 32),
    "odd": (90, 130, 5, 1, 20),
    "wide": (64, 64, 9, 1, 136),
}


@pytest.fixture(params=native_levels(), autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with native_level(request.param):
        yield request.param


@pytest.fixture(params=MODELS)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return MODELS[request.param]


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 2e-5 if ours.dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


def same_rows(operator: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Rows of a batch have the bits of rows alone, on one thread and on two."""
    whole = operator(x)
    for row in (0, len(x) // 2, len(x) - 1):
        assert torch.equal(operator(x[row : row + 1])[0], whole[row])
    cpu.library.set_threads(2)
    assert torch.equal(operator(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_norms_and_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden, inner, *_ = shape
    x, residual = torch.randn(37, hidden).to(dtype), torch.randn(37, hidden).to(dtype)
    weight, bias = torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
    ours, theirs = (m.rms_norm(x, weight, 1e-6, residual) for m in (cpu, ref))
    assert torch.equal(ours[1], theirs[1])
    close(ours[0], theirs[0])
    close(cpu.layer_norm(x, weight, bias, 1e-5), ref.layer_norm(x, weight, bias, 1e-5))
    gate_up = (torch.randn(37, 2 * inner) * 3).to(dtype)
    close(cpu.gated(gate_up, "silu"), ref.gated(gate_up, "silu"))
    close(cpu.gated(gate_up, "gelu_tanh"), ref.gated(gate_up, "gelu_tanh"))
    close(cpu.gated(gate_up, "gelu_erf"), ref.gated(gate_up, "gelu_erf"))
    for activation in ("relu", "relu_squared"):
        close(cpu.gated(gate_up, activation), ref.gated(gate_up, activation))
        close(cpu.activate(gate_up, activation), ref.activate(gate_up, activation))
    for fields in ((1.0, 1.0, 0.0, 0.0), (0.7, -2.0, 3.0, 0.0), (1.0, 1.0, 0.0, 0.5)):
        close(cpu.combine(x, residual, *fields), ref.combine(x, residual, *fields))
        close(cpu.combine(x, None, *fields), ref.combine(x, None, *fields))
    same_rows(lambda x: cpu.combine(x, None, 0.7, 0.0, 3.0, 2.0), x)
    same_rows(lambda x: cpu.rms_norm(x, weight, 1e-6, None)[0], x)
    same_rows(lambda x: cpu.layer_norm(x, weight, bias, 1e-5), x)
    same_rows(lambda x: cpu.gated(x, "silu"), gate_up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_gather_copy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, ids = torch.randn(300, shape[0]).to(dtype), torch.randint(300, (40,))
    assert torch.equal(cpu.embedding(ids, weight), weight[ids])
    assert torch.equal(cpu.gather(weight, ids), weight[ids])
    positions = torch.randint(298, (40,))
    assert torch.equal(cpu.position_embedding(positions, weight, 2), weight[positions + 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_heads(dtype: torch.dtype) -> None:
    """A weight for all heads, and one for each, of a view with a stride."""
    x = torch.randn(9, 3 * 20 + 7).to(dtype)[:, :60].unflatten(1, (3, 20))
    for weight in (torch.randn(20), torch.randn(3, 20)):
        close(
            cpu.layer_norm(x, weight, None, 1e-5), ref.layer_norm(x, weight.to(dtype), None, 1e-5)
        )


def test_extreme_values_stay_what_they_are() -> None:
    """Large, tiny and not finite numbers go the way of the reference."""
    gate = torch.tensor([[0.0, -0.0, 1e30, -1e30, 88.0, -88.0, -104.0, math.inf, math.nan, 1e-40]])
    x = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(cpu.gated(x, "silu"), ref.gated(x, "silu"), equal_nan=True)


KV_DTYPES = [*DTYPES, torch.float8_e4m3fn, torch.int8]


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> KvCache:
    """What cannot hold `fill` (integers, NaN) holds its largest number, with scales of `fill`."""
    if dtype == torch.int8:
        numbers = [torch.full(shape, 127, dtype=dtype) for _ in range(2)]
        return KvCache(*numbers, *(torch.full(shape[:3], fill) for _ in range(2)))
    return KvCache(*(torch.full(shape, fill).to(dtype) for _ in range(2)))


def fused(
    module: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> tuple[Tensor, ...]:
    """rotary_kv of the parts of one QKV buffer: q and both caches."""
    _, _, heads, kv_heads, dim = shape
    made = torch.Generator().manual_seed(seed)
    qkv = torch.randn(9, heads + 2 * kv_heads, dim, generator=made).to(dtypes[0])
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    cache = empty_cache((8, 4, kv_heads, dim), dtypes[1], 0.0)
    angles = torch.rand(9, dim // 2, generator=made) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    slots = torch.randperm(32, generator=made)[:9]
    turned = module.rotary_kv(q, k, v, cos_sin, cache, slots, False)  # type: ignore[attr-defined]
    return turned, *cache.tensors()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", KV_DTYPES)
def test_rotary_kv(shape: tuple[int, ...], dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    for ours, theirs in zip(
        *(fused(module, shape, (dtype, cache_dtype), 3) for module in (cpu, ref)), strict=True
    ):
        if ours.dtype == torch.int8 and dtype == torch.bfloat16:
            # Turned keys may differ in their last bit, and then by one here.
            assert int((ours.int() - theirs.int()).abs().max()) <= 1
        elif ours.dtype == torch.int8:
            assert torch.equal(ours, theirs)
        else:
            close(ours.to(dtype), theirs.to(dtype))


class Context:
    """Sequences in shuffled pages of 16; unwritten slots hold NaN."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, lengths: Sequence[int] = (700, 64, 1, 129)
    ) -> None:
        _, _, self.heads, kv_heads, self.dim = shape
        self.lengths, width = lengths, -(-max(lengths) // 16)
        pages = torch.randperm(width * len(lengths))
        self.table = pages.view(len(lengths), width).int().contiguous()
        cache_shape = (len(pages), 16, kv_heads, self.dim)
        self.cache = empty_cache(cache_shape, dtype, math.nan)
        for row, length in enumerate(self.lengths):
            slots = self.slots(row, torch.arange(length))
            k, v = torch.randn(2, length, kv_heads, self.dim)
            ref.write_kv(k, v, self.cache, slots)

    def slots(self, row: int, positions: Tensor) -> Tensor:
        return self.table[row, positions // 16].long() * 16 + positions % 16

    def meta(self, chunks: list[tuple[int, int, int]]) -> AttentionMeta:
        """For chunks of (row, start, count)."""
        counts = torch.tensor([count for _, _, count in chunks])
        return AttentionMeta(
            page_table=self.table,
            rows=torch.tensor([row for row, _, _ in chunks], dtype=torch.int32),
            query_start=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
            context=torch.tensor([start + count for _, start, count in chunks]).int(),
            slots=torch.cat([self.slots(r, torch.arange(s, s + n)) for r, s, n in chunks]),
            page_size=16,
        )


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (100, 0.0), (0, 30.0)])
def test_attention(
    shape: tuple[int, ...], dtype: torch.dtype, window: int, soft_cap: float
) -> None:
    """Prefill and decode of one batch; the same tokens in chunks and one by one, bit by bit."""
    context = Context(shape, dtype)
    options = {"scale": context.dim**-0.5, "window": window, "soft_cap": soft_cap, "sinks": None}
    chunks = [(0, 640, 60), (1, 63, 1), (2, 0, 1), (3, 0, 129)]
    meta = context.meta(chunks)
    q = torch.randn(int(meta.query_start[-1]), context.heads, context.dim)
    whole = cpu.paged_attention(q, context.cache, meta, **options)
    close(whole, ref.paged_attention(q, context.cache, meta, **options))
    cpu.library.set_threads(2)
    assert torch.equal(cpu.paged_attention(q, context.cache, meta, **options), whole)
    for row, position, token in [
        (0, 640, 0),
        (0, 699, 59),
        (3, 0, 62),
        (3, 64, 126),
        (3, 128, 190),
    ]:
        alone = context.meta([(row, position, 1)])
        one = cpu.paged_attention(q[token : token + 1], context.cache, alone, **options)
        assert torch.equal(one[0], whole[token]), (row, position)
    cut = context.meta([(3, 70, 59), (3, 0, 70)])
    moved = torch.cat((q[62 + 70 : 191], q[62 : 62 + 70]))
    parts = cpu.paged_attention(moved, context.cache, cut, **options)
    assert torch.equal(torch.cat((parts[59:], parts[:59])), whole[62:191])


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_spans_of_few_long_sequences_go_to_all_threads(dtype: torch.dtype) -> None:
    """A sequence over several spans has the same bits on one thread, on eight, in any chunk."""
    shape = (0, 0, 7, 1, 40)
    context = Context(shape, dtype, [1500, 64, 513])
    options = {"scale": 0.2, "window": 0, "soft_cap": 0.0, "sinks": torch.randn(7)}
    meta = context.meta([(0, 1470, 30), (2, 512, 1), (1, 63, 1)])
    q = torch.randn(32, 7, 40)
    whole = cpu.paged_attention(q, context.cache, meta, **options)
    close(whole, ref.paged_attention(q, context.cache, meta, **options))
    cpu.library.set_threads(8)
    assert torch.equal(cpu.paged_attention(q, context.cache, meta, **options), whole)
    alone = context.meta([(0, 1499, 1)])
    assert torch.equal(cpu.paged_attention(q[29:30], context.cache, alone, **options)[0], whole[29])
    windowed = {**options, "window": 600}
    whole = cpu.paged_attention(q, context.cache, meta, **windowed)
    close(whole, ref.paged_attention(q, context.cache, meta, **windowed))
    one = cpu.paged_attention(q[29:30], context.cache, alone, **windowed)
    assert torch.equal(one[0], whole[29])
