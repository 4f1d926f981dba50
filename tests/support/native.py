"""Lets tests run the native operators at every instruction-set level of the machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from headrace.ops import cpu, ref
from headrace.ops.cpu import library


def native_levels() -> tuple[str, ...]:
    """Levels that can run here; none if the library is not built."""
    return () if library.LIBRARY is None else library.levels()


@contextmanager
def native_level(name: str, threads: int = 1) -> Iterator[None]:
    """Use a level (anything that is not one changes nothing) and a number of threads."""
    if name not in native_levels():
        yield
        return
    before = library.level(), library.native().hr_threads()
    library.set_level(name)
    library.set_threads(threads)
    try:
        yield
    finally:
        library.set_level(before[0])
        library.set_threads(before[1])


def operators(implementation: str) -> SimpleNamespace:
    """Every operator, from the native library where it has it and if "cpu" is asked for."""
    first = cpu if implementation == "cpu" else ref
    return SimpleNamespace(
        **{name: getattr(first, name, getattr(ref, name)) for name in ref.__all__}
    )
