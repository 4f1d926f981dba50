"""The KV cache: paged tensors of every layer, allocated from what the model declares.

Stored as `--kv-cache-dtype` says; scales of int8 lie in tensors of their own, beside the pages.

Memory is reserved but not touched: pages cost nothing until they are used, and read as zeros. A
large pool lies on huge pages where the system grants them: reading 4 kB pages is bound by finding
them. Knows nothing of who owns a page.
"""

import mmap
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch

from headrace.core.errors import Unsupported
from headrace.core.plan import StateSpec
from headrace.ops.meta import KV_DTYPES, KvCache, latent_cache

_ALIGNMENT = 4096
_WORTH_HUGE_PAGES = 8 << 20  # bytes of a tensor; the first page used of each costs 2 MB
_STORED = {"kv": 2, "latent": 1}  # tensors by kind of state
_Wanted = tuple[tuple[int, ...], torch.dtype]


def kv_dtype(name: str, model: torch.dtype) -> torch.dtype:
    """The type that `--kv-cache-dtype` names, for a model of dtype `model`."""
    return KV_DTYPES.get(name, model)


def bytes_per_token(specs: Sequence[StateSpec], dtype: torch.dtype) -> int:
    """What a pool of this dtype keeps of a token in all layers, scales included."""
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return sum(spec.bytes_per_token(dtype.itemsize, scale) for spec in specs)


class KvPool:
    """`caches`: one `KvCache` per layer; `scales`: of keys and values in each, for fp8 alone.

    Raises:
        Unsupported: the model keeps a kind of state that has no pool yet.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        scales: Sequence[tuple[float, float]] = (),
    ) -> None:
        wanted = [_wanted(spec, (pages, page_size, spec.kv_heads), dtype) for spec in specs]
        tensors = iter(_untouched_zeros([tensor for layer in wanted for tensor in layer]))
        self.caches = [
            _cache(spec, list(islice(tensors, len(layer))))
            for spec, layer in zip(specs, wanted, strict=True)
        ]
        if dtype == torch.float8_e4m3fn and scales:
            self.caches = [
                replace(cache, key_scale=keys, value_scale=values)
                for cache, (keys, values) in zip(self.caches, scales, strict=True)
            ]

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination) in order, in all layers."""
        if {source for source, _ in copies} & {target for _, target in copies}:
            for pair in copies:
                self._copy_at_once([pair])
        elif copies:
            self._copy_at_once(copies)

    def _copy_at_once(self, copies: Sequence[tuple[int, int]]) -> None:
        sources, targets = torch.tensor(copies, dtype=torch.int64).T
        for cache in self.caches:
            for tensor in cache.tensors():
                # Indexing does not know 8-bit floats.
                data = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
                data[targets] = data[sources]


def _wanted(spec: StateSpec, heads: tuple[int, ...], dtype: torch.dtype) -> list[_Wanted]:
    """The tensors of a layer: what is stored, then scales."""
    if spec.kind not in _STORED:
        raise Unsupported(f"layers that keep {spec.kind!r} state are not supported yet")
    copies = _STORED[spec.kind]
    scales = copies * (dtype == torch.int8)
    return [((*heads, spec.head_dim), dtype)] * copies + [(heads, torch.float32)] * scales


def _cache(spec: StateSpec, tensors: list[torch.Tensor]) -> KvCache:
    if spec.kind == "latent":
        return latent_cache(tensors[0], spec.value_dim, *tensors[1:])
    return KvCache(*tensors)


def _untouched_zeros(wanted: list[_Wanted]) -> list[torch.Tensor]:
    """Zero tensors on one private mapping; the system adds memory page by page when written."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in wanted]
    steps = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    mapping = mmap.mmap(-1, max(sum(steps), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if max(sizes, default=0) >= _WORTH_HUGE_PAGES:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    tensors, offset = [], 0
    for (shape, dtype), size, step in zip(wanted, sizes, steps, strict=True):
        tensors.append(buffer[offset : offset + size].view(dtype).view(shape))
        offset += step
    return tensors
