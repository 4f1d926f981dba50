"""What a model holds: every tensor and packed weight in it, with the way to it.

A way is the attributes, keys and indices that lead from the model to the value, so it names the
same place in another model built from the same configuration. Attributes that a class names as
`computed` are no weights. Knows no layer by name.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from headrace.ops.packed import PackedWeight

Way = tuple[str | int, ...]

# Objects that hold weights come from these packages.
_OURS = ("headrace.layers", "headrace.models", "headrace.quant")


def held(model: object) -> Iterator[tuple[Way, Tensor | PackedWeight]]:
    """Every tensor and packed weight once, by the first way that leads to it."""
    for way, value in parts(model):
        if isinstance(value, Tensor) or _packed(value):
            yield way, value


def parts(model: object) -> Iterator[tuple[Way, Any]]:
    """Everything that the model consists of, containers too, once."""
    yield from _walk((), model, set())


def held_bytes(model: object) -> int:
    """Bytes of all that is held, each storage once."""
    storages: dict[int, int] = {}
    for _, value in held(model):
        for tensor in (value, *vars(value).values()) if _packed(value) else (value,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def at(model: object, way: Way) -> Any:
    """What `way` leads to.

    Raises:
        LookupError: this model has no such way.
    """
    place: Any = model
    for step in way:
        place = _inside(place)[step]
    return place


def put(model: object, way: Way, value: Tensor | PackedWeight) -> None:
    """Let `way` lead to `value`.

    Raises:
        LookupError: this model has no such way.
    """
    _inside(at(model, way[:-1]))[way[-1]] = value


def _walk(way: Way, value: Any, seen: set[int]) -> Iterator[tuple[Way, Any]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    yield way, value
    if isinstance(value, Tensor) or _packed(value):
        return
    inside, computed = _inside(value), getattr(type(value), "computed", ())
    for step, item in inside.items() if isinstance(inside, dict) else enumerate(inside):
        if step not in computed:
            yield from _walk((*way, step), item, seen)


def _packed(value: Any) -> bool:
    return isinstance(value, PackedWeight)


def _inside(value: Any) -> Any:
    """The dict or sequence of what `value` consists of; empty for what holds no weights."""
    if isinstance(value, dict | list | tuple):
        return value
    return vars(value) if type(value).__module__.startswith(_OURS) else ()
