"""How a server option is declared and checked: a dataclass field with an `Option` beside it.

Knows no option and no component.
"""

import dataclasses
from typing import Any, TypeVar

import msgspec

from headrace.core.errors import BadRequest
from headrace.core.secret import Secret

T = TypeVar("T")


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """How an option appears on the command line and which values it takes."""

    help: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


def option(default: T, help: str, **details: Any) -> T:
    """A dataclass field with an `Option` in its metadata."""
    return dataclasses.field(default=default, metadata={"option": Option(help=help, **details)})


def kept(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """What an option keeps of `value`: the text of a secret is hidden at once."""
    return Secret(value) if value_type(field) is Secret and isinstance(value, str) else value


def check_value(field: "dataclasses.Field[Any]", value: Any) -> None:
    """Raise BadRequest when `value` is not allowed for the option `field`."""
    details: Option = field.metadata["option"]
    flag = "--" + field.name.replace("_", "-")
    kind = value_type(field)
    if value is None and field.default is None:
        return
    number_for_float = kind is float and isinstance(value, int)
    if (not isinstance(value, kind) and not number_for_float) or (
        kind is int and isinstance(value, bool)
    ):
        raise BadRequest(f"{flag} must be {kind.__name__}, not {value!r}", field=field.name)
    if details.choices and value not in details.choices:
        raise BadRequest(
            f"{flag} must be one of {', '.join(details.choices)}, not {value!r}", field=field.name
        )
    if details.minimum is not None and value < details.minimum:
        raise BadRequest(
            f"{flag} must be at least {details.minimum}, not {value}", field=field.name
        )
    if details.maximum is not None and value > details.maximum:
        raise BadRequest(f"{flag} must be at most {details.maximum}, not {value}", field=field.name)


def value_type(field: "dataclasses.Field[Any]") -> type:
    """The plain type of an option, `int` for `int | None`."""
    annotation: Any = field.type
    arguments = getattr(annotation, "__args__", ())
    kinds = [item for item in arguments if item is not type(None)]
    kind: type = kinds[0] if kinds else annotation
    return kind
