"""How large a string an expression of a chat template may make, checked before it is made.

For what the standard library lets grow without a loop: paddings, replacements, joins, formats.
Knows no templates; raises jinja2's SecurityError.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2.exceptions import SecurityError

MAX_CHARS = 1 << 24

_WIDE = re.compile(r"\d{7,}")


def check_size(size: int) -> None:
    """Refuse a value of more characters or items than a prompt may have."""
    if size > MAX_CHARS:
        raise SecurityError(f"a value of {size} characters or items")


def check_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call: if it is a method of a string that may grow, how much."""
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str) or name not in _METHODS:
        return
    _METHODS[name](text, *args, **kwargs)


def check_percent(text: Any, values: Any) -> None:
    """Before `text % values`."""
    if isinstance(text, str):
        check_format(text, *(values if isinstance(values, tuple) else (values,)))


def check_format(text: str, *values: Any, **named: Any) -> None:
    """Widths may stand in the text or, by `*` or nested braces, in the values."""
    given = [*values, *named.values()]
    if _WIDE.search(text) or any(isinstance(v, int) and abs(v) > MAX_CHARS for v in given):
        raise SecurityError("a format with a huge number")
    check_size(sum(len(v) for v in given if isinstance(v, str)) * (text.count("{") + 1))


def _check_width(text: str, width: Any = 0, *rest: Any) -> None:
    check_size(width if isinstance(width, int) else 0)


def _check_tabs(text: str, tabsize: Any = 8) -> None:
    check_size(text.count("\t") * (tabsize if isinstance(tabsize, int) else 0))


def _check_replace(text: Any, old: Any, new: Any, count: Any = -1) -> None:
    text, old, new = str(text), str(old), str(new)
    check_size(len(text) + text.count(old) * (len(new) - len(old)))


def _check_join(separator: Any, items: Iterable[Any] = (), *rest: Any) -> None:
    if isinstance(items, list | tuple):
        check_size(sum(len(str(x)) for x in items) + len(items) * len(str(separator)))


def _check_indent(text: Any, width: Any = 4, *rest: Any, **named: Any) -> None:
    each = len(width) if isinstance(width, str) else int(width)
    check_size(len(str(text)) + (str(text).count("\n") + 1) * each)


_METHODS: dict[str, Callable[..., None]] = {
    "center": _check_width,
    "expandtabs": _check_tabs,
    "join": _check_join,
    "ljust": _check_width,
    "replace": _check_replace,
    "rjust": _check_width,
    "zfill": _check_width,
}


def bounded(filters: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Those filters of an environment that may grow, with a check before."""
    return {
        "center": _checked(filters["center"], _check_width),
        "format": _checked(filters["format"], check_format),
        "indent": _checked(filters["indent"], _check_indent),
        "join": _checked_join(filters["join"]),
        "replace": _checked(filters["replace"], _check_replace, skip=1),
    }


def _checked_join(join: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(join)
    def checked(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        items = value if isinstance(value, str) else list(value)
        if attribute is None:
            _check_join(d, list(items))
        else:  # what the items have is not known here
            check_size(len(items) << 8)
        return join(context, items, d, attribute)

    return checked


def _checked(
    filter: Callable[..., Any], check: Callable[..., None], skip: int = 0
) -> Callable[..., Any]:
    """`skip`: how many arguments the environment puts before those of the template."""

    @functools.wraps(filter)  # and with it the marks that jinja2 puts on filters
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args[skip:], **kwargs)
        return filter(*args, **kwargs)

    return checked
