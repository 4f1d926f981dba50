"""JSON that nobody wrote in good faith: values of a sound document replaced by others."""

import copy
from typing import Any

from hypothesis import strategies as st

VALUES = (
    *(None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 70, 0.5, -2.5, float("nan"), float("inf")),
    *("", "x", "../x", "a\0b", "re:(", [], [1], [-1], [None], [[1]], ["x"], {}, {"a": 1}),
    {"rope_type": "yarn"},
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything inside a document."""
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value[:3]) if isinstance(value, list) else inside
    found = [(*way, step) for step, _ in inside]
    for step, item in list(value.items() if isinstance(value, dict) else ()):
        found += places(item, (*way, step))
    return found


@st.composite
def changed(draw: st.DrawFn, sound: Any) -> Any:
    """`sound` with one or two values replaced, or taken away."""
    made = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(places(made)))
        owner = made
        for step in way:
            owner = owner[step]
        if draw(st.integers(0, 4)):
            owner[last] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        else:
            del owner[last]
    return made
