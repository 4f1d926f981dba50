"""Loads module by module, in the order of layers, whatever the order and number of files.

Every loader packs (and quantizes) a matrix as soon as it is whole; how many are there in part
meanwhile is up to the order of the files. Here it is never more than those of one module. Names
sorted with their numbers as numbers are that order in every architecture.
"""

import re
from collections.abc import Iterator

from headrace.loader.default import DefaultModelLoader, Source
from headrace.loader.iterators import Weights, file_reads, streamed

_NUMBER = re.compile(r"(\d+)")


class LayeredModelLoader(DefaultModelLoader):
    """Format layered."""

    def weights(self, source: Source) -> Weights:
        reads = sorted(file_reads(source.files), key=lambda read: module_order(read.name))
        return streamed(reads, self.threads)


def module_order(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.9.` before `layers.10.`, and what belongs to one module together."""
    return list(_parts(name))


def _parts(name: str) -> Iterator[tuple[int, str]]:
    for index, part in enumerate(_NUMBER.split(name)):
        yield (int(part), "") if index % 2 else (-1, part)
