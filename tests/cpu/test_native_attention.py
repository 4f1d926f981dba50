"""Attention beyond keys and values of one size: latent caches, chunks of a window, slopes.

Each against the formula in fp64 for single queries, at every level, and bit by bit against itself
in other batches.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.ops import cpu, ref
from headrace.ops.meta import AttentionMeta, KvCache, latent_cache
from tests.support.native import native_level, native_levels, operators

PAGE = 16
LENGTHS = (290, 33)
CHUNKS = [(0, 270, 20), (1, 0, 32), (1, 32, 1)]
# heads, kv_heads, dim of a key, of a value
LATENT = (20, 1, 24 + 8, 24)
LARGE = (16, 1, 512 + 64, 512)
PLAIN = (6, 2, 20, 20)


@pytest.fixture(params=["ref", *native_levels()])
def impl(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with native_level(request.param):
        yield operators("ref" if request.param == "ref" else "cpu")


class Sequences:
    """Two sequences in shuffled pages; what was written is read back in fp32 as the truth."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.heads, kv_heads, dim, value_dim = shape
        width = -(-max(LENGTHS) // PAGE)
        self.table = torch.randperm(2 * width).view(2, width).int().contiguous()
        sizes = (2 * width, PAGE, kv_heads)
        self.cache = make_cache(sizes, dim, value_dim, dtype)
        for row, length in enumerate(LENGTHS):
            k, v = torch.randn(length, kv_heads, dim), torch.randn(length, kv_heads, dim)
            slots = self.slots(row, torch.arange(length))
            ref.write_kv(k, None if self.cache.latent else v, self.cache, slots)

    def slots(self, row: int, positions: Tensor) -> Tensor:
        return self.table[row, positions // PAGE].long() * PAGE + positions % PAGE

    def meta(self, chunks: list[tuple[int, int, int]]) -> AttentionMeta:
        counts = torch.tensor([count for _, _, count in chunks])
        return AttentionMeta(
            page_table=self.table,
            rows=torch.tensor([row for row, _, _ in chunks], dtype=torch.int32),
            query_start=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
            context=torch.tensor([start + count for _, start, count in chunks]).int(),
            slots=torch.cat([self.slots(r, torch.arange(s, s + n)) for r, s, n in chunks]),
            page_size=PAGE,
        )

    def stored(self, which: str, row: int, length: int) -> Tensor:
        """fp64 [length, kv_heads, dim] of keys or values, scaled."""
        slots = self.slots(row, torch.arange(length))
        tensor = getattr(self.cache, f"{which}s")
        bits = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        found = bits.flatten(0, 1)[slots].view(tensor.dtype).double()
        scale = getattr(self.cache, f"{which}_scale")
        return found * (scale.flatten(0, 1)[slots][..., None] if torch.is_tensor(scale) else scale)


def make_cache(
    sizes: tuple[int, int, int], dim: int, value_dim: int, dtype: torch.dtype
) -> KvCache:
    def one() -> Tensor:
        return torch.zeros(*sizes, dim, dtype=dtype)

    scales = [torch.zeros(sizes) for _ in range(2)] if dtype == torch.int8 else []
    if value_dim < dim:
        return latent_cache(one(), value_dim, *scales[:1])
    return KvCache(one(), one(), *scales)


def naive(
    sequences: Sequences, q: Tensor, row: int, position: int, options: dict[str, Any]
) -> Tensor:
    """[heads, value dim] of one token, as the formula says."""
    size = options.get("size", position + 1)
    low = position // size * size
    group = sequences.heads // sequences.cache.keys.shape[2]
    keys, values = (
        sequences.stored(which, row, position + 1)[low:].repeat_interleave(group, 1)
        for which in ("key", "value")
    )
    scores = torch.einsum("hd,jhd->hj", q.double(), keys) * options["scale"]
    if options.get("slopes") is not None:
        distance = torch.arange(low, position + 1).double() - position
        scores += options["slopes"].double()[:, None] * distance
    return torch.einsum("hj,jhd->hd", scores.softmax(-1), values)


def check(
    impl: SimpleNamespace, shape: tuple[int, ...], dtype: torch.dtype, **changes: Any
) -> None:
    sequences = Sequences(shape, dtype)
    options = {"scale": 0.2, **changes}

    def attend(q: Tensor, meta: AttentionMeta) -> Tensor:
        if "slopes" in options:
            return impl.sloped_attention(q, sequences.cache, meta, **options)
        if "size" in options:
            return impl.chunked_attention(q, sequences.cache, meta, **options)
        fields = {"window": 0, "soft_cap": 0.0, "sinks": None}
        return impl.paged_attention(q, sequences.cache, meta, **fields, **options)

    meta = sequences.meta(CHUNKS)
    q = torch.randn(int(meta.query_start[-1]), shape[0], shape[2])
    whole = attend(q, meta)
    assert whole.shape == (len(q), shape[0], shape[3])
    for row, position, token in [(0, 270, 0), (0, 289, 19), (1, 0, 20), (1, 20, 40), (1, 32, 52)]:
        exact = naive(sequences, q[token], row, position, options)
        torch.testing.assert_close(whole[token].double(), exact, atol=2e-5, rtol=2e-5)
        if impl.paged_attention is ref.paged_attention:
            continue
        alone = sequences.meta([(row, position, 1)])
        one = attend(q[token : token + 1], alone)
        assert torch.equal(one[0], whole[token]), (row, position)
    if impl.paged_attention is not ref.paged_attention:
        cpu.library.set_threads(3)
        assert torch.equal(attend(q, meta), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_values_that_begin_keys(impl: SimpleNamespace, dtype: torch.dtype) -> None:
    check(impl, LATENT, dtype)


def test_latents_of_large_models(impl: SimpleNamespace) -> None:
    check(impl, LARGE, torch.bfloat16, scale=0.04)


@pytest.mark.parametrize("size", [7, 32, 280])
def test_chunks(impl: SimpleNamespace, size: int) -> None:
    check(impl, PLAIN, torch.float32, size=size)


def test_slopes(impl: SimpleNamespace) -> None:
    slopes = 2.0 ** -torch.arange(1.0, 7.0)
    check(impl, PLAIN, torch.float32, slopes=slopes)
    check(impl, PLAIN, torch.int8, slopes=slopes)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_kv(impl: SimpleNamespace, dtype: torch.dtype, interleaved: bool) -> None:
    """The norm of the latent and the turn of the rest, of parts of a wider buffer."""
    buffer, weight = torch.randn(9, 50).to(dtype), torch.rand(24).to(dtype)
    q, kv = torch.randn(9, 3, 32).to(dtype), buffer[:, 18:]
    angles = torch.rand(9, 4) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    slots = torch.randperm(40)[:9]
    norm, _ = ref.rms_norm(kv[:, :24], weight, 1e-5, None)
    turned, rest = ref.rotary(q[..., 24:], kv[:, None, 24:], cos_sin, interleaved)
    wanted = torch.cat((norm, rest[:, 0]), dim=1)
    before, left = q[..., :24].clone(), buffer[:, :18].clone()
    cache = latent_cache(torch.zeros(10, 4, 1, 32, dtype=dtype), 24)
    ours = impl.latent_kv(q, kv, weight, 1e-5, cos_sin, cache, slots, interleaved)
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(ours[..., 24:], turned, atol=tolerance, rtol=tolerance)
    assert torch.equal(ours[..., :24], before) and torch.equal(buffer[:, :18], left)
    stored = cache.keys.flatten(0, 1)[slots, 0]
    torch.testing.assert_close(stored, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("size", "made"), [(12, 24), (32, 64), (90, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_linear(impl: SimpleNamespace, dtype: torch.dtype, size: int, made: int) -> None:
    weights = torch.randn(5, made, size).to(dtype) / size**0.5
    packed = impl.pack_heads(weights)
    x = torch.randn(300, 5 * (size + 7) + 3).to(dtype)[:, : 5 * (size + 7)].unflatten(1, (5, -1))
    y = impl.heads_linear(x, packed)
    exact = torch.einsum("thi,hoi->tho", x[..., :size].double(), weights.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y[..., :made].double(), exact, atol=tolerance, rtol=tolerance)
    assert torch.equal(y[..., made:], x[..., size:])
    if impl.heads_linear is not ref.heads_linear:
        assert torch.equal(impl.heads_linear(x[257:258], packed)[0], y[257])
        cpu.library.set_threads(3)
        assert torch.equal(impl.heads_linear(x, packed), y)
        with pytest.raises(ValueError, match="weights 5 of"):
            impl.heads_linear(x[:, :4], packed)
