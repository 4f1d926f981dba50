"""From the names of a checkpoint to those of the decoder, and from stacked tensors to single ones.

A family that stores the same matrices under other names, stacked or turned, says so in a `Layout`;
the decoder knows one set of names only. Cuts are views where they can be: nothing is read here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headrace.core.errors import LoadError


@dataclass(frozen=True)
class Split:
    """A tensor whose (renamed) name matches `pattern` becomes one tensor for each of `names`.

    `names` are templates of `re.Match.expand`; `cut` gives as many tensors.
    """

    pattern: str
    names: tuple[str, ...]
    cut: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Layout:
    """`renames`: (pattern, replacement), all in this order; then the first split that fits.

    `ignored`: patterns of tensors that checkpoints carry and the model does not need.
    """

    renames: tuple[tuple[str, str], ...] = ()
    splits: tuple[Split, ...] = ()
    ignored: tuple[str, ...] = ()

    def canonical(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights as the decoder names them.

        Raises:
            LoadError: a stacked tensor does not have the shape that its parts need.
        """
        for name, tensor in weights:
            found = self.rename(name)
            if any(re.search(pattern, found) for pattern in self.ignored):
                continue
            yield from self._split(name, found, tensor)

    def rename(self, name: str) -> str:
        for pattern, replacement in self._patterns:
            name = pattern.sub(replacement, name)
        return name

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(pattern), replacement) for pattern, replacement in self.renames]

    def _split(self, name: str, found: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for split in self.splits:
            match = re.fullmatch(split.pattern, found)
            if match is None:
                continue
            try:
                parts = split.cut(tensor)
                if len(parts) != len(split.names):
                    raise ValueError(f"it has {len(parts)} parts")
            except (RuntimeError, ValueError) as error:
                raise LoadError(
                    f"tensor {name} with shape {tuple(tensor.shape)} cannot be cut into "
                    f"{', '.join(split.names)}: {error}"
                ) from error
            for template, part in zip(split.names, parts, strict=True):
                yield match.expand(template), part
            return
        yield found, tensor


def turned(pattern: str) -> Split:
    """Matrices stored [in, out]."""
    return Split(f"({pattern})", (r"\1",), lambda tensor: [tensor.T])


def grouped_qkv(pattern: str, heads: int, kv_heads: int, dim: int) -> Split:
    """Rows ordered by KV head: its query heads, its key, its value."""
    group = heads // kv_heads

    def cut(tensor: Tensor) -> Sequence[Tensor]:
        rows = tensor.reshape(kv_heads, group + 2, dim, *tensor.shape[1:])
        q, k, v = torch.split(rows, [group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in (q, k, v)]

    names = tuple(rf"\1{name}_proj.\2" for name in "qkv")
    return Split(rf"(.*\.){pattern}\.(weight|bias)", names, cut)
