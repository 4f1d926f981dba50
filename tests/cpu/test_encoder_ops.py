"""What encoders need of operators: attention both ways and activations without a gate."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops import ref
from headrace.ops.meta import AttentionMeta, KvCache
from tests.support.native import native_level, native_levels, operators

LENGTHS = (1, 5, 17, 64, 513, 700)
PAGE = 16


@pytest.fixture(params=["ref", *native_levels()])
def impl(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with native_level(request.param):
        yield operators("ref" if request.param == "ref" else "cpu")


def attend(impl: SimpleNamespace, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Attention of whole sequences (q, k, v) in one call, on pages in reverse order."""
    lengths = [len(q) for q, _, _ in parts]
    widths = [-(-length // PAGE) for length in lengths]
    kv_heads, dim = parts[0][1].shape[1:]
    cache = KvCache(*(torch.full((sum(widths), PAGE, kv_heads, dim), torch.nan) for _ in "kv"))
    table = torch.zeros(len(parts), max(widths), dtype=torch.int32)
    slots, page = [], sum(widths)
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        page -= width
        table[row, :width] = torch.arange(page + width - 1, page - 1, -1)
        at = torch.arange(length)
        slots.append(table[row, at // PAGE].long() * PAGE + at % PAGE)
    meta = AttentionMeta(
        page_table=table,
        rows=torch.arange(len(parts), dtype=torch.int32),
        query_start=torch.tensor([0, *lengths]).cumsum(0).int(),
        context=torch.tensor(lengths, dtype=torch.int32),
        slots=torch.cat(slots),
        page_size=PAGE,
    )
    q, k, v = (torch.cat(column) for column in zip(*parts, strict=True))
    ref.write_kv(k, v, cache, meta.slots)
    options = {"scale": q.shape[-1] ** -0.5, "window": 0, "soft_cap": 0.0, "sinks": None}
    return list(impl.paged_attention(q, cache, meta, causal=False, **options).split(lengths))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 12, 32), (6, 2, 64), (4, 1, 20)])
def test_attention_both_ways(impl: SimpleNamespace, heads: int, kv_heads: int, dim: int) -> None:
    parts = [
        [torch.randn(length, count, dim) for count in (heads, kv_heads, kv_heads)]
        for length in LENGTHS
    ]
    together = attend(impl, parts)
    for part, got in zip(parts, together, strict=True):
        q, k, v = (x.transpose(0, 1)[None].double() for x in part)
        want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
        assert torch.equal(attend(impl, [part])[0], got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [44, 512])
def test_activations_without_a_gate(
    impl: SimpleNamespace, dtype: torch.dtype, columns: int
) -> None:
    x = (3 * torch.randn(33, columns)).to(dtype)
    wanted = {
        "silu": F.silu(x.double()),
        "gelu_erf": F.gelu(x.double()),
        "gelu_tanh": F.gelu(x.double(), approximate="tanh"),
    }
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
    for name, want in wanted.items():
        got = impl.activate(x, name)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
