"""The KV cache: paged tensors of every layer, allocated from what the model declares.

Memory is reserved but not touched: pages cost nothing until they are used, and read as zeros.
Knows nothing of who owns a page.
"""

import mmap
from collections.abc import Sequence

import torch

from headrace.core.errors import Unsupported
from headrace.core.plan import StateSpec

_ALIGNMENT = 4096


class KvPool:
    """`caches`: per layer keys and values, each [pages, page_size, kv_heads, head_dim].

    Raises:
        Unsupported: the model keeps a kind of state that has no pool yet.
    """

    def __init__(
        self, specs: Sequence[StateSpec], pages: int, page_size: int, dtype: torch.dtype
    ) -> None:
        for spec in specs:
            if spec.kind != "kv":
                raise Unsupported(f"layers that keep {spec.kind!r} state are not supported yet")
        shapes = [(pages, page_size, spec.kv_heads, spec.head_dim) for spec in specs]
        tensors = _untouched_zeros([shape for shape in shapes for _ in "kv"], dtype)
        self.caches = list(zip(tensors[0::2], tensors[1::2], strict=True))

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
            for tensor in cache:
                tensor[targets] = tensor[sources]


def _untouched_zeros(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Zero tensors on one private mapping; the system adds memory page by page when written."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
    steps = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    mapping = mmap.mmap(-1, max(sum(steps), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    tensors, offset = [], 0
    for shape, size, step in zip(shapes, sizes, steps, strict=True):
        tensors.append(buffer[offset : offset + size].view(dtype).view(shape))
        offset += step
    return tensors
