"""Each operator, in every implementation, against the formula in fp64 or another library's."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from headrace import ops
from headrace.ops import ref
from headrace.ops.meta import AttentionMeta, KvCache
from tests.support.native import native_level, native_levels, operators

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["ref", *native_levels()])
def impl(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The operators of the reference, or of the native library at one of its levels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with native_level(request.param):
        yield operators("ref" if request.param == "ref" else "cpu")


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of `dtype` of an fp64 result."""
    tolerance = 2e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(ours.double(), exact.double(), atol=tolerance, rtol=tolerance)


def test_every_operator_is_served() -> None:
    table = ops.implementations()
    assert set(table) == set(ref.__all__)
    assert set(table.values()) <= {"cpu", "ref"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(impl: SimpleNamespace, dtype: torch.dtype, bias: bool) -> None:
    x, weight, b = torch.randn(5, 33), torch.randn(17, 33) / 6, torch.randn(17)
    x, weight, b = x.to(dtype), weight.to(dtype), b.to(dtype)
    exact = x.double() @ weight.double().T + (b.double() if bias else 0)
    result = impl.linear(x, weight, b if bias else None)
    assert result.dtype == dtype
    close(result, exact, dtype)


def test_embedding(impl: SimpleNamespace) -> None:
    weight, ids = torch.randn(11, 7), torch.tensor([3, 0, 10, 3])
    assert torch.equal(impl.embedding(ids, weight), weight[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(impl: SimpleNamespace, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(6, 40) * 3).to(dtype), torch.randn(40).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    y, kept = impl.rms_norm(x, weight, 1e-5, None)
    assert torch.equal(kept, x)
    assert y.dtype == dtype
    close(y, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_adds_the_residual_first(impl: SimpleNamespace, dtype: torch.dtype) -> None:
    x, residual = torch.randn(6, 40).to(dtype), torch.randn(6, 40).to(dtype)
    weight = torch.randn(40).to(dtype)
    y, added = impl.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(added, x + residual)
    assert torch.equal(y, impl.rms_norm(x + residual, weight, 1e-6, None)[0])


def test_rms_norm_is_that_of_transformers(impl: SimpleNamespace) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    oracle = LlamaRMSNorm(24, eps=1e-6)
    oracle.weight.data = torch.randn(24)
    x = torch.randn(3, 4, 24)
    close(impl.rms_norm(x, oracle.weight.data, 1e-6, None)[0], oracle(x).detach(), torch.float32)


def test_layer_norm(impl: SimpleNamespace) -> None:
    x, weight, bias = torch.randn(6, 40), torch.randn(40), torch.randn(40)
    exact = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    close(impl.layer_norm(x, weight, bias, 1e-5), exact * weight + bias, torch.float32)


def test_rotary_table_rows_are_cosines_and_sines(impl: SimpleNamespace) -> None:
    positions, inv_freq = torch.tensor([0, 1, 70_000]), torch.tensor([1.0, 0.01])
    table = impl.rotary_table(positions, inv_freq, 1.5)
    assert table.dtype == torch.float32
    for row, position in enumerate([0, 1, 70_000]):
        for column, frequency in enumerate(inv_freq.tolist()):
            angle = torch.tensor(float(position)).mul(frequency).item()
            assert table[row, column].item() == pytest.approx(1.5 * math.cos(angle), abs=1e-6)
            assert table[row, column + 2].item() == pytest.approx(1.5 * math.sin(angle), abs=1e-6)


def test_rotary_rows_do_not_depend_on_their_neighbors(impl: SimpleNamespace) -> None:
    inv_freq = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    positions = torch.randint(0, 100_000, (333,))
    table = impl.rotary_table(positions, inv_freq, 1.0)
    for row in (0, 5, 331, 332):
        alone = impl.rotary_table(positions[row : row + 1], inv_freq, 1.0)
        assert torch.equal(alone[0], table[row])


def test_rotary_is_that_of_transformers(impl: SimpleNamespace) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    positions = torch.arange(9) * 3
    inv_freq = 1 / 500 ** (torch.arange(0, 16, 2) / 16)
    angle = (positions[:, None] * inv_freq).repeat(1, 2)
    exact = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    ours = impl.rotary(q.clone(), k.clone(), impl.rotary_table(positions, inv_freq, 1.0), False)
    for a, b in zip(ours, exact, strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_as_complex_numbers(impl: SimpleNamespace, interleaved: bool) -> None:
    """Partial: 12 of 16 elements turn; both pair layouts."""
    q, k, positions = torch.randn(5, 3, 16), torch.randn(5, 1, 16), torch.tensor([0, 1, 7, 2, 100])
    inv_freq = torch.rand(6)
    ours = impl.rotary(
        q.clone(), k.clone(), impl.rotary_table(positions, inv_freq, 1.0), interleaved
    )
    turn = torch.polar(torch.ones(5, 1, 6), (positions[:, None] * inv_freq)[:, None])
    for x, result in zip((q, k), ours, strict=True):
        front = x[..., :12]
        pairs = front.unflatten(-1, (6, 2)) if interleaved else front.unflatten(-1, (2, 6)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        exact = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
        close(result[..., :12], exact, torch.float32)
        assert torch.equal(result[..., 12:], x[..., 12:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations(impl: SimpleNamespace, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 20) * 2).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    close(impl.gated(x, "silu"), gate * torch.sigmoid(gate) * up, dtype)
    erf = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    close(impl.gated(x, "gelu_erf"), erf * up, dtype)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    close(impl.gated(x, "gelu_tanh"), 0.5 * gate * (1 + torch.tanh(inner)) * up, dtype)
    close(impl.gated(x, "relu"), gate.clamp_min(0) * up, dtype)
    close(impl.gated(x, "relu_squared"), gate.clamp_min(0) ** 2 * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(impl: SimpleNamespace, dtype: torch.dtype) -> None:
    x, z = torch.randn(4, 20).to(dtype), torch.randn(4, 20).to(dtype)
    a, b = x.double(), z.double()
    close(impl.combine(x, z, 1.0, 1.0, 0.0, 0.0), a + b, dtype)
    close(impl.combine(x, z, 0.5, 3.0, 2.0, 0.0), 2 * torch.tanh((a / 2 + 3 * b) / 2), dtype)
    close(impl.combine(x, None, 2.0, 1.0, 0.0, 0.7), (2 * a).clamp(-0.7, 0.7), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_fp32(impl: SimpleNamespace, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(3, 32).to(dtype), (torch.randn(50, 32) / 6).to(dtype)
    result = impl.logits(hidden, weight)
    assert result.dtype == torch.float32
    close(result, hidden.double() @ weight.double().T, dtype)


def test_write_kv_touches_only_its_slots(impl: SimpleNamespace) -> None:
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 5)
    k_cache, v_cache = torch.zeros(6, 8, 2, 4), torch.zeros(6, 8, 2, 5)
    slots = torch.tensor([8 * 5 + 7, 0, 8 * 2 + 3])
    impl.write_kv(k, v, KvCache(k_cache, v_cache), slots)
    assert torch.equal(k_cache.view(48, 2, 4)[slots], k)
    assert torch.equal(v_cache.view(48, 2, 5)[slots], v)
    assert k_cache.any(-1).sum() == 6


@pytest.mark.parametrize("dim", [8, 20, 64, 80])
def test_write_kv_in_fp8_rounds_to_the_nearest_and_saturates(
    impl: SimpleNamespace, dim: int
) -> None:
    """Ties, subnormal numbers, all sizes; torch's conversion is the oracle."""
    k = torch.randn(40, 3, dim) * 2.0 ** torch.randint(-12, 4, (40, 3, dim))
    k[0, 0, :8] = torch.tensor([448.0, 464.0, 1e9, -1e9, 0.0, 2.0**-9, 2.0**-10, 17.0])
    stored = torch.zeros(2, 10, 4, 3, dim, dtype=torch.float8_e4m3fn)
    impl.write_kv(k, -k, KvCache(stored[0], stored[1]), torch.arange(40))
    exact = k.clamp(-448, 448).to(torch.float8_e4m3fn).float().view(10, 4, 3, dim)
    assert torch.equal(stored[0].float(), exact)
    assert torch.equal(stored[1].float(), -exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 20, 64, 80])
def test_write_kv_in_int8_keeps_a_scale_per_token_and_head(
    impl: SimpleNamespace, dtype: torch.dtype, dim: int
) -> None:
    k, v = (torch.randn(30, 3, dim) * 4).to(dtype), torch.randn(30, 3, dim).to(dtype)
    k[3, 1] = 0
    cache = int8_cache((10, 4, 3, dim))
    slots = torch.randperm(40)[:30]
    impl.write_kv(k, v, cache, slots)
    for x, stored, scale in (
        (k, cache.keys, cache.key_scale),
        (v, cache.values, cache.value_scale),
    ):
        assert isinstance(scale, Tensor)
        numbers, scales = stored.flatten(0, 1)[slots], scale.flatten(0, 1)[slots]
        assert torch.equal(scales, x.float().abs().amax(-1) / 127)
        error = (numbers.float() * scales[..., None] - x.float()).abs()
        assert (error <= scales[..., None] * 0.5001).all()
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[slots] = False
    assert not cache.keys.flatten(0, 1)[untouched].any()


def int8_cache(shape: tuple[int, ...]) -> KvCache:
    return KvCache(
        *(torch.zeros(shape, dtype=torch.int8) for _ in range(2)),
        *(torch.zeros(shape[:3]) for _ in range(2)),
    )


class Paged:
    """Random sequences in shuffled pages; slots without a token hold NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        self.page_size, width = 4, -(-max(lengths) // 4)
        pages = torch.randperm(width * len(lengths) + 3)
        self.table = pages[: width * len(lengths)].view(len(lengths), width).int()
        self.k = [torch.randn(n, kv_heads, dim).to(dtype) for n in lengths]
        self.v = [torch.randn(n, kv_heads, dim).to(dtype) for n in lengths]
        shape = (len(pages), self.page_size, kv_heads, dim)
        self.cache = KvCache(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))
        for row, n in enumerate(lengths):
            slots = self.slots(row, torch.arange(n))
            ref.write_kv(self.k[row], self.v[row], self.cache, slots)

    def slots(self, row: int, positions: Tensor) -> Tensor:
        page = self.table[row, positions // self.page_size].long()
        return page * self.page_size + positions % self.page_size

    def meta(self, chunks: list[tuple[int, int, int]]) -> AttentionMeta:
        """For chunks of (row, start, count)."""
        counts = torch.tensor([count for _, _, count in chunks])
        slots = [self.slots(row, torch.arange(s, s + n)) for row, s, n in chunks]
        return AttentionMeta(
            page_table=self.table,
            rows=torch.tensor([row for row, _, _ in chunks], dtype=torch.int32),
            query_start=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
            context=torch.tensor([s + n for _, s, n in chunks], dtype=torch.int32),
            slots=torch.cat(slots),
            page_size=self.page_size,
        )


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, position: int, window: int, soft_cap: float, sink: Tensor
) -> Tensor:
    """One query of one head in fp64, written as in the papers."""
    low = max(0, position - window + 1) if window else 0
    scores = (k[low : position + 1].double() @ q.double()) * 0.3
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = torch.softmax(torch.cat((scores, sink.double().view(1))), dim=0)[:-1]
    return weights @ v[low : position + 1].double()


NO_SINK = torch.full((6,), -torch.inf)
CHUNKS = [(0, 29, 1), (1, 0, 40), (2, 3, 1), (3, 10, 3), (1, 40, 1), (2, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "soft_cap", "sinks"),
    [(0, 0.0, False), (7, 0.0, False), (0, 2.0, False), (0, 0.0, True), (5, 3.0, True)],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_paged_attention(
    impl: SimpleNamespace,
    dtype: torch.dtype,
    window: int,
    soft_cap: float,
    sinks: bool,
    kv_heads: int,
) -> None:
    """Decode rows, prefill chunks and short runs of one batch, each as if it were alone."""
    paged = Paged([30, 41, 4, 13], kv_heads, 8, dtype)
    meta = paged.meta(CHUNKS)
    q = torch.randn(int(meta.query_start[-1]), 6, 8).to(dtype)
    sink = torch.randn(6) if sinks else NO_SINK
    ours = impl.paged_attention(
        q,
        paged.cache,
        meta,
        scale=0.3,
        window=window,
        soft_cap=soft_cap,
        sinks=sink if sinks else None,
    )
    assert ours.dtype == dtype
    token = 0
    for row, start, count in CHUNKS:
        for position in range(start, start + count):
            for head in range(6):
                kv = head // (6 // kv_heads)
                k, v = paged.k[row][:, kv], paged.v[row][:, kv]
                exact = naive_attention(
                    q[token, head], k, v, position, window, soft_cap, sink[head]
                )
                close(ours[token, head], exact, dtype)
            token += 1


def test_paged_attention_never_reads_pages_before_the_window(impl: SimpleNamespace) -> None:
    """Freed pages of a windowed layer may be anything, even out of range in the table."""
    paged = Paged([30], 2, 8, torch.float32)
    q = torch.randn(1, 4, 8)
    options = {"scale": 1.0, "window": 6, "soft_cap": 0.0, "sinks": None}
    whole = impl.paged_attention(q, paged.cache, paged.meta([(0, 29, 1)]), **options)
    meta = paged.meta([(0, 29, 1)])
    paged.table[0, :6] = 1_000_000
    cut = impl.paged_attention(q, paged.cache, meta, **options)
    assert torch.equal(whole, cut)


def test_paged_attention_splits_large_batches(
    impl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same result when decode rows do not fit one gather and queries not one block."""
    from headrace.ops import ref_attention

    paged = Paged([30, 41, 4, 13], 2, 8, torch.float32)
    chunks = [(0, 29, 1), (1, 0, 40), (2, 3, 1), (3, 12, 1)]
    q = torch.randn(43, 4, 8)
    options = {"scale": 1.0, "window": 0, "soft_cap": 0.0, "sinks": None}
    whole = impl.paged_attention(q, paged.cache, paged.meta(chunks), **options)
    monkeypatch.setattr(ref_attention, "_BATCH_KEYS", 32)
    monkeypatch.setattr(ref_attention, "_BLOCK_SCORES", 1)
    split = impl.paged_attention(q, paged.cache, paged.meta(chunks), **options)
    torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-5)
